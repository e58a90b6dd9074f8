"""unimm: unified multimodal models, one decoder that reads and writes text and images.

`unimm.load()` gives the model that ships in the package; `unimm.UniMM` is the object behind it, and `unimm.Video` a
video that it is asked about. All are looked up on first use, so that `import unimm` stays quick and imports no torch.
`AutoConfig` and `AutoModel` of transformers know our models from then on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unimm.registration import register

if TYPE_CHECKING:
    from unimm.loading import load
    from unimm.pipeline import UniMM
    from unimm.videos import Video

__version__ = "0.1.0"
__all__ = ["UniMM", "Video", "__version__", "load"]

_LAZY = {
    "UniMM": "unimm.pipeline",
    "Video": "unimm.videos",
    "load": "unimm.loading",
}  # public name -> module that defines it


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    """Show the lazy names to completion and to `dir`."""
    return sorted({*globals(), *__all__})


register()
