"""Candidates drawn, stopped and resumed; scored, ranked and turned into preferences."""

from __future__ import annotations

import copy
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from unimm.data.emojiscenes.concepts import with_article
from unimm.data.emojiscenes.scenes import EmojiScenes, SceneKind
from unimm.errors import UserError
from unimm.pipeline import UniMM
from unimm.preferences.align import Prompts
from unimm.preferences.candidates import (
    DrawingPrompt,
    DrawingQuestion,
    PromptCandidates,
    draw_candidates,
    read_candidates,
    read_prompts,
    scene_prompts,
)
from unimm.preferences.data import read_preferences
from unimm.preferences.rank import Rules, best_and_worst, candidates_of, rank_candidates
from unimm.preferences.scorers import Candidate, make_scorer

SETTINGS = {"model": "tiny", "guidance_scale": 2.0, "temperature": 1.0, "top_k": None, "top_p": None}


@pytest.fixture
def few(tiny_model: UniMM) -> UniMM:
    """The tiny model, two prompts of three at once."""
    return UniMM(tiny_model.model, tiny_model.processor, batch_size=6)


def prompts() -> list[DrawingPrompt]:
    return [DrawingPrompt(prompt=text) for text in ("a red apple", "blue", "what?", "this is", "on a")]


def test_candidates_are_what_draw_draws(few: UniMM, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    report = draw_candidates(few, prompts(), path, 3, 7, SETTINGS)
    assert report == {"candidates": str(path), "prompts": 5, "drawn_before": 0, "each": 3}
    rows = read_candidates(path)
    assert [row.prompt for row in rows] == [prompt.prompt for prompt in prompts()]
    _, codes = few.draw(
        "this is", seed=[9], guidance_scale=2.0, return_codes=True
    )  # its third, of seed 7 + 2
    assert rows[3].candidates[2].seed == 9
    assert rows[3].candidates[2].codes == codes[0].tolist()


def test_a_stopped_run_goes_on_as_if_it_had_not(few: UniMM, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    draw_candidates(few, prompts(), whole, 3, 0, SETTINGS)
    text = whole.read_text()
    cut.write_text(text[: text.index("\n", text.index("\n") + 1) + 40])  # two lines and a piece
    assert draw_candidates(few, prompts(), cut, 3, 0, SETTINGS)["drawn_before"] == 2
    assert cut.read_text() == text
    assert draw_candidates(few, prompts(), cut, 3, 0, SETTINGS)["drawn_before"] == 5
    assert cut.read_text() == text
    with pytest.raises(UserError, match=r"c.*jsonl:1: drawn with guidance_scale 2.0, now 3.0"):
        draw_candidates(few, prompts(), cut, 3, 0, {**SETTINGS, "guidance_scale": 3.0})
    with pytest.raises(UserError, match=r"jsonl:1: drawn with n 3, now 4"):
        draw_candidates(few, prompts(), cut, 4, 0, SETTINGS)
    with pytest.raises(UserError, match=r"jsonl:1: the prompt is not that of this run"):
        draw_candidates(few, prompts()[1:], cut, 3, 0, SETTINGS)
    asked = [
        prompt.model_copy(update={"questions": [DrawingQuestion(question="is it?", answer="yes")]})
        for prompt in prompts()
    ]
    with pytest.raises(UserError, match=r"jsonl:1: the questions are not those of this run"):
        draw_candidates(few, asked, cut, 3, 0, SETTINGS)


NOT_OURS = [
    b"no newline at its end",
    b"notes\nand no newline at the end",
    b'{"prompt": "a green pear", "candid',
    b'{"prompt": "a red apple", "candidates": []}\n{"prompt": "bl',
    b"\xff\xfe\x00",
    b"\n\nabc",
]


@pytest.mark.parametrize("held", NOT_OURS)
def test_a_file_of_something_else_stays_as_it_is(few: UniMM, tmp_path: Path, held: bytes) -> None:
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(held)
    with pytest.raises(UserError, match=r"theirs\.jsonl"):
        draw_candidates(few, prompts(), path, 3, 0, SETTINGS)
    assert path.read_bytes() == held


def test_what_follows_the_last_prompt_stays(few: UniMM, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    draw_candidates(few, prompts(), path, 3, 0, SETTINGS)
    path.write_bytes(held := path.read_bytes() + b"a note")
    with pytest.raises(UserError, match=r"c\.jsonl:6: holds something else than candidates"):
        draw_candidates(few, prompts(), path, 3, 0, SETTINGS)
    assert path.read_bytes() == held


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_candidates_go_through_no_link(few: UniMM, tmp_path: Path, kind: str) -> None:
    path, outside = tmp_path / "c.jsonl", tmp_path / "theirs"
    if kind == "link":
        outside.write_text('{"prompt": "a red')
    if kind in ("link", "dangling"):
        path.symlink_to(outside)
    else:
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UserError, match=r"c\.jsonl: cannot be written \(it is a"):
        draw_candidates(few, prompts(), path, 3, 0, SETTINGS)
    assert outside.read_text() == '{"prompt": "a red' if kind == "link" else not outside.exists()


def drawn(few: UniMM, path: Path, wanted: list[DrawingPrompt], n: int = 3) -> list[PromptCandidates]:
    draw_candidates(few, wanted, path, n, 0, SETTINGS)
    return read_candidates(path)


def test_the_best_meets_the_worst_and_of_equals_the_first_is_taken() -> None:
    scores = torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.2], [0.5, 0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0.5, 0.5, 0.5]])
    assert best_and_worst(scores, 2).tolist() == [[1, 3, 2, 4], [1, 2, 3, 4], [0, 1, 0, 1]]


def test_best_and_worst_become_pairs_and_the_rest_is_counted(few: UniMM, tmp_path: Path) -> None:
    rows = drawn(few, tmp_path / "c.jsonl", [*prompts(), DrawingPrompt(prompt="a star")])
    given = {
        "a red apple": [0.2, 0.9, 0.5],
        "blue": [0.5, 0.5, 0.5],
        "what?": [0.5, 0.55, 0.52],
        "this is": [0.96, 1.0, 0.99],
        "on a": [0.0, 0.05, 0.01],
        "a star": [0.7, 0.1, 0.1],
    }
    path = tmp_path / "p.jsonl"
    report = rank_candidates(few, rows, lambda c: given[c[0].prompt.prompt], "mine", path, Rules(margin=0.1))
    expected = {"prompts": 6, "pairs": 2, "ties": 1, "near_ties": 1, "easy": 1, "hard": 1, "failed": 0}
    assert {key: report[key] for key in expected} == expected
    assert report["mean_score"] == pytest.approx(np.mean(list(given.values())), abs=1e-4)
    first, second = read_preferences(path)
    assert first.words == "a red apple" and second.words == "a star"
    assert first.chosen.codes == rows[0].candidates[1].codes
    assert first.rejected.codes == rows[0].candidates[0].codes
    assert (first.scores, first.margin) == ([0.9, 0.2], pytest.approx(0.7))
    assert isinstance(first.source, dict) and first.source["seeds"] == [1, 0]
    assert second.rejected.codes == rows[5].candidates[1].codes  # of equals the first
    report = rank_candidates(
        few, rows, lambda c: given[c[0].prompt.prompt], "m", path, Rules(margin=0.1, each=3)
    )
    assert report["pairs"] == 2  # of three candidates one is neither good nor bad
    with pytest.raises(
        UserError, match=r"no pair is left of 6 prompts \(1 ties, 3 near ties, 1 easy, 1 hard"
    ):
        rank_candidates(few, rows, lambda c: given[c[0].prompt.prompt], "mine", path, Rules(margin=2))


def wrong_count(candidates: Sequence[Candidate]) -> list[float]:
    return [1.0] if candidates[0].prompt.prompt == "blue" else [0.1, 0.9, 0.5]


def raises(candidates: Sequence[Candidate]) -> list[float]:
    if candidates[0].prompt.prompt == "blue":
        raise RuntimeError("no idea")
    return [0.1, 0.9, 0.5]


def no_number(candidates: Sequence[Candidate]) -> list[float]:
    return [0.1, float("nan"), 0.5] if candidates[0].prompt.prompt == "blue" else [0.1, 0.9, 0.5]


@pytest.mark.parametrize(
    ("scorer", "line"),
    [
        (wrong_count, "prompt 'blue': gave 1 scores for 3 candidates"),
        (raises, "prompt 'blue': raised RuntimeError: no idea"),
        (no_number, "prompt 'blue': gave scores that are no finite numbers"),
    ],
)
def test_scorers_that_fail(few: UniMM, tmp_path: Path, scorer, line: str) -> None:
    rows = drawn(few, tmp_path / "c.jsonl", prompts()[:3])
    with pytest.raises(UserError, match=f"scorer mine: {line}"):
        rank_candidates(few, rows, scorer, "mine", tmp_path / "p.jsonl")
    report = rank_candidates(few, rows, scorer, "mine", tmp_path / "p.jsonl", Rules(on_error="skip"))
    assert (report["failed"], report["pairs"]) == (1, 2)


def test_scorers_are_found_by_dotted_path(
    few: UniMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scorers.py").write_text("def redness(candidates):\n    return [1.0] * len(candidates)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    for name in ("my_scorers.redness", "my_scorers:redness"):
        assert make_scorer(name, few, tmp_path)([None, None]) == [1.0, 1.0]
    with pytest.raises(UserError, match=r"scorer: 'my_scorers.blueness' cannot be imported"):
        make_scorer("my_scorers.blueness", few, tmp_path)
    with pytest.raises(UserError, match=r"scorer: 'my_scorers.__name__' is str"):
        make_scorer("my_scorers.__name__", few, tmp_path)
    with pytest.raises(UserError, match='self-vqa, rules, artwork, variety, probe; did you mean "rules"'):
        make_scorer("rule", few, tmp_path)


def test_emphasis_is_on_what_a_scene_is_for() -> None:
    scenes = EmojiScenes("train", 3)
    heavy = scene_prompts("train", 3, 30, emphasis=4)
    only = scene_prompts("train", 3, 30, emphasis=math.inf)
    for index, (weighed, alone) in enumerate(zip(heavy, only, strict=True)):
        scene = scenes[index]
        kinds = {one.question: one.kind for one in scene.questions() + scene.placings()}
        asked = [(kinds.get(one.question, "is there"), one.answer, one.weight) for one in alone.questions]
        if scene.kind == "single":
            there = f"is there {with_article(scene.concept)}?"
            assert alone.questions == [DrawingQuestion(question=there, answer="yes")]
        elif scene.kind == "pair":
            assert asked == [("count", "two", 0.5), ("yesno", "yes", 0.25), ("yesno", "no", 0.25)]
            assert {(one.question, one.answer) for one in alone.questions[1:]} < {
                (one.question, one.answer) for one in scene.placings()
            }
        else:
            assert [one[::2] for one in asked] == [("count", 1.0)]
        count = len(asked)
        assert sum(one.weight for one in weighed.questions[:count]) == pytest.approx(4)
        assert [one.question for one in weighed.questions[:count]] == [
            one.question for one in alone.questions
        ]
        others = {one.question for one in scene.questions()} - {one.question for one in alone.questions}
        assert {one.question for one in weighed.questions[count:]} == others
        assert all(one.weight == 1 for one in weighed.questions[count:])


def test_kinds_of_scenes_come_by_their_shares() -> None:
    kinds: dict[SceneKind, float] = {"count": 3.0, "pair": 1.0, "single": 0.0}
    prompts = scene_prompts("train", 3, 400, kinds=kinds)
    scenes = [prompt.scene.scene() for prompt in prompts if prompt.scene is not None]
    shown = Counter(scene.kind for scene in scenes)
    assert len(scenes) == 400 and not shown["single"]
    assert shown["count"] == pytest.approx(300, abs=40)
    assert all(prompt.prompt in scene.captions() for prompt, scene in zip(prompts, scenes, strict=True))
    assert scene_prompts("train", 3, 20, kinds=kinds) == prompts[:20]
    with pytest.raises(ValidationError, match="expected a share above 0"):
        Prompts(kinds={"count": 0.0})


def test_self_vqa_is_the_mean_probability_of_the_answers(few: UniMM, tmp_path: Path) -> None:
    wanted = scene_prompts("train", 3, 2, emphasis=3)
    assert all(len(prompt.questions) >= 6 for prompt in wanted)
    rows = drawn(few, tmp_path / "c.jsonl", wanted, n=2)
    candidates = [one for row in rows for one in candidates_of(few, row)]
    scores = make_scorer("self-vqa", few, tmp_path)(candidates)
    processor, model = few.processor, few.model
    for candidate, score in zip(candidates, scores, strict=True):
        each = []
        for asked in candidate.prompt.questions:
            prompt = processor.question_ids(asked.question)
            answer = [*processor.text_ids(asked.answer), processor.eos]
            with torch.no_grad():
                ids = torch.tensor([prompt + answer])
                logits = model(input_ids=ids, pixel_values=processor.look([candidate.image]).pixels).logits
            predicted = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            each.append(predicted[torch.arange(len(answer)), answer].sum().exp().item())
        weights = [asked.weight for asked in candidate.prompt.questions]
        assert score == pytest.approx(np.average(each, weights=weights), rel=1e-4)
    with pytest.raises(UserError, match="self-vqa: the prompt 'blue' has no questions"):
        make_scorer("self-vqa", few, tmp_path)(
            candidates_of(few, drawn(few, tmp_path / "d.jsonl", prompts())[1])
        )


def test_variety_is_the_distance_to_the_other_drawings(few: UniMM, tmp_path: Path) -> None:
    """Against a loop over drawings; the most unlike gets 1, and equals get all the same."""
    shown = EmojiScenes("train", 0)
    images = [Image.fromarray(shown[index].render()) for index in (0, 1, 1, 1)]
    prompt = DrawingPrompt(prompt="a star")
    candidates = [Candidate(prompt, seed, torch.zeros(4, 4), one) for seed, one in enumerate(images)]
    assert few.model.vision is not None
    with torch.no_grad():
        features = [few.model.vision(few.processor.look([one]).pixels)[0].mean(0) for one in images]
    units = [one / one.square().sum().sqrt() for one in features]
    distances = [sum((one - other).square().sum().sqrt().item() for other in units) for one in units]
    score = make_scorer("variety", few, tmp_path)
    scores = score(candidates)
    assert scores == pytest.approx([distance / distances[0] for distance in distances], abs=1e-3)
    assert scores[0] == 1 and scores[1] == pytest.approx(1 / 3, abs=1e-3)
    assert score(candidates[1:]) == [1, 1, 1] and score(candidates[:1]) == [1]


def test_factors_share_what_the_encoder_saw(few: UniMM, tmp_path: Path) -> None:
    """A product encodes the drawings of a prompt once, and gives what its factors give alone."""
    rows = drawn(few, tmp_path / "c.jsonl", scene_prompts("train", 3, 2), n=3)
    groups = [candidates_of(few, row) for row in rows]
    alone = [
        [make_scorer(name, few, tmp_path)(group) for name in ("self-vqa", "variety")] for group in groups
    ]
    product = make_scorer("self-vqa*variety", few, tmp_path)
    encoded: list[int] = []
    assert few.model.vision is not None
    hook = few.model.vision.register_forward_hook(lambda module, given, out: encoded.append(len(out)))
    try:
        together = [product(group) for group in groups]
    finally:
        hook.remove()
    assert encoded == [3, 3]
    assert together == [pytest.approx(np.prod(parts, axis=0)) for parts in alone]
    assert together[0] != together[1]


@pytest.mark.parametrize("name", ["self-vqa", "variety", "rules*variety"])
def test_scorers_that_look_need_an_encoder(few: UniMM, tmp_path: Path, name: str) -> None:
    blind = UniMM(copy.deepcopy(few.model), few.processor)
    blind.model.vision = None
    with pytest.raises(UserError, match=f"{name.split('*')[-1]}: this model has no encoder of images"):
        make_scorer(name, blind, tmp_path)


def test_rules_know_a_real_render_from_a_wrong_one(few: UniMM, tmp_path: Path) -> None:
    wanted = scene_prompts("train", 0, 40)
    scenes = EmojiScenes("train", 0)
    score = make_scorer("rules", few, tmp_path)

    def candidate(index: int, shown: int) -> Candidate:
        return Candidate(wanted[index], 0, torch.zeros(4, 4), Image.fromarray(scenes[shown].render()))

    right = [score([candidate(index, index)])[0] for index in range(40)]
    wrong = [score([candidate(index, (index + 1) % 40)])[0] for index in range(40)]
    assert np.mean(right) > 0.95
    assert np.mean(wrong) < 0.7


def test_prompts_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a star\n\n  a bell \n")
    assert [prompt.prompt for prompt in read_prompts(tmp_path / "p.txt")] == ["a star", "a bell"]
    row = {"prompt": "a star", "questions": [{"question": "what is this?", "answer": "a star"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": ""}))
    with pytest.raises(UserError, match=r"p.jsonl:2: prompt: expected at least 1"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(UserError, match=r"p.txt: empty"):
        read_prompts(tmp_path / "p.txt")


def test_several_pairs_of_a_prompt_go_from_the_outer_ranks_inwards(few: UniMM, tmp_path: Path) -> None:
    rows = drawn(
        few, tmp_path / "c.jsonl", [DrawingPrompt(prompt="a star"), DrawingPrompt(prompt="blue")], n=4
    )
    given = {"a star": [0.4, 0.9, 0.1, 0.6], "blue": [0.5, 0.9, 0.5, 0.2]}
    path = tmp_path / "p.jsonl"
    report = rank_candidates(
        few, rows, lambda c: given[c[0].prompt.prompt], "m", path, Rules(margin=0.1, each=4)
    )
    pairs = read_preferences(path)
    assert report["pairs"] == len(pairs) == 3  # the middle of the second prompt is a tie
    assert [pair.scores for pair in pairs] == [[0.9, 0.1], [0.6, 0.4], [0.9, 0.2]]
    assert pairs[1].chosen.codes == rows[0].candidates[3].codes
    assert pairs[1].rejected.codes == rows[0].candidates[0].codes
