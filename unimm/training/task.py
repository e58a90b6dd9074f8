"""What the trainer asks of a thing that it can train: the `Task` protocol.

A task knows its module, its data and its loss; the trainer knows everything else (stages, learning rates,
accumulation, clipping, averaging, checkpoints, logging). A tokenizer, an encoder and the unified model are
tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from unimm.data.samples import Sample
    from unimm.training.recipe import Stage

Batch: TypeAlias = dict[str, Any]
Metrics: TypeAlias = "Mapping[str, float | Tensor]"


class SampleSource(Protocol):
    """Random access to samples: a `grain.MapDataset`, or anything else that can be indexed without end."""

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`; the same index gives the same sample in every process."""
        ...


class Task(Protocol):
    """One trainable thing.

    The trainer calls `build`, `groups`, then `dataset` at the start of every stage, and for every step
    `collate`, `targets` (both in a background thread) and `loss`.
    """

    def build(self) -> nn.Module:
        """The whole module: everything with weights to train, and what it needs frozen.

        The trainer seeds python, numpy and torch before the call. Buffers and frozen parameters are
        checkpointed too.
        """
        ...

    def groups(self, module: nn.Module) -> Mapping[str, Sequence[nn.Parameter]]:
        """Disjoint named groups of parameters.

        A stage's `lr` names the groups that it trains; all other parameters are frozen for that stage, and
        modules whose own parameters are all frozen run in eval mode.
        """
        ...

    def dataset(self, stage: Stage, seed: int) -> SampleSource:
        """Samples of a stage, already mixed by `stage.mixture`, infinite and random-access.

        Called once at the start of each stage, before its first loss: a task may remember the stage here.
        Step `s` reads the indices `s * batch` to `(s + 1) * batch - 1`. A sample depends on its index and on
        `seed` only, never on Python's, numpy's or torch's global random state (it is read in a background
        thread).
        """
        ...

    def length(self, sample: Sample) -> int:
        """How long a sample is; those of like length share a micro-batch. One number for all keeps their order."""
        ...

    def collate(self, samples: list[Sample]) -> Batch:
        """Samples to a micro-batch of CPU tensors; deterministic. The trainer moves tensors to the device."""
        ...

    def targets(self, batch: Batch) -> Mapping[str, int | float]:
        """How many loss items of each kind a micro-batch holds, e.g. `{"text_tokens": 311, "images": 8}`.

        The same keys for every micro-batch (0 where there is none). Kinds with `token` in the name add up to
        the tokens per second that are shown.
        """
        ...

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Loss of a micro-batch, to be *added* to those of the step's other micro-batches.

        Under ZeRO it must run the same modules for every micro-batch and reach every weight that is trained, if
        with a gradient of 0, alone too: processes wait for each other in each module, and ZeRO 3 adds to a weight's
        gradient of the step before where the first micro-batch has none.

        Args:
            module: what `build` gave (on the device, training mode, under autocast where the recipe says
                bfloat16).
            batch: a micro-batch from `collate`, on the device.
            step: steps done before this one, over all stages.
            totals: the sums of `targets` over every micro-batch (and every rank) of the step. Divide sums of
                item losses by these, and 1 x 8 accumulated gives the same step as 8 x 1.

        Returns:
            The scalar loss, and numbers to log under the same keys each time; these too are summed over the
            step's micro-batches. Give detached tensors rather than floats: the trainer reads them only when
            it logs. A tensor [2] is a sum and a count, of things that not every step has; what is logged is the
            mean of all since the last line.
        """
        ...

    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Write samples for people into `folder` (module in eval mode, averaged weights, no gradients)."""
        ...

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write the finished artefact into `folder` (module in eval mode, averaged weights)."""
        ...


@runtime_checkable
class Packs(Protocol):
    """A task that can put several samples into a row (`pack` of a stage)."""

    def images(self, sample: Sample) -> int:
        """How many images a sample holds that take room of their own."""
        ...

    def collate_rows(self, rows: list[list[Sample]]) -> Batch:
        """Rows of samples to a micro-batch, in which no sample sees another."""
        ...


@runtime_checkable
class Validates(Protocol):
    """A task that can measure its losses on items that it does not train on (`data.validation` of a recipe)."""

    def held_out(self) -> Sequence[Batch]:
        """Micro-batches of the current stage's held-out items, on the CPU, read when they are indexed.

        The same in every process and at every call; empty where nothing is held out.
        """
        ...

    def held_out_sums(self, module: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Of each loss a tensor [2]: its sum over a micro-batch, and how many it is a sum of.

        Args:
            module: on the device, in eval mode, its weights whole, no gradients.
            batch: one of `held_out`, on the device.
        """
        ...

    def held_out_loss(self, means: Mapping[str, float]) -> float:
        """The loss as training weighs it, of the mean of each."""
        ...


@runtime_checkable
class Repeats(Protocol):
    """A task that reads sources of a limited size again and again."""

    def epochs(self, stage: Stage, samples: int) -> Mapping[str, float]:
        """How often so many samples of a stage go through each source that its mixture names."""
        ...


@runtime_checkable
class KnowsData(Protocol):
    """A task that reads sources which may change while a run is stopped."""

    def data_state(self) -> Mapping[str, str]:
        """Of each source that is open its number of items, and a digest of its files' names, sizes and times."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A task whose module has settings that a stage may change (`gradient_checkpointing`, `compile`)."""

    def prepare(self, module: nn.Module, stage: Stage) -> None:
        """Set the module up for a stage; called once, before the stage's engine is made."""
        ...


@runtime_checkable
class Moves(Protocol):
    """A task that changes weights that no optimizer does, such as those of a reference that follows the policy."""

    def before_step(self, module: nn.Module, step: int) -> None:
        """Change the module, where its time has come; every process calls this, once before each step.

        It must follow from the module and `step` (steps done before, over all stages) alone: a resumed run does
        again what had been done after its checkpoint.
        """
        ...


@runtime_checkable
class Draws(Protocol):
    """A task whose model makes what it learns from."""

    def draw(self, module: nn.Module, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Fill in this process's micro-batches of a step; called before its first loss, with whole weights.

        What is drawn must follow from the module, the batches and the recipe's seed alone, or a resumed run
        would see other data.

        Args:
            module: on the device, its weights whole however they are sharded.
            batches: from `collate`, on the CPU.
            step: steps done before this one, over all stages.

        Returns:
            As many micro-batches, for `loss`.
        """
        ...


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors and bundles of tensors are on a device."""
    return {
        key: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for key, value in batch.items()
    }
