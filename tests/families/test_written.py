"""Models written in layouts that they did not come from: transformers reads them, and every tensor comes back."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import unimm
from tests.families.aria_checkpoints import ARIA
from tests.families.fuyu_checkpoints import FUYU
from tests.families.llama_vision_checkpoints import LLAMA_VISION
from tests.families.pixtral_checkpoints import PIXTRAL
from tests.families.qwen2_vl_checkpoints import QWEN2_VL, QWEN2_VL_TIED
from tests.families.survey import Oracle, Reference, picture
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.llama_vision_keys import shard_axis
from unimm.families.shards import ShardedFiles, sharded_files
from unimm.families.source import Checkpoint
from unimm.families.tekken import read_tekken, tekken_document

QUESTIONS = ["what is in this image?", "a"]
REFERENCES = (PIXTRAL, QWEN2_VL, QWEN2_VL_TIED, ARIA, FUYU, LLAMA_VISION)
OTHER = {"transformers": "original", "original": "transformers"}
PAIRS = [(reference, layout) for reference in REFERENCES for layout in reference.layouts]


UNREAD = ("post_layernorm", "rope.freqs")  # tensors that nothing reads, and
PARTLY_READ = (
    "pos_embed.embedding",
    "gated_positional_embedding",
)  # those of Meta's with cells of no arrangement


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, without what nothing reads."""
    if files := sharded_files(folder):
        with ShardedFiles(files, shard_axis) as shards:
            found = dict(shards)
        found = {name: tensor for name, tensor in found.items() if not name.endswith(PARTLY_READ)}
    else:
        found = {key: one for path in folder.glob("*.safetensors") for key, one in load_file(path).items()}
    return {name: tensor for name, tensor in found.items() if not any(part in name for part in UNREAD)}


def shown() -> list[list[Image.Image]]:
    return [[picture(61, 60)], []]


@pytest.mark.parametrize(("reference", "layout"), PAIRS, ids=lambda value: getattr(value, "name", value))
@torch.no_grad()
def test_a_checkpoint_is_written_in_the_other_layout_and_back(
    reference: Reference, layout: str, tmp_path: Path
) -> None:
    oracle = reference.write(tmp_path / "source", layout)
    own = Checkpoint(tmp_path / "source").layout
    other = OTHER[own]
    assert (own == "transformers") == (layout == "transformers")
    expected = unimm.load(tmp_path / "source", device="cpu")
    convert(tmp_path / "source", tmp_path / "other", other)
    assert Checkpoint(tmp_path / "other").layout == other
    written = unimm.load(tmp_path / "other", device="cpu")
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, written.model.state_dict()[name]), name
    before, after = (um.processor(QUESTIONS, shown()) for um in (expected, written))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert expected.processor.end_tokens == written.processor.end_tokens or layout == "original"
    if other == "transformers":
        transformers_agrees(oracle, tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "back", own)
    source, back = weights(tmp_path / "source"), weights(tmp_path / "back")
    assert source.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in source.items())


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)
@torch.no_grad()
def test_a_model_without_a_source_is_written_for_transformers(reference: Reference, tmp_path: Path) -> None:
    """As one that was trained: nothing is kept of a source, not even its chat template."""
    oracle = reference.write(tmp_path / "source", "transformers")
    um = unimm.load(tmp_path / "source", device="cpu")
    with torch.no_grad():
        for parameter in um.model.parameters():
            parameter.mul_(1.01)
    um.save(tmp_path / "own")
    assert not list((tmp_path / "own").glob("source.*"))
    for layout in ("transformers", "original"):
        convert(tmp_path / "own", tmp_path / layout, layout)
        again = unimm.load(tmp_path / layout, device="cpu")
        inputs = um.processor(QUESTIONS, shown())
        assert torch.equal(again.processor(QUESTIONS, shown())["input_ids"], inputs["input_ids"])
        assert torch.equal(again.model(**inputs).logits, um.model(**inputs).logits)
    reloaded = oracle.reloaded(tmp_path / "transformers")
    theirs = reloaded.inputs(QUESTIONS, shown())
    inputs = um.processor(QUESTIONS, shown())
    seen = theirs["attention_mask"].bool()
    assert torch.equal(inputs["input_ids"][seen], theirs["input_ids"][seen])
    assert (um.model(**inputs).logits - reloaded.logits(theirs))[seen].abs().max() < 1e-4


def transformers_agrees(oracle: Oracle, folder: Path) -> None:
    """What transformers reads of a folder gives what the reference that it came from gives."""
    again: Any = oracle.reloaded(folder)
    expected, got = oracle.inputs(QUESTIONS, shown()), again.inputs(QUESTIONS, shown())
    assert expected.keys() == got.keys()
    seen = expected["attention_mask"].bool()  # a layout may name no token for padding
    assert torch.equal(expected["input_ids"][seen], got["input_ids"][seen])
    assert all(torch.equal(expected[name], got[name]) for name in expected if name != "input_ids")
    assert (oracle.logits(expected) - again.logits(got))[seen].abs().max() < 1e-4


def test_tekken_is_written_where_the_text_tokenizer_allows(tmp_path: Path) -> None:
    """Words by rank behind 256 bytes in their order; the small tokenizer of the others has bytes in another."""
    words = [bytes([number]) for number in range(256)] + [b"re", b"red", b" a", b" ap"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"]
    document = {
        "config": {
            "pattern": r"\s?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
            "default_vocab_size": len(words) + len(special),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)
        ],
        "special_tokens": [{"rank": rank, "token_str": name} for rank, name in enumerate(special)],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(document))
    tokenizer = read_tekken(tmp_path / "tekken.json")
    written = tekken_document(tokenizer)
    assert written is not None
    assert written["config"].items() >= document["config"].items()  # type: ignore[attr-defined]
    for name, fields in (("vocab", ("rank", "token_bytes")), ("special_tokens", ("rank", "token_str"))):
        found = [{field: one[field] for field in fields} for one in written[name]]
        assert found == document[name]
    PIXTRAL.write(tmp_path / "source", "transformers")
    assert tekken_document(unimm.load(tmp_path / "source", device="cpu").processor.tokenizer) is None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"connector": {"kind": "mlp", "depth": 1, "norm": "layer"}}, "this model's connector"),
        (
            {"connector": {"kind": "mlp", "depth": 2, "act": "silu"}},
            "have no place for this model's connector",
        ),
    ],
)
def test_a_line_for_what_a_layout_cannot_say(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    QWEN2_VL.write(tmp_path / "source", "transformers")
    um = unimm.load(tmp_path / "source", device="cpu")
    for name, fields in change.items():
        setattr(um.model.config, name, fields)
    shutil.rmtree(tmp_path / "source")
    um.model.config.family = "qwen2_vl"
    changed = type(um.model)(um.model.config)
    um.model = changed
    um.save(tmp_path / "own")
    with pytest.raises(UserError, match=line):
        convert(tmp_path / "own", tmp_path / "other", "transformers")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("part", "change", "line"),
    [
        (
            "decoder",
            {"max_position_embeddings": 512},
            "layouts have no place for this model's decoder.max_position",
        ),
        ("fusion", {"layers": (0, 3)}, "layouts have no place for this model's fusion"),
        ("encoder", {"eps": 1e-6}, "layouts have no place for this model's encoder"),
    ],
)
def test_a_line_for_what_metas_layout_cannot_say(
    part: str, change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    LLAMA_VISION.write(tmp_path / "source", "transformers")
    um = unimm.load(tmp_path / "source", device="cpu")
    setattr(um.model.config, part, {**getattr(um.model.config, part), **change})
    changed = type(um.model)(um.model.config)
    changed.load_state_dict(um.model.state_dict(), strict=False)  # above all the tables of tiles
    um.model = changed
    um.save(tmp_path / "own")
    with pytest.raises(UserError, match=rf"--to: Llama 3.2 Vision's {line}"):
        convert(tmp_path / "own", tmp_path / "other", "original")
    assert not (tmp_path / "other").exists()


def test_a_table_of_tiles_that_metas_layout_cannot_hold_is_named(tmp_path: Path) -> None:
    """transformers has a vector of a tile for each arrangement that it may be in, and training may part them."""
    LLAMA_VISION.write(tmp_path / "source", "transformers")
    um = unimm.load(tmp_path / "source", device="cpu")
    with torch.no_grad():
        um.model.get_parameter("vision.before.table")[1, 0] += 1
    um.save(tmp_path / "own")
    with pytest.raises(UserError, match=r"vision\.before\.table: cannot be written .*more than one vector"):
        convert(tmp_path / "own", tmp_path / "other", "original")
    assert not (tmp_path / "other").exists()
