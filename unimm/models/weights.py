"""Weights are loaded whole, never filled up at random: what is missing, surplus, misshapen or NaN is one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from unimm.errors import UserError

LISTED = 3  # faults of one kind that a line names


class StrictModel(PreTrainedModel):
    """A model of transformers whose `from_pretrained` refuses weights that are not all of it, and finite.

    transformers fills what is missing at random, leaves out what it does not know, and says so in a table.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # theirs returns Self, or a pair with the report
        cls, source: Any, *args: Any, **options: Any
    ) -> Any:
        """Load a model, as transformers does.

        Raises:
            UserError: weights are missing, surplus, of another shape, or NaN or infinite.
        """
        wants_report = options.pop("output_loading_info", False)
        where = "the weights" if source is None else str(source)
        loaded: Any = super().from_pretrained(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, report = loaded
        unlike = [
            f"{name} is {list(has)}, expected {list(own)}" for name, has, own in report["mismatched_keys"]
        ]
        refuse(
            where,
            missing=sorted(report["missing_keys"]),
            misshapen=unlike,
            mistyped=_mistyped(model, source),
            surplus=sorted(report["unexpected_keys"]),
        )
        check_finite(model, where)
        return (model, report) if wants_report else model


def _mistyped(model: nn.Module, source: Any) -> Iterator[str]:
    """Name the tensors of a folder that hold integers for floating point or the reverse, which would be cast."""
    if source is None or not Path(source).is_dir():
        return
    wanted = model.state_dict()
    for path in Path(source).glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, no mapping
                kind = file.get_slice(name).get_dtype()
                floats = name in wanted and wanted[name].is_floating_point()
                if name in wanted and floats != ("F" in kind):
                    yield f"{name} is {kind}, expected {'floating point' if floats else 'integers'}"


def refuse(
    where: str,
    *,
    missing: Iterable[str] = (),
    misshapen: Iterable[str] = (),
    surplus: Iterable[str] = (),
    mistyped: Iterable[str] = (),
) -> None:
    """Raise one line that names what is wrong with weights, if anything is.

    Raises:
        UserError: the line.
    """
    faults = {
        "missing": list(missing),
        "of the wrong shape": list(misshapen),
        "of the wrong kind": list(mistyped),
        "not known": list(surplus),
    }
    lines = [f"{_first(found)} {what}" for what, found in faults.items() if found]
    if lines:
        raise UserError(f"{where}: {'; '.join(lines)}")


def _first(faults: Sequence[str]) -> str:
    """The first few of many faults, and how many more there are."""
    more = f" and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
    return ", ".join(faults[:LISTED]) + more


def check_finite(model: nn.Module, where: str) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        UserError: a line that names the first that is.
    """
    for name, tensor in model.state_dict().items():
        if not is_finite(tensor):
            raise UserError(f"{where}: {name} holds NaN or infinite values")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite; takes no memory beside it."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))  # NaN is both ends
