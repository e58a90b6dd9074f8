"""A checkpoint is opened once: what one load reads of it, and how often."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from unimm.families import family, source
from unimm.families.convert import convert
from unimm.families.source import Checkpoint
from unimm.loading import describe, load_processor

LAYOUTS = [
    f"{name}/{layout}" for name in ("janus", "emu3") for layout in ("transformers", "original", "unimm")
]
TOKENIZER = "Emu3-VisionTokenizer"
watched: list[str] | None = None
"""The files that Python opens, in turn, while a test looks; whoever opens them."""


def _opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and watched is not None and isinstance(arguments[0], str | Path):
        watched.append(str(arguments[0]))


sys.addaudithook(_opened)  # which cannot be taken away again


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random checkpoints of both families in all layouts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, module in (("janus", janus_checkpoints), ("emu3", emu3_checkpoints)):
        model = getattr(module, name)(folder / name / "transformers")
        module.original(folder / name / "original", model)
        convert(folder / name / "transformers", folder / name / "unimm", "unimm")
    return folder


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first argument of every call of a function, which still does what it does."""
    calls: list[Any] = []
    real = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    return calls


def opened(call: Callable[[], object], folder: Path) -> Counter[str]:
    """How often a call opens each file below a folder."""
    global watched
    watched = []
    try:
        call()
        return Counter(name.removeprefix(f"{folder}/") for name in watched if name.startswith(f"{folder}/"))
    finally:
        watched = None


READERS: dict[str, Callable[[Path], object]] = {
    "load": lambda folder: unimm.load(folder, "cpu"),
    "load_processor": load_processor,
    "describe": describe,
    "convert": lambda folder: convert(folder, folder.with_name("converted"), "unimm"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", READERS)
def test_each_small_file_is_read_once(folders: Path, layout: str, reader: str) -> None:
    """Whoever reads it, transformers too.

    transformers opens some again: its loading of our own layout looks for `generation_config.json`, and its tokenizers
    read their own files twice. A conversion copies what it has read.
    """
    folder = folders / layout
    files = opened(lambda: READERS[reader](folder), folder)
    once = {"config.json", "processor_config.json"}
    if layout == "emu3/original":
        once = {"config.json", f"{TOKENIZER}/config.json", f"{TOKENIZER}/preprocessor_config.json"}
    if not layout.endswith("unimm"):
        once |= {"generation_config.json", "preprocessor_config.json"} & {f.name for f in folder.iterdir()}
    copied = 1 if reader == "convert" and not layout.endswith("unimm") else 0
    assert {name: files[name] - copied for name in once} == dict.fromkeys(once, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reader", READERS)
def test_the_family_is_asked_for_once(
    folders: Path, layout: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counted(monkeypatch, source, "recognise")
    imported = counted(monkeypatch, family.Registered, "family")
    READERS[reader](folders / layout)
    assert len(asked) == len(imported) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_tokenizer_is_built_once(
    folders: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = counted(monkeypatch, PreTrainedTokenizerBase, "__init__")
    um = unimm.load(folders / layout, "cpu")
    assert built == [um.processor.tokenizer]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_files_are_looked_for_once(
    folders: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each folder; transformers, which reads those of our own layout, looks again."""
    found = counted(monkeypatch, source, "weight_files")
    unimm.load(folders / layout, "cpu")
    inner = [folders / layout / TOKENIZER] if layout == "emu3/original" else []
    assert found == [folders / layout, *inner]


def test_a_checkpoint_is_read_as_far_as_it_is_asked(folders: Path) -> None:
    """Its kind needs no more than `config.json`."""
    files = opened(lambda: Checkpoint(folders / "janus/original").family, folders / "janus/original")
    assert files == {"config.json": 1}
