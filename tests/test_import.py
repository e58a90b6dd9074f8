"""`import unimm` is light, and its public names are found on first use."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import unimm

HEAVY = ("torch", "transformers", "PIL", "numpy", "pydantic", "rich")


@pytest.mark.parametrize("statement", ["import unimm", "import unimm.cli.main", "import unimm.errors"])
def test_nothing_heavy_is_imported(statement: str) -> None:
    code = f"import sys; {statement}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = unimm.lode


def test_public_names_are_listed_and_found() -> None:
    assert {"UniMM", "load", "__version__"} <= set(dir(unimm))
    assert callable(unimm.load)
    assert unimm.UniMM.__module__ == "unimm.pipeline"


def test_version_is_that_of_the_distribution() -> None:
    try:
        installed = version("unimm")
    except PackageNotFoundError:
        pytest.skip("unimm runs from a checkout that is not installed")
    assert unimm.__version__ == installed


@pytest.mark.parametrize(
    "first",
    [
        "import transformers; import unimm",
        # whose module is not whole while others are imported for it
        "import unimm; from transformers import AutoModelForCausalLM",
        "import unimm; from transformers.image_processing_utils import select_best_resolution",
        "import unimm; import diffusers.loaders.peft",
    ],
)
def test_the_auto_classes_know_our_models_whatever_is_imported_first(first: str, tiny: Path) -> None:
    code = (
        f"{first}; from transformers import AutoConfig, AutoModel; "
        f"print(*(type(auto.from_pretrained({str(tiny)!r})).__name__ for auto in (AutoConfig, AutoModel)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["UniMMConfig", "UniMMModel"]
