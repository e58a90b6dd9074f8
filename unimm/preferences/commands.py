"""The commands `unimm preferences draw`, `rank`, `vote`, `align` and `check`: arguments, one call into the library.

Nothing heavy is imported before a command runs; the model is loaded after what can be wrong with the files has been
said.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import shlex
from pathlib import Path
from typing import Any

from unimm.cli_data import positive
from unimm.cli_model import load, model_arguments
from unimm.console import hide_loading_bars, progress, say
from unimm.errors import UserError

Options = argparse.Namespace
SCENE_SPLITS = ("train", "seen", "composed", "vendor")


def draw_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `draw`."""
    parser.add_argument(
        "prompts", nargs="?", metavar="FILE", help="a prompt a line, or .jsonl with questions"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="candidates, as JSON lines")
    parser.add_argument("-n", type=int, default=8, metavar="N", help="drawings of each prompt (default: 8)")
    parser.add_argument("--scenes", type=int, metavar="N", help="in place of FILE: captions of N EmojiScenes")
    parser.add_argument(
        "--split", default="train", choices=SCENE_SPLITS, help="of the scenes (default: train)"
    )
    parser.add_argument(
        "--emphasis",
        type=float,
        default=1.0,
        metavar="W",
        help="weight of questions about what a scene is for: object, number, places (default: 1; inf: no others)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes and of the first drawing (default: 0)")
    parser.add_argument("--guidance-scale", type=float, default=5.0, metavar="X", help="default: 5")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest codes")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among codes that make up P")
    model_arguments(parser)


def draw(options: Options) -> Any:
    """Draw candidates; a file that was begun is gone on with."""
    from unimm.preferences.candidates import draw_candidates, read_prompts, scene_prompts
    from unimm.sampling.choose import check_options

    if (options.prompts is None) == (options.scenes is None):
        raise UserError("preferences draw: give either a file of prompts or --scenes N")
    for name in ("n", "scenes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"preferences draw: {name}: {getattr(options, name)}; give 1 or more")
    if not options.emphasis > 0:
        raise UserError(f"preferences draw: emphasis: {options.emphasis}; give a number above 0, or inf")
    if options.seed < 0:
        raise UserError(f"preferences draw: seed: {options.seed}; give 0 or more")
    check_options(options.guidance_scale, options.temperature, options.top_k, options.top_p)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    else:
        prompts = scene_prompts(options.split, options.seed, options.scenes, options.emphasis)
    names = ("guidance_scale", "temperature", "top_k", "top_p")
    settings = {"model": options.model or "embedded", **{name: getattr(options, name) for name in names}}
    um = load(options)
    with progress("candidates") as report:
        return draw_candidates(um, prompts, options.output, options.n, options.seed, settings, report)


def rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rank`."""
    parser.add_argument("candidates", metavar="FILE", help="what `unimm preferences draw` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="preferences, as JSON lines")
    known = (
        "self-vqa, rules, artwork, variety, probe, or a callable as module.name; their product as NAME*NAME"
    )
    parser.add_argument("--scorer", default="self-vqa", metavar="NAME", help=f"{known} (default: self-vqa)")
    parser.add_argument(
        "--margin", type=float, default=0.1, metavar="X", help="least difference (default: 0.1)"
    )
    parser.add_argument(
        "--easy", type=_or_none, default=0.95, metavar="X", help="all score this: drop (or none)"
    )
    parser.add_argument(
        "--hard", type=_or_none, default=0.05, metavar="X", help="none scores more: drop (or none)"
    )
    parser.add_argument(
        "--each", type=positive, default=1, metavar="N", help="most pairs of a prompt (default: 1)"
    )
    parser.add_argument("--on-error", default="stop", choices=("stop", "skip"), help="if the scorer fails")
    model_arguments(parser)


def rank(options: Options) -> Any:
    """Score candidates and write the pairs."""
    from unimm.preferences.candidates import read_candidates
    from unimm.preferences.rank import Rules, rank_candidates
    from unimm.preferences.scorers import make_scorer

    rules = Rules(options.margin, options.easy, options.hard, options.each, options.on_error)
    if not rules.margin >= 0:
        raise UserError(f"preferences rank: margin: {rules.margin}; give 0 or more")
    rows = read_candidates(options.candidates)
    um = load(options)
    scorer = make_scorer(options.scorer, um, Path(options.output).parent)
    with progress("scores") as report:
        return rank_candidates(um, rows, scorer, options.scorer, options.output, rules, report)


def align(options: Options) -> Any:
    """Run the whole loop of a recipe."""
    from unimm.preferences.align import align as run
    from unimm.preferences.align import load_alignment
    from unimm.recipes import find_recipe

    recipe = load_alignment(find_recipe(options.recipe), options.overrides)
    hide_loading_bars()
    return run(recipe)


def show_aligned(document: dict[str, Any]) -> None:
    """Print what changed."""
    from unimm.preferences.align import show_alignment

    show_alignment(document)


def vote_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `vote`."""
    parser.add_argument("candidates", metavar="FILE", help="what `unimm preferences draw` wrote, or texts")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="preferences, as JSON lines")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any (default: 8000)")
    parser.add_argument(
        "--pairs", type=positive, metavar="N", help="of each prompt (default: each candidate once)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of pairs and sides (default: 0)")
    parser.add_argument("--voter", metavar="NAME", help="kept with each vote (default: the login)")
    model_arguments(parser)


def vote(options: Options) -> Any:
    """Serve the page on which a person votes, until Ctrl-C."""
    from unimm.preferences.pairs import is_unicode, read_ballot
    from unimm.preferences.server import Booth, Pictures, VoteServer
    from unimm.preferences.votes import Votes

    voter = _login() if options.voter is None else options.voter.strip()
    if not voter or not is_unicode(voter):
        raise UserError(f"preferences vote: --voter: {options.voter!r}; give a name")
    ballot = read_ballot(options.candidates, options.seed, options.pairs)
    if options.model is None and (others := ballot.models - {"embedded"}):
        raise UserError(f"{ballot.file}: drawn with {min(others)}; give --model with the model that drew")
    total = len(ballot.pairs)
    with Votes(options.output, {"seed": options.seed, "pairs": options.pairs}) as votes:
        if votes.kept.keys() - {pair.key for pair in ballot.pairs}:
            raise UserError(
                f"{votes.path}: holds votes on other candidates than {ballot.file}; give another output"
            )
        with VoteServer(options.port) as server:
            pictures = Pictures(ballot, load(options) if ballot.has_codes else None)
            with progress("pictures") as report:
                pictures.check(report)
            if votes.note:
                say(votes.note)
            if ballot.alike:
                say(f"{ballot.alike} prompts left out: all of their candidates are equal")
            say(f"{len(votes.kept)} of {total} pairs voted on; vote at {server.url} (Ctrl-C ends)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve(Booth(ballot, votes, pictures, voter))
        done, ties = len(votes.kept), votes.ties
    return {"preferences": options.output, "kept": done - ties, "ties": ties, "left": total - done}


def show_vote(document: dict[str, Any]) -> None:
    """Say what was kept and what to do with it."""
    file, kept = document["preferences"], document["kept"]
    counts = f"{document['ties']} ties, {document['left']} pairs left"
    print(f"{kept} votes are kept in {file} ({counts})" if kept else f"No votes are kept ({counts})")
    if kept:
        print(f"Train on them: unimm train training/dpo-embedded.yaml data.file={shlex.quote(file)}")


def _login() -> str:
    """Who is at the keyboard, as far as the system knows."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "vote"


def check_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `check`."""
    parser.add_argument("preferences", metavar="FILE", help="preferences, as JSON lines or in tars")
    parser.add_argument("--model", metavar="MODEL", help="whose codes the drawings must be (default: any)")


def check(options: Options) -> Any:
    """Read a file of preferences and count what it holds."""
    from unimm.training.preferences.check import check_preferences

    return check_preferences(options.preferences, options.model)


def _or_none(text: str) -> float | None:
    """Parse a number, or none."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, got {text!r}") from None
