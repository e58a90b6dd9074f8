"""The comparison of ways of seeing: each is built at its scale and looks at an image; runs go on where they ended."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

import unimm
from unimm.models.layout import PictureLayout
from unimm.pipeline import UniMM
from unimm.training.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    import systems as program  # type: ignore[import-not-found]

    yield program
    for name in set(sys.modules) - before:
        if name == "systems" or name.startswith("like_for_like"):
            del sys.modules[name]


def test_all_thirteen_begin_with_the_decoder_and_encoder_of_the_base(
    systems: ModuleType, tmp_path: Path
) -> None:
    task, base = systems.TASKS["scenes"], None
    folder = tmp_path / task.name
    for name in [systems.BASE, *systems.SYSTEMS]:
        start = systems.start_model(task, name, folder / name, base)
        um = unimm.load(start, "cpu", "float32")
        state = um.model.state_dict()
        if base is None:
            base, first = start, state
        else:
            layers = [key for key in state if key.startswith("decoder.model.layers.")]
            assert len(layers) > 20
            shared = [key for key in state if key.startswith("vision.") and key in first]
            assert bool(shared) == (name not in ("Fuyu", "Emu3"))
            for key in (*layers, *shared):
                assert (state[key] == first[key]).all(), (name, key)
        assert um.ask([Image.new("RGB", (64, 48), "red")], ["what is it?"], max_new_tokens=2)
        picture = um.model.layout.picture or PictureLayout()
        assert (um.model.fusion is not None) == (picture.mark != "none" or picture.apart)
    assert len(systems.SYSTEMS) == 13


def test_a_base_of_the_tables_recipe_gives_its_words_and_its_encoder(
    systems: ModuleType, tmp_path: Path
) -> None:
    built: Any = load_recipe(FOLDER.parent / "training" / "tables.yaml").build_task()
    UniMM(built.build(), built.processor).save(tmp_path / "base")
    begun = systems.start_model(systems.TASKS["tables"], "NVLM-D", tmp_path / "one", tmp_path / "base")
    base, um = unimm.load(tmp_path / "base"), unimm.load(begun)
    first, state = base.model.state_dict(), um.model.state_dict()
    encoder = [key for key in first if key.startswith("vision.")]
    assert len(encoder) > 20 and all((state[key] == first[key]).all() for key in encoder)
    numbers, own = base.processor.tokenizer.get_vocab(), um.processor.tokenizer.get_vocab()
    assert set(numbers) < set(own)
    name = "decoder.model.embed_tokens.weight"
    for word, number in numbers.items():
        assert (state[name][own[word]] == first[name][number]).all(), word


def test_what_is_done_is_not_done_again(
    systems: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that still holds a run's lock is waited for; its result is then there."""
    row = {"task": "scenes", "system": "Fuyu"}
    folder = tmp_path / "scenes" / "fuyu"
    folder.mkdir(parents=True)
    holder = "import fcntl, pathlib, sys, time; lock = open(sys.argv[1] + '/lock', 'w');" \
        " fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1);" \
        " pathlib.Path(sys.argv[1], 'result.json').write_text(sys.argv[2])"  # fmt: skip
    command = [sys.executable, "-c", holder, str(folder), json.dumps(row)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        systems.run_one(systems.TASKS["scenes"], "Fuyu", tmp_path, 1.0)
    assert systems.read_rows(tmp_path) == [row]

    started: list[Any] = []
    monkeypatch.setattr(systems.subprocess, "Popen", lambda *args, **options: started.append(args))
    systems.run_all(argparse.Namespace(out=tmp_path, together=2, base={}), [("scenes", "Fuyu", 1.0)])
    assert not started


def test_the_report_has_a_table_and_charts(systems: ModuleType, tmp_path: Path) -> None:
    score = {"rate": 0.5, "right": 1, "count": 2, "low": 0.2, "high": 0.8}
    measured = {
        "tokens": 3,
        "memory_rows": 0,
        "samples_per_second": 9.5,
        "answers_per_second": 2,
        "memory_gib": 1,
    }
    rows = [
        {"task": "scenes", "system": name, "figures": {"answers": score}, **measured}
        for name in ("Molmo", "Fuyu", systems.BASE)
    ]
    page = tmp_path / "docs" / "results" / "systems.md"
    page.parent.mkdir(parents=True)
    page.write_text("before\n<!-- scenes -->\nold\n<!-- end of scenes -->\nafter\n")
    systems.write_report(rows, page)
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert [line.split(" | ")[0] for line in lines[4:6]] == ["| Fuyu", "| Molmo"]
    assert "50.0 (20 to 80)" in lines[4]
    assert Image.open(tmp_path / "docs" / "images" / "systems-scenes.png").size[0] > 900
