"""Decoders that fit: each is built and compared with its own logits; what else a config may say is one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unimm.errors import UserError
from unimm.models.configs import section_for
from unimm.models.decoders import DECODERS, decoder_config, read_decoder

TINY: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
}  # fmt: skip
LLAMA = {"model_type": "llama", **{name: TINY[name] for name in list(TINY)[:8]}}


def tiny(kind: str) -> dict[str, Any]:
    """The config of a small decoder of a kind."""
    described: Any = CONFIG_MAPPING[kind]
    known = section_for(described).model_fields
    return {"model_type": kind, **{name: value for name, value in TINY.items() if name in known}}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_gives_the_logits_of_its_own_and_the_same_with_a_cache(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoder_config(read_decoder(tiny(kind)))).eval()
    ids = torch.arange(5, 25)[None]
    stream = model.get_input_embeddings()(ids)
    with torch.no_grad():
        hidden = model.get_decoder()(inputs_embeds=stream).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(input_ids=ids).logits)
        first = model.get_decoder()(inputs_embeds=stream[:, :9], use_cache=True)
        rest = model.get_decoder()(inputs_embeds=stream[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.last_hidden_state, hidden[:, 9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_what_transformers_writes_of_a_decoder_is_read_again(kind: str) -> None:
    described: Any = CONFIG_MAPPING[kind]
    fields = read_decoder(
        described(**{name: v for name, v in tiny(kind).items() if name != "model_type"}).to_dict()
    )
    again = decoder_config(fields)
    own = [field.name for field in dataclasses.fields(described) if field.name in fields]
    assert {name: getattr(again, name) for name in own} == {name: fields[name] for name in own}


def test_the_guide_names_them_all() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert ", ".join(DECODERS) in " ".join(guide.split())


REFUSED: list[tuple[str, Any, str]] = [
    ("model_type", "lama", 'no decoder is of the kind "lama"; did you mean "llama"?'),
    ("model_type", "cohere", 'no decoder is of the kind "cohere"'),
    ("model_type", ["llama"], 'no decoder is of the kind ["llama"]'),
    ("hiden_size", 48, 'unknown key; did you mean "hidden_size"?'),
    ("to_dict", 5, "unknown key"),
    ("__class__", "x", "unknown key"),
    ("hidden_size", 10**9, "expected at most 65536, got 1000000000"),
    ("num_hidden_layers", 10**9, "expected at most 1024"),
    ("num_hidden_layers", 0, "expected more than 0"),
    ("num_hidden_layers", True, "expected an integer, got true"),
    ("num_hidden_layers", 2.0, "expected an integer, got 2.0"),
    ("vocab_size", -5, "expected more than 0, got -5"),
    ("num_key_value_heads", 3, "expected a divisor of num_attention_heads (2)"),
    ("num_attention_heads", 5, "multiple"),
    ("pad_token_id", 60, "expected less than vocab_size (60)"),
    ("rms_norm_eps", float("nan"), "expected"),
    ("rms_norm_eps", 1e300, "expected less than 1"),
    ("hidden_act", "sillu", 'no activation is named "sillu"; did you mean "silu"?'),
    ("rope_parameters", [], "expected a mapping, got []"),
    ("rope_parameters", {"rope_type": "spiral"}, "expected one of default, linear"),
    ("rope_scaling", {"rope_type": "yarn", "factor": -2.0}, "expected more than 0, got -2"),
    ("rope_scaling", {"type": "llama3"}, "Missing required keys"),
    ("attn_implementation", "kernels-community/flash-attn", "code of a repository is never run"),
    ("_attn_implementation", "a/b", "code of a repository is never run"),
    ("auto_map", {"AutoConfig": "code.Config"}, "code of a checkpoint is never run"),
    ("quantization_config", {"quant_method": "bitsandbytes"}, "quantised weights are not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_a_decoder_cannot_be_is_one_line_with_the_key(key: str, value: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        decoder_config(read_decoder({**LLAMA, key: value}, "config.json"))
    line = str(caught.value)
    assert "decoder" in line and words in line and "\n" not in line


@pytest.mark.parametrize("fields", [None, 5, "llama", [LLAMA], {}])
def test_what_is_no_config_of_a_decoder_is_one_line(fields: Any) -> None:
    with pytest.raises(UserError, match=r"^config\.json: decoder"):
        read_decoder(fields, "config.json")


@pytest.mark.parametrize(
    "key", ["torch_dtype", "architectures", "temperature", "use_bfloat16", "id2label", "_name_or_path"]
)
@pytest.mark.parametrize("value", [None, 5, "x", {"a": 1}])
def test_what_transformers_writes_into_any_config_means_nothing(key: str, value: Any) -> None:
    assert read_decoder({**LLAMA, key: value}) == LLAMA


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(
    kind=st.sampled_from(DECODERS),
    changes=st.dictionaries(
        st.sampled_from([*TINY, "rope_parameters", "hidden_act", "forward"]), JSON, max_size=3
    ),
)
def test_any_config_is_a_decoder_or_one_line(kind: str, changes: dict[str, Any]) -> None:
    try:
        assert decoder_config(read_decoder({**tiny(kind), **changes})).model_type == kind
    except UserError as error:
        assert "\n" not in str(error)
