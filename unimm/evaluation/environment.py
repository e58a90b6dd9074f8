"""What a score was made with besides its protocol: versions of packages, the machine, the model's hash."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unimm.evaluation.rows import file_hash
from unimm.locate import EMBEDDED, embedded_model, locate

PACKAGES = (
    "unimm",
    "torch",
    "transformers",
    "tokenizers",
    "timm",
    "diffusers",
    "numpy",
    "pillow",
    "safetensors",
)
_MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "vocab.txt",
    "merges.txt",
)


def versions() -> dict[str, str]:
    """Versions of Python, unimm and the packages that a number may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The machine: processor, threads, and the accelerator where one is used."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def model_hash(source: str | os.PathLike[str] | None) -> str:
    """SHA-256 over a model's weights, configuration and tokenizer: of the names and hashes of their files.

    Raises:
        UserError: there is no such model.
    """
    checkpoint = locate(source)
    return folder_hash(checkpoint.folder, _MODEL_FILES)


def folder_hash(folder: Path, patterns: Iterable[str]) -> str:
    """SHA-256 over the names and hashes of the files of a folder that fit one of the patterns."""
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name} {file_hash(path)}\n".encode())
    return total.hexdigest()


def model_name(source: str | os.PathLike[str] | None) -> str:
    """A model's name as a result holds it: as it was given, or embedded."""
    if source is None or str(source) == EMBEDDED or Path(source) == embedded_model():
        return EMBEDDED
    return str(source)
