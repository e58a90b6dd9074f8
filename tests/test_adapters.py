"""What the config of an adapter may hold: keys that say what its weights mean, within bounds; others reach nothing."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import unimm
from unimm.adapters import ADAPTER_FILE, AdapterConfig, merge_adapter
from unimm.errors import UserError
from unimm.models.modeling import UniMMModel

BAD: tuple[Any, ...] = (
    None, "x", -1, 0, 1e300, float("nan"), 10**9, [], {}, True, {"a": {"b": [1]}}, ["x", None],
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, as peft writes it."""
    torch.manual_seed(0)
    chosen = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(unimm.load(tiny).model, chosen).save_pretrained(folder)
    return folder


def merged(model: UniMMModel, folder: Path) -> torch.Tensor:
    """The logits of a model with an adapter merged into a copy of it."""
    with torch.no_grad():
        found: torch.Tensor = merge_adapter(copy.deepcopy(model), folder)(torch.arange(20, 32)[None]).logits
    return found


def changed(adapter: Path, target: Path, **options: Any) -> Path:
    """A copy of the adapter with other options."""
    shutil.copytree(adapter, target)
    config = json.loads((target / ADAPTER_FILE).read_text())
    (target / ADAPTER_FILE).write_text(json.dumps({**config, **options}))
    return target


@pytest.mark.parametrize("key", list(AdapterConfig.model_fields))
def test_bad_values_are_a_line_or_an_adapter(tiny: Path, adapter: Path, tmp_path: Path, key: str) -> None:
    model = unimm.load(tiny).model
    outcomes = []
    for number, value in enumerate(BAD):
        folder = changed(adapter, tmp_path / str(number), **{key: value})
        begun = time.process_time()
        try:
            outcomes.append(bool(merged(model, folder).isfinite().all()))
        except UserError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 600 and str(folder) in line, value
            outcomes.append(True)
        assert time.process_time() - begun < 2, value
    assert all(outcomes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 10**6),
        ("r", 4096),
        ("r", -2),
        ("rank_pattern", {"q_proj": 4000}),
        ("rank_pattern", {"(q+)+": 2}),
        ("lora_alpha", 1e9),
        ("target_modules", "(a+)+$"),
        ("target_modules", "(.*)*x"),
        ("target_modules", "["),
        ("target_modules", "a" * 10**5),
        ("target_modules", ["q_proj"] * 10**4),
        ("exclude_modules", "((a|a)+)+b"),
        ("layers_to_transform", 2**63),
        ("peft_type", "IA3"),
        ("peft_type", "PROMPT_TUNING"),
        ("peft_type", ["LORA"]),
    ],
)
def test_what_would_hang_or_allocate_is_named(
    tiny: Path, adapter: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = changed(adapter, tmp_path / "a", **{key: value})
    with pytest.raises(UserError, match=rf"{ADAPTER_FILE}: {key}") as caught:
        unimm.load(tiny, adapter=folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "options",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "unimm_test_megatron"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "unimm_test_megatron"}},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"loftq_config": {"loftq_bits": 4}, "init_lora_weights": "loftq"},
        {"corda_config": {"cache_file": "/nowhere"}, "init_lora_weights": "corda"},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"base_model_name_or_path": "../elsewhere", "revision": "main"},
        {"inference_mode": False, "forward": "x", "to_dict": 1, "__class__": "x"},
        {"something_new": [1, 2, 3]},
    ],
)
def test_other_keys_reach_nothing(
    tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    (tmp_path / "unimm_test_megatron.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    model = unimm.load(tiny).model
    assert torch.equal(merged(model, changed(adapter, tmp_path / "a", **options)), merged(model, adapter))
    assert "unimm_test_megatron" not in sys.modules


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"r": 1e999}', "\x00", "[" * 10**5, "version https://git-lfs"]
)
def test_what_is_no_config_is_named(tiny: Path, adapter: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / ADAPTER_FILE).write_text(text)
    with pytest.raises(UserError, match=ADAPTER_FILE) as caught:
        unimm.load(tiny, adapter=tmp_path / "a")
    assert "\n" not in str(caught.value)
