"""Task `dpo`: align a unified model with preferences about its drawings and its words.

It differs from other training in its batch (pairs of answers) and its loss; stages, engine, checkpoints and resume
are the trainer's. Answers are scored without guidance and without dropout, so that at the start the policy and its
copy agree exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unimm.modeling import AnswerScores, UniMMModel
from unimm.pipeline import UniMM, load
from unimm.training.batches import mix
from unimm.training.engine import first_process_first, in_bfloat16, pick_device
from unimm.training.preferences.data import MODALITIES, Preference, read_preferences
from unimm.training.preferences.losses import Pairs, objective
from unimm.training.preferences.policy import PolicyModel, PolicyTask
from unimm.training.preferences.preview import PREVIEW_PROMPTS, before_and_after, draw_fixed, kept_before
from unimm.training.preferences.recipe import PreferenceRecipe
from unimm.training.preferences.reference import (
    hash_data,
    hash_module,
    hash_processor,
    kept_beside,
    read_or_compute,
)
from unimm.training.preferences.samples import PairSamples, collate, row_length, score_batch

if TYPE_CHECKING:
    from unimm.training.recipe import Stage
    from unimm.training.task import Batch, Metrics, Sample


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
        um = load(self.recipe.model, device="cpu", dtype="float32")
        self.processor, policy = um.processor, um.model
        assert isinstance(policy, UniMMModel)
        mode = self.recipe.reference.mode
        if mode == "precomputed":  # now, before a checkpoint's weights are put in
            self.model_hash = hash_module(policy)
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
        path = Path(self.recipe.data.file)
        preferences = read_preferences(self.recipe.data.file)
        self.pairs = PairSamples(preferences, self.processor, self.policy)
        self.modalities = [m for m in MODALITIES if any(p.modality == m for p in preferences)]
        if self.recipe.reference.mode != "precomputed":
            return
        kept = Path(self.recipe.reference.file or kept_beside(path))
        marks = {
            "model": f"{self.model_hash} {'bfloat16' if self._bfloat16() else 'float32'}",
            "data": hash_data(path, preferences),
            "processor": hash_processor(self.processor),
        }
        with first_process_first() as first:  # it writes the file, the others read it
            self.reference_scores = read_or_compute(kept, marks, self._score_all, first)

    def _bfloat16(self) -> bool:
        """Whether the trainer runs losses under autocast, as the reference then must be."""
        return in_bfloat16(self.recipe, pick_device(self.recipe))

    @torch.no_grad()
    def _score_all(self) -> Tensor:
        """The reference's log-probabilities of every pair, float64 [N, 2]."""
        assert self.pairs is not None
        device = pick_device(self.recipe)
        # Loaded again: on resuming, the policy is no longer what the reference is.
        model = load(self.recipe.model, device="cpu", dtype="float32").model
        assert isinstance(model, UniMMModel)
        nn.Module.to(model, device)
        micro, parts = self.recipe.stages[0].micro, []
        for start in range(0, len(self.pairs), micro):
            indices = range(start, min(start + micro, len(self.pairs)))
            batch = self.collate([self.pairs[index] for index in indices])
            moved = {key: value.to(device) for key, value in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16()):
                scores = score_batch(model, moved)
            parts.append(scores.log_probs.view(2, -1).T.cpu())
        return torch.cat(parts).contiguous()

    def length(self, sample: Sample) -> int:
        """Tokens of a pair."""
        return row_length(sample)

    def collate(self, samples: list[Sample]) -> Batch:
        """Rows of the stream, with the reference's scores where they are precomputed."""
        layout = self.processor.layout
        batch = collate(samples, self.processor.pad, layout.shared, self.recipe.data.packed)
        if self.reference_scores is not None:
            batch["reference"] = self.reference_scores[batch["index"]]
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
        assert isinstance(module, PolicyModel)
        module.eval()  # no dropout
        reference = self.reference_log_probs(module, batch)
        scores = self.score(module.policy, batch)
        pairs = self._pairs(scores, torch.zeros_like(scores.log_probs) if reference is None else reference)
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
            entropy = (scores.entropy / scores.length).view(2, -1).mean(0)[where]
            told = {"loss": losses, "entropy": entropy, **told_of_pairs(chosen, used, section.beta)}
            share = max(totals[f"{name}_pairs"], 1)
            metrics |= {f"{name}/{key}": value.detach().sum() / share for key, value in told.items()}
        return loss.float(), metrics

    def score(self, model: UniMMModel, batch: Batch) -> AnswerScores:
        """Scores [2 N] of the chosen answers, then the rejected ones."""
        return score_batch(model, batch, self.lockstep)

    def reference_log_probs(self, module: nn.Module, batch: Batch) -> Tensor | None:
        """The reference's log-probabilities [2 N] of the answers, from the batch where they are precomputed."""
        if self.recipe.reference.mode == "precomputed":
            return batch["reference"].T.flatten()
        return super().reference_log_probs(module, batch)

    def _pairs(self, scores: AnswerScores, reference: Tensor) -> Pairs:
        sums = (scores.log_probs, reference, scores.length)
        (chosen, rejected), (better, worse), lengths = (tensor.view(2, -1).unbind(0) for tensor in sums)
        return Pairs(chosen, rejected, better, worse, *lengths)

    @torch.no_grad()
    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Draw and answer fixed prompts, beside what the model drew and said before the first step."""
        assert isinstance(module, PolicyModel) and self.pairs is not None
        after = UniMM(module.policy, self.processor)
        device = str(module.policy.device)
        before = kept_before(folder, lambda: self._shown(load(self.recipe.model, device, "float32")))
        now = self._shown(after)
        if now["codes"]:
            sheet = before_and_after(after, self._prompts(), before["codes"], now["codes"])
            sheet.save(folder / f"{step:06d}.png")
        if now["answers"]:
            asked = [pair.words for pair in self._asked()]
            said = zip(asked, before["answers"], now["answers"], strict=True)
            lines = [{"step": step, "prompt": p, "before": b, "after": a} for p, b, a in said]
            with (folder / "answers.jsonl").open("a", encoding="utf-8") as out:
                out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _prompts(self) -> list[str]:
        """What previews draw."""
        assert self.pairs is not None
        if self.recipe.preview.prompts:
            return list(self.recipe.preview.prompts)
        words = (pair.words for pair in self.pairs.preferences if pair.modality == "image")
        return list(dict.fromkeys(words))[:PREVIEW_PROMPTS]

    def _asked(self) -> list[Preference]:
        """What previews answer in words: the first prompts of the data, each once."""
        assert self.pairs is not None
        pairs = (pair for pair in self.pairs.preferences if pair.modality == "text")
        return list({pair.key(): pair for pair in pairs}.values())[: self.recipe.preview.texts]

    def _shown(self, um: UniMM) -> dict[str, Any]:
        """Codes of the fixed prompts and answers to the fixed questions."""
        asked = self._asked()
        codes = draw_fixed(um, self._prompts(), self.recipe.preview)
        answers = um.ask([pair.pictures() for pair in asked], [pair.words for pair in asked]) if asked else []
        return {"codes": codes, "answers": answers}


class _Subset(Sequence["Sample"]):
    """Some of the pairs."""

    def __init__(self, pairs: PairSamples, indices: list[int]) -> None:
        self.pairs, self.indices = pairs, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.pairs[self.indices[index]]


def told_of_pairs(pairs: Pairs, used: Pairs, beta: float) -> dict[str, Tensor]:
    """What is logged of N pairs, each [N]: `pairs` as sums over positions, `used` as the losses see them.

    `kl` estimates the divergence of the policy from the reference, a position, as if the reference had given these
    answers: the mean of log(reference / policy), which single steps may put below 0.
    """
    chosen, rejected = beta * used.chosen_ratio, beta * used.rejected_ratio
    means = pairs.per_position()
    return {
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": (chosen > rejected).double(),
        "logp_chosen": pairs.chosen,
        "logp_rejected": pairs.rejected,
        "kl": -(means.chosen_ratio + means.rejected_ratio) / 2,
    }
