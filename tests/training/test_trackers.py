"""Trackers get every number of the log, and a resumed run is the same run there."""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_trainer import lines, recipe
from unimm.errors import UserError
from unimm.training.trainer import train


def tracked(folder: Path, steps: int, *trackers: str) -> Any:
    stage = {"steps": steps, "batch": 8, "lr": {"head": 0.01}}
    logging = {"every": 2, "tensorboard": False, "trackers": list(trackers), "project": "toys"}
    return recipe(folder, stage, logging=logging)


def logged_to_wandb(run: Path) -> dict[int, dict[str, float]]:
    """The numbers of an offline run's file, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    data, place = run.read_bytes(), 7  # a log of LevelDB's form, of one block, after a mark
    while place < len(data):
        size, kind = struct.unpack_from("<HB", data, place + 4)
        assert kind == 1, "the log has outgrown a block"
        record = Record()
        record.ParseFromString(data[place + 7 : place + 7 + size])
        place += 7 + size
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            found[int(items["_step"])] = items
    return found


def test_wandb_gets_the_log_and_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tracked(tmp_path, 4, "wandb"), quiet=True)
    train(tracked(tmp_path, 8, "wandb"), quiet=True)
    wandb.teardown()  # its own process may still be writing
    name = (tmp_path / "out/tracker-id").read_text().strip()
    runs = sorted((tmp_path / "out/wandb").glob("offline-run-*/*.wandb"))
    assert [run.name for run in runs] == [f"run-{name}.wandb"] * 2
    logged = {step: numbers for run in runs for step, numbers in logged_to_wandb(run).items()}
    assert [*logged] == [2, 4, 6, 8]
    for line in lines(tmp_path):
        numbers = logged[line["step"]]
        assert numbers["loss"] == line["loss"] and numbers["lr/head"] == line["lr/head"]


def test_trackio_gets_the_log_and_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(tracked(tmp_path, 4, "trackio"), quiet=True)
    train(tracked(tmp_path, 8, "trackio"), quiet=True)
    (file,) = (tmp_path / "trackio").glob("toys*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    name = (tmp_path / "out/tracker-id").read_text().strip()
    assert [(run, step) for run, step, _ in rows] == [(f"out-{name}", step) for step in (2, 4, 6, 8)]
    for line, (_, _, metrics) in zip(lines(tmp_path), rows, strict=True):
        assert json.loads(metrics)["loss"] == line["loss"]


def test_what_is_missing_is_named_before_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(
        UserError, match=r"logging\.trackers: needs wandb; install it with: pip install 'unimm\["
    ):
        train(tracked(tmp_path, 2, "wandb"), quiet=True)
    assert not lines(tmp_path)


def test_a_service_that_does_not_take_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # else it stays as offline as the test before left it
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # where no key is kept
    with pytest.raises(UserError, match=r"logging\.trackers: wandb does not take the run \(.+\)"):
        train(tracked(tmp_path, 2, "wandb"), quiet=True)
