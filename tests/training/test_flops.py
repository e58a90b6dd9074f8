"""The count of operations is torch's own of the same step, and the log says what became of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import unimm
from tests.models.test_fusion import LIKE_LLAMA, build, sample
from unimm.data.emojiscenes.settings import SAMPLE_KINDS
from unimm.models.attention import dense_mask
from unimm.models.memory import who_looks
from unimm.training.batches import read_step
from unimm.training.flops import Counts, Operations
from unimm.training.recipe import load_recipe
from unimm.training.tasks.unified import UnifiedTask
from unimm.training.trainer import train

SIDE = 4  # features a side of the tiny encoder
ALL = ("decoder", "vision", "connector", "code_embedding", "code_head")


def recipe_file(folder: Path, tiny: Path, trained: tuple[str, ...], kind: str) -> Path:
    stage = {
        "name": "one",
        "steps": 2,
        "batch": 4,
        "lr": dict.fromkeys(trained, 1e-3),
        "mixture": {f"emojiscenes/{kind}": 1},
    }
    recipe = {
        "task": "unified",
        "output": str(folder / "run"),
        "model": {"pretrained": str(tiny)},
        "data": {"emojiscenes": {"scenes": 8, "lattice": 4}},
        "stages": [stage],
        "logging": {"every": 1, "tensorboard": False, "peak_tflops": 0.5},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        *((kind, trained) for kind in SAMPLE_KINDS for trained in (ALL, ("decoder",))),
        ("generation", ("code_head",)),
        ("understanding", ("connector",)),
    ],
)
def test_the_count_is_torchs(tiny: Path, tmp_path: Path, kind: str, trained: tuple[str, ...]) -> None:
    recipe = load_recipe(recipe_file(tmp_path, tiny, trained, kind))
    task = recipe.build_task()
    assert isinstance(task, UnifiedTask)
    model, source = task.build(), task.dataset(recipe.stages[0], 0)
    for name, group in task.groups(model).items():
        for parameter in group:
            parameter.requires_grad_(name in trained)
    model.decoder.set_attn_implementation("eager")  # type: ignore[union-attr, operator]
    batch = task.collate([source[0]])
    assert (batch["rows"].samples >= 0).all()
    with FlopCounterMode(display=False) as counter:
        loss, _ = task.loss(model, batch, 0, task.targets(batch))
        loss.backward()
    words, codes = task.targets(batch).values()
    length = batch["input_ids"].shape[1]
    # eager attention computes what the mask then hides
    features = SIDE**2 * (kind == "understanding")
    counts = Counts(length, length**2, words, codes, features, features**2)
    found = Operations(unimm.load(tiny).model, trained).of(counts)
    # the connectors are not counted; norms are, as if they were matrices
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_padding_and_hidden_pairs_are_not_counted(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, tiny, ("decoder",), "understanding"))
    task = recipe.build_task()
    assert isinstance(task, UnifiedTask)
    model = task.build()
    task.prepare(model, recipe.stages[0])
    source = task.dataset(recipe.stages[0], 0)
    apart = sum(task.targets(task.collate([source[i]]))["operations"] for i in range(4))
    together = read_step(task, source, recipe.stages[0], 0).totals["operations"]
    assert together == pytest.approx(apart, rel=1e-12)
    batch = task.collate([source[0], source[1]])
    rows = batch["rows"]
    real, mask = rows.samples >= 0, dense_mask(rows.samples, rows.branches)
    seen = mask[:, 0][real].sum()  # what each real position looks at
    words, codes, _ = task.targets(batch).values()
    counts = Counts(int(real.sum()), int(seen), words, codes, 2 * SIDE**2, 2 * SIDE**4)
    assert Operations(model, ("decoder",)).of(counts) == task.targets(batch)["operations"]


def test_the_log_has_utilisation(tiny: Path, tmp_path: Path) -> None:
    train(load_recipe(recipe_file(tmp_path, tiny, ("decoder", "code_head"), "generation")), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["tflops"] > 0 and line["mfu"] == pytest.approx(line["tflops"] / 0.5)
    assert torch.isfinite(torch.tensor([line["mfu"] for line in lines])).all()


@pytest.mark.parametrize("trained", [("fusion", "decoder", "connector"), ("connector", "fusion", "vision")])
def test_what_is_looked_at_counts(trained: tuple[str, ...]) -> None:
    """Blocks compute what no token sees as well; from the first token on all of a memory is seen here."""
    model = build(LIKE_LLAMA).train()
    ids, images = sample(model, [(1, 1)], before=0, after=9)
    for name, part in model.parts().items():
        part.requires_grad_(name in trained)
    model.decoder.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, images=images, labels=ids).loss.backward()
    length, features = ids.shape[1], 4
    assert model.remembering is not None
    looks = who_looks(length, None, None, ids.device)
    looked = model.remembering.counts(model.layout.feature_positions(ids), [(1, 1)], looks)
    assert looked == {"memory": features, "looking": length, "looks": length * features}
    counts = Counts(length, length**2, length - 1, 0, features, features**2, **looked)
    assert Operations(model, trained).of(counts) == pytest.approx(counter.get_total_flops(), rel=0.03)
