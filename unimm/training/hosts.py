"""Hostfiles of launchers (`NAME slots=N` a line): read, and every host tried by ssh before a run is started.

DeepSpeed's launcher tries the first host only, and starts on this machine alone where the file is missing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from unimm.errors import UserError

TRIED_AT_ONCE = 64
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile: the host, its devices (`slots`), and where the line stands."""

    name: str
    slots: int
    line: int


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a hostfile; empty lines and those that begin with `#` are passed over.

    Raises:
        UserError: a line that names the file, the line and what would be right.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such hostfile") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read as a hostfile") from None
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.partition("#")[0].strip())
        if match is None or int(match[2]) == 0:
            raise UserError(
                f'{path}: line {number}: expected "NAME slots=N", such as "node1 slots=8", got "{line.strip()}"'
            )
        if match[1] in {host.name for host in hosts}:
            raise UserError(
                f"{path}: line {number}: {match[1]} is named twice; give it all its slots in one line"
            )
        hosts.append(Host(match[1], int(match[2]), number))
    if not hosts:
        raise UserError(f'{path}: names no host; expected lines such as "node1 slots=8"')
    return hosts


def reason_unreachable(host: str, timeout: int) -> str | None:
    """Why ssh cannot log in to a host without asking for anything; None if it can."""
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={timeout}", "--", host, "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * timeout + 5, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {2 * timeout + 5} s"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1].strip() if said else f"ssh ended with status {done.returncode}"


def check_hosts(path: str | Path, timeout: int = 5) -> list[Host]:
    """Read a hostfile and try every host, all at the same time.

    Args:
        path: the hostfile.
        timeout: seconds that a host has to accept a connection.

    Raises:
        UserError: ssh is missing, or a host cannot be reached; the first is named, the others are counted.
    """
    hosts = read_hostfile(path)
    if shutil.which("ssh") is None:
        raise UserError(
            "hosts: ssh is not installed here, and launchers start processes on other hosts by it"
        )
    with ThreadPoolExecutor(TRIED_AT_ONCE) as pool:
        reasons = list(pool.map(lambda host: reason_unreachable(host.name, timeout), hosts))
    _raise_first(path, [(host, reason) for host, reason in zip(hosts, reasons, strict=True) if reason])
    return hosts


def _raise_first(path: str | Path, failed: Sequence[tuple[Host, str]]) -> None:
    if not failed:
        return
    host, reason = failed[0]
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    raise UserError(
        f"{path}: line {host.line}: {host.name} cannot be reached by ssh: {reason}{more}; "
        "let `ssh HOST true` work without a password, or remove the line"
    )
