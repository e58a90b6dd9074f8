"""Small random checkpoints of Janus and Emu3, each in transformers' layout and in the original one."""

from __future__ import annotations

from pathlib import Path

from tests.families import emu3_checkpoints, janus_checkpoints

LAYOUTS = ("janus/transformers", "janus/original", "emu3/transformers", "emu3/original")


def write_checkpoints(folder: Path) -> Path:
    """Write one checkpoint of each of `LAYOUTS` below a folder, and return the folder."""
    janus_checkpoints.original(
        folder / "janus/original", janus_checkpoints.janus(folder / "janus/transformers")
    )
    emu3_checkpoints.original(folder / "emu3/original", emu3_checkpoints.emu3(folder / "emu3/transformers"))
    return folder
