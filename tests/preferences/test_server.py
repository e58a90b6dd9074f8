"""The voting server over HTTP: who is answered, what is served, and what a vote does."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.preferences.ballots import captions, drawings, write
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.preferences.data import read_preferences
from unimm.preferences.scorers import to_images
from unimm.preferences.vote.booth import BallotImages, Booth
from unimm.preferences.vote.pairs import read_ballot
from unimm.preferences.vote.server import VoteServer
from unimm.preferences.vote.votes import Votes


class Client:
    """Talks to a server as its page does, or not."""

    def __init__(self, server: VoteServer, booth: Booth) -> None:
        self.server, self.port, self.booth = server, server.port, booth

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[HTTPResponse, bytes]:
        """A request; `host` and `x_token` and so on set headers."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    def state(self) -> dict[str, Any]:
        """What the page shows."""
        return json.loads(self.request("GET", "/state")[1])

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """A vote or an undoing from the page."""
        answer, content = self.request("POST", path, body, x_token=self.booth.token)
        assert answer.status == 200, content
        return json.loads(content)


@contextmanager
def serving(candidates: Path, output: Path, um: UniMM | None = None) -> Iterator[Client]:
    ballot = read_ballot(candidates)
    with Votes(output, {"seed": 0, "pairs": None}) as votes, VoteServer(0) as server:
        booth = Booth(ballot, votes, BallotImages(ballot, um), "ann")
        thread = threading.Thread(target=server.serve, args=[booth])
        thread.start()
        try:
            yield Client(server, booth)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with serving(captions(tmp_path), tmp_path / "votes.jsonl") as client:
        yield client


def test_only_this_machine_is_listened_to(client: Client) -> None:
    with pytest.raises(
        ConnectionRefusedError
    ):  # all of 127/8 is this machine; a server on 0.0.0.0 would answer
        socket.create_connection(("127.0.0.2", client.port), timeout=5)
    with pytest.raises(
        UserError, match=f"port {client.port}: address already in use; give another, or --port 0"
    ):
        VoteServer(client.port)
    with pytest.raises(UserError, match="port 70000: "):
        VoteServer(70000)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1]"])
@pytest.mark.parametrize("path", ["/", "/state"])
def test_requests_to_other_names_are_refused(client: Client, host: str, path: str) -> None:
    answer, content = client.request("GET", path, host=host)
    assert answer.status == 421 and client.booth.token.encode() not in content
    pair = client.state()["pair"]["key"]
    voted = client.request(
        "POST", "/vote", {"pair": pair, "choice": "left"}, host=host, x_token=client.booth.token
    )
    assert voted[0].status == 421 and client.state()["done"] == 0


def test_this_machine_has_two_names(client: Client) -> None:
    for host in ("127.0.0.1", f"localhost:{client.port}", "localhost:9"):  # 9: a tunnel's other end
        assert client.request("GET", "/", host=host)[0].status == 200


def test_votes_are_taken_from_the_page_alone(client: Client) -> None:
    body = {"pair": client.state()["pair"]["key"], "choice": "left"}
    token = client.booth.token
    for headers in (
        {},
        {"x_token": "guess"},
        {"x_token": "ü"},
        {"x_token": token, "origin": "http://evil.example"},
        {"x_token": token, "origin": "null"},
        {"x_token": token, "origin": f"http://127.0.0.1:{client.port + 1}"},
    ):
        for path in ("/vote", "/undo"):
            assert client.request("POST", path, body, **headers)[0].status == 403
    assert client.state()["done"] == 0
    origin = f"http://127.0.0.1:{client.port}"
    assert client.request("POST", "/vote", body, x_token=token, origin=origin)[0].status == 200
    assert client.state()["done"] == 1


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/vote", b"{", 400),
        ("/vote", b"[1]", 400),
        ("/vote", b"[" * 4000, 400),
        ("/vote", b" " * 5000, 413),
        ("/vote", {"pair": "none", "choice": "left"}, 404),
        ("/vote", {"pair": ["none"], "choice": "left"}, 404),
        ("/vote", {"choice": "left"}, 404),
        ("/none", {}, 404),
    ],
)
def test_odd_requests_change_nothing(client: Client, path: str, body: Any, status: int) -> None:
    answer, content = client.request("POST", path, body, x_token=client.booth.token)
    assert answer.status == status and set(json.loads(content)) == {"error"}
    key = client.state()["pair"]["key"]
    wrong = client.request("POST", "/vote", {"pair": key, "choice": "best"}, x_token=client.booth.token)
    assert wrong[0].status == 400 and client.state()["done"] == 0


def test_the_page_brings_nothing_from_elsewhere(client: Client) -> None:
    answer, content = client.request("GET", "/")
    page = content.decode()
    assert client.booth.token in page and "{nonce}" not in page and "{token}" not in page
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe" not in policy
    assert "//" not in page.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    assert "innerHTML" not in page
    again = client.request("GET", "/")[0].headers["Content-Security-Policy"]
    assert again != policy


def test_a_walk_through_the_votes(client: Client, tmp_path: Path) -> None:
    before = client.state()
    assert (before["done"], before["total"], before["last"]) == (0, 6, None)
    first = before["pair"]["key"]
    after = client.post("/vote", pair=first, choice="right")
    assert (after["result"], after["done"], after["last"]) == ("kept", 1, first)
    assert after["pair"] == before["next"] == client.state()["pair"]
    (kept,) = read_preferences(tmp_path / "votes.jsonl")
    assert (kept.chosen.text, kept.rejected.text) == (
        before["pair"]["right"]["text"],
        before["pair"]["left"]["text"],
    )
    assert kept.source == "ann" and [blob.path for blob in kept.files()] == [str(tmp_path / "0.png")]
    again = client.post("/vote", pair=first, choice="left")
    assert (again["result"], again["done"]) == ("already", 1)
    tied = client.post("/vote", pair=after["pair"]["key"], choice="tie")
    assert (tied["result"], tied["done"]) == ("kept", 2)
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 1
    assert client.post("/undo", pair=first)["result"] == "changed"  # another tab's last vote
    undone = client.post("/undo", pair=after["pair"]["key"])
    assert (undone["result"], undone["pair"], undone["last"]) == ("undone", after["pair"], first)
    while (state := client.state())["pair"] is not None:
        client.post("/vote", pair=state["pair"]["key"], choice="left")
    assert (state["done"], state["next"]) == (6, None)
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 6


def test_many_tabs_at_once_count_each_pair_once(client: Client, tmp_path: Path) -> None:
    keys = list(client.booth.pairs)
    results: list[str] = []

    def tab() -> None:
        results.extend(client.post("/vote", pair=key, choice="left")["result"] for key in keys)

    tabs = [threading.Thread(target=tab) for _ in range(8)]
    for one in tabs:
        one.start()
    for one in tabs:
        one.join()
    assert (results.count("kept"), results.count("already")) == (6, 42)
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 6


def test_images_of_the_prompt_are_made_here(client: Client, tmp_path: Path) -> None:
    address = client.state()["pair"]["prompt"][0]["image"]
    answer, content = client.request("GET", address)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(tmp_path / "0.png"))
    )
    Image.new("RGB", (3000, 600)).save(tmp_path / "0.png")
    assert Image.open(io.BytesIO(client.request("GET", address)[1])).size == (1024, 205)
    (tmp_path / "0.png").unlink()
    (tmp_path / "0.png").symlink_to(tmp_path / "1.png")  # after the check at the start
    answer, content = client.request("GET", address)
    assert answer.status == 500 and b"is a link" in content


def test_no_path_of_an_address_reaches_the_files(client: Client, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    run, key = client.booth.run, client.state()["pair"]["key"]
    tails = (
        "secret.txt",
        "0.png",
        "../secret.txt",
        "..%2fsecret.txt",
        "left",
        "1",
        "-1",
        "%2e%2e/secret.txt",
    )
    addresses = [f"/image/{run}/{key}/{tail}" for tail in tails]
    addresses += [
        "/secret.txt",
        "/../secret.txt",
        f"//{tmp_path}/secret.txt",
        f"/{tmp_path}/0.png",
        "/vote.html",
    ]
    addresses += [
        f"/image/{run}/..",
        f"/image/{run}/none/0",
        f"/image/other/{key}/0",
        "/image",
    ]
    for address in addresses:
        answer, content = client.request("GET", address)
        assert answer.status == 404 and b"secret" not in content, address


def test_drawings_are_what_the_codes_say(tmp_path: Path, tiny_model: UniMM) -> None:
    with serving(drawings(tmp_path / "d.jsonl"), tmp_path / "votes.jsonl", tiny_model) as client:
        state = client.state()
        assert state["pair"]["prompt"] == [{"text": "prompt 0"}]
        pair = client.booth.ballot.pairs[0]
        for side in ("left", "right"):
            shown = Image.open(io.BytesIO(client.request("GET", state["pair"][side]["image"])[1]))
            drawn = to_images(tiny_model, torch.tensor([getattr(pair, side).codes]))[0]
            assert np.array_equal(np.asarray(shown), np.asarray(drawn))
        client.post("/vote", pair=pair.key, choice="left")
        (kept,) = read_preferences(tmp_path / "votes.jsonl")
        assert (kept.chosen.codes, kept.rejected.codes) == (pair.left.codes, pair.right.codes)


def asked(image: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": [{"image": image}, {"text": "what?"}]}]
    return {"prompt": prompt, "candidates": ["a", "b"]}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            asked("../outside.png"),
            r"c.jsonl:1: ../outside.png: outside the folder of c.jsonl; put the image there",
        ),
        (asked("in/../../outside.png"), r"outside the folder"),
        (asked("/etc/passwd"), r"/etc/passwd: outside the folder"),
        (asked("link.png"), r"link.png: .*link.png is a link, which may lead elsewhere"),
        (asked("linked/outside.png"), r"linked is a link"),
        (asked("text.png"), r"c.jsonl:1: text.png: not an image in a known format"),
        (asked("cut.png"), r"c.jsonl:1: cut.png: the image is damaged or cut short"),
        (asked("none.png"), r"c.jsonl:1: none.png: no such file"),
        (asked("pipe"), r"c.jsonl:1: pipe: not a file"),
        (asked("."), r"c.jsonl:1: .: not a file"),
        ({"prompt": "a", "candidates": [{"image": "link.png"}, {"image": "b.png"}]}, r"link.png is a link"),
        (
            {"prompt": "a", "candidates": [{"codes": [[99]]}, {"codes": [[1]]}]},
            r"c.jsonl:1: 1 x 1 codes; this model",
        ),
        (
            {"prompt": "a", "candidates": [{"codes": [[99] * 4] * 4}, {"codes": [[1] * 4] * 4}]},
            r"c.jsonl:1: code 99; this model's codes are 0 to 31",
        ),
    ],
)
def test_images_that_are_not_shown(tmp_path: Path, tiny_model: UniMM, row: dict[str, Any], line: str) -> None:
    folder = tmp_path / "data"
    (folder / "in").mkdir(parents=True)
    for file in (tmp_path / "outside.png", folder / "b.png"):
        Image.effect_noise((40, 40), 50).save(file)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((tmp_path / "outside.png").read_bytes()[:400])
    os.mkfifo(folder / "pipe")
    ballot = read_ballot(write(folder / "c.jsonl", row))
    with pytest.raises(UserError, match=line) as error:
        BallotImages(ballot, tiny_model).check()
    assert "\n" not in str(error.value)
