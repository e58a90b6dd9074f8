"""For all tests: no network, and a tiny unified model with random weights."""

# ruff: noqa: E402  (imports stand behind what must be set before them)

from __future__ import annotations

import gc
import os
from pathlib import Path

gc.disable()  # until all is imported, see pytest_collection_finish
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has used more may hang where a test forks it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

import unimm
from unimm.data.text_tokenizer import train_text_tokenizer
from unimm.models.configuration import UniMMConfig
from unimm.models.image_tokenizers.vq import ImageTokenizerConfig
from unimm.models.layout import ImageLayout
from unimm.models.modeling import UniMMModel
from unimm.pipeline import UniMM
from unimm.processing.processor import UniMMProcessor

# The same examples in every run, few enough that all fuzzing together takes a minute.
hypothesis.settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
hypothesis.settings.load_profile("suite")


FORKING = ("tests/test_interrupted.py", "tests/test_whole_folders.py")


LONG = (
    "tests/preferences/test_reference.py", "tests/preferences/test_align.py", "tests/training/tasks/test_unified.py",
    "tests/training/test_zero.py", "tests/preferences/test_online.py", "tests/training/tokenizer/test_processes.py",
    "tests/test_readme.py", "tests/training/test_validation.py", "tests/test_golden.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules that fork first: a fork of a process in which a test has trained waits for threads for ever.

    Those that take longest are next, so that no worker ends with one while the others have nothing left to do.
    """
    first = FORKING + LONG
    place = {name: number for number, name in enumerate(first)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(first)))


def pytest_collection_finish() -> None:
    """Collect garbage from here on, but look no more at the million objects that the imports have made.

    DeepSpeed asks for whole collections whenever it shards; each would take half a second.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Let the interpreter take apart what the imports have made, as some libraries check at its exit."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that draws 4 x 4 codes on 32 x 32 pixels."""
    torch.manual_seed(0)
    text_tokenizer = train_text_tokenizer(["a red apple on a blue background", "what is this?"], 300)
    names = ["<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<image>"]
    begin, end, feature, code = text_tokenizer.convert_tokens_to_ids(names)
    sizes = ImageTokenizerConfig(
        image_size=32, patch_size=4, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=8,
        codebook_size=32, codebook_dim=4,
    )  # fmt: skip
    vision = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = UniMMConfig(
        decoder={
            "model_type": "llama", "vocab_size": len(text_tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
            "pad_token_id": text_tokenizer.pad_token_id, "bos_token_id": text_tokenizer.bos_token_id,
            "eos_token_id": text_tokenizer.eos_token_id,
        },
        views={"kind": "square", "image_size": 32},
        encoder={
            "kind": "timm", "name": "vit_base_patch16_siglip_224", "tokens": 16, "width": 16, "kwargs": vision,
        },
        reducer={"kind": "join", "side": 2},
        generation={"codes": 32, "dim": 4, "image_size": 32, "stride": 8},
        image_tokenizer=sizes.to_dict(),
        layout=vars(ImageLayout(begin, end, feature, code, grid=(4, 4))),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    UniMM(UniMMModel(config), UniMMProcessor(config, text_tokenizer)).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny: Path) -> UniMM:
    """The tiny model, loaded; tests must leave its weights alone."""
    return unimm.load(tiny)
