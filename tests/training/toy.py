"""A small real problem for the trainer's tests: regress a function of eight numbers with a small network."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unimm.sections import Section
from unimm.training.batches import derive_seed
from unimm.training.recipe import TASKS, BaseRecipe, Stage

TASKS["toy"] = "tests.training.toy:ToyRecipe"


class ToyModel(Section):
    """Size of the network, and how much of its hidden layer drops out."""

    width: int = 16
    dropout: float = 0.0


class ToySource:
    """Endless samples; sample i depends on (seed, i) alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng(derive_seed(self.seed, index))
        x = random.standard_normal(8).astype(np.float32)
        return {
            "x": x,
            "y": np.float32(np.sin(x[:4]).sum() + x[4] * x[5]),
            "items": int(random.integers(1, 4)),
        }


class ToyTask:
    """Squared error weighted by `items`, so that micro-batches hold unequal numbers of targets.

    TOY_DIES_AT in the environment kills every process but the first at that step.
    """

    def __init__(self, model: ToyModel) -> None:
        self.model = model

    def build(self) -> nn.Module:
        module = nn.Sequential(nn.Linear(8, self.model.width), nn.Tanh(), nn.Dropout(self.model.dropout))
        module.append(nn.LayerNorm(self.model.width))
        module.append(nn.Linear(self.model.width, 1))
        return module

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        assert isinstance(module, nn.Sequential)
        return {
            "body": [*module[0].parameters()],
            "norm": [*module[3].parameters()],
            "head": [*module[4].parameters()],
            "none": [],
        }

    def dataset(self, stage: Stage, seed: int) -> ToySource:
        return ToySource(seed)

    def length(self, sample: dict[str, Any]) -> int:
        return 1

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: torch.from_numpy(np.stack([sample[key] for sample in samples])) for key in samples[0]}

    def targets(self, batch: dict[str, Tensor]) -> Mapping[str, float]:
        return {"tokens": int(batch["items"].sum())}

    def loss(
        self, module: nn.Module, batch: dict[str, Tensor], step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if os.environ.get("TOY_DIES_AT") == str(step) and os.environ.get("RANK", "0") != "0":
            os.kill(os.getpid(), signal.SIGKILL)
        error = (module(batch["x"]).squeeze(-1) - batch["y"]).square()
        loss = (error * batch["items"]).sum() / totals["tokens"]
        return loss, {"squared": loss.detach()}

    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        (folder / f"{step}.txt").write_text(str(module(torch.ones(1, 8)).item()))

    def export(self, module: nn.Module, folder: Path) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in module.state_dict().items()},
            folder / "w.safetensors",
        )


class ToyRecipe(BaseRecipe):
    """The recipe of the toy task."""

    task: Literal["toy"]
    model: ToyModel = ToyModel()

    def build_task(self) -> ToyTask:
        return ToyTask(self.model)
