"""Drawings: a batch of prompts through an engine, up to their codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from unimm.models.configuration import SamplingConfig
from unimm.models.inputs import Images
from unimm.models.layout import Grid
from unimm.models.modeling import UniMMModel
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.engine import Engine
from unimm.sampling.requests import DrawingRequest
from unimm.sampling.sampler import NoiseKey

if TYPE_CHECKING:
    from unimm.console import ProgressCallback
    from unimm.images import ImageInput
    from unimm.videos import Video


class DrawingOrder(NamedTuple):
    """Drawings of one size.

    Attributes:
        texts: a prompt for each.
        images: those that go with each prompt.
        keys: whose noise each has.
        grid: (rows, columns) of codes.
        sampling: guidance, temperature and filters.
    """

    texts: list[str]
    images: list[list[ImageInput | Video]]
    keys: list[NoiseKey]
    grid: Grid
    sampling: SamplingConfig

    def run(
        self, engine: Engine, batch_size: int, on_progress: ProgressCallback | None = None
    ) -> Iterator[Tensor]:
        """Yield the codes [B, rows, columns] of each batch.

        Args:
            engine: of the model.
            batch_size: drawings of a batch.
            on_progress: called with codes done and codes in all.
        """
        each, total = self.grid[0] * self.grid[1], len(self.texts)
        for start in range(0, total, batch_size):
            part, report = slice(start, start + batch_size), None
            if on_progress is not None:
                report = _reporter(on_progress, start * each, total * each)
            rows = (self.texts[part], self.images[part], self.keys[part])
            requests = drawing_requests(engine.processor, *rows, self.sampling, self.grid)
            yield draw_codes(engine, list(requests), report)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the codes [B, rows, columns] of all batches."""
        return torch.cat(list(parts)) if parts else torch.empty((0, *self.grid), dtype=torch.long)


def _reporter(report: ProgressCallback, before: int, total: int) -> Callable[[int], None]:
    return lambda done: report(before + done, total)


def drawing_requests(
    processor: UniMMProcessor,
    prompts: Sequence[str],
    images: Sequence[Sequence[ImageInput | Video]],
    keys: Sequence[NoiseKey],
    sampling: SamplingConfig,
    grid: Grid,
) -> Iterator[DrawingRequest]:
    """Yield the request of each prompt; a prompt and its images that come again are read once."""
    made: dict[tuple[str, int], tuple[list[int], Images | None]] = {}
    for prompt, shown, key in zip(prompts, images, keys, strict=True):
        known = (prompt, id(shown))  # the drawings of one prompt share its list of images
        if known not in made:
            inputs = dict(processor.drawing_inputs(prompt, shown, grid))
            made[known] = inputs.pop("input_ids")[0].tolist(), Images.from_inputs(inputs)
        ids, seen = made[known]
        guided = sampling.guidance_scale != 1.0
        unconditional = processor.unconditional_ids(ids, grid) if guided else None
        yield DrawingRequest(ids, seen, key, grid=grid, unconditional=unconditional, sampling=sampling)


def draw_codes(
    engine: Engine, requests: Sequence[DrawingRequest], on_codes: Callable[[int], None] | None = None
) -> Tensor:
    """Run drawings of one size to their end.

    Args:
        engine: of the model.
        requests: B drawings.
        on_codes: called with the number of codes that are done in all drawings.

    Returns:
        int64 codes [B, rows, columns].
    """
    done = [0] * len(requests)

    def counted(number: int) -> Callable[[list[int]], None]:
        def report(codes: list[int]) -> None:
            done[number] = len(codes)
            if on_codes is not None:
                on_codes(sum(done))

        return report

    for number, request in enumerate(requests):
        request.on_codes = counted(number)
    codes = [ticket.codes for ticket in engine.run(requests)]
    return torch.stack([one for one in codes if one is not None])


def sample_codes(
    model: UniMMModel,
    processor: UniMMProcessor,
    prompts: Sequence[str],
    keys: Sequence[NoiseKey],
    sampling: SamplingConfig,
    grid: Grid | None = None,
) -> Tensor:
    """Draw one image for each prompt with a model as it is now, such as one that is being trained.

    Args:
        model: a model with a code vocabulary.
        processor: the model's processor.
        prompts: B texts, of any lengths.
        keys: whose noise each drawing has.
        sampling: guidance, temperature and filters.
        grid: (rows, columns) of codes, by default the layout's.

    Returns:
        int64 codes [B, rows, columns].
    """
    grid, none = grid or model.layout.grid, [()] * len(prompts)
    requests = drawing_requests(processor, prompts, none, keys, sampling, grid)
    return draw_codes(Engine(model, processor), list(requests))
