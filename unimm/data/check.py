"""Read a source from end to end and say what is in it: kinds, sizes, token lengths, and what is bad and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unimm.data.samples import SampleBuilder, blank_codes
from unimm.data.sources import RECORD_KINDS, BadRecord, Location, Reading, Record, open_source
from unimm.errors import UserError
from unimm.loading import load_processor
from unimm.processing.processor import UniMMProcessor

MOST_BAD = 1000  # bad items that are listed; all are counted


def check_source(
    location: Location,
    reading: Reading | None = None,
    model: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    size: int | None = None,
    keep_ratio: bool = False,
) -> dict[str, Any]:
    """Read everything once; every image is decoded.

    Args:
        location: what `open_source` takes.
        reading: how to read it.
        model: whose processor counts tokens; None: the embedded model's.
        on_progress: called with records done and records in all.
        size: pixels a side that images to draw are brought to; None: the model's.
        keep_ratio: keep their ratio, in an area of that side squared (`unimm.processing.views.TargetSize`).

    Returns:
        Form, records (good ones), kinds, images, tokens, bad (how many) and bad_items.

    Raises:
        UserError: nothing of the source can be read, or it is empty.
    """
    source = open_source(location, reading, strict=False)
    location = source.location
    total = len(source)
    if not total and source.broken:
        raise source.broken[0]
    if not total:
        raise UserError(f"{location}: has no records")
    builder = _builder(load_processor(model), size, keep_ratio)
    found = _Findings()
    bad = list(source.broken)
    for index in range(total):
        try:
            found.add(source[index], builder, location)
        except BadRecord as error:
            bad.append(error)
        if on_progress is not None:
            on_progress(index + 1, total)
    kinds, context = found.kinds, builder.context
    if not kinds:
        raise UserError(f"{location}: none of its {total} records can be used; the first: {bad[0]}")
    over = sum(length > context for length in found.lengths)  # the end of these is left out
    return {
        "source": location,
        "form": source.form,
        "records": sum(kinds.values()),
        "kinds": {kind: kinds[kind] for kind in RECORD_KINDS if kinds[kind]},
        "images": {**_image_sizes(found.sizes), "formats": dict(found.formats.most_common())},
        "tokens": {**_spread(found.lengths), "context": context, "too_long": over},
        "unanswered": found.unanswered,
        "repeated_keys": sum(found.kinds.values()) - len(found.keys),
        "bad": len(bad),
        "bad_items": [{"key": b.key, "file": b.file, "reason": b.reason} for b in bad[:MOST_BAD]],
    }


def _builder(processor: UniMMProcessor, size: int | None, keep_ratio: bool) -> SampleBuilder:
    """What makes samples for a model, but for the codes of images to draw, of which only the number counts."""
    if processor.drawing_size is None:
        return SampleBuilder(processor, None, lambda pixels: pixels)
    target_size = processor.target_size(size, keep_ratio)
    return SampleBuilder(processor, target_size, blank_codes(target_size))


class _Findings:
    """What the good records of a source are, added up."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.sizes: list[tuple[int, int]] = []
        self.formats: Counter[str] = Counter()
        self.lengths: list[int] = []
        self.keys: set[int] = set()
        self.unanswered = 0  # end in a turn of the user, which is left out

    def add(self, record: Record, builder: SampleBuilder, location: str) -> None:
        """Make a record's sample, as training does, and count it.

        Raises:
            BadRecord: it cannot be used.
        """
        sample = builder.build(record, location)
        for image in record.images():
            if image.encoded or image.featured:
                self.formats["codes" if image.encoded else "features"] += 1
                continue
            form, size = image.header()
            self.formats[form] += 1
            self.sizes.append(size)
        self.kinds[record.kind] += 1
        self.keys.add(hash(record.key))
        self.lengths.append(sample["whole"])
        self.unanswered += record.messages[-1].role != "assistant"


def _spread(values: Sequence[float]) -> dict[str, int]:
    """Minimum, median, 95th percentile and maximum of some whole numbers."""
    if not values:
        return {}
    parts: list[int] = np.percentile(values, [0, 50, 95, 100], method="lower").astype(int).tolist()
    return dict(zip(("min", "median", "p95", "max"), parts, strict=True))


def _image_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many images, and the spread of their widths and heights in pixels."""
    widths, heights = zip(*sizes, strict=True) if sizes else ((), ())
    return {"count": len(sizes), "width": _spread(widths), "height": _spread(heights)}
