"""Votes on two drawings of a running server: what is kept, and who may vote. No model is needed for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from unimm.errors import UserError
from unimm.preferences.data import read_preferences
from unimm.preferences.vote import duels as duels_module
from unimm.preferences.vote.duels import Duels, add_votes
from unimm.preferences.vote.votes import Votes
from unimm.server.app import create_app
from unimm.server.service import Service
from unimm.server.settings import ServerSettings

BASE = "http://localhost"


def no_model() -> Any:
    raise UserError("there is no model here")


@pytest.fixture
def booth(tmp_path: Path) -> Iterator[tuple[Duels, TestClient]]:
    service = Service(ServerSettings(), no_model)
    app = create_app(service)
    with Votes(tmp_path / "votes.jsonl", {"model": "embedded"}) as votes:
        duels = Duels(votes, "ann")
        add_votes(app, service, duels)
        yield duels, TestClient(app, base_url=BASE)


def drawn(duels: Duels, *prompts: str) -> list[str]:
    """Names of drawings of prompts, all different."""
    return [
        duels.remember(prompt, [[number, number + 1], [2, 3]]) for number, prompt in enumerate(prompts, 5)
    ]


def test_votes_are_preferences_that_training_reads(booth: tuple[Duels, TestClient], tmp_path: Path) -> None:
    duels, client = booth
    names = drawn(duels, *["a star"] * 5)
    token = {"X-Token": client.get("/votes").json()["token"]}

    def vote(left: int, right: int, choice: str) -> dict[str, Any]:
        body = {"left": names[left], "right": names[right], "choice": choice}
        answer = client.post("/votes", json=body, headers=token)
        assert answer.status_code == 200
        return dict(answer.json())

    assert vote(0, 1, "right")["result"] == "kept"
    assert vote(2, 3, "tie")["votes"] == 2
    assert vote(1, 0, "right")["result"] == "already"  # the same two, the other way round
    last = vote(3, 4, "left")
    (first, second) = read_preferences(tmp_path / "votes.jsonl")
    assert (first.chosen.codes, first.rejected.codes) == ([[6, 7], [2, 3]], [[5, 6], [2, 3]])
    assert second.chosen.codes == [[8, 9], [2, 3]] and first.source == "ann"
    undone = client.post("/votes/undo", json={"pair": last["pair"]}, headers=token).json()
    assert (undone["result"], undone["votes"]) == ("undone", 2)
    again = client.post("/votes/undo", json={"pair": last["pair"]}, headers=token).json()
    assert again["result"] == "changed"
    assert len(read_preferences(tmp_path / "votes.jsonl")) == 1
    same = duels.remember("a star", [[5, 6], [2, 3]])
    body = {"left": names[0], "right": same, "choice": "left"}
    assert client.post("/votes", json=body, headers=token).json()["result"] == "equal"


def test_only_the_page_of_this_run_votes(booth: tuple[Duels, TestClient], tmp_path: Path) -> None:
    duels, client = booth
    one, other, elsewhere = drawn(duels, "a star", "a star", "a moon")
    body: dict[str, Any] = {"left": one, "right": other, "choice": "left"}
    token = {"X-Token": duels.token}
    refused: list[tuple[int, dict[str, Any], dict[str, str]]] = [
        (403, body, {}),
        (403, body, {"X-Token": "of-an-earlier-run"}),
        (403, body, {**token, "Origin": "http://elsewhere.example"}),
        (421, body, {**token, "Host": "elsewhere.example"}),
        (413, {**body, "more": "x" * 5000}, token),
        (404, {**body, "left": "0" * 24}, token),
        (404, {**body, "right": ["no name"]}, token),
        (400, {**body, "right": elsewhere}, token),
        (400, {**body, "choice": "both"}, token),
    ]
    for status, sent, headers in refused:
        answer = client.post("/votes", json=sent, headers=headers)
        assert answer.status_code == status and "\n" not in answer.json()["error"]["message"], sent
    assert client.post("/votes", content=b"[1]", headers=token).status_code == 400
    assert client.get("/votes", headers={"Origin": "http://elsewhere.example"}).status_code == 403
    assert not read_lines(tmp_path / "votes.jsonl")
    own = client.post("/votes", json=body, headers={**token, "Origin": BASE})
    assert own.json()["result"] == "kept" and len(read_lines(tmp_path / "votes.jsonl")) == 1


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_oldest_drawings_are_forgotten(
    booth: tuple[Duels, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duels_module, "REMEMBERED", 3)
    duels, client = booth
    first, *others = drawn(duels, *["a star"] * 4)
    token = {"X-Token": duels.token}
    body = {"left": others[0], "right": others[1], "choice": "tie"}
    assert client.post("/votes", json=body, headers=token).status_code == 200
    assert client.post("/votes", json={**body, "left": first}, headers=token).status_code == 404


def test_a_prompt_that_no_file_can_hold_and_a_file_changed_by_others(
    booth: tuple[Duels, TestClient], tmp_path: Path
) -> None:
    duels, client = booth
    token = {"X-Token": duels.token}
    one, other = drawn(duels, "a \ud800 star", "a \ud800 star")
    body = {"left": one, "right": other, "choice": "left"}
    assert client.post("/votes", json=body, headers=token).status_code == 409
    one, other = drawn(duels, "a star", "a star")
    (tmp_path / "votes.jsonl").write_text("{}\n")
    answer = client.post("/votes", json={**body, "left": one, "right": other}, headers=token)
    assert answer.status_code == 409 and "another program" in answer.json()["error"]["message"]


def test_a_folder_belongs_to_one_model(tmp_path: Path) -> None:
    with Votes(tmp_path / "votes.jsonl", {"model": "embedded"}) as votes:
        duels = Duels(votes, "ann")
        one, other = drawn(duels, "a star", "a star")
        duels.vote(one, other, "left")
    with pytest.raises(UserError, match="begun with model"):
        Votes(tmp_path / "votes.jsonl", {"model": "other"})
