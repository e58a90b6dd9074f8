"""Preferences as others write them: the table of docs/preferences.md is read line by line, in every container."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import unimm
from tests.data.test_documented_forms import as_json, as_lines, as_parquet, as_saved, as_tar
from unimm.data.sources import Blob, Message, Reading
from unimm.errors import UserError, UserNote
from unimm.pipeline import UniMM
from unimm.preferences.check import check_preferences, is_preferences
from unimm.preferences.data import Preference, find_preferences, read_preferences
from unimm.preferences.forms import read_form
from unimm.preferences.samples import PairSamples

DOCUMENT = Path(unimm.__file__).parent.parent / "docs" / "preferences.md"
WANTED = ("TRL", "RLAIF-V", "LLaMA-Factory", "ms-swift", "UltraFeedback", "MMPR")


def lines() -> list[tuple[str, str, str]]:
    """The table of forms: name, line and how it is read."""
    rows = DOCUMENT.read_text(encoding="utf-8").splitlines()
    start = next(i for i, row in enumerate(rows) if "| A line of it |" in row) + 2
    stop = next(i for i in range(start, len(rows)) if not rows[i].startswith("| "))
    found = [row.strip("| ").split(" | ") for row in rows[start:stop]]
    return [(name, line, reads) for name, line, reads in found]


LINES = lines()


def said(preference: Preference) -> str:
    """A preference as the table says it."""
    turns = [
        f"{message.role}: {', '.join('text' if part.image is None else 'image' for part in message.content)}"
        for message in preference.prompt
    ]
    answers = (
        "text" if one.modality == "text" else "drawing" for one in (preference.chosen, preference.rejected)
    )
    return "; ".join([*turns, ", ".join(answers)])


def test_the_table_names_the_forms_that_people_come_with() -> None:
    names = " ".join(name for name, _, _ in LINES)
    assert all(wanted in names for wanted in WANTED) and len(LINES) >= 12


CASES = [
    (container, line, reads)
    for name, line, reads in LINES
    for container in (as_json, as_lines, as_tar, as_parquet, as_saved)
    if (name, container) != ("Pairs of images", as_tar)  # there names are those of members
]


@pytest.mark.parametrize(("container", "line", "reads"), CASES, ids=range(len(CASES)))
def test_a_line_is_read_as_the_table_says(
    container: Callable[[Path, str], Path], line: str, reads: str, tmp_path: Path
) -> None:
    location = container(tmp_path, line)
    assert is_preferences(str(location))
    found = find_preferences(location, Reading())
    assert not found.equal
    preference = found.preferences[0]
    assert said(preference) == reads
    texts = [text for message in preference.prompt for text in message.words]
    texts += [answer.text or "" for answer in (preference.chosen, preference.rejected)]
    assert all(json.dumps(word)[1:-1] in line for text in texts for word in text.splitlines())
    row = json.loads(line.strip("`"))
    better = row.get("chosen", row.get("messages"))
    assert preference.chosen.text is None or preference.chosen.text in json.dumps(better)
    assert all(image.size == (64, 64) for image in preference.read_images())
    for name in preference.names():
        assert preference.read_image(name).size == (64, 64)


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(number: int, rejected: str = "b") -> dict[str, Any]:
    return {"prompt": f"what is {number}?", "chosen": "a", "rejected": rejected}


TURNS = [
    {"role": "user", "content": "what is this?"},
    {"role": "assistant", "content": "a red apple"},
    {"role": "user", "content": "on a blue background?"},
]
WRONG: list[tuple[Any, str]] = [
    ({"chosen": "a", "rejected": "b"}, "prompt: missing"),
    ({"question": "q", "chosen": "a"}, "rejected: missing"),
    ({"messages": TURNS, "chosen": "a"}, "rejected: missing"),
    ({"prompt": TURNS[:2], "chosen": "a", "rejected": "b"}, "prompt: ends in a turn of the assistant"),
    ({"prompt": TURNS, "chosen": {"codes": [[1]]}, "rejected": {"codes": [[2]]}}, "asked for in one turn"),
    ({"prompt": "q", "chosen": TURNS[:1], "rejected": TURNS[:1]}, "the last turn of an answer is the assistant's"),
    ({"chosen": TURNS[:2], "rejected": [TURNS[2], TURNS[1]]}, "the turns before the answers differ"),
    ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen: expected a list of turns"),
    ({"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen: expected a mapping, got 5"),
    ({"prompt": "q", "chosen": None, "rejected": "b"}, "chosen: missing"),
    ({"question": "<image>what?", "chosen": "a", "rejected": "b"}, "more <image> placeholders than images"),
    ({"question": "what?", "image": "none.png", "chosen": "a", "rejected": "b"}, "none.png: no such image"),
    ({"prompt": [*TURNS, {"role": "system", "content": "x"}], "chosen": "a", "rejected": "b"}, "only come first"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "line"), WRONG)
def test_what_fits_no_form_is_named(tmp_path: Path, row: Any, line: str) -> None:
    path = write(tmp_path, pair(1), row)
    with pytest.raises(UserError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:2: ") and line in str(error.value)


@pytest.mark.parametrize(("wrong", "more"), [(2, 0), (10, 0), (13, 3)])
def test_all_wrong_lines_are_named_or_counted(tmp_path: Path, wrong: int, more: int) -> None:
    rows = [row for number in range(wrong) for row in (pair(number), {"prompt": "p", "chosen": "a"})]
    path = write(tmp_path, *rows)
    for read in (read_preferences, lambda path: check_preferences(str(path))):
        with pytest.raises(UserError) as error:
            read(path)
        text = str(error.value)
        assert text.startswith(
            f"{path}: {wrong} of {2 * wrong} preferences are wrong: {path}:2: rejected: missing"
        )
        assert text.count("rejected: missing") == min(wrong, 10) and "\n" not in text
        assert text.endswith(f"; and {more} more") == bool(more)


def test_unreadable_images_are_all_named_by_the_check(tmp_path: Path) -> None:
    for name in "xy":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    rows = [{"question": "q", "image": f"{name}.png", "chosen": "a", "rejected": "b"} for name in "xy"]
    with pytest.raises(UserError, match=r"2 of 2 .*:1: .*x\.png: .*:2: .*y\.png: "):
        check_preferences(str(write(tmp_path, *rows)))


EQUAL = [
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "q", "chosen": "a", "rejected": " a\n"},
    {"prompt": "q", "chosen": {"codes": [[1, 2]]}, "rejected": {"codes": [[1, 2]]}},
    {"chosen": TURNS[:2], "rejected": TURNS[:2]},
    {"question": "q", "chosen": {"from": "gpt", "value": "a"}, "rejected": {"text": "a"}},
]


@pytest.mark.parametrize("row", EQUAL)
def test_equal_pairs_are_counted_and_left_out(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path, pair(1), row, pair(2), row)
    with pytest.warns(
        UserNote, match=r"2 of 4 pairs left out: chosen and rejected are equal \(first: .*:2\)"
    ):
        assert [one.words for one in read_preferences(path)] == ["what is 1?", "what is 2?"]
    report = check_preferences(str(path))
    assert (report["pairs"], report["equal"]) == (2, 2)
    with pytest.raises(UserError, match="equal in each pair; there is nothing to prefer"):
        read_preferences(write(tmp_path, row))


def test_drawings_that_become_the_same_codes_are_left_out(
    pairs_file: Path, tmp_path: Path, tiny_model: UniMM
) -> None:
    for name in ("a.png", "copy.png"):
        (tmp_path / name).write_bytes((pairs_file.parent / "a.png").read_bytes())
    same = {"prompt": "what", "chosen": {"image": "a.png"}, "rejected": {"image": "copy.png"}}
    drawn = {"prompt": "this", "chosen": {"codes": [[0] * 4] * 4}, "rejected": {"codes": [[1] * 4] * 4}}
    preferences = read_preferences(write(tmp_path, pair(1), same, drawn))
    with pytest.warns(UserNote, match=r"1 of 3 pairs left out: .* same codes \(first: .*:2\)"):
        samples = PairSamples(preferences, tiny_model.processor, tiny_model.model)
    assert [one.words for one in samples.preferences] == ["what is 1?", "this"]
    assert samples[1]["chosen"]["codes"].sum() == 0 and samples[1]["rejected"]["codes"].sum() == 16


def test_a_prompt_of_one_turn_is_what_asking_gives(
    pairs_file: Path, tmp_path: Path, tiny_model: UniMM
) -> None:
    processor = tiny_model.processor
    (tmp_path / "a.png").write_bytes((pairs_file.parent / "a.png").read_bytes())
    row = {"prompt": "what is this?", "chosen": "a", "rejected": "b"}
    rows = [row, {**row, "images": ["a.png"]}, {**row, "images": ["a.png", "a.png"]}]
    samples = PairSamples(read_preferences(write(tmp_path, *rows)), processor, tiny_model.model)
    for count in range(3):
        assert samples[count]["prompt"] == processor.question_ids("what is this?", count)


def test_turns_before_the_answer_are_written_as_in_training(tmp_path: Path, tiny_model: UniMM) -> None:
    processor = tiny_model.processor
    row = {"prompt": [{"role": "system", "content": "this"}, *TURNS], "chosen": "is", "rejected": "a"}
    samples = PairSamples(read_preferences(write(tmp_path, row)), processor, tiny_model.model)
    system = Message("system", ("this",))
    said = [Message(one["role"], (one["content"],)) for one in TURNS]  # type: ignore[arg-type]
    whole = processor.conversation.write([system, *said, Message("assistant", ("is",))])
    answer = [*processor.text_ids("is"), processor.eos]
    assert (
        samples[0]["chosen"]["row"] == whole
        and whole.ids[: len(samples[0]["prompt"])] == samples[0]["prompt"]
    )
    assert whole.labels[-len(answer) :] == answer


ATOMS = st.one_of(
    st.none(), st.booleans(), st.floats(), st.integers(), st.sampled_from(["", "a", "<image>", "a.png", "[", "\ud800"])
)  # fmt: skip
KEYS = st.sampled_from(
    ["role", "content", "from", "value", "type", "text", "image", "codes", "bytes", "path"]
)
ROLES = st.sampled_from(["user", "assistant", "system"])
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(lambda role, content: {"role": role, "content": content}, ROLES, inner),
    ),
    max_leaves=8,
)
NAMES = (
    "prompt", "chosen", "rejected", "question", "conversations", "messages", "images", "image", "rejected_response",
    "history", "system", "scores", "source", "margin", "instruction", "input",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6))
def test_any_row_is_read_or_refused_in_a_line(row: dict[str, Any]) -> None:
    try:
        value, files = read_form(row, lambda value: Blob(str(value), b"x"), {})
    except UserError as error:
        assert str(error)
    else:
        assert {"prompt", "chosen", "rejected"} <= value.keys()
        assert all(isinstance(blob, Blob) for blob in files.values())


def test_data_that_is_no_preferences(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": TURNS[:2]})
    assert not is_preferences(str(path))
    with warnings.catch_warnings(), pytest.raises(UserError, match="chosen: missing"):
        read_preferences(path)
