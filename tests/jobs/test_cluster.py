"""A batch job by Ray Data on this machine: the same files as in this process, and nothing left of Ray after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.test_jobs import recipe, rows
from tests.system_calls import contents
from unimm.errors import UserError
from unimm.jobs.run import run_job

pytest.importorskip("ray", reason="needs Ray: pip install 'unimm[ray]'")


def children() -> list[str]:
    """Command lines of the processes below this one that are Ray's."""
    listed = subprocess.run(["ps", "-eo", "ppid=,args="], capture_output=True, text=True, check=True).stdout
    lines = (line.split(maxsplit=1) for line in listed.splitlines())
    return [words for parent, words in lines if int(parent) == os.getpid() and "/ray/" in words]


def test_two_workers_write_the_files_of_one_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # of the workers
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else they starve beside other tests
    prompts = [{"prompt": f"a {'red ' * (i % 3)}apple {i}"} for i in range(10)] + [{"prompt": ""}]
    source = rows(tmp_path / "p.jsonl", prompts)
    given = ("output.format=webdataset", "output.shard=3")
    run_job(recipe("draw", tiny, source, tmp_path / "here", *given))
    counted: list[tuple[int, int]] = []
    spread = recipe(
        "draw", tiny, source, tmp_path / "there", *given, "engine=ray", "ray.workers=2", "ray.cpus=0.5"
    )
    done = run_job(spread, lambda *progress: counted.append(progress))
    assert (done["items"], done["written"], done["bad"], done["files"]) == (11, 10, 1, 4)
    assert counted[-1] == (11, 11)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert not children()


def test_without_ray_it_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray.data", None)
    source = rows(tmp_path / "p.jsonl", [{"prompt": "apple"}])
    with pytest.raises(
        UserError, match=r"engine: ray needs ray\.data; install it with: pip install 'unimm\[ray\]'"
    ):
        run_job(recipe("draw", tiny, source, tmp_path / "out", "engine=ray"))
