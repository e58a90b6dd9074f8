"""Chat messages as the OpenAI client and transformers' chat templates have them, to our own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unimm.errors import UserError
from unimm.processing.messages import SHOWN, ImagePart, Message, Role
from unimm.videos import Video

if TYPE_CHECKING:
    from unimm.images import ImageInput

CHAT_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def read_chat(messages: Any) -> tuple[list[Message], list[ImageInput | Video]]:
    """Read a conversation that ends in the user's turn.

    Args:
        messages: mappings with `role` and `content`: a text, or a list of parts `{"type": "text", "text": …}`,
            `{"type": "image_url", "image_url": {"url": …}}`, `{"type": "image", "image": …}`, whose image is
            whatever `unimm.images.read_image` takes, and `{"type": "video", "video": …}` (or `video_url`), a file or a
            list of frames, with the options of `unimm.videos.Video` beside it.

    Returns:
        The messages, and their images in their order.

    Raises:
        UserError: a line that names the message and the part that is none.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise UserError(f"messages: expected a list of messages, got {type(messages).__name__}")
    read: list[Message] = []
    images: list[ImageInput | Video] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise UserError(
                f"{where}: expected a mapping with role and content, got {type(message).__name__}"
            )
        role = _role(message.get("role"), where, first=number == 0)
        parts, shown = _parts(message.get("content"), f"{where}.content")
        if shown and role != "user":
            raise UserError(f"{where}.content: an image in a turn of the {role}; images stand in the user's")
        read.append(Message(role, tuple(parts)))
        images += shown
    if not read or read[-1].role != "user":
        raise UserError("messages: end with what the user says")
    return read, images


def _role(role: Any, where: str, first: bool) -> Role:
    if role not in CHAT_ROLES:
        raise UserError(f"{where}.role: {role!r}; use system, user or assistant")
    if CHAT_ROLES[role] == "system" and not first:
        raise UserError(f"{where}.role: {role!r}; only the first message may be")
    return CHAT_ROLES[role]


def _parts(content: Any, where: str) -> tuple[list[str | ImagePart], list[ImageInput | Video]]:
    """Return what a message says and shows."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) or not content:
        raise UserError(f"{where}: expected a text or a list of parts")
    parts: list[str | ImagePart] = []
    images: list[ImageInput | Video] = []
    for number, part in enumerate(content):
        at = f"{where}[{number}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise UserError(f"{at}.text: expected a text")
            parts.append(part["text"])
        elif kind in ("image_url", "image"):
            images.append(_image(part, kind, at))
            parts.append(SHOWN)
        elif kind in ("video_url", "video"):
            images.append(_video(part, kind, at))
            parts.append(SHOWN)
        else:
            raise UserError(f"{at}.type: {kind!r}; use text, image_url, image or video")
    if not images and not any(isinstance(part, str) and part.strip() for part in parts):
        raise UserError(f"{where}: empty; say something")
    return parts, images


def _video(part: Mapping[str, Any], kind: str, at: str) -> Video:
    """Return the video of a part; `nframes` is what users of Qwen2-VL call the number of frames."""
    given = part.get(kind)
    if kind == "video_url":
        given = given.get("url") if isinstance(given, Mapping) else given
    if isinstance(given, Video):
        return given
    if given is None:
        raise UserError(f"{at}.{kind}: missing; give a file or a list of frames")
    if isinstance(given, str):
        given = given.removeprefix("file://")
    named = {"fps": "fps", "nframes": "frames", "frames": "frames"}
    named |= {name: name for name in ("min_pixels", "max_pixels")}
    options = {ours: part[name] for name, ours in named.items() if part.get(name) is not None}
    try:
        return Video(given, **options)
    except UserError as error:
        raise UserError(f"{at}.{error}") from None


def _image(part: Mapping[str, Any], kind: str, at: str) -> ImageInput:
    """Return the image of a part."""
    given = part.get(kind)
    if kind == "image_url":
        given = given.get("url") if isinstance(given, Mapping) else given
        if not isinstance(given, str):
            raise UserError(f"{at}.image_url.url: expected a data: URL or a path")
    elif given is None:
        given = next((part[name] for name in ("url", "path", "base64") if name in part), None)
    if given is None:
        raise UserError(f"{at}.{kind}: missing; give an image")
    return given
