"""The commands `unimm preferences draw`, `rank`, `vote`, `align` and `check`: arguments, one call into the library.

Nothing heavy is imported before a command runs; the model is loaded after what can be wrong with the files has been
said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import shlex
from pathlib import Path
from typing import Any

import click

from unimm.cli.commands import Options, command
from unimm.cli.model import load
from unimm.cli.options import (
    FILE,
    FOLDER,
    INTEGER,
    NUMBER,
    NUMBER_OR_NONE,
    POSITIVE,
    SPLITS,
    Choice,
    Text,
    model_options,
    recipe_arguments,
    sampling_options,
)
from unimm.console import hide_loading_bars, is_unicode, print_text, print_tree, progress, say
from unimm.errors import UserError


@command("draw", "draw several candidates of each prompt", print_tree)
@click.argument(
    "prompts",
    type=FILE,
    required=False,
    metavar="[FILE]",
    help="a prompt a line, or .jsonl with questions",
)
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE", help="candidates, as JSON lines")
@click.option("-n", type=INTEGER, default=8, metavar="N", help="drawings of each prompt (default: 8)")
@click.option("--scenes", type=INTEGER, metavar="N", help="in place of FILE: captions of N EmojiScenes")
@click.option("--split", type=SPLITS, default="train", help="of the scenes (default: train)")
@click.option(
    "--emphasis",
    type=NUMBER,
    default=1.0,
    metavar="W",
    help="weight of questions about what a scene is for: object, number, places (default: 1; inf: no others)",
)
@click.option(
    "--seed", type=INTEGER, default=0, metavar="SEED", help="of scenes and of the first drawing (default: 0)"
)
@sampling_options
@model_options
def draw(options: Options) -> Any:
    """Draw candidates; a file that was begun is resumed."""
    from unimm.models.configuration import SamplingConfig
    from unimm.preferences.candidates import draw_candidates, read_prompts, scene_prompts

    if (options.prompts is None) == (options.scenes is None):
        raise UserError("preferences draw: give either a file of prompts or --scenes N")
    for name in ("n", "scenes"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"preferences draw: {name}: {getattr(options, name)}; give 1 or more")
    if not options.emphasis > 0:
        raise UserError(f"preferences draw: emphasis: {options.emphasis}; give a number above 0, or inf")
    if options.seed < 0:
        raise UserError(f"preferences draw: seed: {options.seed}; give 0 or more")
    SamplingConfig().updated(options.guidance_scale, options.temperature, options.top_k, options.top_p)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)
    else:
        prompts = scene_prompts(options.split, options.seed, options.scenes, options.emphasis)
    um = load(options)
    sampling = um.model.config.sampling_config()
    sampling = sampling.updated(options.guidance_scale, options.temperature, options.top_k, options.top_p)
    settings = {"model": options.model or "embedded", **dataclasses.asdict(sampling)}
    with progress("candidates") as report:
        return draw_candidates(um, prompts, options.output, options.n, options.seed, settings, report)


@command("rank", "score candidates and pair the best with the worst", print_tree)
@click.argument("candidates", type=FILE, metavar="FILE", help="what `unimm preferences draw` wrote")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE", help="preferences, as JSON lines")
@click.option(
    "--scorer",
    type=Text("self-vqa", "rules", "artwork", "variety", "probe"),
    default="self-vqa",
    metavar="NAME",
    help="self-vqa, rules, artwork, variety, probe, or a callable as module.name; their product as NAME*NAME "
    "(default: self-vqa)",
)
@click.option("--margin", type=NUMBER, default=0.1, metavar="X", help="least difference (default: 0.1)")
@click.option("--easy", type=NUMBER_OR_NONE, default=0.95, metavar="X", help="all score this: drop (or none)")
@click.option(
    "--hard", type=NUMBER_OR_NONE, default=0.05, metavar="X", help="none scores more: drop (or none)"
)
@click.option("--each", type=POSITIVE, default=1, metavar="N", help="most pairs of a prompt (default: 1)")
@click.option("--on-error", type=Choice("stop", "skip"), default="stop", help="if the scorer fails")
@model_options
def rank(options: Options) -> Any:
    """Score candidates and write the pairs."""
    from unimm.outputs import check_output, first_line_has
    from unimm.preferences.candidates import read_candidates
    from unimm.preferences.rank import RANKED, Rules, rank_candidates
    from unimm.preferences.scorers import make_scorer

    rules = Rules(options.margin, options.easy, options.hard, options.each, options.on_error)
    if not rules.margin >= 0:
        raise UserError(f"preferences rank: margin: {rules.margin}; give 0 or more")
    rows = read_candidates(options.candidates)
    check_output(options.output, "an earlier ranking", first_line_has(*RANKED), [options.candidates])
    um = load(options)
    scorer = make_scorer(options.scorer, um, Path(options.output).parent)
    with progress("scores") as report:
        return rank_candidates(um, rows, scorer, options.scorer, options.output, rules, report)


def show_aligned(document: dict[str, Any]) -> None:
    """Print what changed."""
    from unimm.preferences.align import show_alignment

    show_alignment(document)


@command("align", "draw, rank, train and measure by a recipe", show_aligned)
@recipe_arguments
def align(options: Options) -> Any:
    """Run the whole loop of a recipe."""
    from unimm.preferences.align import align as run
    from unimm.preferences.align import load_alignment
    from unimm.recipes import find_recipe

    recipe = load_alignment(find_recipe(options.recipe), options.overrides)
    hide_loading_bars()
    return run(recipe)


def show_vote(document: dict[str, Any]) -> None:
    """Say what was kept and what to do with it."""
    file, kept = document["preferences"], document["kept"]
    counts = f"{document['ties']} ties, {document['left']} pairs left"
    print_text(f"{kept} votes are kept in {file} ({counts})" if kept else f"No votes are kept ({counts})")
    if kept:
        print_text(f"Train on them: unimm train training/dpo-embedded.yaml data.file={shlex.quote(file)}")


@command("vote", "pick the better of two candidates on a local page", show_vote)
@click.argument("candidates", type=FILE, metavar="FILE", help="what `unimm preferences draw` wrote, or texts")
@click.option("-o", "--output", type=FILE, required=True, metavar="FILE", help="preferences, as JSON lines")
@click.option("--port", type=INTEGER, default=8000, metavar="N", help="0: any (default: 8000)")
@click.option("--pairs", type=POSITIVE, metavar="N", help="of each prompt (default: each candidate once)")
@click.option("--seed", type=INTEGER, default=0, metavar="SEED", help="of pairs and sides (default: 0)")
@click.option("--voter", metavar="NAME", help="kept with each vote (default: the login)")
@model_options
def vote(options: Options) -> Any:
    """Serve the page on which a person votes, until Ctrl-C."""
    from unimm.preferences.vote.booth import BallotImages, Booth
    from unimm.preferences.vote.pairs import read_ballot
    from unimm.preferences.vote.server import VoteServer
    from unimm.preferences.vote.votes import Votes

    voter = voter_name(options.voter)
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
            images = BallotImages(ballot, load(options) if ballot.has_codes else None)
            with progress("images") as report:
                images.check(report)
            if votes.note:
                say(votes.note)
            if ballot.alike:
                say(f"{ballot.alike} prompts left out: all of their candidates are equal")
            say(f"{len(votes.kept)} of {total} pairs voted on; vote at {server.url} (Ctrl-C ends)")
            with contextlib.suppress(KeyboardInterrupt):
                server.serve(Booth(ballot, votes, images, voter))
        done, ties = len(votes.kept), votes.ties
    return {"preferences": options.output, "kept": done - ties, "ties": ties, "left": total - done}


def voter_name(given: str | None) -> str:
    """Return who votes: the name given, or who is at the keyboard, as far as the system knows.

    Raises:
        UserError: the name is none.
    """
    if given is not None:
        if not given.strip() or not is_unicode(given):
            raise UserError(f"--voter: {given!r}; give a name")
        return given.strip()
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "vote"


@command("check", "check a file of preferences", print_tree)
@click.argument(
    "preferences",
    type=FILE,
    metavar="PATH",
    help="preferences: JSON lines, tars, Parquet or a datasets folder",
)
@click.option("--model", type=FOLDER, metavar="MODEL", help="whose codes the drawings must be (default: any)")
@click.option(
    "--images", type=FOLDER, metavar="DIR", help="where names of images start (default: beside PATH)"
)
@click.option("--split", metavar="NAME", help="which split, where there are several")
@click.option("--allow-outside", is_flag=True, help="let images lie outside the file's folder")
def check(options: Options) -> Any:
    """Read a file of preferences and count what it holds."""
    from unimm.data.sources import Reading
    from unimm.preferences.check import check_preferences

    reading = Reading(images=options.images, split=options.split, allow_outside=options.allow_outside)
    return check_preferences(options.preferences, options.model, reading)
