"""Models of ours inside other evaluation suites: lmms-eval and VLMEvalKit, which find them here."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval's entry point `lmms_eval.models` loads: the model `unimm`, its chat and its simple class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "unimm.evaluation.plugins.lmms_eval"
    return ModelManifest("unimm", f"{module}.SimpleModel", f"{module}.ChatModel")
