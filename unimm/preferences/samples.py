"""From preferences to rows of the stream: a prompt with both answers as branches, or a row for each answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature

from unimm.errors import UserError, UserNote
from unimm.models.inputs import Images
from unimm.models.layout import IGNORED
from unimm.models.model_outputs import AnswerScores
from unimm.models.modeling import UniMMModel
from unimm.preferences.data import MODALITIES, Preference, Response, check_response_codes
from unimm.preferences.forms import SIDES
from unimm.processing.messages import DRAWN, Message
from unimm.processing.processor import UniMMProcessor, grids_of
from unimm.processing.rows import branch, stack_answers

if TYPE_CHECKING:
    from unimm.data.samples import Sample
    from unimm.training.task import Batch

TOKENISED_AT_ONCE = 64


class PairSamples(Sequence["Sample"]):
    """Random access to preferences as token rows.

    Args:
        preferences: what to read.
        processor: the model's processor.
        model: the model, for its grid of codes and its image tokenizer, which answers given as files go through.

    Raises:
        UserError: an answer's codes are not the model's, naming the line; or all pairs turn into the same codes (a few
            are left out, with a note).
    """

    def __init__(
        self, preferences: Sequence[Preference], processor: UniMMProcessor, model: UniMMModel
    ) -> None:
        self.preferences, self.processor, self.layout = preferences, processor, processor.layout
        self.codes = self._all_codes(model)
        self._leave_out_equal()

    def __len__(self) -> int:
        return len(self.preferences)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """The pair at `index`: the prompt's ids and images, and for each answer a `Row` with the prompt and its codes.

        Raises:
            UserError: it does not fit the context, naming the line.
        """
        preference = self.preferences[index]
        sample: Sample = {"index": index, "modality": MODALITIES.index(preference.modality)}
        with _named(preference):
            if preference.modality == "image":
                return sample | self._drawings(preference, *self.codes[index])
            return sample | self._texts(preference)

    def _drawings(self, preference: Preference, *codes: Tensor) -> Sample:
        """A prompt with two drawings [h, w]."""
        prompt = Message("user", (preference.words,))
        grid = (codes[0].shape[0], codes[0].shape[1])
        sample: Sample = {"prompt": self.processor.drawing_ids(preference.words, grid), "images": Images()}
        for side, own in zip(SIDES, codes, strict=True):
            row = self.processor.conversation.write([prompt, Message("assistant", (DRAWN,))], [own])
            sample[side] = {"row": row, "codes": own}
        return sample

    def _texts(self, preference: Preference) -> Sample:
        """A prompt, perhaps with images, with two answers in words."""
        conversation, turns = self.processor.conversation, preference.turns()
        images = self.processor.look(preference.read_images())
        grids = grids_of(images)
        sample: Sample = {"prompt": conversation.ask(turns, grids), "images": images}
        for side, answer in zip(SIDES, (preference.chosen, preference.rejected), strict=True):
            assert answer.text is not None
            row = conversation.write([*turns, Message("assistant", (answer.text.strip(),))], grids)
            if len(row.ids) > conversation.context:
                raise UserError(
                    f"{side}: {len(row.ids)} tokens with its prompt, the context holds {conversation.context}; "
                    "shorten it"
                )
            sample[side] = {"row": row}
        return sample

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
            grid = None if self.layout.sized else (self.layout.grid[0], self.layout.grid[1])
            for side in SIDES:
                answer: Response = getattr(preference, side)
                if answer.codes is not None:
                    check_response_codes(answer.codes, generation.codes, grid, f"{preference.where}: {side}")
                    found[index, side] = torch.tensor(answer.codes)
                elif answer.image is not None:
                    files.append(((index, side), answer.image))
        for start in range(0, len(files), TOKENISED_AT_ONCE):
            assert model.image_tokenizer is not None
            part = files[start : start + TOKENISED_AT_ONCE]
            images = [self.preferences[index].read_image(name) for (index, _), name in part]
            pixels = self.processor.drawing_pixels(images).to(model.device, model.dtype)
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
            pairs[index] = (chosen, rejected)
        return pairs

    def _leave_out_equal(self) -> None:
        """Leave out pairs of drawings that turned into the same codes, and say how many.

        Raises:
            UserError: no pair is left.
        """
        equal = [index for index, (one, other) in self.codes.items() if torch.equal(one, other)]
        if not equal:
            return
        line = "chosen and rejected are the same codes"
        where = self.preferences[equal[0]].where
        left = [index for index in range(len(self.preferences)) if index not in {*equal}]
        if not left:
            raise UserError(f"{where}: {line}, as in each pair; there is nothing to prefer")
        count = f"{len(equal)} of {len(self.preferences)} pairs left out"
        warnings.warn(f"{count}: {line} (first: {where})", UserNote, stacklevel=3)
        self.codes = {place: self.codes[index] for place, index in enumerate(left) if index in self.codes}
        self.preferences = [self.preferences[index] for index in left]


@contextmanager
def _named(preference: Preference) -> Iterator[None]:
    """Within, what is wrong is said with the preference's line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{preference.where}: {error}") from None


def row_length(sample: Sample) -> int:
    """Tokens of a pair in one row, with what its answers have in common once."""
    return len(branch([sample[side]["row"] for side in SIDES]).ids)


def collate(samples: Sequence[Sample], processor: UniMMProcessor, packed: bool = True) -> Batch:
    """Join N pairs into a batch; answer i is the chosen one of pair i, answer N + i the rejected.

    Args:
        samples: what `PairSamples` gives.
        processor: of the model.
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
    images = [sample["images"].owned_by(number) for number, (sample, _) in enumerate(plan)]
    codes = [sample[side]["codes"] for sample, sides in plan for side in sides if "codes" in sample[side]]
    images.append(processor.drawn(codes))
    return {
        **stack_answers([_row(sample, sides) for sample, sides in plan], processor.pad),
        "modality": torch.tensor([sample["modality"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "images": Images.cat(images),
    }


def _row(sample: Sample, sides: Mapping[str, int]) -> dict[str, Any]:
    """A row with some of a pair's answers, each numbered; arrays [T]."""
    row = branch([sample[side]["row"] for side in sides])
    return {**row.arrays(), "answers": row.numbered(list(sides.values()))}


def prompt_inputs(samples: Sequence[Sample], processor: UniMMProcessor) -> BatchFeature:
    """The prompts of pairs as a batch to answer, padded on the left, as the processor makes it of questions."""
    input_ids, attention_mask = processor.pad_left([sample["prompt"] for sample in samples])
    images = Images.cat(sample["images"] for sample in samples)
    inputs = {} if images is None else images.inputs()
    return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **inputs})


def score_positions(model: UniMMModel, batch: Batch, lockstep: bool = False) -> AnswerScores:
    """Return the scores [P] of all counted positions of a batch, row by row; `owners` says whose each is.

    Args:
        model: what scores.
        batch: from `collate`.
        lockstep: see `UniMMModel.forward`.
    """
    counted = batch["labels"] != IGNORED
    count = int(counted.sum())
    numbers = torch.zeros_like(batch["answers"])
    numbers[counted] = torch.arange(count, device=numbers.device)
    return model.score({**batch, "answers": numbers}, count, lockstep=lockstep)


def owners(batch: Batch) -> Tensor:
    """Return the number [P] of the answer that each counted position of a batch belongs to, row by row."""
    numbers: Tensor = batch["answers"]
    return numbers[batch["labels"] != IGNORED]


def sum_answers(values: Tensor, batch: Batch) -> Tensor:
    """Return the sums [2 N] of values of positions [P]: those of the N chosen answers, then of the rejected."""
    return values.new_zeros(2 * len(batch["modality"])).index_add(0, owners(batch), values)


def score_batch(model: UniMMModel, batch: Batch, lockstep: bool = False) -> AnswerScores:
    """Return the scores [2 N] of a batch's answers, the N chosen ones and then the rejected; see `score_positions`."""
    return AnswerScores(*(sum_answers(one, batch) for one in score_positions(model, batch, lockstep)))
