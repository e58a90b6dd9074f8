"""Runs of protocols on twins, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.twins import DRAWN_TWINS, TWINS
from unimm.evaluation.benchmark import Benchmark, RunOptions
from unimm.evaluation.protocol import find_protocol, load_protocol

OWN = ("data.sha256={}",)
Score = Callable[..., dict[str, Any]]


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """Score a model on a protocol's twin; the data is made once a test."""

    def run(name: str, *overrides: str, output: str = "out", **options: Any) -> dict[str, Any]:
        data = tmp_path / "data" / name
        if not data.exists():
            data.mkdir(parents=True)
            files = [str(path) for path in {**TWINS, **DRAWN_TWINS}[name](data)]
            (data / "files.list").write_text(json.dumps(files))
        files = json.loads((data / "files.list").read_text())
        images = data / "images" if (data / "images").exists() else None
        path = find_protocol(name)
        assert path is not None
        protocol = load_protocol(path, [*OWN, *overrides])
        given: dict[str, Any] = {"data": files, "images": images, **options}
        document = Benchmark(protocol, RunOptions(output=tmp_path / output, **given)).run()
        assert document is not None
        return document

    return run
