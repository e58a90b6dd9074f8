"""What the tasks have in common whose model draws while it learns: draw, be scored, and make rows of what teaches.

Such a task differs from other training in its data, which the model draws before each step. A drawing follows from the
weights that drew it, its prompt and a stream of its own, which follows from the seed and the prompt's place in the
data; so a resumed run draws again what it would have drawn. With one update for each batch of drawings these
are the policy's own weights. With more, a frozen copy that is renewed with each batch draws, and travels in the
checkpoint.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unimm.data.emojiscenes.scenes import Split
from unimm.errors import UserError
from unimm.images import save_image
from unimm.loading import load, load_whole
from unimm.models.configuration import SamplingConfig
from unimm.models.layout import IGNORED
from unimm.models.model_outputs import AnswerScores
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.preferences.candidates import DrawingPrompt, Emphasis, read_prompts, scene_prompts
from unimm.preferences.policy import PolicyModel, PolicyRecipe, PolicyTask, frozen_copy
from unimm.preferences.preview import before_and_after, cached_before, draw_fixed
from unimm.preferences.scorers import (
    Scorer,
    ScorerError,
    find_scorer,
    image_candidates,
    make_scorer,
    score_candidates,
)
from unimm.processing.messages import DRAWN, Message
from unimm.processing.rows import branch, stack_answers
from unimm.sampling.drawing import sample_codes
from unimm.sampling.sampler import noise_keys
from unimm.sections import NotNegative, Positive, Section, near
from unimm.training import shards
from unimm.training.batches import derive_seed, mix
from unimm.training.engine import first_process_first, in_bfloat16, pick_device
from unimm.training.previews import PREVIEW_PROMPTS
from unimm.training.task import on_device

if TYPE_CHECKING:
    from unimm.data.samples import Sample
    from unimm.training.recipe import Stage
    from unimm.training.task import Batch

PLAIN = "plain"  # the kind of prompts that are no scene's


class PromptSection(Section):
    """What is drawn: a file of prompts, or captions of EmojiScenes."""

    file: str | None = None
    """A prompt a line, or `.jsonl` with questions, as `unimm preferences draw` takes it."""
    scenes: Positive | None = None
    """In place of a file: captions of so many scenes."""
    split: Split = "train"
    """Of the scenes."""
    seed: NotNegative = 0
    """Of the scenes."""
    emphasis: Emphasis = 1.0
    """Weight of the questions about what a scene is for, against 1 of the others (`scene_prompts`)."""

    @model_validator(mode="after")
    def _one(self) -> PromptSection:
        if (self.file is None) == (self.scenes is None):
            raise ValueError("expected either file or scenes")
        return self


class DrawingSampling(Section):
    """How the policy draws."""

    group: Annotated[int, Field(ge=2)] = 8
    """Drawings of each prompt, which are compared with each other."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The policy that learns is the one that draws: log-probabilities are taken at this temperature too."""
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """1 draws without guidance, from the very distribution that learns; with any other the drawings are better and
    off-policy, and learnt from as if the unguided policy had drawn them."""
    batch_size: Positive = 64
    """Drawings that are sampled together."""


class OnlineRecipe(PolicyRecipe):
    """Recipe of a model that draws while it learns; groups are the model's parts, a stage's batch counts prompts."""

    prompts: PromptSection
    scorer: Annotated[str, Field(min_length=1)] = "rules"
    """Judges drawings: a name of `unimm.preferences.scorers`, or the dotted path of a callable."""
    sampling: DrawingSampling = DrawingSampling()
    packed: bool = True
    """Drawings that are learnt from side by side (a prompt's, or a pair's) in one row, after a prompt that is read
    once; else a row for each."""

    @property
    def updates(self) -> int:
        """Optimisation steps on each batch of drawings."""
        return 1

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """A tiny model with random weights, which draws a few scenes twice and is judged by rules."""
        from unimm.preferences.tiny import write_tiny_model

        folder = Path(data["output"]) / "tiny"
        write_tiny_model(folder)
        data |= {"model": str(folder), "prompts": {"scenes": 16}, "scorer": "rules"}
        data["sampling"] = {**data.get("sampling", {}), "group": 2}
        data["preview"] = {**data.get("preview", {}), "prompts": ["a star"]}

    def check_policy(self) -> None:
        """Refuse also a scorer that is none, and a reference that cannot be kept.

        Raises:
            UserError: as said.
        """
        find_scorer(self.scorer)
        super().check_policy()
        if self.reference.mode == "precomputed":
            raise self.error("reference.mode", "drawings are new in every step; take copy, adapter or none")


class DrawingPolicy(PolicyModel):
    """A policy, its reference and, where a batch of drawings is used more than once, the weights that drew it."""

    def __init__(self, policy: UniMMModel, recipe: OnlineRecipe) -> None:
        super().__init__(policy, recipe.reference.mode == "copy", recipe.lora)
        self.behaviour: UniMMModel | None = frozen_copy(policy) if recipe.updates > 1 else None

    @property
    def artist(self) -> UniMMModel:
        """What draws."""
        return self.policy if self.behaviour is None else self.behaviour


class PromptStream:
    """A stage's prompts, each with the seed of its drawings; the same for every update on one batch of drawings.

    Args:
        source: endless samples with the number of a prompt.
        batch: prompts in a step.
        updates: steps on one batch of drawings.
        seed: of the stage.
    """

    def __init__(self, source: Any, batch: int, updates: int, seed: int) -> None:
        self.source, self.batch, self.updates, self.seed = source, batch, updates, seed

    def __getitem__(self, index: int) -> Sample:
        """The prompt at `index`, and the seed of its group of drawings."""
        step, place = divmod(int(index), self.batch)
        drawn = step // self.updates * self.batch + place
        return {"prompt": self.source[drawn], "draw": derive_seed(self.seed, drawn)}


class OnlineTask(PolicyTask):
    """Trains and exports a `UniMMModel` on its own drawings; see the module's docstring and `Task`."""

    recipe: OnlineRecipe

    def __init__(self, recipe: OnlineRecipe) -> None:
        self.recipe = recipe
        self.lockstep = recipe.zero_stage > 0  # see `Task.loss`
        section = recipe.prompts
        self.prompts = (
            scene_prompts(section.split, section.seed, section.scenes, section.emphasis)
            if section.scenes is not None
            else read_prompts(str(section.file))
        )
        self.kinds = [_kind(prompt) for prompt in self.prompts]
        self.scorer: Scorer | None = None
        self._kept: tuple[list[int], list[Batch]] = ([], [])  # a batch of drawings and their seeds

    def build(self) -> nn.Module:
        """The model to start from, as float32 on the CPU, with what the recipe keeps beside it."""
        um = load_whole(self.recipe.model)
        self.processor, policy = um.processor, um.model
        if policy.config.generation_config() is None or policy.image_tokenizer is None:
            raise self.recipe.error("model", "this model cannot draw")
        self.layout = self.processor.layout
        self.grid = (self.layout.grid[0], self.layout.grid[1])
        self.codes = self.grid[0] * self.grid[1]
        return DrawingPolicy(policy, self.recipe)

    def dataset(self, stage: Stage, seed: int) -> PromptStream:
        """The prompts, shuffled anew in each pass; kinds of scenes by the stage's mixture, or as many as there are."""
        self.rows = [self._prompt_ids(prompt) for prompt in self.prompts]
        sources = {
            kind: [i for i, one in enumerate(self.kinds) if one == kind] for kind in dict.fromkeys(self.kinds)
        }
        for kind in stage.mixture:
            if kind not in sources:
                expected = f"expected one of {', '.join(sources)}{near(kind, sources)}"
                raise self.recipe.error(f"stages.{stage.name}.mixture.{kind}", expected)
        shares = stage.mixture or {kind: float(len(rows)) for kind, rows in sources.items()}
        return PromptStream(mix(sources, shares, seed), stage.batch, self.recipe.updates, seed)

    def _prompt_ids(self, prompt: DrawingPrompt) -> list[int]:
        try:
            return self.processor.drawing_ids(prompt.prompt, self.grid)
        except UserError as error:
            raise self.recipe.error("prompts", f"{prompt.prompt[:60]!r}: {error}") from None

    def length(self, sample: Sample) -> int:
        """Tokens of the prompt."""
        return len(self.rows[sample["prompt"]])

    def collate(self, samples: list[Sample]) -> Batch:
        """Numbers of prompts and seeds of their drawings [P]; `draw` makes rows of them."""
        return {name: torch.tensor([sample[name] for sample in samples]) for name in ("prompt", "draw")}

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """Prompts; which of their drawings are learnt from is not known before `draw`."""
        return {"prompts": len(batch["prompt"])}

    def before_step(self, module: nn.Module, step: int) -> None:
        """Move a reference that follows; give the weights that draw those of the policy, for a new batch."""
        super().before_step(module, step)
        assert isinstance(module, DrawingPolicy)
        if module.behaviour is not None and step % self.recipe.updates == 0:
            shards.blend(module.behaviour, module.policy, 1.0)

    @torch.no_grad()
    def draw(self, module: nn.Module, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Draw and score a group for each prompt, or give those of the step before once more; rows for `loss`."""
        assert isinstance(module, DrawingPolicy)
        module.eval()  # no dropout
        seeds = [seed for batch in batches for seed in batch["draw"].tolist()]
        if seeds != self._kept[0]:
            # A context of its own, lest weights that are cast without a gradient be kept for the loss.
            with self._autocast():
                self._kept = (seeds, self._draw(module, batches))
        return self._kept[1]

    def _autocast(self) -> AbstractContextManager[Any]:
        """The number format in which losses are computed."""
        device = pick_device(self.recipe)
        if not in_bfloat16(self.recipe, device):
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def _draw(self, module: DrawingPolicy, batches: Sequence[Batch]) -> list[Batch]:
        group = self.recipe.sampling.group
        numbers = [number for batch in batches for number in batch["prompt"].tolist()]
        seeds = [seed + k for batch in batches for seed in batch["draw"].tolist() for k in range(group)]
        codes = self._sample(
            module.artist, [self.prompts[n].prompt for n in numbers for _ in range(group)], seeds
        )
        codes = codes.view(len(numbers), group, *self.grid)
        rewards = self._rewards(module, numbers, seeds, codes)
        sizes = [len(batch["prompt"]) for batch in batches]
        made: list[Batch] = []
        for batch, own, drawn in zip(batches, rewards.split(sizes), codes.split(sizes), strict=True):
            learnt = self.choose(own)
            owners = learnt["owners"]
            rows = self._rows(batch["prompt"][owners].tolist(), drawn[owners[:, None], learnt["taken"]])
            made.append({**batch, **rows, "rewards": own, **learnt})
        if module.behaviour is not None:
            device = module.behaviour.device
            for batch in made:
                batch["old"] = self.score(module.behaviour, on_device(batch, device)).log_probs.cpu()
        return made

    @abstractmethod
    def choose(self, rewards: Tensor) -> Batch:
        """Which drawings are learnt from, and how.

        Args:
            rewards: float64 [P, G] of each prompt's group.

        Returns:
            What the loss finds in its batch: `owners`, a prompt's place [R], R > 0; `taken`, indices of some of its
            drawings, which are learnt from side by side [R, K]; and what the task adds to them [R, ...].
        """

    def _sample(self, model: UniMMModel, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Codes [N, h, w] on the CPU of a drawing of each prompt."""
        section, parts = self.recipe.sampling, []
        for start in range(0, len(prompts), section.batch_size):
            end = start + section.batch_size
            keys = noise_keys(seeds[start:end], len(prompts[start:end]))
            sampling = SamplingConfig(section.guidance_scale, section.temperature)
            drawn = sample_codes(model, self.processor, prompts[start:end], keys, sampling, self.grid)
            parts.append(drawn.cpu().clone())  # no longer a tensor of inference
        return torch.cat(parts)

    def _rewards(
        self, module: DrawingPolicy, numbers: Sequence[int], seeds: Sequence[int], codes: Tensor
    ) -> Tensor:
        """The scorer's numbers [P, G] for drawings [P, G, h, w]."""
        group, name = codes.shape[1], self.recipe.scorer
        with self._judging(module) as (scorer, um):
            rewards = []
            for place, (number, drawn) in enumerate(zip(numbers, codes, strict=True)):
                prompt, own = self.prompts[number], seeds[place * group : (place + 1) * group]
                try:
                    rewards.append(score_candidates(scorer, image_candidates(um, prompt, own, drawn)))
                except ScorerError as error:
                    raise UserError(f"scorer {name}: prompt {prompt.prompt!r}: {error}") from error
        return torch.tensor(rewards, dtype=torch.float64)

    @contextmanager
    def _judging(self, module: DrawingPolicy) -> Iterator[tuple[Scorer, UniMM]]:
        """The scorer and what decodes drawings.

        A scorer that asks a model asks the reference, so that rewards do not drift with what learns; where there is
        none, what drew.
        """
        with (
            module.as_reference()
            if self.recipe.reference.mode != "none"
            else nullcontext(module.artist) as judge
        ):
            if self.scorer is None:
                tokenizer = module.policy.image_tokenizer  # which a copy lacks
                self.scorer = self._make_scorer(UniMM(judge, self.processor, image_tokenizer=tokenizer))
            yield self.scorer, UniMM(module.policy, self.processor)

    def _make_scorer(self, um: UniMM) -> Scorer:
        """The recipe's scorer; the first process makes it, since it may keep what it fits."""
        with first_process_first():
            return make_scorer(self.recipe.scorer, um, Path(self.recipe.output))

    def _rows(self, numbers: Sequence[int], codes: Tensor) -> Batch:
        """Prompts with drawings [R, K, h, w] as rows, every code position numbered: [R, K, h * w] in order."""
        rows: list[dict[str, Any]] = []
        count = 0
        for number, drawings in zip(numbers, codes, strict=True):
            prompt = Message("user", (self.prompts[number].prompt,))
            for shared in drawings.split(len(drawings) if self.recipe.packed else 1):
                exchange = [prompt, Message("assistant", (DRAWN,))]
                row = branch([self.processor.conversation.write(exchange, [one]) for one in shared])
                arrays = row.arrays()
                labelled = arrays["labels"] != IGNORED
                answers = np.zeros_like(arrays["labels"])
                answers[labelled] = np.arange(count, count + labelled.sum())
                count += int(labelled.sum())
                rows.append({**arrays, "answers": answers})
        images = self.processor.drawn(list(codes.flatten(0, 1)))
        return {**stack_answers(rows, self.processor.pad), "images": images}

    def score(self, model: UniMMModel, batch: Batch) -> AnswerScores:
        """Scores [R K h w] of every code, at the temperature at which it was drawn."""
        count, temperature = batch["taken"].numel() * self.codes, self.recipe.sampling.temperature
        return model.score(batch, count, temperature, self.lockstep)

    def reward_metrics(self, batch: Batch, totals: Mapping[str, float]) -> dict[str, Tensor]:
        """What is logged of rewards [P, G]; of each kind of prompt as sum and count, since a step may have none."""
        rewards, prompts = batch["rewards"], totals["prompts"]
        spread, means = rewards.std(1), rewards.mean(1)
        metrics = {
            "reward": means.sum() / prompts,
            "reward_std": spread.sum() / prompts,
            "no_spread": (rewards == rewards[:, :1]).all(1).double().sum() / prompts,
        }
        kinds = [self.kinds[number] for number in batch["prompt"].tolist()]
        for kind in dict.fromkeys(self.kinds):
            where = torch.tensor([one == kind for one in kinds], device=means.device)
            metrics[f"reward/{kind}"] = sum_and_count(means, where)
        return metrics

    @torch.no_grad()
    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Draw fixed prompts, beside what the model drew before the first step."""
        assert isinstance(module, DrawingPolicy)
        section = self.recipe.preview
        words = dict.fromkeys(prompt.prompt for prompt in self.prompts)
        prompts = list(section.prompts) or list(words)[:PREVIEW_PROMPTS]
        um, device = UniMM(module.policy, self.processor), str(module.policy.device)

        def first() -> dict[str, Any]:
            return {"codes": draw_fixed(load(self.recipe.model, device, "float32"), prompts, section)}

        before = cached_before(folder, first)["codes"]
        sheet = before_and_after(um, prompts, before, draw_fixed(um, prompts, section))
        save_image(sheet, folder / f"{step:06d}.png")


def sum_and_count(values: Tensor, where: Tensor) -> Tensor:
    """Sum and count [2] of the values [N] that a mask [N] picks: a step may have none, and then no mean is logged."""
    return torch.stack([values.detach()[where].double().sum(), where.double().sum()])


def _kind(prompt: DrawingPrompt) -> str:
    """The kind of the scene that a prompt describes."""
    key = prompt.scene
    return PLAIN if key is None else key.scene().kind
