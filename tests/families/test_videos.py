"""Videos: frames of Qwen2-VL against transformers' processor and model, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import unimm
from tests.families.fuyu_checkpoints import FUYU
from tests.families.qwen2_vl_checkpoints import BOUNDS, QWEN2_VL
from tests.families.survey import Oracle, picture
from unimm.errors import UserError
from unimm.models.inputs import Images, Rows
from unimm.models.seeing import from_patches
from unimm.pipeline import UniMM
from unimm.sampling.engine import Engine
from unimm.sampling.requests import TextRequest, TextSampling
from unimm.videos import Video


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen2_vl")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return QWEN2_VL.write(folder, "transformers")


@pytest.fixture(scope="module")
def um(folder: Path, oracle: Oracle) -> UniMM:
    return unimm.load(folder, device="cpu")


def clip(frames: int, width: int = 60, height: int = 40) -> list[Image.Image]:
    return [picture(width, height, seed) for seed in range(frames)]


# Each a user's message: images by themselves, videos as lists of frames; no frame has to be resized.
MESSAGES: list[list[Any]] = [
    [clip(5), "what is in this?"],
    [picture(60, 80), "and", clip(4, 80, 60), picture(40, 40), clip(1), "a"],
    ["a"],
    [clip(3, 40, 80), clip(2), "how many?"],
]


def chat_of(message: list[Any], shown: bool) -> list[dict[str, Any]]:
    """A message for ours, or, without what is shown, for the reference's template."""
    parts: list[dict[str, Any]] = []
    for part in message:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
        parts.append({"type": kind, **({kind: part} if shown or kind == "text" else {})})
    return [{"role": "user", "content": parts}]


def expected_inputs(oracle: Oracle, messages: list[list[Any]]) -> dict[str, Tensor]:
    """What transformers' processor gives for messages, padded on the left."""
    processor: Any = oracle.processor
    texts = [
        processor.apply_chat_template(chat_of(message, shown=False), add_generation_prompt=True)
        for message in messages
    ]
    parts = [part for message in messages for part in message if not isinstance(part, str)]
    videos = [np.stack([np.asarray(frame) for frame in part]) for part in parts if isinstance(part, list)]
    images = [part for part in parts if not isinstance(part, list)]
    given = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        text_kwargs={"padding": True, "padding_side": "left"},
        return_tensors="pt",
    )
    return {name: value for name, value in given.items() if name != "token_type_ids"}


@pytest.fixture
def published_positions(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a video has more times than rows and columns, text behind it has positions that its times have too.

    The published code goes on behind the largest; transformers behind the larger of rows and columns.
    """
    model: Any = oracle.model.model
    given = model.get_vision_position_ids

    def positions(start: int, grid: Tensor, *options: Any, **named: Any) -> Tensor:
        found: Tensor = given(start, grid, *options, **named)
        grid[1:] = grid[1:].maximum(2 * grid[0])  # the larger of the two is what it adds
        return found

    monkeypatch.setattr(model, "get_vision_position_ids", positions)


@torch.no_grad()
def test_tokens_pixels_and_logits_are_the_references(um: UniMM, oracle: Oracle) -> None:
    for messages in (*([message] for message in MESSAGES), MESSAGES):
        inputs = expected_inputs(oracle, messages)
        read = [um.processor.chat(chat_of(message, shown=True)) for message in messages]
        ids, mask = um.processor.pad_left([ids for ids, _ in read])
        assert torch.equal(ids, inputs["input_ids"]) and torch.equal(mask, inputs["attention_mask"])
        images = Images.cat(images for _, images in read)
        expected = oracle.logits({name: value.clone() for name, value in inputs.items()})
        got = um.model(input_ids=ids, attention_mask=mask, images=images).logits
        given = um.model(**inputs).logits  # what the reference's processor gives
        seen = mask.bool()
        assert expected[seen].std() > 0.1
        assert (got - expected)[seen].abs().max() < 1e-4
        assert (given - expected)[seen].abs().max() < 1e-4


@torch.no_grad()
def test_a_long_video_is_counted_by_its_times(
    um: UniMM, oracle: Oracle, request: pytest.FixtureRequest
) -> None:
    """More times than rows and columns; the test fails once transformers counts so."""
    message = [clip(12, 40, 40), "what is it?"]
    inputs = expected_inputs(oracle, [message])
    ids, images = um.processor.chat(chat_of(message, shown=True))
    got = um.model(input_ids=torch.tensor([ids]), images=images).logits
    assert (got - oracle.logits({**inputs})).abs().max() > 1e-2
    request.getfixturevalue("published_positions")
    copied = {name: value.clone() for name, value in inputs.items()}
    assert (got - oracle.logits(copied)).abs().max() < 1e-4


def test_greedy_answers_are_equal(um: UniMM, oracle: Oracle) -> None:
    inputs = expected_inputs(oracle, MESSAGES)
    expected = oracle.greedy(inputs, 6)
    engine = Engine(um.model, um.processor)
    read = [um.processor.chat(chat_of(message, shown=True)) for message in MESSAGES]
    sampling = TextSampling(max_new_tokens=6)
    answers = engine.run(TextRequest(ids, images, sampling=sampling) for ids, images in read)
    ends = set(um.processor.end_tokens)
    for row, answer in zip(expected.tolist(), answers, strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        assert stop > 1 and answer.ids == row[:stop]


def test_frames_are_resized_as_the_references(um: UniMM, oracle: Oracle) -> None:
    """Within what torchvision's resizing differs from Pillow's: two levels of 255, and less than half on average."""
    frames = clip(4, 91, 67)
    inputs = expected_inputs(oracle, [[frames, "a"]])
    ids, images = um.processor.question("a", [Video(frames)])
    assert ids == inputs["input_ids"][0].tolist()
    assert images.pixels is not None and images.times is not None
    assert images.times.tolist() == inputs["video_grid_thw"][:, 0].tolist() == [2]
    theirs = from_patches(
        inputs["pixel_values_videos"], inputs["video_grid_thw"], um.model.seeing, moving=True
    )
    assert theirs.pixels is not None and theirs.pixels.shape == images.pixels.shape
    levels = (theirs.pixels - images.pixels).abs() * 255 * 0.26
    assert levels.max() < 2.1 and levels.mean() < 0.5


@torch.no_grad()
def test_packed_and_as_features_they_are_the_same(um: UniMM) -> None:
    read = [um.processor.chat(chat_of(message, shown=True)) for message in MESSAGES]
    alone = [um.model(input_ids=torch.tensor([ids]), images=images).logits[0] for ids, images in read]
    lengths = [len(ids) for ids, _ in read]
    rows = Rows(
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        samples=torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None],
        branches=torch.zeros(1, sum(lengths), dtype=torch.int64),
    )
    ids = torch.tensor([[token for ids, _ in read for token in ids]])
    together = Images.cat(images for _, images in read)
    assert together is not None
    packed = um.model(input_ids=ids, images=together, rows=rows).logits[0]
    spread = max(one.abs().max().item() for one in alone)
    for own, part in zip(alone, packed.split(lengths), strict=True):
        assert (part - own).abs().max() < 1e-5 * spread
    features = um.model.as_features(together)
    assert torch.allclose(um.model(input_ids=ids, images=features, rows=rows).logits[0], packed, atol=1e-4)
    mixed = Images.cat([features.part(0, 2), together.part(2, len(together))])
    assert torch.allclose(um.model(input_ids=ids, images=mixed, rows=rows).logits[0], packed, atol=1e-4)
    half = um.model(input_ids=torch.tensor([read[0][0]]), images=together.part(0, 1)).logits[0]
    assert torch.allclose(half, alone[0], atol=1e-4)


def test_a_file_is_a_video_of_some_of_its_frames(um: UniMM, tmp_path: Path) -> None:
    """A GIF of 3 seconds gives 2 frames a second, or as many as are asked for."""
    grey = [Image.new("RGB", (60, 40), (10 * i, 10 * i, 10 * i)) for i in range(12)]
    path = tmp_path / "clip.gif"
    grey[0].save(path, save_all=True, append_images=grey[1:], duration=250, loop=0)
    levels = [frame.getpixel((0, 0))[0] // 10 for frame in Video(path).read()]  # type: ignore[index]
    assert levels == [0, 2, 4, 6, 8, 10]
    assert len(list(Video(path, fps=100).read())) == 12
    assert [frame.getpixel((0, 0))[0] // 10 for frame in Video(path, frames=3).read()] == [0, 4, 8]  # type: ignore[index]
    shown = list(Video(path).read())
    wanted = um.ask(Video(shown), "what is it?", max_new_tokens=4)
    assert um.ask(Video(path), "what is it?", max_new_tokens=4) == wanted
    content = [{"type": "video", "video": f"file://{path}"}, {"type": "text", "text": "what is it?"}]
    assert um.chat([{"role": "user", "content": content}], max_new_tokens=4) == wanted
    several = um.ask([Video(path), picture(60, 40), None], ["what is it?"] * 3, max_new_tokens=4)
    assert several[0] == wanted and len(several) == 3


def test_a_film_is_read(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            grey = np.full((48, 64, 3), 8 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    frames = [np.asarray(frame) for frame in Video(path, fps=2).read()]
    assert [round(frame.mean() / 8) for frame in frames] == [0, 5, 10, 15, 20, 25]
    assert frames[0].shape == (48, 64, 3)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(UserError, match=r"broken\.mp4: not a video"):
        list(Video(tmp_path / "broken.mp4").read())
    with pytest.raises(UserError, match=r"none\.mp4: no such file"):
        list(Video(tmp_path / "none.mp4").read())


def test_limits_of_frames(um: UniMM) -> None:
    shown = um.processor.look([Video(clip(2, 200, 100)), Video(clip(2, 200, 100), max_pixels=BOUNDS[0])])
    areas = [height * width for height, width in shown.view_sizes()]
    assert BOUNDS[0] < areas[0] <= BOUNDS[1] and areas[1] <= BOUNDS[0]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Video([]), "video: expected a file or a list"),
        (lambda: Video("a.mp4", fps=0), "video: fps: 0; give a number above 0"),
        (lambda: Video("a.mp4", fps=1, frames=2), "video: fps and frames; give one"),
        (lambda: Video("a.mp4", frames=-1), "video: frames: -1; give a whole number"),
        (lambda: list(Video([b"x"]).read()), "video: frame 1: "),
    ],
)
def test_a_line_for_what_is_no_video(make: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        make()


def test_a_line_where_videos_or_their_parts_do_not_fit(um: UniMM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"messages\[0\].content\[0\].video: missing"):
        um.chat([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(UserError, match=r"messages\[0\].content\[0\].video: fps: 0"):
        um.chat([{"role": "user", "content": [{"type": "video", "video": clip(2), "fps": 0}]}])
    with pytest.raises(UserError, match="video: a frame of"):
        um.ask(Video([picture(60, 40), picture(40, 60)]), "a")
    ids, images = um.processor.question("a", [Video(clip(4))])
    with pytest.raises(ValueError, match=r"images: .*room"):
        um.model(input_ids=torch.tensor([ids[: len(ids) // 2]]), images=images)
    FUYU.write(tmp_path, "transformers")
    with pytest.raises(UserError, match="video: this model understands images only"):
        unimm.load(tmp_path, device="cpu").ask(Video(clip(2)), "a")
