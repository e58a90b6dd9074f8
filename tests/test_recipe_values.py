"""Every key of every shipped recipe, set to bad values: a recipe, or one line that names the file and the key."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from unimm.errors import UserError
from unimm.evaluation.recipe import load_evaluation
from unimm.jobs.recipe import load_job
from unimm.preferences.align import load_alignment
from unimm.recipes import list_recipes
from unimm.training.recipe import load_recipe

PATHS = [info.path for info in list_recipes()]
VALUES: tuple[Any, ...] = (
    None, "x", "a/../b", -1, 0, 3, 1e300, math.nan, math.inf, -math.inf, 10**9, True, [], {}, {"a": [{"b": 1}]}, "\0",
    2**80, "2001-01-01",
)  # fmt: skip
SAMPLED = 20  # changes of each recipe
JOBS = ("ask", "caption", "draw")
LOADERS = {"evaluation": load_evaluation, "alignment": load_alignment, **dict.fromkeys(JOBS, load_job)}
Place = tuple[str | int, ...]


def nodes(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every place in a document but the document itself."""
    if place:
        yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from nodes(part, (*place, key))


def changed(document: Any, place: Place, value: Any) -> Any:
    """A copy of a document with another value in a place."""
    new = copy.deepcopy(document)
    node = new
    for step in place[:-1]:
        node = node[step]
    node[place[-1]] = value
    return new


def load(path: Path, document: Any, task: str) -> str | None:
    """The line that a recipe is refused with, None if it is read."""
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    try:
        LOADERS.get(task, load_recipe)(path)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("recipe", PATHS, ids=lambda path: path.stem)
def test_every_key_set_to_bad_values_is_one_line_with_the_key(recipe: Path, tmp_path: Path) -> None:
    document, path = yaml.safe_load(recipe.read_text(encoding="utf-8")), tmp_path / "recipe.yaml"
    every = [(place, value) for place in nodes(document) for value in VALUES]
    refused = 0
    for place, value in random.Random(0).sample(every, SAMPLED):
        line = load(path, changed(document, place, value), document["task"])
        if line is None:
            continue
        refused += 1
        keys = [str(key) for key in place if isinstance(key, str)]
        assert line.startswith(f"{path}:") and "\n" not in line and len(line) < len(str(path)) + 700, line
        assert keys[0] in line, (place, value, line)
    assert refused > SAMPLED // 3


@pytest.mark.parametrize("recipe", PATHS, ids=lambda path: path.stem)
def test_a_key_that_no_section_has_is_named(recipe: Path, tmp_path: Path) -> None:
    document, path = yaml.safe_load(recipe.read_text(encoding="utf-8")), tmp_path / "recipe.yaml"
    free = ("mixture", "lr", "sources", "weights", "measures", "deepspeed", "options")  # of any key
    for place in [(), *nodes(document)]:
        node = document
        for step in place:
            node = node[step]
        if isinstance(node, dict) and not set(place) & set(free):
            line = load(path, changed(document, (*place, "forward"), 5), document["task"])
            assert line is not None and "forward" in line and "\n" not in line, (place, line)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("model", "decoder", "hidden_size"), 10**9, "model.decoder.hidden_size: expected at most 65536"),
        (("model", "decoder", "model_type"), "lama", 'model.decoder.model_type: no decoder is of the kind "lama"'),
        (("model", "decoder", "num_key_value_heads"), 3, "model.decoder.num_key_value_heads: expected a divisor"),
        (("model", "decoder", "hiden"), 3, "model.decoder.hiden: unknown key"),
        (("model", "vision", "name"), "hf-hub:a/b", "model.vision.name: no SigLIP or CLIP encoder of timm is named"),
        (("model", "vision", "kwargs"), {"checkpoint_path": "x"}, "model.vision.kwargs.checkpoint_path: unknown"),
        (("model", "vision", "tokens"), -1, "model.vision.tokens: expected more than 0"),
        (("model", "image_tokenizer", "model_type"), "x", "model.image_tokenizer.model_type: expected one of"),
        (("model", "image_tokenizer", "block_out_channels"), [1.5], "model.image_tokenizer.block_out_channels[0]"),
        (("model", "image_tokenizer", "patch_sise"), 2, "model.image_tokenizer.patch_sise: unknown key"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_part_of_the_model_is_named_by_its_key(
    tmp_path: Path, place: Place, value: Any, words: str
) -> None:
    recipe = next(path for path in PATHS if path.stem == "janus-pro-1b")
    document = changed(yaml.safe_load(recipe.read_text(encoding="utf-8")), place, value)
    line = load(tmp_path / "recipe.yaml", document, "unified")
    assert line is not None and line.startswith(f"{tmp_path / 'recipe.yaml'}: {words}"), line


@pytest.mark.parametrize("key", ["\n", "a\nb", "\x1b[31m", "\u2028", "k" * 10**4])
def test_a_key_of_any_characters_is_one_short_line(tmp_path: Path, key: str) -> None:
    path = next(path for path in PATHS if path.name == "finetune-folder.yaml")
    whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    for document in ({**whole, key: 1}, {**whole, "data": {**whole["data"], key: None}}):
        line = load(tmp_path / "recipe.yaml", document, "unified")
        assert line is not None and "unknown key" in line
        assert line.isprintable() and len(line) < len(str(tmp_path)) + 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_recipe_is_read_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    document = yaml.safe_load(data.draw(st.sampled_from(PATHS)).read_text(encoding="utf-8"))
    place, value = data.draw(st.sampled_from(list(nodes(document)))), data.draw(JSON)
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    line = load(path, changed(document, place, value), document["task"])
    assert line is None or (line.startswith(f"{path}:") and "\n" not in line)
