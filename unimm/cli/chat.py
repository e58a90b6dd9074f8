"""`unimm chat`: a conversation in the terminal, with images and drawings."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unimm.cli.drawings import drawing_name, save_drawing
from unimm.console import printable, say
from unimm.errors import UserError
from unimm.images import read_image

HELP = """\
/image FILE...   show images with what you say next
/draw WORDS      draw, and save the drawing
/system WORDS    tell the model how to answer, and begin anew
/undo            take the last turn back
/reset           begin anew
/save FILE       write the conversation as JSON
/quit            leave (or Ctrl-D)"""


class Chat:
    """A conversation with a model.

    Args:
        um: the model.
        folder: where drawings go.
        options: of `UniMM.chat`.
        seed: of drawings; each has the next number.

    Attributes:
        messages: what was said, as `UniMM.chat` takes it.
    """

    def __init__(self, um: Any, folder: Path, options: dict[str, Any], seed: int | None = None) -> None:
        self.um, self.folder, self.options = um, folder, options
        self.seed = secrets.randbelow(2**31) if seed is None else seed
        self.drawn = itertools.count()
        self.messages: list[dict[str, Any]] = []
        self.shown: list[str] = []

    def reply(self, line: str) -> Iterator[str]:
        """Do what a line says, and yield what is to be printed.

        Raises:
            UserError: it cannot be done; the conversation is as it was before.
        """
        word, _, rest = line.strip().partition(" ")
        commands: dict[str, Callable[[str], Iterator[str]]] = {
            "/image": self._show,
            "/draw": self._draw,
            "/system": self._system,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: iter([HELP]),
        }
        if word in commands:
            return commands[word](rest.strip())
        if word.startswith("/"):
            raise UserError(f"{word}: unknown; /help lists what there is")
        return self._say(line.strip())

    def _say(self, text: str) -> Iterator[str]:
        parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in self.shown]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        before, answer = [*self.messages], ""
        pieces = self.um.chat([*before, message], stream=True, **self.options)
        try:
            for piece in pieces:
                answer += piece
                yield piece
        except KeyboardInterrupt:  # what was said so far stays
            yield " …"
        self.messages = [*before, message, {"role": "assistant", "content": answer.strip() or " "}]
        self.shown = []

    def _show(self, files: str) -> Iterator[str]:
        paths = shlex.split(files)
        if not paths:
            raise UserError("/image: which? give a file")
        self.um.processor.check_understands()
        for path in paths:
            read_image(path)
        self.shown += paths
        yield f"{len(self.shown)} with what you say next"

    def _draw(self, prompt: str) -> Iterator[str]:
        if not prompt:
            raise UserError("/draw: what? give some words")
        number = next(self.drawn)
        drawing = self.um.draw(prompt, seed=[self.seed + number])[0]
        self.folder.mkdir(parents=True, exist_ok=True)
        yield str(save_drawing(drawing, self.folder, drawing_name(prompt, self.seed + number, 0)))

    def _system(self, text: str) -> Iterator[str]:
        self.messages = [{"role": "system", "content": text}] if text else []
        yield "begun anew"

    def _undo(self, _: str) -> Iterator[str]:
        if len(self.messages) < 2:
            raise UserError("/undo: there is nothing to take back")
        self.messages = self.messages[:-2]
        yield "taken back"

    def _reset(self, _: str) -> Iterator[str]:
        self.messages = [one for one in self.messages if one["role"] == "system"]
        self.shown = []
        yield "begun anew"

    def _save(self, file: str) -> Iterator[str]:
        from unimm.files import write_json

        if not file:
            raise UserError("/save: where? give a file")
        write_json(Path(file), {"messages": self.messages})
        yield file


def talk(chat: Chat, quiet: bool) -> None:
    """Read lines until they end.

    Args:
        chat: the conversation.
        quiet: whether nobody types: no prompt is shown.
    """
    if not quiet:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # history and editing of what is typed

        print("Say something; /help lists what else there is.")
    while True:
        try:
            line = input("" if quiet else "> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() in ("/quit", "/exit"):
            return
        if not line.strip():
            continue
        try:
            for piece in chat.reply(line):
                print("\n".join(printable(part) for part in piece.split("\n")), end="", flush=True)
        except UserError as error:
            say(str(error))
            continue
        print(flush=True)


def is_typed() -> bool:
    """Whether a person types."""
    return sys.stdin.isatty() and sys.stdout.isatty()
