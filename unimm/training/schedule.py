"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimm.training.recipe import Stage


def lr_factor(stage: Stage, step: int) -> float:
    """What the stage's learning rates are multiplied by at `step` (0-based, within the stage).

    Rises linearly over `warmup` steps (or all, where there are fewer) to 1 at the last of them, then stays
    (`constant`) or falls towards `min_lr_ratio`, which the step after the stage's last would have (`linear`,
    `cosine`; as in transformers): so the last step trains too.
    """
    warmup = min(stage.warmup, stage.steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, stage.steps - warmup))
    shape = 1.0 - done if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape


def shortened_warmups(stages: Sequence[Stage]) -> list[str]:
    """A line for each stage that is shorter than its warm-up."""
    return [
        f"stages[{number}].warmup: {stage.warmup} steps, the stage has {stage.steps}; the rates rise over all of it"
        for number, stage in enumerate(stages)
        if stage.warmup > stage.steps
    ]
