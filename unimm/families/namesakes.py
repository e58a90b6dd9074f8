"""Models that are taken for Janus, some of which call themselves `multi_modality` as it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OTHERS = {
    "deepseek_vl": "DeepSeek-VL",
    "deepseek_vl_hybrid": "DeepSeek-VL",
    "deepseek_vl_v2": "DeepSeek-VL2",
    "janus_flow": "JanusFlow",
}


def namesake(config: Mapping[str, Any]) -> str | None:
    """Return the name of the architecture that a `config.json` is of, None if it is none of these."""
    if config.get("model_type") != "multi_modality":
        return OTHERS.get(str(config.get("model_type")))
    flow = ("vision_und_enc_config", "vision_gen_enc_config", "vision_gen_dec_config")
    if any(part in config for part in flow):
        return "JanusFlow"
    drawing = any(part in config for part in ("gen_vision_config", "gen_aligner_config", "gen_head_config"))
    return None if drawing or "aligner_config" not in config else "DeepSeek-VL"
