"""Which column of a row is what: our names, the names that others use, and what to say where none is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unimm.data.sources.images import looks_like_image, may_name_image
from unimm.data.sources.text import clip
from unimm.errors import UserError
from unimm.sections import near

COLUMN_NAMES: dict[str, tuple[str, ...]] = {  # our name -> other names in use
    "image": (
        "img", "picture", "photo", "pic", "image_path", "image_file", "image_filename", "image_name", "img_path",
        "image_bytes", "image_base64", "image_url", "jpg", "jpeg", "png", "webp",
        "file_name", "filename", "file", "file_path", "filepath", "path",
    ),
    "images": ("image_paths", "image_files", "pictures", "photos"),
    "text": ("caption", "captions", "txt", "prompt", "description"),
    "input_image": ("original_image", "source_image"),
    "instruction": ("edit_prompt",),
    "output_image": ("edited_image", "target_image"),
    "conversations": ("conversation",),
}  # fmt: skip
FILE_NAMES = ("file_name", "filename", "file", "file_path", "filepath", "path")  # may name other files too
ASKED = ("question", "query", "instruction", "prompt", "problem", "input")
ANSWERED = (
    "multiple_choice_answer", "answer", "answers", "response", "output", "completion", "solution",
)  # fmt: skip
FORMS = (
    "messages",
    "conversations",
    "texts with images",
    "input_image, instruction and output_image",
    "question and answer",
    "instruction and output",
    "query and response",
    "prompt and completion",
    "image and text",
    "text",
)
KEYS = ("key", "__key__", "id")
KNOWN = (
    *COLUMN_NAMES,
    *(name for names in COLUMN_NAMES.values() for name in names),
    *ASKED,
    *ANSWERED,
    "messages",
    "texts",
)
"""Every name of a column that means something."""


def row_key(row: Any, fallback: str) -> str:
    """The key that a row gives itself, or the fallback."""
    if isinstance(row, Mapping):
        for name in KEYS:
            if isinstance(row.get(name), str | int) and row[name] != "":
                return clip(str(row[name]), 200)
    return fallback


def renamed(row: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The row's columns that hold something, under our names too.

    Args:
        row: its columns.
        fields: our name -> the source's; an empty one says that there is no such column.

    Raises:
        UserError: a column that `fields` names is missing.
    """
    columns = {str(name): value for name, value in row.items() if value is not None}
    for ours, others in COLUMN_NAMES.items():
        found = next((name for name in others if _is_meant(name, columns)), None)
        if ours not in columns and found is not None and fields.get(ours) is None:
            columns[ours] = columns[found]
    for ours, theirs in fields.items():
        if not theirs:
            columns.pop(ours, None)
            continue
        if row.get(theirs) is None:
            hint = near(theirs, columns)
            raise UserError(f"{theirs}: missing (fields says it holds {ours}){hint}")
        columns[ours] = row[theirs]
    return columns


def _is_meant(name: str, columns: Mapping[str, Any]) -> bool:
    """Whether a column of another's name is there; a file's name counts only where it may be an image's."""
    return name in columns and (name not in FILE_NAMES or may_name_image(columns[name]))


def check_no_image(row: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Refuse a row that was read as words alone though a column looks like an image.

    Raises:
        UserError: it does; the line names the column.
    """
    if fields.get("image") == "":
        return
    for name, value in row.items():
        if looks_like_image(value):
            raise UserError(
                f"{clip(name)}: looks like an image, but no column of images is called so; "
                f"say fields: {{image: {clip(name)}}}, or {{image: ''}} to read the words alone"
            )


def unknown_form(columns: Sequence[str]) -> UserError:
    """What to say of a row that fits no form."""
    telling = [name for name in KNOWN if name not in FILE_NAMES]
    unknown = [name for name in columns if name not in KNOWN and near(name, telling)]
    hint = next((f"; {clip(name)}: {near(name, telling)[2:]}" for name in unknown), "")
    shown = ", ".join(map(clip, columns[:8])) or "none"
    return UserError(
        f"text: missing, and no other form of data fits (columns: {shown}){hint}; known are "
        f"{'; '.join(FORMS)}; fields names columns that are called otherwise"
    )
