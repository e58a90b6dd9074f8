"""A tiny model and a few preferences for `--smoke`, written as files, so that such a run reads what every run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from unimm.pipeline import UniMM
from unimm.preferences.data import write_lines
from unimm.preferences.forms import SIDES
from unimm.training.model_builder import Assembly
from unimm.training.model_section import tiny_model

PROMPTS = ("a star on a blue background", "a bell", "an apple left of a car", "two cats")


def write_tiny_model(folder: Path) -> UniMM:
    """Write a model of tiny parts with random weights, each time the same ones; return it."""
    from unimm.training.tasks.unified import UnifiedRecipe

    stage = {"name": "none", "steps": 1, "batch": 1, "lr": {"decoder": 1.0}}  # never run
    described = {"task": "unified", "output": str(folder), "model": tiny_model({}), "stages": [stage]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assembly = Assembly(UnifiedRecipe.model_validate(described))
        um = UniMM(assembly.build(), assembly.processor)
    um.save(folder)
    return um


def write_tiny_pairs(path: Path, um: UniMM) -> None:
    """Write preferences between drawings of random codes, and between short texts."""
    rng = np.random.default_rng(0)
    shape, codes = um.model.layout.grid, um.model.config.generation_config().codes
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, **{side: {"codes": rng.integers(codes, size=shape).tolist()} for side in SIDES}}
        for prompt in PROMPTS
    ]
    rows += [{"prompt": f"what is {prompt}?", "chosen": "a picture", "rejected": "a"} for prompt in PROMPTS]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, rows)
