"""What a training run would take: parameters, memory by ZeRO stage, tokens, operations and days, before it is begun.

The model is built on the meta device, so nothing is loaded and a machine of any size can plan for any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from unimm.modeling import UniMMModel
from unimm.training.flops import Counts, Operations, weights_of
from unimm.training.lora import add_adapters
from unimm.training.parts import describe_model, model_groups
from unimm.training.recipe import Stage
from unimm.training.unified import UnifiedRecipe

H100 = 989.0  # TFLOP/s of dense bfloat16
DAY = 86_400.0
MOMENTS, MASTER, GRADIENT = (
    8,
    4,
    4,
)  # bytes a weight: AdamW's two, the optimizer's copy and its gradient, float32


@dataclass(frozen=True)
class Machines:
    """What there is to train on.

    Attributes:
        gpus: in all.
        memory: of each, GiB.
        peak: of each, TFLOP/s in bfloat16.
        utilisation: share of the peak that is reached.
        words: text tokens that a sample holds on average beside its picture.
    """

    gpus: int
    memory: float
    peak: float = H100
    utilisation: float = 0.4
    words: int = 128


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
        UserError: the recipe names groups, adapters or files that are not there.
    """
    model = describe_model(recipe)
    if recipe.lora is not None:
        add_adapters(model, recipe.lora)
    groups = model_groups(model, recipe.lora is not None)
    parts = {name: weights_of(part) for name, part in model.parts().items()}
    if model.image_tokenizer is not None:
        parts["image_tokenizer"] = weights_of(model.image_tokenizer)
    stages = [_stage(recipe, number, model, groups, machines) for number in range(len(recipe.stages))]
    return {
        "machines": asdict(machines),
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
    tokens, operations = _work(model, stage, machines.words, recipe.data.size)
    samples = stage.steps * stage.batch
    seconds = samples * operations / (machines.gpus * machines.peak * 1e12 * machines.utilisation)
    return {
        "name": stage.name,
        "trained": trained,
        "memory_gib": memory,
        "fits": [name for name, size in memory.items() if size < machines.memory],
        "chosen": f"zero{recipe.zero_stage}",
        "tokens": samples * tokens,
        "flops": samples * operations,
        "days": seconds / DAY,
    }


def _work(model: UniMMModel, stage: Stage, words: int, size: int | None) -> tuple[float, float]:
    """Return the mean tokens and floating-point operations of a sample, whose drawings are of `size` pixels a side."""
    operations = Operations(model, stage.lr)
    mixture = stage.mixture or {"understanding": 1.0, "generation": 1.0}
    total = sum(mixture.values())
    samples = [(share / total, _sample(model, kind, words, size)) for kind, share in mixture.items()]
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
    features = (layout.features or rows * (columns + 1)) if kind == "understanding" else 0
    length = words + codes + features
    return Counts(
        tokens=length,
        pairs=length * (length + 1) / 2,
        words=0 if kind == "generation" else words,
        codes=codes,
        pictures=int(kind == "understanding" and model.vision is not None),
    )
