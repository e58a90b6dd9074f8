"""Requests that are wrong, hostile or both, each with the statuses that may answer it."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from PIL import Image

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
ASK = {"messages": [{"role": "user", "content": "what is a star?"}]}


class Bad(NamedTuple):
    """A request that is refused.

    Attributes:
        name: what is wrong.
        statuses: that may answer it.
        path: whom it is sent to.
        body: JSON, or bytes as they are.
        headers: further ones.
        method: of HTTP.
    """

    name: str
    statuses: tuple[int, ...]
    path: str
    body: Any = None
    headers: dict[str, str] = {}  # noqa: RUF012  (read only)
    method: str = "POST"


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A PNG of this size; by default its pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = b"" if data is None else chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def small(form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, form)
    return buffer.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def seen(address: Any) -> dict[str, Any]:
    """A question about an image at an address."""
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "what?"}]
    return {"messages": [{"role": "user", "content": parts}]}


def nested(depth: int, opening: str = "[", closing: str = "]") -> bytes:
    return b'{"messages": ' + (opening * depth + closing * depth).encode() + b"}"


def form(*parts: tuple[str, bytes], boundary: bytes = b"xx") -> bytes:
    """A multipart form of parts, each with its disposition."""
    lines = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (boundary, head.encode(), content)
        for head, content in parts
    )
    return lines + b"--%b--\r\n" % boundary


FORM = {"Content-Type": "multipart/form-data; boundary=xx"}


def wrong_types() -> Iterator[Bad]:
    """Fields of the wrong type, out of range, missing or unknown."""
    odd: list[Any] = [None, 1, -1, 1.5, True, "x", "", [], {}, [None], [[]], {"a": 1}, "\ud800"]
    for value in odd:
        yield Bad(f"messages {value!r}", (400,), CHAT, {"messages": value})
        if not (isinstance(value, str) and value == "x"):
            yield Bad(f"prompt {value!r}", (400,), DRAW, {"prompt": value})
    wrong: dict[str, list[Any]] = {
        "n": [0, -1, 1.5, "1", True, 10**6, 10**30, [1]],
        "seed": [-1, 2**64, 1.5, "7", True, 10**40],
        "temperature": [-1, "hot", True, 10**400, 1e308, [1], 1e-9],
        "top_p": [0, 1.1, -1, "x"],
        "top_k": [-1, 1.5, "x"],
        "stream": ["yes", 1, []],
        "model": ["other", "../../etc/passwd", "embedded/../embedded", "", "embedded\x00", "%2e%2e", "a" * 10_000,
                  "file:///etc/passwd", "embedded ", 1, [], {}],
    }  # fmt: skip
    for name, values in wrong.items():
        for value in values:
            statuses = (400, 404) if name == "model" else (400,)
            yield Bad(f"chat {name} {repr(value)[:30]}", statuses, CHAT, {**ASK, name: value})
            yield Bad(f"draw {name} {repr(value)[:30]}", statuses, DRAW, {"prompt": "a", name: value})
    for fields in (
        {"max_tokens": 0}, {"max_tokens": "5"}, {"max_completion_tokens": -1}, {"stop": [""]}, {"stop": ["a"] * 99},
        {"stop": "a" * 1000}, {"stop": [1]}, {"tools": [{"type": "function"}]}, {"logprobs": True}, {"n": 99},
        {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "http://a/b"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a",
        "schema": {"$ref": "file:///etc/passwd"}}}},
        {"regex": "(a?){300}a{300}"}, {"regex": "("}, {"regex": "a" * 5000},
        {"regex": "a", "response_format": {"type": "json_object"}}, {"stream_options": {"include_usage": True}},
        {"repetition_penalty": 0}, {"frequency_penalty": 1}, {"temprature": 1}, {"__class__": 1}, {"messages.0": 1},
        {"logit_bias": {"5": 100}}, {"modalities": ["audio"]},
    ):  # fmt: skip
        yield Bad(f"chat {json.dumps(fields)[:150]}", (400,), CHAT, {**ASK, **fields})
    for more in (
        {"size": "64"}, {"size": "0x0"}, {"size": "-1x5"}, {"size": "63x64"}, {"size": "99999999x99999999"},
        {"size": "65536x65536"}, {"size": [64, 64]}, {"size": "6４x64"}, {"output_format": "svg"},
        {"output_format": "../a"}, {"output_compression": 101}, {"response_format": "file"}, {"partial_images": -1},
        {"background": "transparent"}, {"guidance_scale": "x"}, {"guidance_scale": 1e30}, {"guidence_scale": 2},
        {"negative_prompt": 1}, {"negative_prompt": "a", "guidance_scale": 1}, {"prompt": " "},
        {"prompt": "word " * 3000}, {"prompt": "a" * 100_000}, {"mask": "x"}, {"negative_prompt": " "},
    ):  # fmt: skip
        yield Bad(
            f"draw {json.dumps(more)[:50]}, {len(json.dumps(more))}", (400,), DRAW, {"prompt": "a", **more}
        )


def wrong_turns() -> Iterator[Bad]:
    """Messages that are none."""
    for turns in (
        [{"role": "user"}], [{"content": "a"}], [{"role": "god", "content": "a"}], [{"role": "user", "content": ""}],
        [{"role": "user", "content": " \n"}], [{"role": "assistant", "content": "a"}], [{"role": "tool",
        "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], ["a"], [[]], [None],
        [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}], [{"role": "user", "content": [{"text": "a"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "a"}}]}],
        [{"role": "user", "content": "a\udc00"}], [{"role": "user", "content": "word " * 5000}],
        [{"role": "user", "content": "a", "extra": 1}], [{"role": "user", "content": "a"}] * 5000,
        [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": url(small())}}]},
         {"role": "user", "content": "a"}],
    ):  # fmt: skip
        yield Bad(
            f"turns {json.dumps(turns)[:90]} {len(json.dumps(turns))}", (400, 422), CHAT, {"messages": turns}
        )


def bodies() -> Iterator[Bad]:
    """Bodies that are no JSON, or too much of it."""
    for name, content in {
        "nothing": b"", "no json": b"hello", "half": b'{"messages": [', "a list": b"[]", "a number": b"5",
        "null": b"null",
        "nan": b'{"messages": [], "temperature": NaN}', "infinity": b'{"prompt": "a", "seed": Infinity}',
        "minus infinity": b'{"temperature": -Infinity}', "1e999": b'{"prompt": "a", "temperature": 1e999}',
        "digits": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}", "deep lists": nested(100),
        "deeper lists": nested(100_000), "deep objects": nested(5_000, '{"a":', "}").replace(b":}", b":1}"),
        "no utf-8": b'{"prompt": "\xff\xfe"}', "utf-16": '{"prompt": "a"}'.encode("utf-16"),
        "surrogate": b'{"prompt": "\\ud800"}', "surrogate key": b'{"\\udfff": 1}', "nul": b"\x00",
        "bom": b"\xef\xbb\xbf{}",
        "comment": b'{"prompt": "a" /* b */}', "trailing": b'{"prompt": "a"} x',
        "many values": json.dumps({"stop": [0] * 50_000}).encode(),
    }.items():  # fmt: skip
        for path in (CHAT, DRAW, EDIT):
            yield Bad(f"{name} to {path[4:]}", (400,), path, content)
    yield Bad("huge", (413,), DRAW, b'{"prompt": "' + b"a" * 3_000_000 + b'"}')
    yield Bad("gzip", (415,), DRAW, zlib.compress(b'{"prompt": "a"}'), {"Content-Encoding": "gzip"})
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=xx",
        "image/png",
        "",
    ):
        yield Bad(f"content type {kind!r}", (415,), DRAW, b'{"prompt": "a"}', {"Content-Type": kind})


def images() -> Iterator[Bad]:
    """Images that are none, are bombs, or too many."""
    zeros = zlib.compress(bytes(4_000_000), 9)
    for name, data, kind in (
        ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/'/></svg>", "image/svg+xml"),
        ("text", b"hello", "image/png"), ("pdf", b"%PDF-1.7 %%EOF", "image/png"), ("eps", b"%!PS-Adobe-3.0 EPSF",
        "image/png"),
        ("cut png", small()[:40], "image/png"), ("cut jpeg", small("JPEG")[:100], "image/jpeg"),
        ("png header alone", b"\x89PNG\r\n\x1a\n", "image/png"), ("no pixels", png(0, 0), "image/png"),
        ("large png", png(60_000, 60_000), "image/png"), ("larger png", png(2**31 - 1, 2**31 - 1), "image/png"),
        ("long png", png(1, 65_500, zlib.compress(bytes(2 * 65_500))), "image/png"),
        ("wide png", png(65_500, 1, zlib.compress(bytes(65_501))), "image/png"),
        ("bomb", png(30_000, 30_000, zeros), "image/png"), ("zip", b"PK\x03\x04" + bytes(50), "image/png"),
        ("gif of nothing", b"GIF89a", "image/gif"), ("webp", b"RIFF\xff\xff\xff\xffWEBPVP8X", "image/webp"),
        ("bmp", b"BM" + bytes(60), "image/bmp"), ("tiff", b"II*\x00" + b"\xff" * 40, "image/tiff"),
        ("xml bomb", b'<!DOCTYPE a [<!ENTITY b "c">]><svg>&b;</svg>', "image/svg+xml"),
    ):  # fmt: skip
        yield Bad(f"image: {name}", (400, 422), CHAT, seen(url(data, kind)))
    for name, address in {
        "half base64": "data:image/png;base64,iVBORw0KGg", "no base64": "data:image/png;base64,@@@@", "nothing": "",
        "empty": "data:image/png;base64,", "plain": "data:image/png,hello", "no comma": "data:image/png;base64",
        "a path": "/etc/passwd", "a name": "a.png", "javascript": "javascript:alert(1)",
        "ftp": "ftp://127.0.0.1/a.png",
        "gopher": "gopher://127.0.0.1:25/_x", "blob": "blob:http://a/b", "number": 5, "list": [],
        "long": "x" * 10_000,
        "surrogate": "data:image/png;base64,\ud800", "data in data": "data:data:image/png;base64,aa",
    }.items():  # fmt: skip
        yield Bad(f"address: {name}", (400, 422), CHAT, seen(address))
    parts = [{"type": "image_url", "image_url": {"url": url(small())}}] * 20
    yield Bad("twenty images", (400,), CHAT, {"messages": [{"role": "user", "content": parts}]})
    yield Bad("twenty to edit", (400,), EDIT, {"prompt": "a", "images": [{"image_url": url(small())}] * 20})
    yield Bad("none to edit", (400,), EDIT, {"prompt": "a", "images": []})
    yield Bad("a file's id", (400,), EDIT, {"prompt": "a", "images": [{"file_id": "x"}]})


def addresses() -> Iterator[Bad]:
    """Addresses that a server must not ask, and files that it must not open."""
    for address in (
        "http://127.0.0.1:{port}/health", "http://localhost:{port}/health", "http://[::1]/", "http://0.0.0.0:{port}/",
        "http://0/", "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/",
        "http://169.254.169.254/latest/meta-data/", "http://[::ffff:127.0.0.1]/", "http://10.0.0.1/",
        "http://192.168.0.1/",
        "http://metadata.google.internal/", "http://pictures.example@127.0.0.1/",
        "http://127.0.0.1#@pictures.example/",
        "http://pictures.example:22/", "http://pictures.example.evil.example/",
        "http://evil.example/pictures.example",
        "https://pictures.example:444/", "http://pictures.example\\@127.0.0.1/", "http://pictures.example\r\nX: y/",
        "http:///etc/passwd", "http://", "HTTP://127.0.0.1/", "http://[", "http://pictures.example:99999/",
        "//127.0.0.1/",
        "http://user:pass@pictures.example/", "http://pict\u00fcres.example/", "http://pictures.example%00.evil/",
        "file:///etc/passwd", "file://localhost/etc/passwd", "file:../../etc/passwd", "file:///proc/self/environ",
        "file:///{media}/../secret.png", "file:///{media}/%2e%2e/secret.png", "file:///{media}/link.png",
        "FILE:///etc/passwd",
        "file:///{media}/folder", "file:///{media}/pipe", "file:///{media}/..%2fsecret.png", "file:///{media}",
        "file:",
        "file://evil.example/{media}/a.png", "file:///{media}/a.png%00.txt", "file:///{media}/folderlink/secret.png",
        "file:///{media}/missing.png", "file:///dev/zero", "file:///{media}/a.png?x",
    ):  # fmt: skip
        yield Bad(f"to {address}", (400, 422), CHAT, seen(address))


def forms() -> Iterator[Bad]:
    """Forms that are none, or hold what does not belong there."""
    image = ('name="image"; filename="a.png"', small())
    prompt = ('name="prompt"', b"a")
    for name, content in {
        "no parts": b"", "garbage": b"\xff" * 100, "no end": form(image, prompt)[:-10], "no image": form(prompt),
        "no prompt": form(image), "no name": form(("filename=a", b"x"), prompt), "mask": form(image, prompt,
        ('name="mask"; filename="m.png"', small())),
        "other file": form(prompt, ('name="../../a"; filename="../../b"', small())), "image as text": form(prompt,
        ('name="image"', b"x")),
        "n": form(image, prompt, ('name="n"', b"zero")), "nan": form(image, prompt, ('name="temperature"', b"NaN")),
        "twice": form(image, prompt, prompt), "unknown": form(image, prompt, ('name="colour"', b"red")),
        "many fields": form(image, prompt, *[(f'name="f{i}"', b"") for i in range(500)]),
        "many files": form(prompt, *[image] * 40), "empty image": form(prompt, ('name="image"; filename="a.png"',
        b"")),
        "text image": form(prompt, ('name="image"; filename="a.png"', b"hello")), "seed": form(image, prompt,
        ('name="seed"', b"-1")),
        "long number": form(image, prompt, ('name="seed"', b"9" * 5000)), "bomb": form(prompt,
        ('name="image"; filename="a.png"', png(60_000, 60_000))),
    }.items():  # fmt: skip
        yield Bad(f"form: {name}", (400, 422), EDIT, content, FORM)
    yield Bad(
        "form without boundary", (400,), EDIT, form(image, prompt), {"Content-Type": "multipart/form-data"}
    )
    long = {"Content-Type": f"multipart/form-data; boundary={'x' * 5000}"}
    yield Bad("form with a long boundary", (400,), EDIT, form(image, prompt), long)


def strangers() -> Iterator[Bad]:
    """Requests of other hosts, other pages and other methods."""
    for host in ("evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example",
        "10.0.0.1", "[::2]",
                 "127.0.0.1:x", "localhost:", "a b", "127.0.0.1@evil.example", "{port}"):  # fmt: skip
        yield Bad(f"host {host}", (400, 421), DRAW, {"prompt": "a"}, {"Host": host})
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example", "file://",
        "https://evil.example:{port}",
                   "http://127.0.0.1:{port}.evil.example", "", "http://[::1]:{port}",
                   "chrome-extension://abc"):  # fmt: skip
        yield Bad(f"origin {origin}", (403,), DRAW, {"prompt": "a"}, {"Origin": origin})
    cross = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    yield Bad("an image on another page", (403,), "/metrics", None, cross, "GET")
    yield Bad("preflight", (403,), DRAW, None, {"Origin": "http://evil.example"}, "OPTIONS")
    for path in ("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/../../etc/passwd", "/v1/models/%00",
        "/v1/models/a%0d%0ab",
                 "/v1/models//etc/passwd", "/etc/passwd", "/v1/", "/v1/images", "/static/../app.py",
                 "/v1/models/" + "a" * 5000, "//",
                 "/v1/chat/completions/", "/docs/../../etc/passwd", "/.git/config"):  # fmt: skip
        yield Bad(f"path {path[:40]}", (404,), path, None, {}, "GET")
    for method, path in (("GET", CHAT), ("DELETE", DRAW), ("PUT", EDIT), ("POST", "/v1/models"), ("POST",
        "/health"), ("TRACE", "/"),
                         ("PATCH", "/metrics"), ("BREW", "/")):  # fmt: skip
        yield Bad(f"{method} {path}", (405,), path, {}, {}, method)


CORPUS = [
    bad for make in (wrong_types, wrong_turns, bodies, images, addresses, forms, strangers) for bad in make()
]
