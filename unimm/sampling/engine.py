"""Drawing: the codes of many images at once, both guidance rows in one batch, over a static cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import BatchFeature

from unimm.models.configuration import SamplingConfig
from unimm.models.inputs import Images
from unimm.models.modeling import UniMMModel
from unimm.processing.conversation import Grid
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.decoder import make_steps
from unimm.sampling.sampler import guide, pick, probabilities

if TYPE_CHECKING:
    from unimm.images import ImageInput


class CodeSteps:
    """The code logits of drawings, one code after the other.

    Args:
        model: a model with a code vocabulary.
        processor: the model's processor.
        prompts: B prompts, as `UniMMProcessor.drawing_inputs` gives them; one that is listed twice is read once.
        grid: (rows, columns) of codes.
        guidance_scale: 1 switches guidance off and halves the batch.
    """

    def __init__(
        self,
        model: UniMMModel,
        processor: UniMMProcessor,
        prompts: Sequence[BatchFeature],
        grid: Grid,
        guidance_scale: float,
    ) -> None:
        self.model, self.scale, self.done = model, guidance_scale, 0
        steps = model.layout.drawing_steps(*grid)
        rows: list[list[int]] = [prompt["input_ids"][0].tolist() for prompt in prompts]
        if guidance_scale != 1.0:
            rows += [processor.unconditional_ids(row, grid) for row in rows]
        input_ids, attention_mask = (t.to(model.device) for t in processor.pad_left(rows))
        self._run = make_steps(model, attention_mask, input_ids.shape[1] + len(steps))
        blank = input_ids.masked_fill(model.layout.feature_positions(input_ids), processor.pad)
        self._stream = self._with_images(model.embed(blank).stream, prompts)
        self._steps = iter(steps)
        self._force()

    def _with_images(self, stream: Tensor, prompts: Sequence[BatchFeature]) -> Tensor:
        """Put prompts with images in their rows; each is read alone, so that no other in the batch changes it."""
        own: dict[int, Tensor] = {}
        for i, prompt in enumerate(prompts):
            if "pixel_values" not in prompt:
                continue
            if id(prompt) not in own:
                inputs = dict(prompt.to(self.model.device))
                own[id(prompt)] = self.model.embed(
                    inputs.pop("input_ids"), Images.from_inputs(inputs)
                ).stream[0]
            stream[i, -len(own[id(prompt)]) :] = own[id(prompt)]
        return stream

    def _force(self) -> None:
        """Let the tokens that are forced before the next code ride along with what comes before them."""
        for wanted in self._steps:
            if wanted == self.model.layout.code:
                return
            forced = torch.full((len(self._stream), 1), wanted, device=self.model.device)
            self._stream = torch.cat([self._stream, self.model.get_input_embeddings()(forced)], dim=1)

    def logits(self) -> Tensor:
        """Return the logits of the next code, guided [B, K]; to be called once before each `put`."""
        logits = self.model.code_logits(self._run(self._stream))
        if self.scale == 1.0:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return guide(conditional, unconditional, self.scale)

    def put(self, codes: Tensor) -> None:
        """Go on with these codes [B]."""
        rows = codes if self.scale == 1.0 else codes.repeat(2)
        self._stream = self.model.embed_codes(rows[:, None], start=self.done)
        self.done += 1
        self._force()


@torch.inference_mode()
def sample_codes(
    model: UniMMModel,
    processor: UniMMProcessor,
    prompts: Sequence[str],
    uniforms: Tensor,
    sampling: SamplingConfig,
    grid: Grid | None = None,
    on_step: Callable[[int], None] | None = None,
    images: Sequence[Sequence[ImageInput]] | None = None,
) -> Tensor:
    """Draw one image for each prompt.

    Args:
        model: a model with a code vocabulary.
        processor: the model's processor.
        prompts: B texts, of any lengths.
        uniforms: random numbers [B, rows * columns] in [0, 1), one row for each image.
        sampling: guidance (a scale of 1 halves the batch), temperature (0 takes the likeliest code) and filters.
        grid: (rows, columns) of codes, by default the layout's.
        on_step: called with the number of codes done.
        images: the pictures that go with each prompt, any number for each; None: none.

    Returns:
        int64 codes [B, rows, columns].
    """
    grid = grid or model.layout.grid
    shown = images or [()] * len(prompts)
    made: dict[tuple[str, int], BatchFeature] = {}  # the drawings of one prompt share its list of pictures
    keys = [(prompt, id(pictures)) for prompt, pictures in zip(prompts, shown, strict=True)]
    for key, pictures in zip(keys, shown, strict=True):
        if key not in made:
            made[key] = processor.drawing_inputs(key[0], pictures, grid)
    steps = CodeSteps(model, processor, [made[key] for key in keys], grid, sampling.guidance_scale)
    codes: list[Tensor] = []
    uniforms = uniforms.to(model.device)
    while len(codes) < grid[0] * grid[1]:
        logits = steps.logits()
        if sampling.temperature == 0:
            chosen = logits.argmax(-1)
        else:
            weights = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
            chosen = pick(weights, uniforms[:, len(codes)])
        codes.append(chosen)
        steps.put(chosen)
        if on_step is not None:
            on_step(len(codes))
    return torch.stack(codes, dim=1).view(-1, *grid)
