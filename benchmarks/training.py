"""Training by unimm and by a plain padded PyTorch loop on transformers' Janus: the same weights, samples and AdamW.

    python benchmarks/training.py                    # (a) the mixture of training/embedded.yaml, (b) conversations
    python benchmarks/training.py mixture --rounds 3

The model has the embedded one's size (but 64 features an image, since Janus's layout cannot merge patches), random
weights, float32, on the CPU. Both take the same optimisation steps, on the same samples read ahead by the same thread;
that the losses agree is checked before and after. A sample is a (image, question, answer), a (caption, image) or a
text in both. What they do differently:

- unimm shows an image once and asks all its questions in branches; the plain loop has a row for each question, as
  people write it, with the image in each.
- unimm projects only the positions that a loss counts; the plain loop takes transformers' text loss, on all positions,
  and for drawings what transformers lacks: generation embeddings and aligner in, generation head and cross-entropy out.
- (b): unimm packs (`pack` of a stage); the plain loop pads each micro-batch to its longest row, in the order given.

The two take turns, a few steps each; seconds are medians over the rounds. Memory is the peak of a process that runs
one of them alone, and what of it is above its imports. The wait is for samples, as a share of the step's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from janus import make_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusForConditionalGeneration

from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.data.samples import SampleBuilder
from unimm.data.sources import open_source
from unimm.loading import load_processor
from unimm.models.inputs import Images
from unimm.models.layout import IGNORED
from unimm.processing.rows import stack_rows
from unimm.training.batches import read_ahead
from unimm.training.engine import TrainingEngine, freeze, start_distributed
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedRecipe, UnifiedTask

WORKLOADS = ("mixture", "conversations")
RATE, BETAS, EPS, CLIP = 3e-4, (0.9, 0.95), 1e-8, 1.0
SHORTEST, LONGEST = 20, 600  # tokens of a conversation
SHAPE = Namespace(width=256, layers=6, intermediate=688, vocabulary=785, codes=1024)
CPU = torch.device("cpu")


# --- what is trained on -------------------------------------------------------------------------------------


def write_conversations(path: Path, count: int, model: Path) -> None:
    """Write conversations about scenes, of 20 to 600 tokens, their lengths evenly spread on a logarithmic scale."""
    rng = np.random.default_rng(0)
    scenes, builder = (
        EmojiScenes("train", 3),
        SampleBuilder(load_processor(model), None, lambda pixels: pixels),
    )
    lines = []
    for number in range(count):
        characters = 4.5 * np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST)))  # of as many tokens, about
        turns: list[dict[str, str]] = []
        for index in range(number * 100, number * 100 + 100):
            for asked in scenes[index].questions():
                if turns and sum(len(turn["content"]) + 12 for turn in turns) > characters:
                    break
                turns.append({"role": "user", "content": asked.question})
                turns.append({"role": "assistant", "content": asked.answer})
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    source = open_source(path)
    lengths = [len(builder.row(source[index], [], []).ids) for index in range(count)]
    kept = [number for number, length in enumerate(lengths) if SHORTEST <= length <= LONGEST]
    path.write_text("".join(lines[number] for number in kept), encoding="utf-8")
    tokens = [lengths[number] for number in kept]
    print(
        f"{len(kept)} conversations of {min(tokens)} to {max(tokens)} tokens, {np.mean(tokens):.0f} in the mean"
    )


def write_recipe(folder: Path, workload: str) -> Path:
    """Write the recipe that unimm trains with."""
    parts = ("decoder", "vision", "connector", "code_embedding", "code_head")
    stage: dict[str, Any] = {"name": workload, "steps": 100_000, "lr": dict.fromkeys(parts, RATE)}
    data: dict[str, Any] = {}
    if workload == "mixture":
        stage |= {"batch": 16, "micro_batch": 8}
        shares = {"understanding": 0.45, "text": 0.02, "generation": 0.53}
        stage["mixture"] = {f"emojiscenes/{kind}": share for kind, share in shares.items()}
        data["emojiscenes"] = {"scenes": 512, "codes": str(folder / "codes.safetensors")}
    else:
        write_conversations(folder / "talks.jsonl", 600, folder / "janus")
        data["sources"] = {"talks": {"path": str(folder / "talks.jsonl")}}
        stage |= {"batch": 32, "pack": {"length": LONGEST}, "lr": {"decoder": RATE}, "mixture": {"talks": 1}}
    recipe = {
        "task": "unified",
        "output": str(folder / workload),
        "model": {"pretrained": str(folder / "janus")},
        "data": data,
        "stages": [stage],
        "optimizer": {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "clip": CLIP},
        "device": "cpu",
    }
    path = folder / f"{workload}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_model(folder: Path) -> None:
    """Write a Janus with random weights and a text tokenizer trained on EmojiScenes."""
    scenes = EmojiScenes("train", 0)
    texts = [text for i in range(2000) for text in scenes[i].captions()]
    texts += [word for i in range(2000) for asked in scenes[i].questions() for word in asked[1:]]
    make_checkpoint(folder, SHAPE, texts, SHAPE.vocabulary - 2)


# --- unimm --------------------------------------------------------------------------------------------------


class Ours:
    """unimm: its task, its engine, its reading."""

    name = "unimm"

    def __init__(self, recipe: UnifiedRecipe, stack: ExitStack) -> None:
        start_distributed(CPU)
        stage = recipe.stages[0]
        self.task = UnifiedTask(recipe)
        self.module = self.task.build()
        groups = self.task.groups(self.module)
        freeze(recipe, 0, groups, self.module)
        source = self.task.dataset(stage, recipe.seed)
        self.task.prepare(self.module, stage)
        self.engine = TrainingEngine(recipe, 0, self.task, self.module, groups, CPU)
        self.steps = stack.enter_context(read_ahead(self.task, source, stage, 0))

    @torch.no_grad()
    def loss_of(self, batch: Any) -> float:
        """The loss of one step's batch, without training on it."""
        parts = [self.task.loss(self.module, one, 0, batch.totals)[0] for one in batch.micro_batches]
        return float(sum(parts))

    def step(self, batch: Any) -> float:
        """One optimisation step; gives its loss."""
        return float(self.engine.step(batch.micro_batches, batch.totals, 0, 1.0).loss)


# --- the plain loop -----------------------------------------------------------------------------------------


class Rows(UnifiedTask):
    """The same samples as rows of one question or one drawing each, padded in micro-batches."""

    micro = 16

    def length(self, sample: Mapping[str, Any]) -> int:
        """Rows keep their order."""
        return 0

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        """All micro-batches of a step."""
        rows = [row for sample in samples for row in self.split(sample)]
        parts = [rows[start : start + self.micro] for start in range(0, len(rows), self.micro)]
        return {"parts": [self.pad(part) for part in parts], "samples": len(rows)}

    def split(self, sample: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A row for each branch: the prefix, then the branch."""
        branches = sample["branches"]
        for number in range(min(1, branches.max()), branches.max() + 1):
            mine = (branches == 0) | (branches == number)
            row = {name: sample[name][mine] for name in ("ids", "labels")}
            yield {**row, "images": sample.get("images") or Images()}

    def pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows as one batch, padded on the right."""
        ids = stack_rows([row["ids"] for row in rows], self.processor.pad)
        labels = stack_rows([row["labels"] for row in rows], IGNORED)
        mask = stack_rows([np.ones_like(row["ids"]) for row in rows], 0)
        is_code = self.processor.layout.code_positions(ids)
        batch = {
            "input_ids": ids.masked_fill(is_code, 0),
            "labels": labels.masked_fill(is_code, IGNORED),
            "attention_mask": mask,
            "is_code": is_code,
            "code_labels": labels[is_code],
        }
        images = Images.cat(row["images"] for row in rows) or Images()
        if images.pixels is not None:
            batch["pixel_values"] = images.pixels
        if images.codes is not None:
            batch["codes"] = images.codes.flatten(1)
        return batch

    def targets(self, batch: Any) -> dict[str, int | float]:
        """Positions that the losses count, and rows."""
        parts = batch["parts"]
        return {
            "text_tokens": sum(int((part["labels"][:, 1:] != IGNORED).sum()) for part in parts),
            "code_tokens": sum(len(part["code_labels"]) for part in parts),
            "samples": batch["samples"],
        }


class Plain:
    """A loop as people write it, on transformers' model."""

    name = "plain"

    def __init__(self, recipe: UnifiedRecipe, stack: ExitStack) -> None:
        stage = recipe.stages[0]
        self.model = JanusForConditionalGeneration.from_pretrained(recipe.model.pretrained).train()
        model = self.model.model
        model.vqmodel.requires_grad_(False).eval()
        trained: Sequence[nn.Module] = (model.language_model, self.model.lm_head)
        if len(stage.lr) > 1:
            trained = (*trained, model.vision_model, model.aligner, model.generation_embeddings)
            trained = (*trained, model.generation_aligner, model.generation_head)
        self.parameters = [weight for part in trained for weight in part.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, RATE, betas=BETAS, eps=EPS, weight_decay=0, fused=True
        )
        task = Rows(recipe)
        task.build()  # unimm's model, which is not needed here
        source = task.dataset(stage, recipe.seed)
        whole = stage.model_copy(update={"micro_batch": None, "pack": None})
        self.steps = stack.enter_context(read_ahead(task, source, whole, 0))

    def loss(self, part: Mapping[str, Tensor], totals: Mapping[str, float]) -> Tensor:
        """The loss of a micro-batch, to be added to those of the step's others."""
        embeds = self.model.get_input_embeddings()(part["input_ids"])
        if "pixel_values" in part:
            features = self.model.model.get_image_features(part["pixel_values"]).pooler_output
            places = (part["input_ids"] == self.model.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(places, features)
        if "codes" in part:
            embedded = self.model.prepare_embeddings_for_image_generation(part["codes"])
            embeds = embeds.masked_scatter(part["is_code"][..., None], embedded)
        output = self.model(
            inputs_embeds=embeds, attention_mask=part["attention_mask"], labels=part["labels"],
            num_items_in_batch=max(totals["text_tokens"], 1), output_hidden_states=True, use_cache=False,
        )  # fmt: skip
        if "codes" not in part:
            return output.loss  # type: ignore[no-any-return]
        hidden = output.hidden_states[-1][:, :-1][part["is_code"][:, 1:]]
        logits = self.model.model.generation_head(hidden)
        code_loss = F.cross_entropy(logits, part["code_labels"], reduction="sum")
        return output.loss + code_loss / totals["code_tokens"]  # type: ignore[no-any-return]

    @torch.no_grad()
    def loss_of(self, batch: Any) -> float:
        """The loss of one step's batch, without training on it."""
        (whole,) = batch.micro_batches
        return float(sum(self.loss(part, batch.totals) for part in whole["parts"]))

    def step(self, batch: Any) -> float:
        """One optimisation step; gives its loss."""
        (whole,) = batch.micro_batches
        self.optimizer.zero_grad()
        total = 0.0
        for part in whole["parts"]:
            loss = self.loss(part, batch.totals)
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return total


# --- measuring ----------------------------------------------------------------------------------------------


class Timed:
    """One of the two, with what its rounds took."""

    def __init__(self, side: Ours | Plain) -> None:
        self.side = side
        self.rounds: list[float] = []
        self.waits: list[float] = []
        self.losses: list[float] = []
        self.samples: list[float] = []

    def round(self, steps: int) -> None:
        """Take a few steps."""
        start, waited, samples = time.perf_counter(), 0.0, 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.side.steps)
            waited += time.perf_counter() - asked
            self.losses.append(self.side.step(batch))
            samples += batch.totals.get("samples", 0.0)
        self.rounds.append(time.perf_counter() - start)
        self.waits.append(waited / self.rounds[-1])
        self.samples.append(samples)


def memory() -> float:
    """Peak memory of this process so far in MB; not of the one that started it, as `ru_maxrss` would have it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run_alone(name: str, recipe: UnifiedRecipe, steps: int) -> None:
    """Take steps and print the peak memory, and what of it is above the imports."""
    import deepspeed  # noqa: F401  (both count it, so that the difference is the training's)

    before = memory()
    with ExitStack() as stack:
        Timed(Ours(recipe, stack) if name == Ours.name else Plain(recipe, stack)).round(steps)
        print(json.dumps({"peak": memory(), "above": memory() - before}))


def compare(path: Path, recipe: UnifiedRecipe, options: Namespace) -> None:
    """Check that both do the same, take turns, print."""
    with ExitStack() as stack:
        sides = [Timed(Ours(recipe, stack)), Timed(Plain(recipe, stack))]
        first = [next(side.side.steps) for side in sides]
        before = [side.side.loss_of(batch) for side, batch in zip(sides, first, strict=True)]
        for kind in ("text_tokens", "code_tokens"):
            assert first[0].totals[kind] == first[1].totals[kind], f"{kind}: not the same samples"
        assert abs(before[0] - before[1]) < 1e-3, f"not the same loss: {before}"
        print(f"{recipe.stages[0].name}: loss of the first batch {before[0]:.5f} and {before[1]:.5f}")
        for number in range(options.rounds + 1):
            for side in sides:
                side.round(options.steps if number else 1)
    losses = np.array([side.losses for side in sides])
    print(f"loss of the last step {losses[0, -1]:.4f} and {losses[1, -1]:.4f}, "
          f"at most {np.abs(losses[0] - losses[1]).max():.1e} apart in {losses.shape[1]} steps")  # fmt: skip
    samples = sides[1].samples[1:]  # unimm's totals do not count rows; the steps are the same
    speeds = []
    for side in sides:
        speeds.append([n / seconds for n, seconds in zip(samples, side.rounds[1:], strict=True)])
        command = [
            sys.executable,
            __file__,
            "--alone",
            side.side.name,
            str(path),
            "--steps",
            str(options.steps),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        used = json.loads(done.stdout.splitlines()[-1])
        print(
            f"  {side.side.name:<6}{statistics.median(speeds[-1]):8.1f} samples/s   waits for data "
            f"{statistics.median(side.waits[1:]):.2%}   peak memory {used['peak']:.0f} MB, "
            f"{used['above']:.0f} MB above imports"
        )
    ratios = [ours / theirs for ours, theirs in zip(*speeds, strict=True)]
    print(f"  unimm trains {statistics.median(ratios):.2f} times as many samples a second "
          f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)")  # fmt: skip


def main() -> None:
    """Make the model and the data, compare each workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        run_alone(options.alone[0], read_recipe(Path(options.alone[1])), options.steps)
        return
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place) / "janus")
        for workload in options.workloads or WORKLOADS:
            path = write_recipe(Path(place), workload)
            compare(path, read_recipe(path), options)


def read_recipe(path: Path) -> UnifiedRecipe:
    """Read a recipe of the unified task."""
    recipe = load_recipe(path)
    assert isinstance(recipe, UnifiedRecipe)
    return recipe


if __name__ == "__main__":
    main()
