"""Where a model's files are: in a folder, in the package, or on the hub, from which they are fetched."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from unimm.errors import UserError
from unimm.families.family import SeparateImageTokenizer
from unimm.families.hub import fetch, is_hub_id, tensor_shapes
from unimm.families.source import Checkpoint
from unimm.files import settled

EMBEDDED = "embedded"  # folder of the model that ships with the package


def locate(
    source: str | os.PathLike[str] | None,
    revision: str | None = None,
    image_tokenizer: str | os.PathLike[str] | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Return a model's checkpoint, after fetching what is on the hub and not here yet; none of its files is read yet.

    Args:
        source: a folder, the embedded model (None or "embedded") or a hub id, owner/name or owner/name@revision. A
            folder that is called `embedded` comes before the model of that name.
        revision: of a hub id: a branch, a tag or a commit.
        image_tokenizer: folder or hub id of Emu3's vision tokenizer, which its original layout has apart; by default
            it is looked for in the folder and beside it, and fetched for a hub id.
        weights: whether the weights are needed; else a hub is asked for the small files and the headers alone.

    Raises:
        UserError: there is no such folder, the hub does not have it or cannot be reached, or an option does not
            fit the source.
    """
    folder, name = _find(source, revision, weights)
    checkpoint = Checkpoint(folder)
    if image_tokenizer is not None:
        if checkpoint.separate is None:
            raise UserError(
                "image_tokenizer: only Emu3's original layout has one apart; leave it out for this model"
            )
        checkpoint.image_tokenizer = _find(image_tokenizer, None, weights)[0]
    elif name is not None and (separate := _separate(checkpoint)) and separate.find(folder) is None:
        checkpoint.image_tokenizer = fetch(separate.hub_id, weights=weights)
    if name is not None and not weights and not _holds_weights(checkpoint):
        checkpoint.given_shapes = tensor_shapes(name, folder)
    return checkpoint


def _separate(checkpoint: Checkpoint) -> SeparateImageTokenizer | None:
    """What a checkpoint has apart, if it is one of a model."""
    try:
        return checkpoint.separate
    except UserError:  # it says so when it is read, if it is read as a model
        return None


def _find(
    source: str | os.PathLike[str] | None, revision: str | None, weights: bool
) -> tuple[Path, str | None]:
    """The folder of a source, and the hub's name of it if it is from there."""
    folder = None if source is None else settled(source)
    here = folder is not None and folder.is_dir()
    embedded = not here and (source is None or str(source) == EMBEDDED)
    if revision is not None and (here or embedded):
        raise UserError(f"revision: {revision!r}; only a hub id has revisions, not {source or EMBEDDED}")
    if embedded or folder is None:
        return embedded_model(), None
    if here:
        return folder, None
    if folder.exists():
        raise UserError(f"{source}: a file, not a model folder; name the folder that holds config.json")
    if not is_hub_id(str(source)):
        raise UserError(f"{source}: no such folder; give a model folder or a hub id such as owner/name")
    name, _, inner = str(source).partition("@")
    if inner and revision is not None:
        raise UserError(f"revision: {revision!r}; {source} names one already")
    return fetch(name, inner or revision, weights), name


def _holds_weights(checkpoint: Checkpoint) -> bool:
    """Whether all files of weights are there, which may have been fetched before."""
    try:
        return bool(checkpoint.own_weight_files)
    except UserError:
        return False


def embedded_model() -> Path:
    """Return the folder of the model that ships with the package."""
    folder = Path(str(resources.files("unimm"))) / "assets" / EMBEDDED
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: the embedded model is missing; reinstall unimm, or name a model")
    return folder
