"""Image codes that are kept in a file: files of before are accepted, others are made again, strangers are left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimm.data.emojiscenes import EmojiScenes
from unimm.errors import UserError
from unimm.tokenizers.model import ImageTokenizer, ImageTokenizerConfig
from unimm.training.kept import Kept, kept_codes
from unimm.training.scenes import SceneCodes, encode_scenes

MARK = "tokenizer and data"
OLD, NEW = torch.arange(12).view(3, 2, 2), torch.ones(4, 2, 2, dtype=torch.int64)


def compute() -> Kept:
    """New codes, with a note."""
    return {"codes": NEW}, {"bad": "{}"}


def test_a_file_with_the_mark_as_a_note_is_read(tmp_path: Path) -> None:
    file, notes = tmp_path / "codes.safetensors", {"mark": MARK, "bad": '{"1": []}'}
    save_file({"codes": OLD}, file, notes)
    before = file.read_bytes()
    tensors, found = kept_codes(file, MARK, compute, least=2)
    assert torch.equal(tensors["codes"], OLD) and found == notes
    assert file.read_bytes() == before


@pytest.mark.parametrize("fault", ["absent", "damaged", "another mark", "too few"])
def test_any_other_file_is_made_again_once(tmp_path: Path, fault: str) -> None:
    file = tmp_path / "new/codes.safetensors"
    if fault != "absent":
        file.parent.mkdir()
        save_file({"codes": OLD}, file, {"mark": "of old" if fault == "another mark" else MARK})
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:-8])
    least = 4 if fault == "too few" else 0
    for make in (compute, lambda: pytest.fail("made twice")):
        tensors, notes = kept_codes(file, MARK, make, least)
        assert torch.equal(tensors["codes"], NEW) and notes["bad"] == "{}"


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": OLD}, file, {"format": "pt"})
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"model\.safetensors: this is no file of image codes; name another"):
        kept_codes(file, MARK, compute)
    assert file.read_bytes() == before


def test_codes_of_scenes_have_their_mark_as_a_tensor_too(tmp_path: Path) -> None:
    sizes = ImageTokenizerConfig(
        image_size=64, patch_size=4, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=8,
        codebook_size=32, codebook_dim=4,
    )  # fmt: skip
    tokenizer, scenes = ImageTokenizer(sizes).eval(), EmojiScenes("train", 1, 64, 3)
    file, cpu = tmp_path / "codes.safetensors", torch.device("cpu")
    codes = SceneCodes(file, tokenizer, scenes, cpu)
    assert (
        torch.equal(codes.codes, encode_scenes(tokenizer, scenes, cpu)) and codes.codes.dtype == torch.int16
    )
    stored = load_file(file)
    assert set(stored) == {"codes", "mark"}
    save_file(stored, file)  # as it was before: without notes
    before = file.read_bytes()
    assert torch.equal(SceneCodes(file, tokenizer, EmojiScenes("train", 1, 64, 2), cpu).codes, codes.codes)
    assert file.read_bytes() == before
