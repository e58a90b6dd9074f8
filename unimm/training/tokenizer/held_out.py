"""Images of one's own that a tokenizer is measured on: held out of its sources, or sources of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import overload

from torch import Tensor, nn

from unimm.data.sources import BadRecord
from unimm.data.split import MAX_DIVIDED, divide
from unimm.errors import UserError
from unimm.processing.views import square_pixels
from unimm.training.held_out import Place, share_out, spread
from unimm.training.tokenizer.images import ImageFiles


def divided(files: ImageFiles, share: float) -> tuple[list[int], list[int]]:
    """Indices of the images to train on and of those held out, by a hash of their names.

    Raises:
        UserError: there are fewer than two images, or too many to look at each.
    """
    if len(files) > MAX_DIVIDED:
        message = (
            f"{files.location} has {len(files):,} images, too many to look at each; name sources instead"
        )
        raise UserError(message)
    trained, held = divide([files.key(index) for index in range(len(files))], share, files.location)
    return trained.tolist(), held.tolist()


class HeldOutImages(Sequence[dict[str, Tensor]]):
    """Micro-batches of held-out images, read when they are indexed: squares cut from the middle, as `pixels`.

    Args:
        files: the images of each source.
        held: which of each are held out.
        items: most images, evenly spread over all.
        size: pixels a side.
        batch: images in a micro-batch.
        bad: told of every image that cannot be read; such a one is left out.
    """

    def __init__(
        self,
        files: Mapping[str, ImageFiles],
        held: Mapping[str, Sequence[int]],
        items: int,
        size: int,
        batch: int,
        bad: Callable[[str, BadRecord], None],
    ) -> None:
        self.files, self.size, self.batch = files, size, batch
        self.places: list[Place] = []
        sizes = {name: len(indices) for name, indices in held.items() if len(indices)}
        shares = {name: float(size) for name, size in sizes.items()}
        for name, count in share_out(items, sizes, shares).items():
            for index in spread(held[name], count):
                try:
                    files[name][index]
                except BadRecord as error:
                    bad(name, error)
                else:
                    self.places.append((name, index))

    def pixels(self, places: Sequence[Place]) -> Tensor:
        """Pixels [B, 3, size, size] in [-1, 1]."""
        return square_pixels([self.files[name][index] for name, index in places], self.size)

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | Sequence[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start = index * self.batch
        return {"pixels": self.pixels(self.places[start : start + self.batch])}

    def first(self, count: int) -> dict[str, Tensor]:
        """Pixels of some images of each source, evenly spread over them."""
        found: dict[str, Tensor] = {}
        for name in self.files:
            own = [place for place in self.places if place[0] == name]
            if own:
                found[name] = self.pixels(
                    [own[number] for number in spread(range(len(own)), min(count, len(own)))]
                )
        return found


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Put back what a module holds: a codebook that has not begun is otherwise begun by whatever it sees first."""
    tensors = [*module.buffers(), *(parameter.data for parameter in module.parameters())]
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)


def begun(module: nn.Module) -> bool:
    """Whether the codebooks of a module have been set by k-means, where they are."""
    return all(bool(buffer.all()) for name, buffer in module.named_buffers() if name.endswith("initted"))
