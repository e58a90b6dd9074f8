"""Emu3 from any layout to any other: every tensor, the text tokenizer, logits and codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Emu3Config, Emu3ForConditionalGeneration, Emu3Processor
from transformers.models.emu3.configuration_emu3 import Emu3TextConfig, Emu3VQVAEConfig

import unimm
from tests.families.emu3_checkpoints import FIRST, IMAGES, emu3, inner, original
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.emu3_text_tokenizer import read_text_tokenizer
from unimm.families.source import Checkpoint
from unimm.loading import describe

VISION = "Emu3-VisionTokenizer"
TEXTS = ("a red apple", "don't  4*12\n\nCafe\u0301 apple<|image token|>red", "🐼 漢字, USER: 1024 ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in every layout; `ours-original` came to us from the original."""
    folder = tmp_path_factory.mktemp("emu3")
    original(folder / "original", emu3(folder / "transformers"))
    inner(folder / "inner", folder / "transformers")
    for layout in ("original", "transformers", "inner"):
        convert(folder / layout, folder / f"ours-{layout}", "unimm")
    convert(folder / "original", folder / "new-transformers", "transformers")
    convert(folder / "transformers", folder / "new-original", "original")
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, those of its vision tokenizer under its folder's name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{file.parent.relative_to(folder)}:{name}": t
        for file in files
        for name, t in load_file(file).items()
    }


def _same(one: Path, two: Path) -> None:
    before, after = _weights(one), _weights(two)
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("source", ["ours-original", "ours-transformers", "transformers", "original"])
def test_every_tensor_arrives_in_the_other_layout(folder: Path, tmp_path: Path, source: str) -> None:
    for layout in ("transformers", "original"):
        target = tmp_path / layout
        if source == layout:
            target = folder / f"new-{'original' if layout == 'transformers' else 'transformers'}"
            back = tmp_path / "back"
            convert(target, back, layout)
            target = back
        else:
            convert(folder / source, target, layout)
        _same(folder / layout, target)


def test_transformers_runs_what_came_from_the_original(folder: Path) -> None:
    loaded, loading = Emu3ForConditionalGeneration.from_pretrained(
        folder / "new-transformers", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    theirs = loaded.eval()
    assert (
        theirs.config.vocabulary_map["<image>"]
        == theirs.config.image_token_id
        == 300 + FIRST.index("<|extra_0|>")
    )
    ours = unimm.load(folder / "original", device="cpu")
    processor = Emu3Processor.from_pretrained(folder / "new-transformers")
    processor.downsample_ratio = 4  # fixed at 8 in its code
    image = ours.draw("a red apple", temperature=0, size=(24, 16))[0]
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a red apple "}]},
    ]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    mine = ours.processor([" a red apple "], [[image]])
    assert (inputs["pixel_values"] - mine["pixel_values"]).abs().max() < 1e-4
    seen = mine["input_ids"].clone()
    seen[seen == ours.model.layout.feature] = theirs.config.image_token_id
    assert torch.equal(seen, inputs["input_ids"])
    with torch.no_grad():
        logits, expected = ours.model(**mine).logits, theirs(**inputs).logits
    assert (logits - expected).abs().max() < 1e-4 and expected.std() > 0.1
    written = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, seen.shape[1] :]
    assert ours.ask(image, " a red apple ", 64).startswith(
        processor.tokenizer.decode(written, skip_special_tokens=True).strip()
    )


@pytest.mark.parametrize("new", ["new-original", "new-transformers", "ours-inner", "inner"])
def test_the_same_logits_and_greedy_codes_wherever_it_came_from(folder: Path, new: str) -> None:
    one, two = (unimm.load(folder / name, device="cpu") for name in ("ours-original", new))
    ids = torch.tensor([one.processor.ids("what is it", [one.processor.layout.begin])])
    with torch.no_grad():
        assert torch.equal(one.model(input_ids=ids).logits, two.model(input_ids=ids).logits)
    drawn = [um.draw("a red", temperature=0, size=(20, 12), return_codes=True)[1] for um in (one, two)]
    assert torch.equal(*drawn) and len(drawn[0].unique()) > 3
    end = " " if new.endswith("inner") else ". "  # the end of a question comes along
    assert two.processor.turns.assistant == f"{end}ASSISTANT:"
    assert one.processor.turns.praise == two.processor.turns.praise


def test_the_tokenizer_gives_the_same_ids_both_ways(folder: Path) -> None:
    plain = read_text_tokenizer(folder / "original")
    new = AutoTokenizer.from_pretrained(folder / "new-transformers")
    back = read_text_tokenizer(folder / "new-original")
    for text in TEXTS:
        ids = plain.encode(text, add_special_tokens=False)
        assert (
            new.encode(text, add_special_tokens=False) == ids == back.encode(text, add_special_tokens=False)
        )
    assert new.convert_tokens_to_ids("<image>") == plain.convert_tokens_to_ids("<|extra_0|>")
    assert back.get_vocab() == plain.get_vocab() and len(plain) == 300 + len(FIRST) + len(IMAGES)
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        assert (folder / "new-original" / name).read_bytes() == (folder / "original" / name).read_bytes()


def test_the_written_original_is_laid_out_as_the_published_one(folder: Path) -> None:
    wanted, got = (
        json.loads((folder / name / "config.json").read_text()) for name in ("original", "new-original")
    )
    assert got["model_type"] == "Emu3" and got["rope_theta"] == wanted["rope_theta"]
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps")
    assert all(got[name] == wanted[name] for name in sizes)
    assert got["img_token_id"] == 300 + len(FIRST) and got["eol_token_id"] == 300 + FIRST.index(
        "<|extra_200|>"
    )
    for name in ("config.json", "preprocessor_config.json"):
        wanted, got = (
            json.loads((folder / layout / VISION / name).read_text())
            for layout in ("original", "new-original")
        )
        assert wanted.items() <= got.items()
    described = describe(folder / "new-original")
    assert (described["family"], described["layout"]) == ("emu3", "original")
    assert described["understands"] == "any size, 256 to 1024 pixels"


def test_the_vision_tokenizer_may_lie_beside_the_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "original", tmp_path / "Emu3-Gen")
    (tmp_path / "Emu3-Gen" / VISION).rename(tmp_path / VISION)
    convert(tmp_path / "Emu3-Gen", tmp_path / "new", "transformers")
    _same(folder / "transformers", tmp_path / "new")
    convert(tmp_path / "Emu3-Gen", tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "original")
    _same(folder / "original", tmp_path / "back")


def test_the_names_of_its_modules_are_read_and_go_back_as_they_were(folder: Path, tmp_path: Path) -> None:
    """transformers writes names of its first release, which its modules no longer have; both are published."""
    first, second = (load_file(folder / name / "model.safetensors") for name in ("transformers", "inner"))
    for names, some in (
        (
            first,
            ("text_model.lm_head.weight", "text_model.model.norm.weight", "vqmodel.quant_conv.conv.weight"),
        ),
        (second, ("lm_head.weight", "model.text_model.norm.weight", "model.vqmodel.quant_conv.conv.weight")),
    ):
        assert set(some) <= names.keys()
    convert(folder / "ours-inner", tmp_path / "back", "transformers")
    _same(folder / "inner", tmp_path / "back")
    convert(folder / "ours-inner", tmp_path / "original", "original")
    _same(folder / "original", tmp_path / "original")
    theirs = Emu3ForConditionalGeneration.from_pretrained(folder / "inner").state_dict()
    assert second.keys() == theirs.keys() and all(torch.equal(second[name], theirs[name]) for name in theirs)


def test_a_model_saved_again_gets_its_files_written_anew(folder: Path, tmp_path: Path) -> None:
    """As after training: nothing of the source lies beside it any more."""
    for layout in ("transformers", "original"):
        um = unimm.load(folder / f"ours-{layout}", device="cpu")
        with torch.no_grad():
            um.model.decoder.lm_head.weight.mul_(1.5)
        um.save(tmp_path / f"tuned-{layout}")
        convert(tmp_path / f"tuned-{layout}", tmp_path / layout, layout)
        again = unimm.load(tmp_path / layout, device="cpu")
        assert torch.equal(again.model.decoder.lm_head.weight, um.model.decoder.lm_head.weight)
        assert again.processor.question_ids("it", [(2, 3)]) == um.processor.question_ids("it", [(2, 3)])


def test_a_tokenizer_that_tiktoken_cannot_say_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "transformers", tmp_path / "other")
    document = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    document["model"]["merges"][0], document["model"]["merges"][-1] = (
        document["model"]["merges"][-1], document["model"]["merges"][0],
    )  # fmt: skip
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(document))
    line = r"other: this tokenizer cannot be written as emu3\.tiktoken.*joined in the order of their ids"
    with pytest.raises(UserError, match=line):
        convert(tmp_path / "other", tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_what_a_config_leaves_out_is_as_in_emu3_by_default(folder: Path, tmp_path: Path) -> None:
    """transformers writes only what differs from its defaults, and those are not Llama's."""
    for file in (folder / "transformers").glob("*.json"):
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] = {"vocab_size": config["text_config"]["vocab_size"]}
    config["vq_config"] = {"codebook_size": config["vq_config"]["codebook_size"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = Checkpoint(tmp_path).config
    decoder, theirs = read.decoder_config(), Emu3TextConfig()
    for name in (
        "hidden_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "rope_parameters",
    ):
        assert getattr(decoder, name) == getattr(theirs, name), name
    assert read.image_tokenizer is not None
    assert read.image_tokenizer["block_out_channels"] == [256, 512, 512, 1024]
    config["text_config"]["hidden_size"] = "wide"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config\.json: text_config\.hidden_size: expected an integer"
    ) as caught:
        _ = Checkpoint(tmp_path).config
    assert "\n" not in str(caught.value)


def test_the_published_size_has_the_published_number_of_parameters(folder: Path, tmp_path: Path) -> None:
    (tmp_path / VISION).mkdir()
    vision = {
        "model_type": "Emu3VisionVQ", "ch": 256, "ch_mult": [1, 2, 2, 4], "z_channels": 4, "embed_dim": 4,
        "codebook_size": 32768, "num_res_blocks": 2, "attn_resolutions": [3], "temporal_downsample_factor": 4,
    }  # fmt: skip
    config = {
        "model_type": "Emu3", "vocab_size": 184622, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 9216, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
    }  # fmt: skip
    (tmp_path / VISION / "config.json").write_text(json.dumps(vision))
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        shutil.copy(folder / "original" / name, tmp_path)
    images = [*IMAGES[:3], *(f"<|visual token {code:06d}|>" for code in range(32768))]
    (tmp_path / "emu3_vision_tokens.txt").write_text("\n".join(images))
    described = describe(tmp_path)
    assert described["parameters"]["decoder"] == 8_492_011_520
    with torch.device("meta"):
        reference = Emu3ForConditionalGeneration(
            Emu3Config(text_config=Emu3TextConfig(), vq_config=Emu3VQVAEConfig(), vocabulary_map={})
        )
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("all", reference), ("vq", reference.model.vqmodel))
    }
    assert described["parameters"]["image_tokenizer"] == counts["vq"]
    assert described["parameters_total"] == counts["all"]
    assert described["context"] == 9216 and described["draws"] == "720x720"
