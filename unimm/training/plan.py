"""What a training run would take: parameters, memory by ZeRO stage, tokens, operations and days, before it is begun.

The model is built on the meta device, so nothing is loaded and a machine of any size can plan for any other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unimm.data.emojiscenes.settings import SAMPLE_KINDS, SCENE_NAMES
from unimm.data.tables.settings import TABLE_KINDS, TABLE_NAMES
from unimm.models.lora import add_adapters
from unimm.models.memory import who_looks
from unimm.models.modeling import UniMMModel
from unimm.processing.views import make_views
from unimm.training.flops import Counts, Operations, weights_of
from unimm.training.model_builder import describe_model, model_groups
from unimm.training.recipe import Stage
from unimm.training.tasks.unified import UnifiedRecipe

H100 = 989.0  # TFLOP/s of dense bfloat16
DAY = 86_400.0
TYPICAL_IMAGE = (480, 640)  # height and width, where views differ by image
MOMENTS, MASTER, GRADIENT = (
    8,
    4,
    4,
)  # bytes a weight: AdamW's two, the optimizer's copy and its gradient, float32


@dataclass(frozen=True)
class Here:
    """The machine that plans: where weights, gradients and optimizer would lie.

    Attributes:
        processes: one for each GPU, or one.
        memory: GiB of each GPU, or of the machine where it has none.
        what: what that memory is.
    """

    processes: int
    memory: float
    what: str


def this_machine() -> Here:
    """What there is to train on here; of memory the part that a container may use."""
    if torch.cuda.is_available():
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        return Here(len(sizes), min(sizes) / 2**30, torch.cuda.get_device_name(0))
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            sizes.append(int(Path(file).read_text()))
    return Here(1, min(sizes) / 2**30, "RAM, no GPU")


@dataclass(frozen=True)
class Machines:
    """What there is to train on.

    Attributes:
        gpus: in all.
        memory: of each, GiB.
        peak: of each, TFLOP/s in bfloat16.
        utilisation: share of the peak that is reached.
        words: text tokens that a sample holds on average beside its image.
        here: this machine, with which the plan is compared too.
    """

    gpus: int
    memory: float
    peak: float = H100
    utilisation: float = 0.4
    words: int = 128
    here: Here = field(default_factory=this_machine)


def state_bytes(zero: int, trained: int, frozen: int, largest: int, ranks: int, weight: int = 4) -> int:
    """Return the bytes that weights, gradients and optimizer take on each rank; activations come on top.

    Args:
        zero: stage of ZeRO.
        trained: weights that are trained.
        frozen: weights that are not.
        largest: weights of the largest single layer, which ZeRO 3 makes whole with its gradient.
        ranks: processes.
        weight: bytes of a weight and of its gradient on the model's side; this trainer has float32 (4). With 2,
            the results for ZeRO 2 and 3 are those of DeepSpeed's own estimator.

    Source: Rajbhandari et al. 2020 (ZeRO), section 3, and what DeepSpeed 0.19 allocates.
    """
    sharded = MASTER + MOMENTS + GRADIENT
    if zero == 0:  # the optimizer works on the weights themselves
        return weight * (trained + frozen) + (weight + MOMENTS) * trained
    if zero == 1:
        return weight * (trained + frozen) + weight * trained + sharded * trained // ranks
    if zero == 2:
        return weight * (trained + frozen) + (weight + sharded) * trained // ranks
    return (weight * (trained + frozen) + sharded * trained) // ranks + 2 * weight * largest


def largest_layer(model: nn.Module) -> int:
    """Return the weights of the module that has the most of its own."""
    return max(sum(p.numel() for p in child.parameters(recurse=False)) for child in model.modules())


def plan(recipe: UnifiedRecipe, machines: Machines) -> dict[str, Any]:
    """Return what a recipe would take on these machines, as plain values.

    Raises:
        UserError: the recipe names groups, adapters, data or files that are not there.
    """
    recipe.check_mixtures()
    model = describe_model(recipe)
    if recipe.lora is not None:
        add_adapters(model, recipe.lora)
    groups = model_groups(model, recipe.lora is not None)
    parts = {name: weights_of(part) for name, part in model.parts().items()}
    if model.image_tokenizer is not None:
        parts["image_tokenizer"] = weights_of(model.image_tokenizer)
    stages = [_stage(recipe, number, model, groups, machines) for number in range(len(recipe.stages))]
    named = asdict(machines)
    return {
        "here": named.pop("here"),
        "machines": named,
        "parameters": {**parts, "all": weights_of(model)},
        "stages": stages,
        "days": sum(stage["days"] for stage in stages),
    }


def _stage(
    recipe: UnifiedRecipe,
    number: int,
    model: UniMMModel,
    groups: Mapping[str, list[nn.Parameter]],
    machines: Machines,
) -> dict[str, Any]:
    stage = recipe.stages[number]
    for name in stage.lr:
        if name not in groups:
            message = f"no such group of weights; the groups are {', '.join(groups)}"
            raise recipe.error(f"stages[{number}].lr.{name}", message)
    trained = sum(parameter.numel() for name in stage.lr for parameter in groups[name])
    frozen, largest = weights_of(model) - trained, largest_layer(model)
    memory = {
        f"zero{zero}": state_bytes(zero, trained, frozen, largest, machines.gpus) / 2**30 for zero in range(4)
    }
    here = state_bytes(recipe.zero_stage, trained, frozen, largest, machines.here.processes) / 2**30
    tokens, operations = _work(model, recipe, stage, machines.words)
    samples = stage.steps * stage.batch
    seconds = samples * operations / (machines.gpus * machines.peak * 1e12 * machines.utilisation)
    return {
        "name": stage.name,
        "trained": trained,
        "memory_gib": memory,
        "fits": [name for name, size in memory.items() if size < machines.memory],
        "chosen": f"zero{recipe.zero_stage}",
        "here_gib": here,
        "fits_here": here < machines.here.memory,
        "tokens": samples * tokens,
        "flops": samples * operations,
        "days": seconds / DAY,
    }


def _work(model: UniMMModel, recipe: UnifiedRecipe, stage: Stage, words: int) -> tuple[float, float]:
    """Return the mean tokens and floating-point operations of a sample of a stage."""
    operations = Operations(model, stage.lr)
    sides = {"understanding": model.config.views, "generation": model.config.generation}
    mixture = recipe.mixture(stage, [kind for kind, part in sides.items() if part is not None])
    kinds = {name: source.kind for name, source in recipe.data.sources.items()} | dict(
        zip((*SCENE_NAMES, *TABLE_NAMES), (*SAMPLE_KINDS, *TABLE_KINDS), strict=True)
    )
    total = sum(mixture.values())
    samples = [
        (share / total, _sample(model, kinds[name], words, recipe.data.size))
        for name, share in mixture.items()
    ]
    return (
        sum(share * counts.tokens for share, counts in samples),
        sum(share * operations.of(counts) for share, counts in samples),
    )


def _sample(model: UniMMModel, kind: str, words: int, size: int | None) -> Counts:
    """What a sample of one kind holds."""
    layout, generation = model.layout, model.config.generation_config()
    rows, columns = layout.grid
    if size is not None and generation is not None:
        rows = columns = size // generation.stride
    codes = len(layout.drawing_steps(rows, columns)) if kind == "generation" else 0
    tokens, features = 0, []
    if kind == "understanding":
        views = make_views(model.config)
        seen = views is not None and not model.sees_codes
        grid = views.grid_of(*TYPICAL_IMAGE) if views is not None and seen else (rows, columns)
        parts = [part for part in layout.understanding(*grid) if not isinstance(part, str)]
        image = [token for part in parts for token in part]
        tokens = len(image)
        if model.vision is not None:
            features = model.seeing.passes(grid)
    length = words + codes + tokens
    looked = {}
    if kind == "understanding" and model.remembering is not None:
        ids = torch.tensor([[*image, *[0] * words]])
        looks = who_looks(ids.shape[1], None, None, ids.device)
        looked = model.remembering.counts(layout.feature_positions(ids), [grid], looks)
    return Counts(
        tokens=length,
        pairs=length * (length + 1) / 2,
        words=0 if kind == "generation" else words,
        codes=codes,
        features=sum(features),
        feature_pairs=sum(count**2 for count in features),
        **looked,
    )
