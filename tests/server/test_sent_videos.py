"""Videos that clients send: looked at as `um.chat` does, from where images may come, and within limits."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import unimm
from tests.families.qwen2_vl_checkpoints import QWEN2_VL
from tests.families.survey import picture
from tests.server.bad_requests import CHAT, addresses, url
from tests.server.serving import Client, serving
from tests.server.test_bad_requests import harmless, touched
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.videos import Video, VideoLimits


def clip(frames: int = 6, width: int = 60, height: int = 40) -> bytes:
    """A GIF of 4 frames a second."""
    first, *others = [picture(width, height, seed) for seed in range(frames)]
    buffer = io.BytesIO()
    first.save(buffer, "gif", save_all=True, append_images=others, duration=250, loop=0)
    return buffer.getvalue()


def film(form: str, codec: str, frames: int = 20) -> bytes:
    """A film of 10 frames a second, each lighter than the one before."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (number * 10,) * 3))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def ask(address: Any, **options: Any) -> dict[str, Any]:
    """A question about a video."""
    parts = [
        {"type": "video_url", "video_url": {"url": address, **options}},
        {"type": "text", "text": "what?"},
    ]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 6}


@pytest.fixture(scope="module")
def um(tmp_path_factory: pytest.TempPathFactory) -> UniMM:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    QWEN2_VL.write(folder, "transformers")
    return unimm.load(folder, device="cpu")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    above = tmp_path_factory.mktemp("above")
    (above / "secret.png").write_bytes(clip())
    folder = above / "media"
    (folder / "folder").mkdir(parents=True)
    (folder / "a.png").write_bytes(clip())
    (folder / "link.png").symlink_to(above / "secret.png")
    (folder / "folderlink").symlink_to(above)
    return folder


@pytest.fixture(scope="module")
def seeing(um: UniMM, media: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server whose model sees videos."""
    folder = tmp_path_factory.mktemp("served")
    um.save(folder)
    served = unimm.load(folder, device="cpu")
    limits = {"max_pixels": 100_000, "max_side": 400}
    with serving(served, media_path=media, allow_hosts=("pictures.example",), **limits) as client:
        yield client


def test_answers_are_those_of_chat(um: UniMM, seeing: Client, media: Path) -> None:
    data, found = clip(), []
    for options in ({}, {"nframes": 2}, {"fps": 4.0}):
        parts = [{"type": "video", "video": data, **options}, {"type": "text", "text": "what?"}]
        expected = um.chat([{"role": "user", "content": parts}], max_new_tokens=6)
        for address in (url(data, "image/gif"), f"file://{media}/a.png"):
            answer = seeing.post(CHAT, **ask(address, **options))
            assert answer.status == 200, answer.content
            assert answer.document["choices"][0]["message"]["content"] == expected
        found.append(answer.document["usage"]["prompt_tokens"])
    assert found[1] < found[0] < found[2]  # 2, 4 and 6 frames


@pytest.mark.parametrize(("form", "codec"), [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("avi", "mpeg4")])
def test_films_are_read_from_their_bytes(form: str, codec: str, seeing: Client) -> None:
    data = film(form, codec)
    levels = [frame.getpixel((9, 9))[0] for frame in Video(data, limits=VideoLimits()).read()]  # type: ignore[index]
    assert levels == pytest.approx([0, 50, 100, 150], abs=3)
    answer = seeing.post(CHAT, **ask(f"data:video/mp4;base64,{base64.b64encode(data).decode()}"))
    assert answer.status == 200, answer.content
    for damaged in (data[: len(data) // 2], data[:40], data[:100] + bytes(200) + data[300:]):
        assert seeing.post(CHAT, **ask(url(damaged, "video/mp4"))).status in (200, 400)


@pytest.mark.parametrize("bad", list(addresses()), ids=lambda bad: ascii(bad.name)[1:-1])
def test_no_other_place_is_touched(seeing: Client, media: Path, bad: Any) -> None:
    address = bad.body["messages"][0]["content"][0]["image_url"]["url"]
    address = address.replace("{port}", str(seeing.port)).replace("{media}", str(media).lstrip("/"))
    touched.clear()
    answer = seeing.post(CHAT, **ask(address))
    assert answer.status in bad.statuses and answer.document["error"]["message"].isprintable()
    assert str(media.parent) not in answer.content.decode()
    assert not [what for what in touched if not harmless(what, media)]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (ask(url(b"#EXTM3U\nfile:///etc/passwd\n")), "not a video in a known format"),
        (ask(url(b"ffconcat version 1.0\nfile '/etc/passwd'\n")), "not a video in a known format"),
        (ask(url(clip(2, 500, 30))), r"frames of 500 x 30 pixels; a frame may have 100,000, and a side 400"),
        (ask(url(clip()), nframes=500), r"video_url.nframes: 500; 128 may be taken"),
        (ask(url(clip()), nframes=0), r"video_url.nframes: 0; give a whole number"),
        (ask(url(clip()), fps=-1.0), r"video_url.fps: -1.0; give a number above 0"),
        (ask(url(clip()), fps=1.0, nframes=2), r"fps and nframes; give one of them"),
        (ask(url(clip()), min_pixels=10**9), r"video_url.min_pixels: unknown key"),
        (ask("/etc/passwd"), "expected a data: URL with the video in base64"),
        (ask(None), "video_url.url: "),
    ],
)
def test_bad_videos_are_refused_in_a_line(body: dict[str, Any], line: str, seeing: Client) -> None:
    answer = seeing.post(CHAT, **body)
    error = answer.document["error"]
    assert answer.status == 400 and "\n" not in error["message"]
    assert error["message"].startswith("messages[0].content[0].video_url")
    assert line in error["message"]


def test_a_part_of_another_type_and_a_second_video_are_refused(seeing: Client) -> None:
    part = {"type": "video", "video": "/etc/passwd"}
    answer = seeing.post(CHAT, messages=[{"role": "user", "content": [part]}])
    assert answer.status == 400 and "messages[0].content[0]" in answer.document["error"]["message"]
    body = ask(url(clip()))
    body["messages"][0]["content"] *= 2
    answer = seeing.post(CHAT, **body)
    assert answer.status == 400 and "2 videos; a request may have 1" in answer.document["error"]["message"]


def test_a_model_that_sees_no_videos_says_so_before_any_is_read(client: Client) -> None:
    touched.clear()
    answer = client.post(CHAT, **ask("file:///etc/passwd"))
    assert answer.status == 400 and "understands images only" in answer.document["error"]["message"]
    assert ("open", "/etc/passwd") not in touched


@pytest.mark.parametrize(
    ("data", "limits", "line"),
    [
        (clip(8), VideoLimits(decoded=5 * 60 * 40), "more than 5 frames of 60 x 40 pixels; make it shorter"),
        (clip(8), VideoLimits(pixels=2_000), "a frame may have 2,000"),
        (b"GIF89a", VideoLimits(), "video: "),
    ],
)
def test_limits_hold_for_animations(data: bytes, limits: VideoLimits, line: str) -> None:
    with pytest.raises(UserError, match=line):
        list(Video(data, limits=limits).read())


def test_fewer_frames_are_taken_where_a_limit_is_lower() -> None:
    assert len(list(Video(clip(8), fps=100, limits=VideoLimits(frames=4)).read())) == 4
    assert len(list(Video(clip(8), fps=100).read())) == 8


def test_limits_hold_for_films() -> None:
    data = film("mp4", "mpeg4")
    with pytest.raises(UserError, match="more than 10 frames of 64 x 48 pixels; make it shorter"):
        list(Video(data, limits=VideoLimits(decoded=10 * 64 * 48)).read())
    with pytest.raises(UserError, match="a side 63; make it smaller"):
        list(Video(data, limits=VideoLimits(side=63)).read())
