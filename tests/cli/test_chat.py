"""`unimm chat`: lines in, answers and drawings out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unimm.cli.chat import Chat
from unimm.console import printable
from unimm.errors import UserError
from unimm.pipeline import UniMM


@pytest.fixture
def chat(tiny_model: UniMM, tmp_path: Path) -> Chat:
    return Chat(tiny_model, tmp_path / "drawings", {"max_new_tokens": 6}, seed=5)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "an apple.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def say(chat: Chat, line: str) -> str:
    return "".join(chat.reply(line))


def test_turns_go_on_with_what_was_said(chat: Chat, tiny_model: UniMM, image: Path) -> None:
    say(chat, f"/image '{image}'")
    first = say(chat, "what is this?")
    second = say(chat, "a red apple")
    roles = [message["role"] for message in chat.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    assert chat.messages[1]["content"] == first.strip() and chat.messages[3]["content"] == second.strip()
    assert second.strip() == tiny_model.chat(chat.messages[:3], max_new_tokens=6)
    assert second.strip() != tiny_model.chat(chat.messages[2:3], max_new_tokens=6)
    shown = [part["type"] for part in chat.messages[0]["content"]]
    assert shown == ["image", "text"] and len(chat.messages[2]["content"]) == 1


def test_turns_are_taken_back(chat: Chat) -> None:
    say(chat, "/system it is a red apple")
    say(chat, "what?")
    assert len(chat.messages) == 3
    say(chat, "/undo")
    assert [message["role"] for message in chat.messages] == ["system"]
    with pytest.raises(UserError, match="nothing to take back"):
        say(chat, "/undo")
    say(chat, "what?")
    say(chat, "/reset")
    assert [message["role"] for message in chat.messages] == ["system"]
    say(chat, "/system")
    assert chat.messages == []


def test_drawings_are_files(chat: Chat, tiny_model: UniMM) -> None:
    paths = [say(chat, "/draw a red apple"), say(chat, "/draw a red apple")]
    for number, path in enumerate(paths):
        expected = tiny_model.draw("a red apple", seed=[5 + number])[0]
        assert Image.open(path).tobytes() == expected.tobytes()
    assert paths[0] != paths[1] and chat.messages == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("/imag x", "/imag: unknown; /help lists"),
        ("/image", "/image: which"),
        ("/image nothing.png", "nothing.png: no such file"),
        ("/draw", "/draw: what"),
        ("/save", "/save: where"),
        ("why? " * 100, "the context holds 128"),
    ],
)
def test_what_cannot_be_leaves_the_conversation(chat: Chat, line: str, wrong: str) -> None:
    say(chat, "what?")
    before = [*chat.messages]
    with pytest.raises(UserError, match=wrong):
        say(chat, line)
    assert chat.messages == before and not chat.shown


def test_the_command_reads_lines(tiny: Path, image: Path, tmp_path: Path) -> None:
    lines = [
        "what?",
        f"/image '{image}'",
        "/nothing",
        "",
        "a red apple",
        "/save talk.json",
        "/draw it",
        "/quit",
        "no",
    ]
    command = [
        sys.executable,
        "-m",
        "unimm",
        "chat",
        "--model",
        str(tiny),
        "--max-new-tokens",
        "4",
        "--seed",
        "1",
    ]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert "unimm: /nothing: unknown; /help lists what there is\n" in run.stderr
    said = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["role"] for message in said] == ["user", "assistant"] * 2
    assert "1 with what you say next\n" in run.stdout and (tmp_path / "it-1-0.png").exists()
    assert printable(said[1]["content"].strip()) in run.stdout
