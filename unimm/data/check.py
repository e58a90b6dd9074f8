"""Read a source from end to end and say what is in it: kinds, sizes, token lengths, and what is bad and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unimm.data.sources import RECORD_KINDS, BadRecord, Reading, Record, open_source
from unimm.data.stream import RowBuilder, grids_of
from unimm.errors import UserError
from unimm.pipeline import load_processor
from unimm.processing import UniMMProcessor, area_size

MOST_BAD = 1000  # bad items that are listed; all are counted


def check_source(
    location: str,
    reading: Reading | None = None,
    model: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Read everything once; every picture is decoded.

    Args:
        location: what `open_source` takes.
        reading: how to read it.
        model: whose processor counts tokens; None: the embedded model's.
        on_progress: called with records done and records in all.

    Returns:
        Form, records (good ones), kinds, pictures, tokens, bad (how many) and bad_items.

    Raises:
        UserError: nothing of the source can be read, or it is empty.
    """
    source = open_source(location, reading, strict=False)
    total = len(source)
    if not total and source.broken:
        raise source.broken[0]
    if not total:
        raise UserError(f"{location}: has no records")
    processor = load_processor(model)
    builder = RowBuilder(processor)
    kinds: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    formats: Counter[str] = Counter()
    lengths: list[int] = []
    bad, keys, repeated = list(source.broken), set[int](), 0
    for index in range(total):
        try:
            record = source[index]
            shown = _look(record, location, sizes, formats)
            lengths.append(_length(record, builder, shown, location))
        except BadRecord as error:
            bad.append(error)
        else:
            kinds[record.kind] += 1
            repeated += hash(record.key) in keys
            keys.add(hash(record.key))
        if on_progress is not None:
            on_progress(index + 1, total)
    if not kinds:
        raise UserError(f"{location}: none of its {total} records can be used; the first: {bad[0]}")
    return {
        "source": location,
        "form": source.form,
        "records": sum(kinds.values()),
        "kinds": {kind: kinds[kind] for kind in RECORD_KINDS if kinds[kind]},
        "pictures": {**_picture_sizes(sizes), "formats": dict(formats.most_common())},
        "tokens": {**_spread(lengths), "context": processor.context, "too_long": _over(lengths, processor)},
        "repeated_keys": repeated,
        "bad": len(bad),
        "bad_items": [{"key": b.key, "file": b.file, "reason": b.reason} for b in bad[:MOST_BAD]],
    }


def _look(
    record: Record, location: str, sizes: list[tuple[int, int]], formats: Counter[str]
) -> list[tuple[int, int]]:
    """Decode all pictures of a record; gives width and height of those to look at.

    Raises:
        BadRecord: one cannot be read.
    """
    shown = []
    found: list[tuple[tuple[int, int] | None, str]] = []
    for picture in record.pictures():
        try:
            if picture.encoded:
                picture.codes()
                found.append((None, "codes"))
                continue
            if picture.featured:
                picture.features()
                found.append((None, "features"))
                continue
            size = picture.image().size
        except UserError as error:
            raise BadRecord(record.key, location, str(error)) from None
        found.append((size, picture.form()))
        if not picture.draw:
            shown.append(size)
    for picture_size, form in found:
        formats[form] += 1
        if picture_size is not None:
            sizes.append(picture_size)
    return shown


def _length(record: Record, builder: RowBuilder, shown: Sequence[tuple[int, int]], location: str) -> int:
    """Tokens of a record, with its pictures at the sizes that the layout gives them."""
    processor = builder.processor
    grids = []
    try:
        if processor.layout.shared and processor.area is not None:
            areas = [area_size(h, w, processor.stride, *processor.area) for w, h in shown]
            grids = grids_of(processor, areas)
        return builder.length(record, grids)
    except UserError as error:
        raise BadRecord(record.key, location, str(error)) from None


def _over(lengths: Sequence[int], processor: UniMMProcessor) -> int:
    return sum(length > processor.context for length in lengths)


def _spread(values: Sequence[float]) -> dict[str, int]:
    """Least, median, 95th percentile and most of some whole numbers."""
    if not values:
        return {}
    parts: list[int] = np.percentile(values, [0, 50, 95, 100], method="lower").astype(int).tolist()
    return dict(zip(("least", "median", "p95", "most"), parts, strict=True))


def _picture_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How many pictures, and the spread of their widths and heights in pixels."""
    widths, heights = zip(*sizes, strict=True) if sizes else ((), ())
    return {"count": len(sizes), "width": _spread(widths), "height": _spread(heights)}
