"""Encoding that is killed and started again, or shared by processes, writes the same tars."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.data import forms
from unimm.data.encode import EncodingJob, encode_source
from unimm.data.sources import Reading
from unimm.files import NEIGHBOUR

DRAWING = Reading(pairs="text_to_image")


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_several_processes_and_a_kill_give_the_same_tars(tiny: Path, tmp_path: Path) -> None:
    folder = forms.shards(tmp_path / "data", 60, each=30)
    encode_source(EncodingJob(str(folder), tmp_path / "whole", str(tiny), DRAWING, shard=4))
    whole = tars(tmp_path / "whole")
    assert len(whole) == 15
    command = [sys.executable, "-m", "unimm", "data", "encode", str(folder), str(tmp_path / "cut")]
    options = ["--model", str(tiny), "--pairs", "text_to_image", "--shard", "4"]
    running = subprocess.Popen([*command, *options], env=os.environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (tmp_path / "cut" / "000000.tar").exists() and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
    done = tars(tmp_path / "cut")
    assert 0 < len(done) < 15
    left = tmp_path / "cut" / f".000014.tar.0{NEIGHBOUR}"  # as a kill at another moment leaves it
    left.mkdir()
    (left / ".new.tar").write_bytes(b"left over")
    assert (
        encode_source(EncodingJob(str(folder), tmp_path / "cut", str(tiny), DRAWING, shard=4), processes=2)[
            "written"
        ]
        == 60
    )
    assert tars(tmp_path / "cut") == whole
    assert not list((tmp_path / "cut").glob(".*"))
