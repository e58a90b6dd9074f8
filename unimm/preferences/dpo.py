"""Task `dpo`: align a unified model with preferences about its drawings and its words.

It differs from other training in its batch (pairs of answers) and its loss; stages, engine, checkpoints and resume
are the trainer's. Answers are scored without guidance and without dropout, so that at the start the policy and its
copy agree exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unimm.data.codes import fingerprint
from unimm.data.sources import Reading
from unimm.files import append
from unimm.images import save_image
from unimm.loading import load, load_whole
from unimm.models.model_outputs import AnswerScores
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.preferences.data import MODALITIES, read_preferences
from unimm.preferences.losses import ModalityObjective, Pairs, k3, objective
from unimm.preferences.policy import DrawingPreview, PolicyModel, PolicyRecipe, PolicyTask
from unimm.preferences.preview import before_and_after, cached_before, draw_fixed
from unimm.preferences.reference import (
    cache_beside,
    hash_data,
    read_or_compute,
)
from unimm.preferences.samples import (
    PairSamples,
    collate,
    owners,
    prompt_inputs,
    row_length,
    score_positions,
    sum_answers,
)
from unimm.sampling.text import generate_text
from unimm.sections import Positive, Section, near
from unimm.training.batches import mix
from unimm.training.engine import first_process_first, in_bfloat16, pick_device
from unimm.training.previews import PREVIEW_PROMPTS
from unimm.training.sides import NO_DRAWING
from unimm.training.task import on_device

if TYPE_CHECKING:
    from unimm.data.samples import Sample
    from unimm.training.recipe import Stage
    from unimm.training.task import Batch, Metrics

PREVIEW_TOKENS = 64  # of an answer in a preview


class PreferenceData(Section):
    """The preferences, and how they go through the model."""

    file: Annotated[str, Field(min_length=1)]
    """A file, folder or pattern of what `unimm.preferences.data` reads."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Our name of a column -> the data's."""
    images: str | None = None
    """Folder that names of images are relative to; null: where the file lies."""
    split: str | None = None
    """Which split, of data that has several."""
    allow_outside: bool = False
    """Whether its images may lie outside its folder."""
    packed: bool = True
    """Both answers in one row, after a prompt that is read once; else a row for each."""

    @property
    def reading(self) -> Reading:
        """How the file is read."""
        return Reading(
            fields=self.fields, images=self.images, split=self.split, allow_outside=self.allow_outside
        )


class PreviewSection(DrawingPreview):
    """What is drawn and said at every preview, before and after."""

    texts: Positive = 8
    """Prompts of the data that are answered in words."""


class PreferenceRecipe(PolicyRecipe):
    """Recipe of the task `dpo`; groups are the model's parts, the mixture is over text and image pairs."""

    task: Literal["dpo"]
    data: PreferenceData
    text: ModalityObjective = ModalityObjective()
    image: ModalityObjective = ModalityObjective()
    preview: PreviewSection = PreviewSection()

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """A tiny model with random weights, and a few pairs of random drawings and of short texts."""
        from unimm.preferences.tiny import write_tiny_model, write_tiny_pairs

        folder = Path(data["output"]) / "tiny"
        data["model"] = str(folder / "model")
        own = {key: value for key, value in data["data"].items() if key not in ("fields", "images", "split")}
        data["data"] = {**own, "file": str(folder / "pairs.jsonl")}
        data["reference"] = {key: value for key, value in data.get("reference", {}).items() if key != "file"}
        data["preview"] = {**data.get("preview", {}), "texts": 2}
        write_tiny_pairs(folder / "pairs.jsonl", write_tiny_model(folder / "model"))

    def objective(self, modality: str) -> ModalityObjective:
        """The section of a modality."""
        return self.text if modality == "text" else self.image

    def build_task(self) -> PreferenceTask:
        """The task that this recipe describes."""
        for index, stage in enumerate(self.stages):
            for kind in stage.mixture:
                if kind not in MODALITIES:
                    expected = f"expected one of {', '.join(MODALITIES)}{near(kind, MODALITIES)}"
                    raise self.error(f"stages[{index}].mixture.{kind}", expected)
        for modality in MODALITIES:
            self.check_losses(modality, self.objective(modality))
        self.check_policy()
        return PreferenceTask(self)


class PreferenceTask(PolicyTask):
    """Trains and exports a `UniMMModel` on pairs; see the module's docstring and `unimm.training.task.Task`."""

    recipe: PreferenceRecipe

    def __init__(self, recipe: PreferenceRecipe) -> None:
        self.recipe = recipe
        self.pairs: PairSamples | None = None
        self.reference_scores: Tensor | None = None
        self.lockstep = recipe.zero_stage > 0  # see `Task.loss`

    def build(self) -> nn.Module:
        """The model to start from, as float32 on the CPU, and its reference."""
        um = load_whole(self.recipe.model)
        self.processor, policy = um.processor, um.model
        if self.recipe.preview.prompts and self.processor.drawing_size is None:
            raise self.recipe.error("preview.prompts", NO_DRAWING)
        assert isinstance(policy, UniMMModel)
        mode = self.recipe.reference.mode
        if mode == "precomputed":  # now, before a checkpoint's weights are put in
            self.model_hash = fingerprint(policy)
        self.policy = policy
        return PolicyModel(policy, mode == "copy", self.recipe.lora)

    def dataset(self, stage: Stage, seed: int) -> Any:
        """The preferences, shuffled anew in each pass; mixed by modality where the stage says so."""
        if self.pairs is None:
            self._read()
        assert self.pairs is not None
        if not stage.mixture:
            return mix({"pairs": self.pairs}, {"pairs": 1}, seed)
        preferences = self.pairs.preferences
        sources: dict[str, Any] = {
            modality: _Subset(self.pairs, [i for i, p in enumerate(preferences) if p.modality == modality])
            for modality in MODALITIES
        }
        return mix(sources, stage.mixture, seed)

    def _read(self) -> None:
        """Read the data and, where the recipe says so, the reference's scores of it."""
        file, reading = self.recipe.data.file, self.recipe.data.reading
        preferences = read_preferences(file, reading)
        self.pairs = PairSamples(preferences, self.processor, self.policy)
        self.modalities = [m for m in MODALITIES if any(p.modality == m for p in self.pairs.preferences)]
        if self.recipe.reference.mode != "precomputed":
            return
        cached = Path(self.recipe.reference.file or cache_beside(Path(file)))
        marks = {
            "model": f"{self.model_hash} {'bfloat16' if self._bfloat16() else 'float32'}",
            "data": hash_data(file, preferences, reading),
            "processor": fingerprint(self.processor),
        }
        with first_process_first() as first:  # it writes the file, the others read it
            self.reference_scores = read_or_compute(cached, marks, self._score_all, first)

    def _bfloat16(self) -> bool:
        """Whether the trainer runs losses under autocast, as the reference then must be."""
        return in_bfloat16(self.recipe, pick_device(self.recipe))

    @torch.no_grad()
    def _score_all(self) -> Tensor:
        """The reference's log-probabilities, float32 [N, 2, T]: of both answers of every pair, filled up with 0."""
        assert self.pairs is not None
        device = pick_device(self.recipe)
        # Loaded again: on resuming, the policy is no longer what the reference is.
        model = load_whole(self.recipe.model).model
        assert isinstance(model, UniMMModel)
        nn.Module.to(model, device)
        micro = self.recipe.stages[0].micro
        parts: dict[tuple[int, int], Tensor] = {}
        for start in range(0, len(self.pairs), micro):
            indices = range(start, min(start + micro, len(self.pairs)))
            batch = self.collate([self.pairs[index] for index in indices])
            moved = on_device(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16()):
                found = score_positions(model, moved).log_probs.float().cpu()
            numbers = owners(batch)
            for side in (0, 1):
                parts |= {
                    (start + i, side): found[numbers == side * len(indices) + i] for i in range(len(indices))
                }
        scores = torch.zeros(len(self.pairs), 2, max(map(len, parts.values())))
        for (index, side), part in parts.items():
            scores[index, side, : len(part)] = part
        return scores

    def length(self, sample: Sample) -> int:
        """Tokens of a pair."""
        return row_length(sample)

    def collate(self, samples: list[Sample]) -> Batch:
        """Rows of the stream, with the reference's scores where they are precomputed."""
        batch = collate(samples, self.processor, self.recipe.data.packed)
        if self.reference_scores is not None:
            numbers, lengths = owners(batch).unique_consecutive(return_counts=True)  # answers do not mix
            sides, places = numbers // len(samples), numbers % len(samples)
            chosen = self.reference_scores[batch["index"][places], sides]
            batch["reference"] = torch.cat([row[:n] for row, n in zip(chosen, lengths, strict=True)]).double()
        return batch

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """Pairs of each modality, and the positions of their answers."""
        counts: dict[str, int | float] = {
            f"{name}_pairs": int((batch["modality"] == number).sum())
            for number, name in enumerate(MODALITIES)
        }
        return {**counts, "answer_tokens": int((batch["labels"] >= 0).sum())}

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Mean over pairs of the weighted losses of their modality."""
        scores, reference = self.score_both(module, batch)
        pairs = self._pairs(scores, reference, batch)
        entropy = _mean_of_pairs(scores.entropy, batch)
        moved = None if reference is None else _mean_of_pairs(k3(reference, scores.log_probs.detach()), batch)
        count = max(sum(totals[f"{name}_pairs"] for name in MODALITIES), 1)
        loss = scores.log_probs.new_zeros(())
        metrics: dict[str, Tensor] = {}
        for name in self.modalities:
            section = self.recipe.objective(name)
            where = batch["modality"] == MODALITIES.index(name)
            chosen = Pairs(*(tensor[where] for tensor in pairs))
            used = chosen.per_position() if section.per_position else chosen
            losses = objective(used, section.losses, section.options)
            loss = loss + section.weight * losses.sum() / count
            own = {"loss": losses, "entropy": entropy[where], **pair_metrics(chosen, used, section.beta)}
            if moved is not None:
                own["kl"] = moved[where]
            share = max(totals[f"{name}_pairs"], 1)
            metrics |= {f"{name}/{key}": value.detach().sum() / share for key, value in own.items()}
        return loss.float(), metrics

    def score(self, model: UniMMModel, batch: Batch) -> AnswerScores:
        """Scores [P] of every counted position."""
        return score_positions(model, batch, self.lockstep)

    def reference_log_probs(self, module: nn.Module, batch: Batch) -> Tensor | None:
        """The reference's log-probabilities [P] of the positions, from the batch where they are precomputed."""
        if self.recipe.reference.mode == "precomputed":
            stored: Tensor = batch["reference"]
            return stored
        return super().reference_log_probs(module, batch)

    def _pairs(self, scores: AnswerScores, reference: Tensor | None, batch: Batch) -> Pairs:
        """Sums over the positions of each answer; a reference that is none counts as 0."""
        given = torch.zeros_like(scores.log_probs) if reference is None else reference
        sums = (sum_answers(one, batch).view(2, -1) for one in (scores.log_probs, given, scores.length))
        (chosen, rejected), (better, worse), lengths = sums
        return Pairs(chosen, rejected, better, worse, *lengths)

    @torch.no_grad()
    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Draw and answer fixed prompts, beside what the model drew and said before the first step."""
        assert isinstance(module, PolicyModel) and self.pairs is not None
        after = UniMM(module.policy, self.processor)
        device = str(module.policy.device)
        before = cached_before(folder, lambda: self._shown(load(self.recipe.model, device, "float32")))
        now = self._shown(after)
        if now["codes"]:
            sheet = before_and_after(after, self._prompts(), before["codes"], now["codes"])
            save_image(sheet, folder / f"{step:06d}.png")
        if now["answers"]:
            asked = [self.pairs.preferences[index].words for index in self._asked()]
            said = zip(asked, before["answers"], now["answers"], strict=True)
            lines = [{"step": step, "prompt": p, "before": b, "after": a} for p, b, a in said]
            append(
                folder / "answers.jsonl",
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            )

    def _prompts(self) -> list[str]:
        """What previews draw."""
        assert self.pairs is not None
        if self.recipe.preview.prompts:
            return list(self.recipe.preview.prompts)
        words = (pair.words for pair in self.pairs.preferences if pair.modality == "image")
        return list(dict.fromkeys(words))[:PREVIEW_PROMPTS]

    def _asked(self) -> list[int]:
        """What previews answer in words: the first prompts of the data, each once, as indices of pairs."""
        assert self.pairs is not None
        first: dict[tuple[str, ...], int] = {}
        for index, pair in enumerate(self.pairs.preferences):
            if pair.modality == "text":
                first.setdefault(pair.key(), index)
        return list(first.values())[: self.recipe.preview.texts]

    def _shown(self, um: UniMM) -> dict[str, Any]:
        """Codes of the fixed prompts and answers to the fixed questions."""
        assert self.pairs is not None
        codes = draw_fixed(um, self._prompts(), self.recipe.preview)
        asked = [self.pairs[index] for index in self._asked()]
        if not asked:
            return {"codes": codes, "answers": []}
        inputs = prompt_inputs(asked, um.processor)
        return {"codes": codes, "answers": generate_text(um.model, um.processor, inputs, PREVIEW_TOKENS)}


class _Subset(Sequence["Sample"]):
    """Some of the pairs."""

    def __init__(self, pairs: PairSamples, indices: list[int]) -> None:
        self.pairs, self.indices = pairs, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.pairs[self.indices[index]]


def _mean_of_pairs(values: Tensor, batch: Batch) -> Tensor:
    """Means [N] over both answers of each pair of the means of values [P] over an answer's positions."""
    lengths = sum_answers(torch.ones_like(values), batch)
    return (sum_answers(values, batch) / lengths).view(2, -1).mean(0)


def pair_metrics(pairs: Pairs, used: Pairs, beta: float) -> dict[str, Tensor]:
    """What is logged of N pairs, each [N]: `pairs` as sums over positions, `used` as the losses see them."""
    chosen, rejected = beta * used.chosen_ratio, beta * used.rejected_ratio
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).double(),
        "logp_chosen": pairs.chosen,
        "logp_rejected": pairs.rejected,
    }
