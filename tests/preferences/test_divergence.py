"""`kl` of the task `dpo`: held against the exact divergence of full distributions, and never below 0."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unimm.models.configuration import SamplingConfig
from unimm.models.inputs import Images
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.preferences.dpo import PreferenceTask
from unimm.preferences.losses import k3
from unimm.preferences.policy import PolicyModel
from unimm.sampling.drawing import sample_codes
from unimm.sampling.sampler import noise_keys
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

PROMPTS = ["a red apple", "blue", "what is this?", "a red apple on a blue background"]
DRAWN = 96


def write_recipe(folder: Path, tiny: Path, data: Path, **more: Any) -> Path:
    recipe = {
        "task": "dpo",
        "output": str(folder / "run"),
        "device": "cpu",
        "model": str(tiny),
        "data": {"file": str(data)},
        "stages": [{"name": "a", "steps": 30, "batch": 8, "lr": {"decoder": 1e-2, "code_head": 1e-2}}],
        "logging": {"every": 1, "tensorboard": False},
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def drawn(tiny_model: UniMM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that the tiny model drew itself, from its own distribution."""
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(DRAWN)]
    um = tiny_model
    with torch.no_grad():
        options = (noise_keys(0, DRAWN), SamplingConfig(guidance_scale=1.0))
        codes = sample_codes(um.model, um.processor, prompts, *options).tolist()
    half = DRAWN // 2
    rows = [
        {
            "prompt": prompts[index],
            "chosen": {"codes": codes[index]},
            "rejected": {"codes": codes[half + index]},
        }
        for index in range(half)
    ]
    path = tmp_path_factory.mktemp("drawn") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def distributions(model: UniMMModel, sample: dict[str, Any], side: str) -> Tensor:
    """Log-probabilities of every code at each position of a drawing, alone in its row."""
    stream = model.embed(
        torch.tensor([sample[side]["row"].ids]), Images(codes=sample[side]["codes"][None])
    ).stream
    hidden = model.decode(stream).last_hidden_state[0, len(sample["prompt"]) - 1 : -1]
    return model.code_logits(hidden).double().log_softmax(-1)


@pytest.mark.parametrize("moved", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("mode", ["copy", "precomputed"])
def test_it_is_the_exact_divergence_within_its_error(
    drawn: Path, tiny: Path, tmp_path: Path, moved: float, mode: str
) -> None:
    section = {"mode": mode} | ({"file": str(tmp_path / "r.safetensors")} if mode == "precomputed" else {})
    task = load_recipe(write_recipe(tmp_path, tiny, drawn, reference=section)).build_task()
    assert isinstance(task, PreferenceTask)
    module = task.build()
    assert isinstance(module, PolicyModel)
    task.dataset(task.recipe.stages[0], 0)
    assert task.pairs is not None
    reference = UniMMModel(module.policy.config).eval()
    reference.load_state_dict(module.policy.state_dict())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in module.policy.code_head.parameters():
            one += moved * torch.randn(one.shape, generator=generator)
    samples = [task.pairs[index] for index in range(len(task.pairs))]
    batch = task.collate(samples)
    _, metrics = task.loss(module, batch, 0, task.targets(batch))
    exact, estimates = [], []
    for sample in samples:
        for side in ("chosen", "rejected"):
            theirs, ours = (distributions(model, sample, side) for model in (reference, module.policy))
            exact.append((theirs.exp() * (theirs - ours)).sum(-1))
            codes = sample[side]["codes"].flatten()[:, None]
            estimates.append(k3(theirs.gather(-1, codes), ours.gather(-1, codes))[:, 0])
    divergence, values = torch.cat(exact).mean().item(), torch.cat(estimates)
    found, error = float(metrics["image/kl"]), values.std().item() / math.sqrt(len(values))
    assert found == pytest.approx(values.mean().item(), rel=1e-3)
    assert abs(found - divergence) < 3 * error < 0.5 * divergence


@pytest.mark.parametrize("packed", ["true", "false"])
def test_a_step_that_cancels_is_still_told(drawn: Path, tiny: Path, tmp_path: Path, packed: str) -> None:
    """What the chosen gain and the rejected lose must not add up to nothing, or to less."""
    overrides = [f"data.packed={packed}", "image.losses={sigmoid: 0.05, cross_entropy: 1}"]
    train(load_recipe(write_recipe(tmp_path, tiny, drawn), overrides), quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [line["image/kl"] for line in lines]
    assert values[0] == 0 and min(values) >= 0
    assert lines[-1]["image/margin"] > 0.1 and values[-1] > 0.01


def test_without_a_reference_there_is_no_divergence(drawn: Path, tiny: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, drawn, reference={"mode": "none"})
    train(load_recipe(recipe, ["stages[0].steps=1"]), quiet=True)
    assert "image/kl" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


@given(st.lists(st.tuples(*[st.floats(-60, 0)] * 2), min_size=1, max_size=20), st.floats(0, 1e-6))
def test_k3_is_never_below_0(pairs: list[tuple[float, float]], near: float) -> None:
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    for other in (theirs, ours + near, ours - near):
        assert (k3(ours, other) >= 0).all() and k3(ours, other).isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_k3_weighted_by_all_outcomes_is_the_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (3 * torch.randn(2, 40, generator=generator, dtype=torch.float64)).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), exact)
