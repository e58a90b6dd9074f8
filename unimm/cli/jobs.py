"""The command `sample`: a batch job by its recipe, and how a person sees what came of it."""

from __future__ import annotations

from typing import Any

from unimm.cli.commands import Options, command
from unimm.cli.options import recipe_arguments
from unimm.console import hide_loading_bars, print_table, print_text, progress

SHOWN = 20  # bad items on the screen; `--json` has more
DOING = {"caption": "captions", "ask": "answers", "draw": "drawings"}


def show_job(document: dict[str, Any]) -> None:
    """Say what was written and where, and which items were bad."""
    bad = document["bad_items"][:SHOWN]
    if bad:
        rows = [(item["key"], item["file"], item["reason"]) for item in bad]
        more = f", the first {SHOWN} of {document['bad']}" if document["bad"] > len(rows) else ""
        print_table(("key", "file", "reason"), rows, f"Bad items{more}")
    print_text(
        f"{document['written']:,} {DOING[document['task']]} of {document['items']:,} items, {document['bad']:,} bad: "
        f"{document['files']:,} files in {document['folder']}"
    )


@command("sample", "caption, ask or draw every item of a source, by a recipe", show_job)
@recipe_arguments
def sample(options: Options) -> Any:
    """Run a batch job."""
    from unimm.jobs.recipe import load_job
    from unimm.jobs.run import run_job
    from unimm.recipes import find_recipe

    recipe = load_job(find_recipe(options.recipe), options.overrides)
    hide_loading_bars()
    with progress(DOING[recipe.task]) as report:
        return run_job(recipe, report)
