"""From a model to a better one by one command: draw candidates, rank them, train on the pairs, measure.

Every step leaves a file or a folder and resumes where it was stopped; what is there already is not made again.
`folder/seed-K` holds `before.json`, `after.json` and, for each round, `round-R` with `candidates.jsonl`,
`pairs.jsonl` and `training/export`. A round starts from the model of the one before, on new prompts. Where the
training recipe is one of the tasks that draw and score for themselves (`ONLINE`), a round is that training alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from unimm.console import print_table, progress
from unimm.errors import UserError
from unimm.evaluation.emojiscenes.drawing import prompt_for
from unimm.evaluation.emojiscenes.judge import Judge
from unimm.evaluation.recipe import JudgeSection
from unimm.files import atomic_write
from unimm.images import save_image
from unimm.loading import load
from unimm.outputs import check_output, document_has
from unimm.pipeline import UniMM
from unimm.preferences.candidates import (
    DrawingPrompt,
    Emphasis,
    KindShares,
    draw_candidates,
    read_candidates,
    read_prompts,
    scene_prompts,
)
from unimm.preferences.measure import Measure, compare, held_out, measure_drawings, measure_words
from unimm.preferences.rank import Rules, rank_candidates
from unimm.preferences.scorers import make_scorer
from unimm.recipes import find_recipe
from unimm.sections import NotNegative, Positive, Section, near, read_yaml, validate
from unimm.sheet import Card, Line, SheetSection, draw_sheet
from unimm.training.recipe import load_recipe

ALIGNMENT_TASK = "alignment"
ONLINE = ("grpo", "online_dpo")  # tasks that draw and score for themselves
TIMES_FILE = "seconds.json"
SHOWN_PROMPTS = 32  # prompts on the sheet of drawings before and after
Guidance = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Prompts(Section):
    """What candidates are drawn of: captions of training scenes, or a file of one's own."""

    scenes: Positive = 1500
    kinds: KindShares | None = None
    """Shares of the kinds of scene; null: their usual ones. A recipe of `ONLINE` has them in its mixture."""
    emphasis: Emphasis = 1.0
    """Weight of the questions about what a scene is for, against 1 of the others (`scene_prompts`)."""
    file: str | None = None
    """A prompt a line, or `.jsonl` with questions; null: captions of scenes."""


class Candidates(Section):
    """How candidates are drawn."""

    n: Annotated[int, Field(ge=2)] = 8
    guidance_scale: Guidance = 2.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_k: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None


class Ranking(Section):
    """By what, and which prompts make a pair; see `unimm.preferences.rank.Rules`."""

    scorer: str = "self-vqa"
    margin: Annotated[float, Field(ge=0)] = 0.1
    easy: float | None = 0.95
    hard: float | None = 0.05
    each: Positive = 1
    """Most pairs of a prompt."""
    on_error: Literal["skip", "stop"] = "stop"


class Training(Section):
    """What trains on the pairs."""

    recipe: str = "training/dpo-embedded"
    """A recipe of the task `dpo`, or of one of `ONLINE`: a file, or the name of a shipped one; its model, data or
    prompts, seed and output are set."""
    overrides: tuple[str, ...] = Field(default=(), strict=False)
    processes: Positive = 1


class RoundSection(Section):
    """One round, or several alike: sections that differ from the recipe's own."""

    times: Annotated[int, Field(gt=0, le=100)] = 1
    prompts: Prompts | None = None
    candidates: Candidates | None = None
    ranking: Ranking | None = None
    training: Training | None = None


def _rounds(given: Any) -> Any:
    """A bare number stands for so many rounds of the recipe's own sections."""
    if given == []:
        raise ValueError("expected a number of rounds, or a list of at least one")
    return [{"times": given}] if isinstance(given, int) else given


class AlignmentRecipe(Section):
    """The whole loop."""

    task: Literal["alignment"]
    output: Annotated[str, Field(min_length=1)]
    model: str | None = None
    """Folder or hub id of the model to align; null or "embedded": the embedded model."""
    seeds: Annotated[tuple[NotNegative, ...], Field(min_length=1, strict=False)] = (0,)
    """One loop for each: of prompts, candidates, training and the drawings that are judged."""
    rounds: Annotated[tuple[RoundSection, ...], Field(strict=False), BeforeValidator(_rounds)] = (
        RoundSection(),
    )
    """Times that the model is drawn from, ranked and trained, each on prompts of its own: a number, or a list where
    rounds differ."""
    prompts: Prompts = Prompts()
    candidates: Candidates = Candidates()
    ranking: Ranking = Ranking()
    training: Training = Training()
    measure: Measure = Measure()
    judge: JudgeSection = JudgeSection()

    def each_round(self) -> list[AlignmentRecipe]:
        """The recipe as each round has it."""
        return [
            self.model_copy(update={name: section for name, section in one if name != "times" and section})
            for one in self.rounds
            for _ in range(one.times)
        ]


def load_alignment(path: str | Path, overrides: Iterable[str] = ()) -> AlignmentRecipe:
    """Read a recipe of the loop.

    Raises:
        UserError: one line naming the file and the key.
    """
    data = read_yaml(path, overrides)
    if data.get("task") != ALIGNMENT_TASK:
        task = data.get("task")
        raise UserError(
            f'{path}: task: expected "{ALIGNMENT_TASK}", got "{task}"{near(task, [ALIGNMENT_TASK])}'
        )
    recipe = validate(AlignmentRecipe, data, str(path))
    # What is wrong with the training recipe is said before hours of drawing.
    for number, own in enumerate(recipe.each_round()):
        try:
            planned = Round(own, recipe.seeds[0], number, recipe.model, Path(recipe.output))
            load_recipe(planned.training, planned.overrides())
        except UserError as error:
            raise UserError(f"{path}: training.recipe: {error}") from None
    return recipe


def align(recipe: AlignmentRecipe) -> dict[str, Any]:
    """Run the loop once for each seed and compare before with after.

    Returns:
        `drawings` and `words`, as `unimm.preferences.measure.compare` gives them over all seeds; `seeds`, the same of
        each; `pairs`, what ranking counted in each round; `seconds` of each step. It is also written to `report.json`.

    Raises:
        UserError: a step cannot be done; what was done before it is kept.
    """
    output = Path(recipe.output)
    check_output(output / "report.json", "an earlier report", document_has("drawings", "pairs", "seconds"))
    output.mkdir(parents=True, exist_ok=True)
    loops = [Loop(recipe, seed, output) for seed in recipe.seeds]
    runs = [loop.run() for loop in loops]
    report = {
        **compare(runs),
        "seeds": {loop.seed: compare([run]) for loop, run in zip(loops, runs, strict=True)},
        "pairs": {loop.seed: loop.read_each("ranking.json") for loop in loops},
        "seconds": {loop.seed: loop.seconds() for loop in loops},
    }
    _write(output / "report.json", report)
    return report


class Round:
    """One round of one seed, from a model and prompts to a better model; what is made already is kept.

    Args:
        recipe: of the loop, as this round has it.
        seed: of the loop.
        number: of the round, from 0.
        source: the model to start from; None: the embedded model.
        folder: of the loop.
    """

    def __init__(
        self, recipe: AlignmentRecipe, seed: int, number: int, source: str | None, folder: Path
    ) -> None:
        self.recipe, self.seed, self.source = recipe, seed, source
        # Scenes of another seed than those of other loops and rounds, and than those that the model was trained on.
        self.scene_seed = 1000 + 100 * number + seed
        self.folder = folder / f"round-{number + 1}"
        self.pairs, self.export = self.folder / "pairs.jsonl", self.folder / "training" / "export"
        self.training = find_recipe(recipe.training.recipe)
        self.online = read_yaml(self.training).get("task") in ONLINE

    def run(self) -> str:
        """Go through the steps; returns the folder of the model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.export.exists():
            if not self.online:
                self.rank()
            self.train()
        return str(self.export)

    def rank(self) -> None:
        """Draw and score the candidates; keep the pairs."""
        if (self.folder / "ranking.json").exists():
            return
        recipe, file, um = self.recipe, self.folder / "candidates.jsonl", load(self.source)
        prompts = read_prompts(recipe.prompts.file) if recipe.prompts.file else self._scenes()
        drawn = recipe.candidates.model_dump()
        settings = {"model": self.source or "embedded", **{k: v for k, v in drawn.items() if k != "n"}}
        with _timed(self.folder, "draw"), progress("candidates") as on_progress:
            draw_candidates(um, prompts, file, recipe.candidates.n, self.seed, settings, on_progress)
        asked = recipe.ranking.model_dump()
        name = asked.pop("scorer")
        with _timed(self.folder, "rank"), progress("scores") as on_progress:
            scorer = make_scorer(name, um, self.folder.parents[1])
            rows = read_candidates(file)
            counts = rank_candidates(um, rows, scorer, name, self.pairs, Rules(**asked), on_progress)
        _write(self.folder / "ranking.json", counts)

    def _scenes(self) -> list[DrawingPrompt]:
        asked = self.recipe.prompts
        return scene_prompts("train", self.scene_seed, asked.scenes, asked.emphasis, asked.kinds)

    def overrides(self) -> list[str]:
        """What the training recipe is overridden with."""
        output, model = json.dumps(str(self.folder / "training")), json.dumps(self.source)
        overrides = [f"output={output}", f"model={model}", f"seed={self.seed}"]
        if self.online:
            asked = self.recipe.prompts
            emphasis = ".inf" if math.isinf(asked.emphasis) else asked.emphasis
            scenes = f"{{scenes: {asked.scenes}, seed: {self.scene_seed}, emphasis: {emphasis}}}"
            overrides += [
                f"prompts={{file: {json.dumps(asked.file)}}}" if asked.file else f"prompts={scenes}"
            ]
        else:
            overrides += [f"data.file={json.dumps(str(self.pairs))}"]
        return [*overrides, *self.recipe.training.overrides]

    def train(self) -> None:
        """Train, in processes of its own, from the newest checkpoint."""
        count = self.recipe.training.processes
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        trainer = ["-m", "unimm.training.trainer", str(self.training), *self.overrides()]
        command = [sys.executable, *(launcher if count > 1 else []), *trainer]
        threads = max(torch.get_num_threads() // count, 1)
        with _timed(self.folder, "train"):
            done = subprocess.run(
                command, env={"OMP_NUM_THREADS": str(threads), **os.environ}, stdout=sys.stderr
            )
        if done.returncode or not self.export.exists():
            raise UserError(
                f"{self.training}: training stopped with status {done.returncode}; give the command again to resume"
            )


class Loop:
    """The loop of one seed; every method makes its file unless it is there."""

    def __init__(self, recipe: AlignmentRecipe, seed: int, output: Path) -> None:
        self.recipe, self.seed, self.output = recipe, seed, output
        self.folder = output / f"seed-{seed}"
        self.rounds: list[Round] = []

    def run(self) -> tuple[Any, Any]:
        """Go through the rounds; returns what was measured before and after."""
        for name in ("before", "after"):  # a mistake is said before an hour of training
            self.measured(name)
        source = self.recipe.model
        for number, recipe in enumerate(self.recipe.each_round()):
            self.rounds.append(Round(recipe, self.seed, number, source, self.folder))
            source = self.rounds[-1].run()
        assert source is not None
        before = self.measure("before", self.recipe.model)
        after = self.measure("after", source)
        self.show(source)
        return before, after

    def read_each(self, name: str) -> list[Any]:
        """A file of each round, where it has one."""
        files = [one.folder / name for one in self.rounds]
        return [_read(file) for file in files if file.exists()]

    def seconds(self) -> dict[str, float]:
        """What each step took, over all rounds."""
        total: dict[str, float] = {}
        for seconds in [*self.read_each(TIMES_FILE), _read(self.folder / TIMES_FILE)]:
            for step, took in seconds.items():
                total[step] = round(total.get(step, 0) + took, 1)
        return total

    def measure(self, name: str, source: str | None) -> Any:
        """Figures of the model before or after."""
        kept = self.measured(name)
        if kept is not None:
            return kept
        section, um = self.recipe.measure, load(source)
        judge = Judge(self.recipe.judge, self.output / "judge.safetensors", str(um.model.device))
        with _timed(self.folder, f"measure {name}"), progress(f"drawings {name}") as on_progress:
            drawings = measure_drawings(um, judge, section, self.seed, on_progress)
            words = self._words(um, name)
        asked = section.model_dump(mode="json")
        figures = {"measure": asked, "drawings": drawings, "words": words}
        _write(self.folder / f"{name}.json", figures)
        return figures

    def measured(self, name: str) -> Any:
        """Figures that were taken already, or None.

        Raises:
            UserError: they were taken with other settings.
        """
        file = self.folder / f"{name}.json"
        if not file.exists():
            return None
        kept = _read(file)
        if kept.get("measure") != self.recipe.measure.model_dump(mode="json"):
            raise UserError(f"{file}: measured with other settings; remove it, or put `measure` back")
        return kept

    def _words(self, um: UniMM, name: str) -> Any:
        """Figures of words; before, they are the same for every seed."""
        section = self.recipe.measure
        if not section.words:
            return {}
        if name != "before":
            return measure_words(um, section)
        file, asked = self.output / "words.json", section.model_dump(mode="json")
        if not file.exists() or _read(file).get("measure") != asked:
            _write(file, {"measure": asked, "words": measure_words(um, section)})
        return _read(file)["words"]

    def show(self, source: str) -> None:
        """A sheet of held-out prompts drawn before and after from the same random streams."""
        sheet = self.folder / "before-after.png"
        if sheet.exists():
            return
        section = self.recipe.measure
        models = (load(self.recipe.model), load(source))
        scenes, seeds = held_out(models[0], section, self.seed, range(min(SHOWN_PROMPTS, section.prompts)))
        prompts = [prompt_for(scene) for scene in scenes]
        drawn = [
            um.draw(
                prompts,
                seed=seeds[:: section.n],
                guidance_scale=section.guidance_scale,
                temperature=section.temperature,
            )
            for um in models
        ]
        cards = [Card(list(pair), [Line(prompt)]) for prompt, *pair in zip(prompts, *drawn, strict=True)]
        title = f"held-out prompts, seed {self.seed}: before on the left, after on the right"
        save_image(draw_sheet("Aligned drawings", title, [SheetSection("Same random streams", cards)]), sheet)


@contextmanager
def _timed(folder: Path, step: str) -> Iterator[None]:
    """Add the seconds of a step to what it took before it was stopped."""
    start = time.monotonic()
    try:
        yield
    finally:
        file = folder / TIMES_FILE
        seconds = _read(file) if file.exists() else {}
        seconds[step] = round(seconds.get(step, 0) + time.monotonic() - start, 1)
        _write(file, seconds)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, document: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def show_alignment(document: dict[str, Any]) -> None:
    """Print the tables of a report: figures of drawings with the change's interval, then of words."""
    rows = []
    for name, change in document["drawings"].items():
        scale = 1 if name in ("codes", "distance") else 100
        cells = [f"{scale * change[key]:.3g}" for key in ("before", "after")]
        interval = [f"{scale * change[key]:+.3g}" for key in ("change", "low", "high")]
        rows.append((name, *cells, interval[0], f"{interval[1]} … {interval[2]}", change["prompts"]))
    print_table(("drawings", "before", "after", "change", "95 %", "prompts"), rows)
    words = [
        (
            f"{name}, {split}",
            f"{100 * f['before']:.1f}",
            f"{100 * f['after']:.1f}",
            f"{100 * f['change']:+.1f}",
        )
        for split, figures in document["words"].items()
        for name, f in figures.items()
    ]
    if words:
        print_table(("words", "before", "after", "change"), words)
