"""The seam behind which families are: imported when needed, described alike, and of use without a writer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.families.janus_checkpoints import janus, original
from tests.system_calls import contents
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.family import FAMILIES, LAYOUTS, REGISTRY, Registered
from unimm.families.image_tokenizers import PUBLISHED
from unimm.families.janus import Janus


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random Janus in both layouts."""
    folder = tmp_path_factory.mktemp("janus")
    original(folder / "original", janus(folder / "transformers"))
    return folder


def test_a_family_is_imported_when_it_is_needed(checkpoints: Path) -> None:
    lines = f"""
        import sys
        from unimm.families.family import FAMILIES
        heavy = ("torch", "transformers", "unimm.families.janus", "unimm.families.qwen2_vl")
        assert set(FAMILIES) >= {{"unimm", "janus", "multi_modality", "emu3", "Emu3", "qwen2_vl"}}
        assert not set(heavy) & set(sys.modules), set(heavy) & set(sys.modules)
        from pathlib import Path
        from unimm.families.source import Checkpoint
        assert Checkpoint(Path({str(checkpoints / "transformers")!r})).family.name == "janus"
        assert "unimm.families.janus" in sys.modules and "unimm.families.qwen2_vl" not in sys.modules
    """
    code = "\n".join(line.strip() for line in lines.splitlines())
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("registered", REGISTRY, ids=lambda registered: registered.module)
def test_a_line_of_the_registry_says_what_the_family_does(registered: Registered) -> None:
    family = registered.family()
    assert set(registered.layouts.values()) <= set(LAYOUTS)
    assert set(family.image_tokenizers) <= set(registered.layouts.values())
    apart = {separate.model_type for separate in family.image_tokenizers.values()}
    assert apart == {registered.image_tokenizer} - {None} and apart <= set(PUBLISHED)


def test_no_two_families_share_a_model_type() -> None:
    assert len(FAMILIES) == sum(len(registered.layouts) for registered in REGISTRY)


def test_a_family_without_a_writer_goes_back_only(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Janus, "writer", None)
    convert(checkpoints / "original", tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "original")
    small = {
        name
        for name in contents(checkpoints / "original")
        if not name.endswith(("safetensors", "index.json"))
    }
    assert small <= set(contents(tmp_path / "back"))
    for source in (checkpoints / "original", tmp_path / "ours"):
        with pytest.raises(UserError) as caught:
            convert(source, tmp_path / "new", "transformers")
        line = "--to: Janus is read but not written by unimm; the layout unimm holds this model"
        assert str(caught.value) == line and not (tmp_path / "new").exists()
