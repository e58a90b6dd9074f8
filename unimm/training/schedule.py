"""Learning-rate schedules as pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unimm.training.recipe import Stage


def lr_factor(stage: Stage, step: int) -> float:
    """What the stage's learning rates are multiplied by at `step` (0-based, within the stage).

    Rises linearly over `warmup` steps to 1 at the last of them, then stays (`constant`) or falls to
    `min_lr_ratio` at the stage's last step (`linear`, `cosine`).
    """
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    if stage.schedule == "constant":
        return 1.0
    done = (step - stage.warmup) / max(1, stage.steps - 1 - stage.warmup)
    done = min(1.0, done)
    shape = 1.0 - done if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape
