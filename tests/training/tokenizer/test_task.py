"""The tokenizer's training task: recipes, losses and their sums, one real run, its export and evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unimm.errors import UserError
from unimm.training.recipe import load_recipe
from unimm.training.tokenizer import evaluate
from unimm.training.tokenizer.metrics import codebook_use, comparison, psnr, ssim
from unimm.training.tokenizer.task import (
    Adversarial,
    Quantization,
    TokenizerRecipe,
    TokenizerTask,
    TokenizerTraining,
)
from unimm.training.trainer import train

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tokenizers" / "emojiscenes-tiny.yaml"


def load(*overrides: str, path: Path = TINY) -> TokenizerRecipe:
    recipe = load_recipe(path, overrides)
    assert isinstance(recipe, TokenizerRecipe)
    return recipe


def built(*overrides: str) -> tuple[TokenizerTask, TokenizerTraining]:
    torch.manual_seed(0)
    task = load(*overrides).build_task()
    return task, task.build().train()


def batch(task: TokenizerTask, count: int = 8) -> dict[str, torch.Tensor]:
    source = task.dataset(task.recipe.stages[0], 0)
    return task.collate([source[index] for index in range(count)])


# --- recipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "tokenizers").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_build(path: Path) -> None:
    recipe = load("loss.perceptual.network=null", path=path)  # its weights are not in the repository
    task = recipe.build_task()
    with torch.device("meta"):
        module = task.build()
    assert set(recipe.stages[0].lr) <= set(task.groups(module))
    groups = [id(weight) for group in task.groups(module).values() for weight in group]
    assert len(groups) == len(set(groups)) == len(list(module.parameters()))


def test_the_shipped_tokenizer_gives_64_codes() -> None:
    config = load(path=ROOT / "tokenizers" / "emojiscenes.yaml").build_task().config
    assert (config.image_size, config.stride, config.grid_size) == (64, 8, 8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.l3=1", "loss.l3: unknown key"),
        (
            "model.quantizer.codebook_size=many",
            'model.quantizer.codebook_size: expected an integer, got "many"',
        ),
        ("model.quantizer={kind: fsk}", 'model.quantizer.kind: expected one of vq, .* did you mean "fsq"'),
        ("model.quantizer={levels: [3]}", "model.quantizer.kind: missing"),
        ("model.quantizer={kind: fsq, levels: [2]}", r"model.quantizer.levels\[0\]: expected more than 2"),
        (
            "model.quantizer={kind: fsq, levels: [3], size: 1}",
            r"quantizer.size: unknown key \(known: kind, levels",
        ),
        ("model.quantizer={kind: lfq, codebook_size: 12}", "quantizer.codebook_size: expected a power of 2"),
        ("data.sources={a: {path: b, shorter: [1, 0.5]}}", "shorter: expected two growing shares"),
        ("data.sources={scenes: {path: b}}", "data.sources.scenes: this is a kind of scenes"),
        ("deepspeed.zero_optimization.stage=3", "stage: a tokenizer's weights are not sharded"),
        ("loss.perceptual.network=lpips:vgg16", "'lpips:vgg16': expected one of lpips:vgg"),
        ("stages[0].mixture.scense=1", r"stages\[0\].mixture.scense: unknown kind; .*did you mean"),
        ("stages[1].mixture={}", r"stages\[1\].mixture: no data; give data.sources, or {scenes: 1} here"),
        ("model.image_size=36", "model.image_size: expected a multiple of the stride 8"),
        ("model.block_out_channels=[16, 18]", r"model.block_out_channels\[1\]: expected a multiple of norm"),
        ("stages[1].options.augment=0.5", r"stages\[1\].options: augment: unknown key; did you mean"),
        ("evaluation.splits=[test]", r"evaluation.splits\[0\]"),
    ],
)
def test_mistakes_are_named(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load(override).build_task().build()
    assert "\n" not in str(caught.value)
    assert "emojiscenes-tiny.yaml" in str(caught.value) or "perceptual" in override


def test_schedules_of_the_losses() -> None:
    gan = Adversarial(weight=0.5, start=10, warmup=4)
    assert [gan.weight_at(step) for step in (0, 9, 10, 11, 13, 99)] == [0, 0, 0.125, 0.25, 0.5, 0.5]
    assert Adversarial(weight=0.5).weight_at(0) == 0.5
    codes = Quantization(start=2, ramp=2)
    assert [codes.blend_at(step) for step in (0, 1, 2, 3, 9)] == [0, 0, 0.5, 1, 1]
    assert Quantization().blend_at(0) == 1


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 19])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole(step: int) -> None:
    """Before and with the adversarial loss. The adaptive weight is per micro-batch by nature, so it is off."""
    gradients = []
    for parts in (1, 4):
        # each pass moves the codebook and normalises by its own batch, so both are set to rest here
        task, module = built("model.quantizer.kmeans_init=false", "loss.adversarial.adaptive=false")
        module.tokenizer.eval()
        pixels = batch(task)["pixels"]
        for part in pixels.chunk(parts):
            loss, _ = task.loss(module, {"pixels": part}, step, {"images": float(len(pixels))})
            loss.backward()
        gradients.append({name: w.grad for name, w in module.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("discriminator") for name in gradients[0]) == (step == 19)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("step", [0, 19])
def test_every_weight_learns_and_the_log_keeps_its_columns(step: int) -> None:
    task, module = built()
    images = batch(task)
    loss, metrics = task.loss(module, images, step, {"images": 8.0})
    loss.backward()
    names = {"reconstruction", "commitment", "psnr", "codebook_use", "perplexity"}
    assert set(metrics) == names | {"generator", "discriminator"}
    for name, weight in module.named_parameters():
        if step == 19 or not name.startswith("discriminator"):
            assert weight.grad is not None and weight.grad.isfinite().all(), name


def test_without_an_adversarial_weight_there_is_no_discriminator() -> None:
    task, module = built("loss.adversarial.weight=0")
    assert module.discriminator is None and set(task.groups(module)) == {"tokenizer"}


# --- figures ----------------------------------------------------------------------------------------------


def test_psnr_by_hand() -> None:
    black, grey = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 3, 4, 4), -0.8)  # 0 and 0.1 of 1
    assert psnr(grey, black).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(black - 3, black).tolist() == [100.0, 100.0]


def test_ssim_by_hand() -> None:
    target = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert ssim(target, target).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    # flat images have no variance: only the term of their means is left
    low, high = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.8)
    wanted = (2 * 0.2 * 0.8 + 0.0004) / (0.2**2 + 0.8**2 + 0.0004)
    assert ssim(low, high).item() == pytest.approx(wanted, abs=1e-4)
    # a value of torchmetrics 1.9's structural_similarity_index_measure for the same two images
    rows = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    assert ssim(rows * 0.8, (rows + rows.mT) / 2).item() == pytest.approx(0.2934, abs=1e-4)


def test_codebook_use_by_hand() -> None:
    used, perplexity = codebook_use(torch.tensor([5, 5, 0, 0]))
    assert (used, perplexity) == (0.5, pytest.approx(2.0))
    assert codebook_use(torch.ones(8)) == (1.0, pytest.approx(8.0))


def test_a_sheet_has_each_reconstruction_under_its_original() -> None:
    light, dark = torch.ones(5, 3, 8, 8), -torch.ones(5, 3, 8, 8)
    sheet = np.asarray(comparison(light, dark, columns=3))
    assert sheet.shape == (2 * 22 - 2, 3 * 10 - 2, 3)
    assert (sheet[0:8, 0:8] == 255).all() and (sheet[10:18, 0:8] == 0).all()
    assert (sheet[22:30, 10:18] == 255).all() and (sheet[32:40, 10:18] == 0).all()


# --- a real run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of the tiny recipe, trained for real."""
    folder = tmp_path_factory.mktemp("tokenizer")
    changes = [
        "stages[0].steps=56",
        "loss.adversarial.start=50",
        "logging.samples_every=60",
        "checkpoint.every=60",
    ]
    train(load(f"output={folder}", "logging.tensorboard=false", *changes), quiet=True)
    return folder


def test_training_learns_and_shows_what_it_does(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["psnr"] > lines[0]["psnr"] + 1
    assert lines[0]["discriminator"] == 0 and lines[-1]["discriminator"] > 0
    previews = [json.loads(line) for line in (run / "samples" / "psnr.jsonl").read_text().splitlines()]
    assert previews[-1]["step"] == 60 and {"seen", "vendor"} < set(previews[-1])
    assert Image.open(run / "samples" / "vendor-0000060.png").size == (12 * 34 - 2, 2 * 70 - 2)


def test_evaluation_of_the_export(run: Path) -> None:
    result = evaluate.evaluate_tokenizer(TINY, [f"output={run}"])
    assert json.loads((run / "evaluation" / "metrics.json").read_text()) == result
    assert result["codes"] == 16 and result["codebook_size"] == 32
    for split in ("seen", "composed", "vendor"):
        figures = result[split]
        assert figures["samples"] == 60
        assert 8 < figures["psnr"] < 40 and 0 < figures["ssim"] < 1
        assert 0 < figures["codebook_use"] <= 1
        assert 1 <= figures["perplexity"] <= 32 * figures["codebook_use"] + 1e-6
        assert (run / "evaluation" / f"{split}.png").is_file()


def test_evaluation_sees_a_worse_tokenizer(run: Path) -> None:
    """With the codebook shuffled the same network draws the wrong things."""
    tokenizer = evaluate.load_trained_tokenizer(run / "export")
    good = evaluate.evaluate_split(tokenizer, "vendor", 20, 1)
    before = tokenizer.encode
    tokenizer.encode = lambda pixels: (before(pixels) + 7) % 32  # type: ignore[method-assign]
    bad = evaluate.evaluate_split(tokenizer, "vendor", 20, 1)
    assert bad["psnr"] < good["psnr"] - 1 and bad["ssim"] < good["ssim"]


def test_a_tokenizer_that_is_missing_or_damaged_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json here"):
        evaluate.load_trained_tokenizer(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run / "export" / name).read_bytes())
    whole = load_file(tmp_path / "model.safetensors")
    whole.pop("quant_conv.weight")
    save_file(whole, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"quant_conv.weight missing"):
        evaluate.load_trained_tokenizer(tmp_path)
    data = (run / "export" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        evaluate.load_trained_tokenizer(tmp_path)
