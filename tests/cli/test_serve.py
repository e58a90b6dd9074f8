"""`unimm serve` on the command line: what it refuses before a model is loaded, and what it calls a model."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from unimm.cli.serve import model_name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-n", "9", "--max-waiting", "8"], "--max-n: 9 is more than --max-waiting"),
        (["--max-body", "0"], "--max-body: expected a whole number of at least 1"),
        (["--request-timeout", "-1"], "--request-timeout: -1.0; give a number of seconds above 0"),
        (["--media-path", "nowhere"], "--media-path: nowhere: no such folder"),
        (["--allow-host", "http://a/"], "--allow-host: 'http://a/'; give a host name, or NAME:PORT"),
        (["--allow-origin", "a"], "--allow-origin: 'a'; give one such as https://example.org"),
        (["--model-name", "../a"], "--model-name: '../a'"),
        (["--host", "999.1.1.1"], "host 999.1.1.1: no address of this machine"),
        (["--port", "99999"], "port 99999: "),
        (["--replicas", "2"], "--replicas: is for --ray; add it"),
        (["--ongoing", "2"], "--ongoing: is for --ray; add it"),
        (["--ray", "--replicas", "0"], "--replicas: 0:0; give a number of at least 1, or LEAST:MOST"),
        (["--ray", "--replicas", "3:2"], "--replicas: 3:2; give a number of at least 1, or LEAST:MOST"),
        (["--ray", "--replicas", "2:"], "--replicas: '2:'; give a number, or LEAST:MOST"),
        (["--ray", "--ongoing", "0"], "--ongoing: expected a whole number of at least 1"),
        (["--ray", "--replica-cpus", "0"], "--replica-cpus: 0; give a number of cores above 0"),
        (["--ray", "--replica-gpus", "-1"], "--replica-gpus: -1; give a number of GPUs, 0 for none"),
        (["--ray", "--votes", "."], "--votes: replicas do not share a file of votes; serve without --ray"),
        (["--prot", "1"], "there is no option --prot; did you mean --port?"),
    ],
)
def test_odd_options_are_refused_in_a_line(unimm, arguments: list[str], words: str) -> None:
    done = unimm("serve", *arguments)
    assert (done.code, done.out) == (2, "") and words in done.err and done.err.count("\n") == 1


def test_without_ray_it_says_what_to_install(unimm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    done = unimm("serve", "--port", "0", "--ray")
    assert done.code == 2 and "--ray: ray needs " in done.err and "pip install 'unimm[ray]'" in done.err


def test_a_taken_port_is_named(unimm) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = unimm("serve", "--port", taken.getsockname()[1])
    assert done.code == 2 and done.err.endswith("address already in use; give another, or --port 0 for any\n")


def test_a_model_that_cannot_be_loaded_ends_the_server(unimm, tmp_path: Path) -> None:
    done = unimm("serve", "--port", 0, "--model", tmp_path)
    assert (done.code, done.out) == (2, "") and str(tmp_path) in done.err and done.err.count("\n") == 1


def test_the_key_is_not_on_the_screen(unimm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "UNIMM_API_KEY", "s3cret")
    assert "s3cret" not in unimm("serve", "--help").out
    done = unimm("serve", "--max-n", 9, "--max-waiting", 8)
    assert "s3cret" not in done.err


def test_models_are_called_as_they_were_given(tmp_path: Path) -> None:
    assert model_name(None) == "embedded"
    assert model_name("deepseek-ai/Janus-Pro-1B@main") == "deepseek-ai/Janus-Pro-1B"
    (tmp_path / "mine").mkdir()
    assert model_name(str(tmp_path / "mine")) == "mine"
