"""What Python users hand in: images, seeds, sizes and texts of many kinds give one result, or one clear line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unimm
from unimm.errors import UserError
from unimm.pipeline import UniMM

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def um(tiny: Path) -> UniMM:
    """A tiny model that a test may change."""
    return unimm.load(tiny)


def ways(tmp_path: Path) -> dict[str, Any]:
    """One image in the ways that users have it."""
    image = Image.fromarray(PIXELS)
    image.save(path := tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    floats = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255
    return {
        "path": path, "str": str(path), "PIL": image, "array": PIXELS, "tensor": floats,
        "bytes": buffer.getvalue(), "file": io.BytesIO(buffer.getvalue()),
    }  # fmt: skip


def test_images_of_every_kind_are_asked_about_alike(um: UniMM, tmp_path: Path) -> None:
    said = {name: um.ask(image, "what is this?", 8) for name, image in ways(tmp_path).items()}
    assert len(set(said.values())) == 1 and all(isinstance(text, str) for text in said.values())
    together = um.ask(list(ways(tmp_path).values()), "what is this?", 8)
    assert together == list(said.values())
    assert um.ask([list(ways(tmp_path).values())], ["what is this?"], 2)  # all of them in one question


def test_iterators_are_lists(um: UniMM) -> None:
    images = [PIXELS, PIXELS[::2]]
    assert um.caption(iter(images), 8) == um.caption(images, 8) == um.caption(tuple(images), 8)
    questions = ["what?", "is it red?"]
    generated: Iterator[Any] = (image for image in images)
    assert um.ask(generated, iter(questions), 8) == um.ask(images, questions, 8)
    codes = um.draw_codes(iter(["hi", "a red apple"]), seed=iter([3, 4]))
    assert torch.equal(codes, um.draw_codes(["hi", "a red apple"], seed=[3, 4]))


def test_arrays_of_images_are_several(um: UniMM) -> None:
    batch = np.stack([PIXELS, PIXELS[::-1]])
    assert um.caption(batch, 8) == um.caption(list(batch), 8)
    assert um.caption(torch.from_numpy(batch), 8) == um.caption(list(batch), 8)


def test_questions_need_no_image(um: UniMM) -> None:
    alone = um.ask(None, "what is this?", 8)
    assert isinstance(alone, str)
    mixed = um.ask([None, PIXELS, [], [PIXELS, PIXELS]], "what is this?", 8)
    assert mixed == [alone, um.ask(PIXELS, "what is this?", 8), alone, mixed[3]]
    assert um.ask(None, ["what?", "what is this?"], 8)[1] == alone


def test_nothing_gives_nothing(um: UniMM) -> None:
    assert um.draw([]) == [] and um.caption([]) == [] and um.ask([], []) == [] and um.ask(None, []) == []
    images, codes = um.draw([], return_codes=True, n=3)
    assert images == [] and codes.shape == (0, 4, 4) and codes.dtype == torch.int64
    assert list(um.draw_batches([])) == []


@pytest.mark.parametrize(
    "seed", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), [7], (7,), np.array([7]), torch.tensor([7])]
)  # fmt: skip
def test_seeds_of_numpy_and_torch(um: UniMM, seed: Any) -> None:
    many = not isinstance(seed, int | np.integer) and (isinstance(seed, list | tuple) or seed.ndim == 1)
    expected = um.draw_codes("hi", seed=[7] if many else 7)
    assert torch.equal(um.draw_codes("hi", seed=seed), expected)


@pytest.mark.parametrize(
    "seed",
    [
        -1,
        np.int64(-1),
        1.0,
        np.float32(1),
        "7",
        b"7",
        True,
        2**64,
        [1, -1],
        [1, None],
        [[1]],
        {7: 1},
        float("nan"),
    ],
)
def test_seeds_that_are_none(um: UniMM, seed: Any) -> None:
    with pytest.raises(UserError, match=r"^seed: ") as caught:
        um.draw(["a", "b"], seed=seed)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "size", [(32, 32), [32, 32], "32x32", "32X32", np.array([32, 32]), torch.tensor([32, 32]), (np.int64(32), 32)]
)  # fmt: skip
def test_sizes(um: UniMM, size: Any) -> None:
    assert torch.equal(um.draw_codes("hi", seed=7, size=size), um.draw_codes("hi", seed=7))


@pytest.mark.parametrize(
    "size", ["64", "x", "64x", (64,), (1, 2, 3), (0, 64), (-64, 64), (64.5, 64), (10**9, 10**9), {}, object(), True]
)  # fmt: skip
def test_sizes_that_are_none(um: UniMM, size: Any) -> None:
    with pytest.raises(UserError, match=r"^size: ") as caught:
        um.draw("hi", size=size)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [0, -3, 1.5, "4", None, True, [4]])
def test_batch_sizes_that_are_none(um: UniMM, size: Any) -> None:
    with pytest.raises(UserError, match=r"^batch_size: .*; give a whole number of at least 1"):
        um.batch_size = size
    with pytest.raises(UserError, match=r"^batch_size: "):
        UniMM(um.model, um.processor, batch_size=size)
    assert um.batch_size == 64


@pytest.mark.parametrize("text", ["half \ud800 a letter", "\udcff", "a\udfffb"])
def test_half_a_letter_is_named(um: UniMM, text: str) -> None:
    for call in (um.draw, lambda words: um.ask(None, words), lambda words: um.ask(PIXELS, [words])):
        with pytest.raises(UserError, match=r"half a character; give text in Unicode"):
            call(text)  # type: ignore[operator]


@pytest.mark.parametrize("text", [None, 7, b"apple", ["apple"], "", "  \n", {"a": 1}])
def test_what_is_no_text_is_named(um: UniMM, text: Any) -> None:
    with pytest.raises(UserError, match=r"^prompts?: "):
        um.draw([text])
    with pytest.raises(UserError, match=r"^questions?: "):
        um.ask(None, [text])


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
def test_numbers_of_drawings_that_are_none(um: UniMM, n: Any) -> None:
    with pytest.raises(UserError, match=r"^n: "):
        um.draw("hi", n=n)


@pytest.mark.parametrize(
    "images", [7, object(), {"a": 1}, [7], [[PIXELS, 7]], "missing.png", b"not an image"]
)
def test_what_is_no_image_is_named(um: UniMM, images: Any) -> None:
    calls = (
        lambda: um.caption(images),
        lambda: um.ask(images, "what?"),
        lambda: um.draw("a", images=images),
    )
    for call in calls:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_batches_of_drawings_are_those_of_one_call(um: UniMM) -> None:
    drawings = um.draw(["a", "b", "c"], n=2, seed=7)
    um.batch_size = 4
    batches = list(um.draw_batches(["a", "b", "c"], n=2, seed=7))
    assert [len(batch) for batch in batches] == [4, 2]
    assert [image.tobytes() for batch in batches for image in batch] == [
        image.tobytes() for image in drawings
    ]
    with pytest.raises(UserError, match=r"^top_p: "):  # at the call, not at the first batch
        um.draw_batches("a", top_p=2.0)


def test_a_model_has_a_device_and_a_format(um: UniMM) -> None:
    assert um.device == torch.device("cpu") and um.dtype == torch.float32
    assert um.to("cpu") is um and um.to(torch.device("cpu")).dtype == torch.float32
    for moved in (um.to(torch.bfloat16), um.to(dtype="bfloat16"), um.to("cpu", torch.bfloat16)):
        assert moved.dtype == torch.bfloat16
        assert {p.dtype for p in moved.model.parameters()} == {torch.bfloat16}
    assert isinstance(um.caption(PIXELS, 4), str) and len(um.draw("hi")) == 1
    assert um.to("cpu", "float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "dtype"), [("gpu", None), ("cuda:99", None), (None, "int3"), (7, None), (None, torch.int8)]
)
def test_devices_and_formats_that_are_none(um: UniMM, device: Any, dtype: Any) -> None:
    with pytest.raises(UserError, match=r"^(device|dtype): "):
        um.to(device, dtype)
    assert um.dtype == torch.float32


def test_int8_weights_keep_their_format(tiny: Path) -> None:
    um = unimm.load(tiny, quantize="int8")
    assert um.to("cpu") is um
    with pytest.raises(UserError, match=r"^dtype: a model with int8 weights keeps its own"):
        um.to(dtype="bfloat16")
