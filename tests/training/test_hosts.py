"""Hostfiles: what they say, and the one line for a host that no run could be started on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unimm.cli.main import main
from unimm.errors import UserError
from unimm.recipes import recipe_root
from unimm.training import hosts as hosts_module
from unimm.training.hosts import Host, check_hosts, read_hostfile


def write(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_and_slots_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "# a comment\nnode1 slots=8\n\n  user@node2   slots=4  # half\n")
    assert read_hostfile(path) == [Host("node1", 8, 2), Host("user@node2", 4, 4)]
    assert len(read_hostfile(recipe_root() / "training" / "launch" / "hostfile")) == 2


MISTAKES = [
    ("node1 slots=8\nnode2\n", 'line 2: expected "NAME slots=N", such as "node1 slots=8", got "node2"'),
    ("node1 slots=0\n", "line 1: expected"),
    ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is named twice"),
    ("# nobody\n", "names no host"),
]


@pytest.mark.parametrize(("text", "expected"), MISTAKES)
def test_a_mistake_is_one_line_with_file_and_line(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)


def test_a_missing_hostfile_is_not_this_machine_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such hostfile"):
        check_hosts(tmp_path / "none")


@pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh")
def test_a_host_that_cannot_be_reached_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "\nhost.invalid slots=8\nother.invalid slots=8\n")
    assert main(["hosts", str(path), "--timeout", "1"]) == 2
    line = capfd.readouterr().err
    assert line.startswith(f"unimm: {path}: line 2: host.invalid cannot be reached by ssh: ")
    assert "(and 1 more); let `ssh HOST true` work" in line and line.count("\n") == 1


def test_a_host_that_answers_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The ssh here is a program that runs what it is told on this machine."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift 2\nexec "$@"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(ssh.parent), prepend=":")
    assert hosts_module.reason_unreachable("node1", 1) is None
    assert main(["hosts", str(write(tmp_path, "node1 slots=8\nnode2 slots=4\n"))]) == 0
    assert "All 2 hosts answer; 12 processes." in capfd.readouterr().out
