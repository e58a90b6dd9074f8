"""A checkpoint of any layout whose files hold bad values: one line that names the file, or a model that answers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from tests.families.bad_values import apply, changes, description, outcome, restore
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.image_tokenizers import load_image_tokenizer
from unimm.loading import describe

FAMILIES = ("unimm", "janus", "janus-original", "emu3", "emu3-original")
SAMPLED = 40  # changes of each checkpoint; all together are some 12,000
IMAGE = Image.new("RGB", (40, 30), "red")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """A whole checkpoint of each layout."""
    root = tmp_path_factory.mktemp("whole")
    model = janus_checkpoints.janus(root / "janus")
    janus_checkpoints.original(root / "janus-original", model)
    emu3_checkpoints.original(root / "emu3-original", emu3_checkpoints.emu3(root / "emu3"))
    return {"unimm": tiny, **{name: root / name for name in FAMILIES[1:]}}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_set_to_bad_values_is_one_line_or_harmless(
    tmp_path: Path, folders: dict[str, Path], family: str
) -> None:
    source, target = folders[family], tmp_path / "model"
    whole, every = description(source), list(changes(source))
    found = []
    for change in random.Random(0).sample(every, SAMPLED):
        apply(source, target, change)
        kind, line = outcome(target, whole, IMAGE)
        if kind in ("refused", "unanswered"):
            assert "\n" not in line and len(line) < len(str(target)) * 2 + 600, (change, line)
            assert kind == "unanswered" or str(target) in line, (change, line)
        found.append(kind)
        restore(source, target, change)
    assert found.count("refused") > SAMPLED // 3, "few would mean that the changes miss what matters"


def with_value(source: Path, target: Path, file: str, place: tuple[Any, ...], value: Any) -> Path:
    """A copy of a checkpoint with one value of a file set."""
    apply(source, target, (file, place, "set", value))
    return target


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert all(word in line for word in words) and "\n" not in line, line


OWN: list[tuple[tuple[Any, ...], Any, str]] = [
    (("encoder", "name"), "/tmp/model", "encoder.name: no SigLIP or CLIP encoder of timm is named"),
    (("encoder", "name"), "hf-hub:someone/model", "encoder.name: no SigLIP or CLIP encoder of timm is named"),
    (("encoder", "name"), "resnet50", "encoder.name: no SigLIP or CLIP encoder of timm is named"),
    (("encoder", "kwargs", "checkpoint_path"), "/tmp/weights.pth", "encoder.kwargs.checkpoint_path: unknown key"),
    (("encoder", "kwargs", "pretrained_cfg"), {"file": "x"}, "encoder.kwargs.pretrained_cfg: unknown key"),
    (("encoder", "kwargs", "depth"), 10**9, "encoder.kwargs.depth: expected at most 1024"),
    (("encoder", "tokens"), 15, "encoder.tokens: expected 16 "),
    (("reducer", "side"), 3, "reducer.side: 3 x 3 features do not divide"),
    (("image_tokenizer", "model_type"), "vitmatte", "image_tokenizer.model_type: expected one of unimm_vq"),
    (("image_tokenizer", "use_pretrained_backbone"), True, "image_tokenizer.use_pretrained_backbone: unknown key"),
    (("image_tokenizer", "block_out_channels"), [8, 10**9], "image_tokenizer.block_out_channels[1]"),
    (("image_tokenizer", "attention_levels"), [2], "image_tokenizer.attention_levels[0]: expected less than"),
    (("image_tokenizer", "quantizer"), {"kind": "fsq", "levels": [99, 99, 99, 99]}, "quantizer.levels: expected"),
    (("decoder", "attn_implementation"), "kernels-community/x", "decoder.attn_implementation: code of"),
    (("decoder", "num_hidden_layers"), 10**9, "decoder.num_hidden_layers: expected at most 1024"),
    (("decoder", "forward"), 5, "decoder.forward: unknown key"),
    (("decoder",), {"model_type": "llama", "hidden_size": 32}, "decoder.num_attention_heads: missing"),
    (("decoder", "num_attention_heads"), 32, "decoder.num_attention_heads: 32 heads of an odd width (1)"),
    (("decoder", "rope_parameters"), {"rope_type": None}, "decoder.rope_parameters.rope_type: expected one of"),
    (("decoder",), [], "decoder: expected a mapping, got []"),
    (("to_dict",), 5, "to_dict: unknown key"),
    (("auto_map",), {"AutoModel": "code.Model"}, "auto_map: "),
    (("quantization_config",), {"load_in_8bit": True}, "quantization_config: "),
    (("dtype",), "float7", "dtype: expected a number format such as float32"),
    (("generation", "codes"), 31, "generation.codes: expected 32 (the image tokenizer's), got 31"),
    (("generation", "stride"), 7, "generation.stride: expected 8"),
    (("generation",), 5, "generation: expected a mapping, got 5"),
    (("views", "image_size"), 10**9, "views.image_size: expected at most"),
    (("views", "kind"), "sqare", "views.kind: expected one of square, area, fit, canvas, got"),
    (("fusion",), {"kind": "crss"}, "fusion.kind: expected one of stream, cross, both, got"),
    (("fusion",), {"kind": "cross"}, "fusion.layers: missing"),
    (("encoder",), None, "encoder: missing, though `views` is given"),
    (("family",), 5, "family: expected"),
    (("layout", "grid"), [10**9, 10**9], "layout.grid[0]: expected at most"),
    (("layout", "begin"), 10**6, "layout.begin: token 1000000 is beyond the vocabulary"),
    (("layout", "wrapper"), 3, "layout.wrapper: expected a token where codes are tokens, and there alone"),
    (("layout", "lines"), 3, "layout.lines: unknown key"),
    (("connector", "depth"), 10**9, "connector.depth: expected at most 64"),
    (("conversation",), {"usr": "x"}, 'conversation.usr: unknown key; did you mean "user"?'),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "words"), OWN, ids=lambda value: str(value)[:30])
def test_our_own_config_names_the_key(
    tmp_path: Path, tiny: Path, place: tuple[Any, ...], value: Any, words: str
) -> None:
    folder = with_value(tiny, tmp_path / "model", "config.json", place, value)
    for call in (unimm.load, describe, lambda source: convert(source, tmp_path / "out", "original")):
        refused(lambda call=call: call(folder), str(folder / "config.json"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "token"), [("code", 20), ("feature", 30), ("feature", 1), ("code", 3)])
def test_a_token_of_texts_stands_for_no_image(tmp_path: Path, tiny: Path, key: str, token: int) -> None:
    folder = with_value(tiny, tmp_path / "model", "config.json", ("layout", key), token)
    refused(lambda: unimm.load(folder), str(folder / "config.json"), f"layout.{key}: token {token} is")


FOREIGN: list[tuple[str, str, tuple[Any, ...], Any, str]] = [
    ("janus", "config.json", ("text_config", "model_type"), "mistral", "text_config.model_type: expected one of llama"),
    ("janus", "config.json", ("text_config", "hidden_size"), "x", "text_config.hidden_size: expected an integer"),
    ("janus", "config.json", ("text_config", "auto_map"), {"AutoModel": "a.B"}, "text_config.auto_map: code of"),
    ("janus", "config.json", ("vision_config", "image_size"), 10**9, "vision_config.image_size: expected at most"),
    ("janus", "config.json", ("vision_config", "patch_size"), 0, "vision_config.patch_size: expected more than 0"),
    ("janus", "config.json", ("vq_config", "channel_multiplier"), [1, -2], "vq_config.channel_multiplier[1]"),
    ("janus", "config.json", ("vq_config", "num_embeddings"), 10**12, "vq_config.num_embeddings: expected at most"),
    ("janus-original", "config.json", ("language_config", "num_hidden_layers"), 10**9, "language_config.num_hidden"),
    ("janus-original", "config.json", ("language_config", "_attn_implementation"), "a/b", "language_config._attn_imp"),
    ("janus-original", "config.json", ("vision_config", "params"), None, "vision_config.params: expected a mapping"),
    ("janus-original", "config.json", ("gen_head_config", "params", "image_token_embed"), -1, "gen_head_config.params"),
    ("janus-original", "preprocessor_config.json", ("image_mean",), [0.5, 0.5], "image_mean: expected at least 3"),
    ("janus-original", "processor_config.json", ("sft_format",), "alpaca", "sft_format: expected one of deepseek"),
    ("emu3", "config.json", ("text_config", "vocab_size"), None, "text_config.vocab_size: expected an integer"),
    ("emu3", "config.json", ("vq_config", "temporal_downsample_factor"), 10**9, "vq_config.temporal_downsample_factor"),
    ("emu3", "processor_config.json", ("image_processor", "min_pixels"), 2**30, "views.least"),
    ("emu3", "processor_config.json", ("image_processor", "image_std"), [1, 0, 1], "image_processor.image_std[1]"),
    ("emu3-original", "config.json", ("rope_scaling",), {"type": "x"}, "rope_scaling.type: expected one of default"),
    ("emu3-original", "config.json", ("quantization_config",), {"bits": 4}, "quantization_config: quantised weights"),
    ("emu3-original", "Emu3-VisionTokenizer/config.json", ("ch",), 10**9, "ch: expected at most"),
    ("emu3-original", "Emu3-VisionTokenizer/config.json", ("double_z",), True, "double_z: True is not supported"),
    ("janus", "tokenizer_config.json", ("auto_map",), {"AutoTokenizer": ["a.B", None]}, "auto_map: code of"),
    ("janus", "tokenizer_config.json", ("bos_token",), 5, "bos_token: expected a string"),
    ("janus", "tokenizer_config.json", ("tokenizer_class",), "RagTokenizer", "tokenizer_class: no tokenizer is of"),
    ("janus", "tokenizer_config.json", ("model_max_length",), "x", "model_max_length: expected a number"),
    ("janus", "tokenizer_config.json", ("padding_side",), "up", "padding_side: expected one of left, right"),
    ("janus", "tokenizer.json", ("model", "merges"), 5, "tokenizer.json: no tokenizer that can be read"),
    ("janus", "tokenizer.json", ("model", "vocab", "a"), 10**9, "tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "file", "place", "value", "words"), FOREIGN, ids=lambda value: str(value)[:30]
)
def test_a_published_file_is_named_with_the_key(
    tmp_path: Path,
    folders: dict[str, Path],
    family: str,
    file: str,
    place: tuple[Any, ...],
    value: Any,
    words: str,
) -> None:
    folder = with_value(folders[family], tmp_path / "model", file, place, value)
    refused(lambda: unimm.load(folder), str(folder), words)


def test_code_that_ours_replaces_may_be_named(tmp_path: Path, folders: dict[str, Path]) -> None:
    """As baaivision/Emu3-Chat is published."""
    value = {"AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3"}
    folder = with_value(folders["emu3-original"], tmp_path / "model", "config.json", ("auto_map",), value)
    assert describe(folder)["family"] == "emu3"


def test_a_normaliser_that_multiplies_a_text_is_refused(tmp_path: Path, tiny: Path) -> None:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}
    value = {"type": "Sequence", "normalizers": [step] * 5}
    folder = with_value(tiny, tmp_path / "model", "tokenizer.json", ("normalizer",), value)
    refused(lambda: unimm.load(folder), "tokenizer.json: normalizer: lengthens texts")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"decoder": NaN}', "[]", "5", ""])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_what_is_no_section_is_one_line(tmp_path: Path, tiny: Path, name: str, text: str) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / name).write_text(text)
    refused(lambda: unimm.load(folder), str(folder / name))


ALONE: list[tuple[str, Any, str]] = [
    ("latent_channels", 10**9, "latent_channels: expected at most"),
    ("quantizer", {"kind": "vq", "codebook_size": 10**9}, "quantizer.codebook_size: expected at most"),
    ("image_size", 33, "image_size: expected a multiple of the stride 8, got 33"),
    ("forward", 5, "forward: unknown key"),
]


@pytest.mark.parametrize(("key", "value", "words"), ALONE, ids=lambda value: str(value)[:20])
def test_an_image_tokenizer_alone_names_the_key(
    tmp_path: Path, tiny_model: Any, key: str, value: Any, words: str
) -> None:
    tiny_model.image_tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    refused(lambda: load_image_tokenizer(tmp_path), words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40)
@given(data=st.data())
def test_any_config_is_described_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path], data: st.DataObject
) -> None:
    family = data.draw(st.sampled_from(FAMILIES))
    places = [(name, place) for name, place, action, _ in changes(folders[family]) if action == "drop"]
    name, place = data.draw(st.sampled_from(places))
    target = tmp_path_factory.getbasetemp() / f"fuzzed-{family}"
    change = (name, place, "set", data.draw(JSON))
    apply(folders[family], target, change)
    try:
        assert describe(target)["parameters_total"] > 0
    except UserError as error:
        assert "\n" not in str(error)
    restore(folders[family], target, change)
