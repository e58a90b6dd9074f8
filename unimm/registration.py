"""Lets transformers' auto classes find our models after a plain `import unimm`, which imports neither of them.

`AutoConfig.register` and `AutoModel.register` stand in the modules that define our classes. These modules are imported
when transformers' own auto modules are, by a hook of the import system.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

REGISTERED = {  # transformers' module -> ours, which registers with it
    "transformers.models.auto.configuration_auto": "unimm.models.configuration",
    "transformers.models.auto.modeling_auto": "unimm.models.modeling",
}
BUSY = ("transformers", "diffusers", "peft", "timm", "accelerate", "unimm")
"""Packages of which ours needs whole modules: while one of theirs is being imported, ours waits."""
_WAITING: list[str] = []  # modules of ours to import


def register() -> None:
    """Register our classes where transformers' auto modules are imported already, and else once they are."""
    for theirs, ours in REGISTERED.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules of those packages as the others would, and lets us know when each has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module with our loader around its own; None for one of another package."""
        if name.partition(".")[0] not in BUSY[:-1]:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then those of ours that have waited for it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader makes."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module, then import ours, unless a module that it may need is not whole yet."""
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        if module.__name__ in REGISTERED:
            _WAITING.append(REGISTERED[module.__name__])
        while _WAITING and not _busy(module.__name__):
            importlib.import_module(_WAITING.pop(0))


def _busy(done: str) -> bool:
    """Whether a module of those packages, other than the one that is just done, is not imported to its end yet."""
    names = [name for name in sys.modules if name.partition(".")[0] in BUSY and name != done]
    return any(_importing(name) for name in names)


def _importing(name: str) -> bool:
    """Whether a module is not imported to its end yet."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))
