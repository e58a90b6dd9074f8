"""From preferences to rows of the stream: a prompt with both answers as branches, or a row for each answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unimm.errors import UserError
from unimm.layout import ImageLayout
from unimm.modeling import IGNORED, AnswerScores, UniMMModel
from unimm.processing import UniMMProcessor
from unimm.training.branches import Branches, stack_answers
from unimm.training.preferences.data import MODALITIES, Answer, Preference, check_codes

if TYPE_CHECKING:
    from unimm.training.task import Batch, Sample

SIDES = ("chosen", "rejected")
INPUTS = (
    "input_ids", "labels", "answers", "attention_mask", "position_ids", "pixel_values", "image_codes", "image_sizes",
)  # fmt: skip
TOKENISED_AT_ONCE = 64


class PairSamples(Sequence["Sample"]):
    """Random access to preferences as token rows.

    Args:
        preferences: what to read.
        processor: the model's processor.
        model: the model, for its grid of codes and its image tokenizer, which answers given as files go through.

    Raises:
        UserError: an answer's codes are not the model's, or two files turn into the same codes; naming the line.
    """

    def __init__(
        self, preferences: Sequence[Preference], processor: UniMMProcessor, model: UniMMModel
    ) -> None:
        self.preferences, self.processor, self.layout = preferences, processor, processor.layout
        self.codes = self._all_codes(model)

    def __len__(self) -> int:
        return len(self.preferences)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """The pair at `index`: ids of the prompt, ids and labels of both answers, codes, pictures of the prompt."""
        preference = self.preferences[index]
        sample: Sample = {"index": index, "modality": MODALITIES.index(preference.modality)}
        if preference.modality == "image":
            chosen, rejected = self.codes[index]
            sample["prompt"] = self._prompt(preference, lambda: self._drawing_prompt(preference, chosen))
            for side, codes in zip(SIDES, (chosen, rejected), strict=True):
                ids, labels = drawing_answer(self.layout, codes)
                sample[side] = {"ids": ids, "labels": labels, "codes": codes}
            return sample
        grids = self._see(preference, sample)
        sample["prompt"] = self._prompt(
            preference, lambda: self.processor.question_ids(preference.words, grids)
        )
        for side, answer in zip(SIDES, (preference.chosen, preference.rejected), strict=True):
            assert answer.text is not None
            ids = [*self.processor.text_ids(answer.text.strip()), self.processor.eos]
            if len(sample["prompt"]) + len(ids) > self.processor.context:
                length = len(sample["prompt"]) + len(ids)
                raise UserError(
                    f"{preference.where}: {side}: {length} tokens with its prompt, "
                    f"the context holds {self.processor.context}; shorten it"
                )
            sample[side] = {"ids": ids, "labels": ids}
        return sample

    def _drawing_prompt(self, preference: Preference, codes: Tensor) -> list[int]:
        return self.processor.drawing_ids(preference.words, (codes.shape[0], codes.shape[1]))

    def _prompt(self, preference: Preference, make: Callable[[], list[int]]) -> list[int]:
        """The prompt's ids; what is wrong with it is said with its line."""
        try:
            return make()
        except UserError as error:
            raise UserError(f"{preference.where}: {error}") from None

    def _see(self, preference: Preference, sample: Sample) -> list[tuple[int, int]]:
        """Put the prompt's pictures into the sample; return the grid of each."""
        images, stride = preference.pictures(), self.processor.stride
        if not images:
            return []
        if not self.layout.shared:
            sample["pixels"] = self.processor.pixels(images)
            return [self.layout.grid] * len(images)
        sample["pixels"], sample["sizes"] = self.processor.sized_pixels(images)
        return [(height // stride, width // stride) for height, width in sample["sizes"].tolist()]

    @torch.no_grad()
    def _all_codes(self, model: UniMMModel) -> dict[int, tuple[Tensor, Tensor]]:
        """The codes [h, w] of both answers of every pair of drawings, files among them tokenised."""
        generation = model.config.generation_config()
        found: dict[tuple[int, str], Tensor] = {}
        files: list[tuple[tuple[int, str], str]] = []
        for index, preference in enumerate(self.preferences):
            if preference.modality != "image":
                continue
            if generation is None or model.image_tokenizer is None:
                raise UserError(f"{preference.where}: a drawing, but this model cannot draw")
            grid = None if self.layout.shared else (self.layout.grid[0], self.layout.grid[1])
            for side in SIDES:
                answer: Answer = getattr(preference, side)
                if answer.codes is not None:
                    check_codes(answer.codes, generation.codes, grid, f"{preference.where}: {side}")
                    found[index, side] = torch.tensor(answer.codes)
                elif answer.image is not None:
                    files.append(((index, side), answer.image))
        for start in range(0, len(files), TOKENISED_AT_ONCE):
            assert model.image_tokenizer is not None
            part = files[start : start + TOKENISED_AT_ONCE]
            pictures = [self.preferences[index].picture(name) for (index, _), name in part]
            pixels = self.processor.drawing_pixels(pictures).to(model.device, model.dtype)
            codes = model.image_tokenizer.encode(pixels).cpu()
            found |= {key: one for (key, _), one in zip(part, codes, strict=True)}
        return self._paired(found)

    def _paired(self, found: Mapping[tuple[int, str], Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        pairs = {}
        for index in sorted({index for index, _ in found}):
            chosen, rejected = found[index, "chosen"], found[index, "rejected"]
            where = self.preferences[index].where
            if chosen.shape != rejected.shape:
                raise UserError(f"{where}: chosen and rejected are of different sizes; give two of one size")
            if torch.equal(chosen, rejected):
                raise UserError(
                    f"{where}: chosen and rejected are the same codes; there is nothing to prefer"
                )
            pairs[index] = (chosen, rejected)
        return pairs


def drawing_answer(layout: ImageLayout, codes: Tensor) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a drawing with codes [h, w]; tokens that are forced are not learnt."""
    left = iter(codes.flatten().tolist())
    first = layout.code if layout.shared else 0
    ids, labels = [], []
    for step in layout.drawing_steps(*codes.shape):
        if step != layout.code:
            ids.append(step)
            labels.append(IGNORED)
            continue
        code = next(left)
        ids.append(layout.code + (code if layout.shared else 0))
        labels.append(first + code)
    return ids, labels


def row_length(sample: Sample) -> int:
    """Tokens of a pair in one row."""
    return sum(len(sample[part]["ids"]) for part in SIDES) + len(sample["prompt"])


def collate(samples: Sequence[Sample], pad: int, shared: bool, packed: bool = True) -> Batch:
    """Join N pairs into a batch; answer i is the chosen one of pair i, answer N + i the rejected.

    Args:
        samples: what `PairSamples` gives.
        pad: token that fills rows up on the right.
        shared: whether codes are tokens (they then need no `image_codes`).
        packed: both answers of a pair in one row, after a prompt that is read once; else a row for each.
    """
    count = len(samples)
    if packed:
        plan = [
            (sample, {"chosen": index, "rejected": count + index}) for index, sample in enumerate(samples)
        ]
    else:
        plan = [
            (sample, {side: number * count + index})
            for number, side in enumerate(SIDES)
            for index, sample in enumerate(samples)
        ]
    rows = [_row(sample, sides) for sample, sides in plan]
    batch: Batch = {
        **stack_answers(rows, pad),
        "modality": torch.tensor([sample["modality"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
    codes = [sample[side]["codes"] for sample, sides in plan for side in sides if "codes" in sample[side]]
    if codes and not shared:
        batch["image_codes"] = torch.stack(codes)
    if pictures := [sample for sample, _ in plan if "pixels" in sample]:
        batch["pixel_values"] = _stack_pixels([sample["pixels"] for sample in pictures])
        if shared:
            batch["image_sizes"] = torch.cat([sample["sizes"] for sample in pictures])
    return batch


def _row(sample: Sample, sides: Mapping[str, int]) -> dict[str, Any]:
    """A row with some of a pair's answers, each numbered; arrays [T]."""
    *prefix, last = sample["prompt"]
    row = Branches(prefix)
    for side in sides:  # a branch begins with the prompt's last token, which predicts its first
        row.add([last], sample[side]["ids"], sample[side]["labels"])
    arrays = row.arrays()
    numbers = np.array([0, *sides.values()], np.int64)
    return {**arrays, "answers": numbers[arrays["branches"]]}


def _stack_pixels(parts: Sequence[Tensor]) -> Tensor:
    """Pictures [n, 3, H, W] of several prompts as one tensor, filled with 0 to the largest."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (2, 3))
    stacked = torch.zeros(sum(map(len, parts)), 3, height, width)
    for index, picture in enumerate(picture for part in parts for picture in part):
        stacked[index, :, : picture.shape[1], : picture.shape[2]] = picture
    return stacked


def score_batch(model: UniMMModel, batch: Batch, lockstep: bool = False) -> AnswerScores:
    """Return the scores [2 N] of a batch's answers: the N chosen ones, then the N rejected.

    Args:
        model: what scores.
        batch: from `collate`.
        lockstep: see `UniMMModel.forward`.
    """
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
    return model.score(count=2 * len(batch["modality"]), lockstep=lockstep, **inputs)
