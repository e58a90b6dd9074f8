"""Checkpoints on the hub: fetched whole, or without their weights, of which only the headers are asked for."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from unimm.errors import UserError
from unimm.families.tensors import meta_tensor

SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""What a checkpoint has besides weights: configuration, tokenizer, processor, templates, the index of shards."""
SECOND = "original/*"
"""Where repositories of Meta's hold the same weights once more, in their own layout."""


def is_hub_id(source: str) -> bool:
    """Whether a source is of the form owner/name or owner/name@revision."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@.+)?", source, re.ASCII) is not None


def fetch(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder of a repository's files in the hub's cache; what it lacks is fetched first.

    Args:
        name: owner/name.
        revision: a branch, a tag or a commit; None: the main branch.
        weights: whether all files are fetched, or only the `SMALL` ones.

    Raises:
        UserError: there is no such repository or revision, it may not be read, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if revision is not None and not re.fullmatch(r"(?!.*\.\.)\w[\w./+-]*", revision):
        raise UserError(f"revision: {revision!r}; give a branch, a tag or a commit")
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=None if weights else list(SMALL),
                ignore_patterns=[SECOND],
            )
        )
    except RevisionNotFoundError:
        raise UserError(f"{name}: has no revision {revision!r}; give a branch, a tag or a commit") from None
    except GatedRepoError:
        line = "is gated; accept its terms on the hub, then log in with `hf auth login`"
        raise UserError(f"{name}: {line}") from None
    except RepositoryNotFoundError:
        line = "no such folder, and not on the hub (if it is private, log in with `hf auth login`)"
        raise UserError(f"{name}: {line}") from None
    except Exception as error:  # the hub client raises many kinds, all of which mean the same here
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"{name}: no such folder, and not available from the hub{at} ({_reason(error)})"
        ) from None


def tensor_shapes(name: str, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a repository's safetensors files on the meta device, from the files' headers alone.

    Args:
        name: owner/name.
        folder: what `fetch` returned for it; it is named by the commit, of which the headers are.

    Returns:
        None of them if the repository has no safetensors, or the hub may not be asked.

    Raises:
        UserError: a header is damaged, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, OfflineModeIsEnabled

    try:
        found = HfApi().get_safetensors_metadata(name, revision=folder.name)
    except (NotASafetensorsRepoError, OfflineModeIsEnabled):
        return {}
    except Exception as error:
        raise UserError(f"{name}: the headers of its weights are not readable ({_reason(error)})") from None
    return {
        tensor: meta_tensor(f"{name}: {file}: {tensor}", info.shape, info.dtype)
        for file, header in found.files_metadata.items()
        for tensor, info in header.tensors.items()
    }


def _reason(error: Exception) -> str:
    """The first line of what the hub's client says."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
