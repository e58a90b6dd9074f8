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

REGISTERED = {  # transformers' module -> ours, which registers with it
    "transformers.models.auto.configuration_auto": "unimm.models.configuration",
    "transformers.models.auto.modeling_auto": "unimm.models.modeling",
}
_WAITING: list[str] = []  # modules of ours to import


def register() -> None:
    """Register our classes where transformers' auto modules are imported already, and else once they are."""
    for theirs, ours in REGISTERED.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers' auto modules as the others would, and loads ours after them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an auto module with our loader around its own; None for any other module."""
        if name not in REGISTERED:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, REGISTERED[name])
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module with its own loader, then one of ours."""

    def __init__(self, loader: importlib.abc.Loader, ours: str) -> None:
        self.loader, self.ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Return what the module's own loader makes."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module, then import ours; one that is needed by what is being imported waits until that is done."""
        self.loader.exec_module(module)
        _WAITING.append(self.ours)
        while _WAITING and not any(
            _importing(name) for name in list(sys.modules) if name.startswith("unimm.")
        ):
            importlib.import_module(_WAITING.pop())


def _importing(name: str) -> bool:
    """Whether a module is not imported to its end yet."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))
