"""Recipes: what they accept, and the one line that each mistake gets."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.training.toy  # noqa: F401 (registers the task)
from unimm.errors import UserError
from unimm.training.recipe import load_recipe

GOOD = """
task: toy
output: out
seed: 3
ema: 0.99
optimizer: {beta2: 0.99, eps: 1e-6, clip: null}
model: {width: 4}
stages:
  - {name: one, steps: 4, batch: 8, micro_batch: 2, lr: {body: 1e-3, head: 1}, warmup: 2, schedule: cosine}
  - {name: two, steps: 2, batch: 4, lr: {head: 5e-4}, mixture: {a: 1, b: 3}, options: {any: [thing]}}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_reads_numbers_defaults_and_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path), ["stages[1].lr.head=2e-4", "stages.0.steps=9", "logging.every=7"])
    assert recipe.stages[0].lr == {"body": 1e-3, "head": 1.0}
    assert recipe.stages[1].lr == {"head": 2e-4}
    assert recipe.stages[0].steps == 9
    assert recipe.logging.every == 7
    assert recipe.optimizer.clip is None
    assert recipe.optimizer.beta1 == 0.9
    assert (recipe.stages[0].micro, recipe.stages[1].micro) == (2, 4)
    assert recipe.source == str(tmp_path / "r.yaml")


MISTAKES = [
    ("steps: 2", "steps: many", 'stages[1].steps: expected an integer, got "many"'),
    ("steps: 2", "steps: 2.0", "stages[1].steps: expected an integer, got 2.0"),
    ("steps: 2", "steps: 0", "stages[1].steps: expected more than 0, got 0"),
    ("steps: 2, ", "", "stages[1].steps: missing"),
    ("head: 1}", "head: -1}", "stages[0].lr.head: expected at least 0, got -1"),
    ("head: 1}", "head: .nan}", "stages[0].lr.head: expected"),
    ("head: 1}", "head: fast}", 'stages[0].lr.head: expected a number, got "fast"'),
    (
        "lr: {head: 5e-4}",
        "lr: {head: 0}",
        "stages[1].lr: every rate is 0, so nothing would train; give head one",
    ),
    ("lr: {head: 5e-4}", "lr: {}", "stages[1].lr: expected at least 1, got {}"),
    ("warmup: 2", "warm_up: 2", 'stages[0].warm_up: unknown key; did you mean "warmup"?'),
    ("width: 4", "widht: 4", 'model.widht: unknown key; did you mean "width"?'),
    ("seed: 3", "Seeds: 3", 'Seeds: unknown key; did you mean "seed"?'),
    ("cosine", "cosin", 'stages[0].schedule: expected one of constant, cosine, linear, got "cosin"'),
    ("micro_batch: 2", "micro_batch: 3", "stages[0].micro_batch: expected a divisor of batch (8), got 3"),
    ("name: two", "name: one", 'stages: two stages are named "one"'),
    ("a: 1, b: 3", "a: 0", "stages[1].mixture: expected at least one share above 0"),
    ("ema: 0.99", "ema: 1.5", "ema: expected less than 1, got 1.5"),
    ("seed: 3", "seed: true", "seed: expected an integer, got true"),
    ("seed: 3", "deepspeed: {gradient_clipping: 1}", 'deepspeed: "gradient_clipping" is set by the trainer'),
    (
        "task: toy",
        "task: tokeniser",
        'task: expected one of tokenizer, siglip, unified, dpo, grpo, online_dpo, toy, got "tokeniser"',
    ),
    ("task: toy", "task: tokeniser", 'did you mean "tokenizer"?'),
    ("task: toy", "", "task: missing; one of"),
    ("output: out", "output: 5", "output: expected a string, got 5"),
    ("model: {width: 4}", "model: [4]", "model: expected a mapping, got [4]"),
    ("seed: 3", "seed: 3\nseed: 4", 'line 5: key "seed" is given twice'),
    ("seed: 3", "seed: {3", "line "),
    (GOOD, "- a list", 'expected a mapping of keys, got ["a list"]'),
]


@pytest.mark.parametrize(("old", "new", "expected"), MISTAKES)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    line = str(caught.value)
    assert line.startswith(f"{path}:")
    assert expected in line
    assert "\n" not in line


OVERRIDES = [
    ("stages[9].steps=5", "stages has the indices 0 to 1, not 9"),
    ("stages[0].steps", "expected key=value"),
    ("=5", "expected key=value"),
    ("seed.x=5", "seed is 3, which has no keys"),
    ("stages[0].step=5", 'stages[0].step: unknown key; did you mean "steps"?'),
    ("stages[0].steps=[1", "override"),
    ("stages[0].steps=a", 'stages[0].steps: expected an integer, got "a"'),
    ("loging.every=5", 'loging: unknown key; did you mean "logging"?'),
    (
        "deepspeed={zero_optimization: {stage: 3, offload_param: {device: cpu}}}",
        "offload_param: weights stay",
    ),
    (
        "deepspeed={zero_optimization: {stage: 3, offload_optimizer: {device: nvme}}}",
        "offload_optimizer: expected {device: cpu}",
    ),
    (
        "deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}",
        "offload_optimizer: needs a stage of 1",
    ),
    ("checkpoint.mode=least", 'checkpoint.mode: expected one of min, max, got "least"'),
]


@pytest.mark.parametrize(("override", "expected"), OVERRIDES)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_range_that_the_shell_has_expanded_is_not_read_as_its_last_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    expanded = [f"output=shards/{number:03d}.tar" for number in range(3)]
    with pytest.raises(UserError, match=r"output: given several times; quote a range for the shell"):
        load_recipe(path, expanded)
    last = load_recipe(path, ["stages[0].steps=5", "stages[0].steps=7", "output=a", "output=b"])
    assert last.stages[0].steps == 7 and last.output == "b"


def test_offloading_on_a_cpu_says_what_it_needs(tmp_path: Path) -> None:
    from unimm.training.engine import pick_device

    offload = "deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}"
    recipe = load_recipe(write(tmp_path), [offload, "device=cpu"])
    assert recipe.offloads and not load_recipe(write(tmp_path)).offloads
    with pytest.raises(UserError, match=r"zero_optimization\.offload_optimizer: .*needs a CUDA device"):
        pick_device(recipe)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="not a text file"):
        load_recipe(tmp_path / "b.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
