"""What voting shows and does, whatever carries it: the images of a ballot, the pair to vote on, votes, undoing.

Images are made here, from codes or from files inside the data's folder; what a request says is looked up among the
pairs and never reaches the file system.
"""

from __future__ import annotations

import io
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from unimm.errors import UserError
from unimm.images import read_image
from unimm.preferences.data import check_response_codes
from unimm.preferences.vote.pairs import Ballot, PageSide, Pair
from unimm.preferences.vote.votes import Votes

if TYPE_CHECKING:
    from unimm.pipeline import UniMM

MAX_IMAGE_SIDE = 1024  # longest side of an image on the page, in pixels


class Refusal(Exception):
    """A request that is answered with an error: its status and a line for the person."""

    def __init__(self, status: HTTPStatus, line: str) -> None:
        super().__init__(line)
        self.status = status


class BallotImages:
    """The images of a ballot, as PNG.

    Args:
        ballot: what is voted on.
        um: the model whose image tokenizer made the codes; None if there are none.
    """

    def __init__(self, ballot: Ballot, um: UniMM | None) -> None:
        self.ballot, self.um = ballot, um
        self._lock = threading.Lock()  # one decoding at a time

    def check(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """See that every image can be shown, before anyone votes.

        Raises:
            UserError: naming line and file: an image is outside the folder or unreadable, or codes are not the
                model's.
        """
        seen: set[str] = set()
        for done, pair in enumerate(self.ballot.pairs, start=1):
            for name in pair.images():
                if name not in seen:
                    seen.add(name)
                    self._read(name, pair.where)
            for side in (pair.left, pair.right):
                if side.codes is not None:
                    self._check_codes(side.codes, pair.where)
            if on_progress is not None:
                on_progress(done, len(self.ballot.pairs))

    def png(self, pair: Pair, place: str) -> bytes | None:
        """The image at a place of a pair, `left`, `right` or the number of a part of the prompt; None: there is none.

        Raises:
            UserError: its file has become unreadable.
        """
        if place in ("left", "right"):
            answer = pair.left if place == "left" else pair.right
            if answer.codes is not None:
                return _png(self._decode(answer.codes))
            name = answer.image
        else:
            parts = {str(number): part.image for number, part in enumerate(pair.prompt.content)}
            name = parts.get(place)
        return None if name is None else _png(self._read(name, pair.where))

    def _read(self, name: str, where: str) -> Image.Image:
        """Read an image file that the data names, if it lies in the data's folder."""
        given = PurePosixPath(name)
        if given.is_absolute() or ".." in given.parts:
            raise UserError(
                f"{where}: {name}: outside the folder of {self.ballot.file.name}; put the image there"
            )
        path = self.ballot.folder
        for part in given.parts:
            path = path / part
            if path.is_symlink():
                raise UserError(
                    f"{where}: {name}: {path} is a link, which may lead elsewhere; put a copy there"
                )
        if path.exists() and not path.is_file():
            raise UserError(f"{where}: {name}: not a file")
        return read_image(path, f"{where}: {name}")

    def _check_codes(self, codes: list[list[int]], where: str) -> None:
        assert self.um is not None
        generation, layout = self.um.model.config.generation_config(), self.um.processor.layout
        if generation is None or self.um.model.image_tokenizer is None:
            raise UserError(
                f"{where}: drawings, but this model cannot draw; give --model with the one that drew them"
            )
        grid = None if layout.sized else (layout.grid[0], layout.grid[1])
        check_response_codes(codes, generation.codes, grid, where)

    def _decode(self, codes: list[list[int]]) -> Image.Image:
        import torch

        from unimm.preferences.scorers import to_images

        assert self.um is not None
        with self._lock:
            return to_images(self.um, torch.tensor([codes]))[0]


def _png(image: Image.Image) -> bytes:
    """An image as PNG, made smaller where it is larger than a page shows."""
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


class Booth:
    """What the page asks for and does: the pair to vote on, a vote, an undoing.

    Args:
        ballot: what is voted on.
        votes: where votes go; those that it holds are of these pairs.
        images: of the ballot.
        voter: who votes.
    """

    def __init__(self, ballot: Ballot, votes: Votes, images: BallotImages, voter: str) -> None:
        self.ballot, self.votes, self.images, self.voter = ballot, votes, images, voter
        self.token = secrets.token_urlsafe(24)
        self.run = secrets.token_hex(6)  # in the images' addresses, so that no other run's are shown
        self.pairs = {pair.key: pair for pair in ballot.pairs}

    def state(self) -> dict[str, Any]:
        """What the page shows: the first pair without a vote, and the one after it to be fetched ahead."""
        done, last = self.votes.view()
        waiting = (pair for pair in self.ballot.pairs if pair.key not in done)
        return {
            "pair": self._shown(next(waiting, None)),
            "next": self._shown(next(waiting, None)),
            "done": len(done),
            "total": len(self.ballot.pairs),
            "last": last,
            "file": str(self.votes.path),
        }

    def vote(self, key: Any, choice: Any) -> dict[str, Any]:
        """Keep a vote; `result` is `kept`, or `already` if the pair was voted on before.

        Args:
            key: of the pair.
            choice: `left`, `right` or `tie`.
        """
        pair = self.pairs.get(key) if isinstance(key, str) else None
        if pair is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "there is no such pair; reload the page")
        if choice not in ("left", "right", "tie"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "a vote is left, right or tie")
        preference = None
        if choice != "tie":
            folders = self.ballot.folder, self.votes.path.parent
            preference = pair.preference(cast(PageSide, choice), *folders, self.voter)
        kept = self.votes.add(pair.key, preference, self.voter)
        return {"result": "kept" if kept else "already", **self.state()}

    def undo(self, key: Any) -> dict[str, Any]:
        """Take the last vote back; `result` is `undone`, or `changed` if the last vote is not on the pair `key`."""
        undone = isinstance(key, str) and self.votes.undo(key)
        return {"result": "undone" if undone else "changed", **self.state()}

    def image(self, run: str, key: str, place: str) -> bytes | None:
        """An image by the parts of its address; None: there is none."""
        pair = self.pairs.get(key)
        return self.images.png(pair, place) if pair is not None and run == self.run else None

    def _shown(self, pair: Pair | None) -> dict[str, Any] | None:
        if pair is None:
            return None

        def shown(text: str | None, place: str) -> dict[str, str]:
            return {"text": text} if text is not None else {"image": f"/image/{self.run}/{pair.key}/{place}"}

        prompt = [shown(part.text, str(number)) for number, part in enumerate(pair.prompt.content)]
        sides = {"left": shown(pair.left.text, "left"), "right": shown(pair.right.text, "right")}
        return {"key": pair.key, "prompt": prompt, **sides}
