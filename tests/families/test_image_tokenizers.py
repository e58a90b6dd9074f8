"""Image tokenizers alone, in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from tests.families.emu3_checkpoints import emu3
from tests.families.emu3_checkpoints import original as original_emu3
from tests.families.janus_checkpoints import janus
from tests.families.janus_checkpoints import original as original_janus
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.families.image_tokenizers import load_image_tokenizer

PREFIX = "gen_vision_model."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> JanusForConditionalGeneration:
    return janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def llamagen(model: JanusForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as LlamaGen publishes it: the weights inside a dictionary, in a pickle."""
    folder = tmp_path_factory.mktemp("llamagen")
    weights = original_janus(folder / "janus", model)
    own = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    torch.save({"model": own, "steps": 3}, folder / "vq_ds8.pt")
    return folder / "vq_ds8.pt"


@torch.no_grad()
def test_llamagen_from_its_file_and_back(
    llamagen: Path, model: JanusForConditionalGeneration, tmp_path: Path
) -> None:
    tokenizer = load_image_tokenizer(llamagen)
    codes = torch.randint(70, (2, 4, 4))
    expected = model.model.vqmodel.decode(codes.flatten(1)).clamp(-1, 1)
    assert (tokenizer.decode(codes) - expected).abs().max() < 1e-4
    assert main(["convert", str(llamagen), str(tmp_path / "ours"), "--to", "unimm"]) == 0
    assert torch.equal(load_image_tokenizer(tmp_path / "ours").decode(codes), tokenizer.decode(codes))
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "original"]) == 0
    before, after = torch.load(llamagen)["model"], load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@torch.no_grad()
def test_emu3_from_its_folder_and_back(tmp_path: Path) -> None:
    original_emu3(tmp_path / "original", emu3(tmp_path / "transformers"))
    source = tmp_path / "original" / "Emu3-VisionTokenizer"
    pixels = torch.rand(2, 3, 16, 12) * 2 - 1
    codes = load_image_tokenizer(source).encode(pixels)
    assert main(["convert", str(source), str(tmp_path / "ours"), "--to", "unimm"]) == 0
    assert torch.equal(load_image_tokenizer(tmp_path / "ours").encode(pixels), codes)
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "original"]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="this is no whole image tokenizer"):
        load_image_tokenizer(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no such file or folder"):
        load_image_tokenizer(tmp_path / "nothing.pt")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type: 'llama' is no image tokenizer"):
        load_image_tokenizer(tmp_path)
