"""Llama 3.2 Vision's own: Meta's numbers, files for several devices, tables of tiles, turns with and without images."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.mllama.image_processing_mllama import (
    get_image_size_fit_to_canvas,
    get_optimal_tiled_canvas,
)

import unimm
from tests.families.llama_vision_checkpoints import (
    LLAMA_VISION,
    SPECIAL,
    TABLES,
    TILE,
    cells,
    original,
    text_tokenizer,
)
from tests.families.survey import TEXTS, Oracle, picture
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.llama_tokenizer import read_llama_tokenizer
from unimm.families.shards import write_shards
from unimm.loading import describe
from unimm.pipeline import UniMM

# of Meta's tokenizer
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
RECORDED = json.loads((Path(__file__).parent / "fixtures" / "llama_vision.json").read_text())


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return LLAMA_VISION.make()


@pytest.fixture(scope="module")
def folders(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts, not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    LLAMA_VISION.write_all(folder)
    return folder


@pytest.fixture(scope="module")
def um(folders: Path) -> UniMM:
    return unimm.load(folders / "transformers", device="cpu")


def copied(folders: Path, layout: str, to: Path) -> Path:
    to.mkdir(parents=True)
    for path in (folders / layout).iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file, of its sections too."""
    document = json.loads(path.read_text())
    for name, value in changes.items():
        document[name] = {**document[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(document))


# --- Meta's code --------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", LLAMA_VISION.layouts)
def test_logits_are_those_of_metas_code(folders: Path, layout: str) -> None:
    um = unimm.load(folders / layout, device="cpu")
    for recorded in RECORDED["questions"]:
        shown = [picture(*size) for size in recorded["images"]]
        ids, images = um.processor.question(recorded["question"], shown)
        assert ids == recorded["ids"]
        logits = um.model(input_ids=torch.tensor([ids]), images=images).logits[0]
        wanted = torch.tensor(recorded["logits"])
        assert (logits[:, :: RECORDED["every"]] - wanted).abs().max() < 1e-4 and wanted.std() > 1
        assert logits.argmax(-1).tolist() == recorded["likeliest"]


@torch.no_grad()
def test_memory_is_that_of_metas_code(um: UniMM) -> None:
    """What the blocks look at: of each image the real tiles, projected."""
    model: Any = um.model
    for recorded in RECORDED["questions"]:
        _, images = um.processor.question("a", [picture(*size) for size in recorded["images"]])
        features = model.vision(images.pixels, tiles=images.grids)
        memory = model.connector.layers(features).flatten()
        wanted = torch.tensor(recorded["memory"])
        assert (memory[:: RECORDED["memory_every"]] - wanted).abs().max() < 1e-4 and wanted.std() > 1


@torch.no_grad()
def test_text_before_an_image_is_the_same_whatever_it_shows(um: UniMM) -> None:
    mark = um.processor.layout.feature
    words = um.processor.text_ids("what is in this image? ")
    ids = torch.tensor([[*words, mark, *words, mark, mark, *words]])
    images = [
        um.processor.look([picture(*size, seed) for size in ((37, 91), (61, 60), (13, 200))])
        for seed in (0, 1)
    ]
    bare = um.model(input_ids=torch.tensor([words])).logits[0]
    one, two = (um.model(input_ids=ids, images=own).logits[0] for own in images)
    assert torch.equal(one[: len(words)], two[: len(words)])
    assert torch.allclose(one[: len(words)], bare, atol=1e-5)
    assert (one - two)[len(words) :].abs().amax(-1).min() > 1e-3
    # the first image is seen up to the second mark, and not behind it
    third = um.processor.look([picture(30, 30), *(picture(*size) for size in ((61, 60), (13, 200)))])
    moved = (um.model(input_ids=ids, images=third).logits[0] - one).abs().amax(-1)
    assert moved[len(words) : 2 * len(words) + 1].min() > 1e-3


def test_parts_without_an_image_run_in_lockstep(um: UniMM) -> None:
    """The encoder looks at an empty tile and the blocks at what nobody sees; neither changes anything."""
    ids = torch.tensor([um.processor.text_ids("what is this?")])
    model: Any = um.model
    alone, together = (model.embed(ids, None, lockstep) for lockstep in (False, True))
    states = model.decode(together.stream, together.memory).last_hidden_state
    assert alone.memory is None and torch.equal(states, model.decode(alone.stream).last_hidden_state)
    states.sum().backward()
    for part in (model.vision, model.connector, model.fusion):
        assert all(weight.grad is not None and not weight.grad.any() for weight in part.parameters())
    um.model.zero_grad()


def test_tiles_are_chosen_as_by_transformers(um: UniMM) -> None:
    views: Any = um.processor.views
    rng = np.random.default_rng(0)
    for height, width in np.exp(rng.uniform(0, 9, (2000, 2))).astype(int).clip(1).tolist():
        canvas = get_optimal_tiled_canvas(height, width, 4, TILE)
        inner = get_image_size_fit_to_canvas(height, width, *canvas, TILE)
        rows, columns = views.grid_of(height, width)
        assert (rows * TILE, columns * TILE) == canvas
        assert views._inner(SimpleNamespace(height=height, width=width), canvas, "corner") == inner


# --- turns --------------------------------------------------------------------------------------------------


def chats(shown: bool) -> list[list[dict[str, Any]]]:
    text: dict[str, Any] = {"type": "text", "text": "what is it?"}
    image = {"type": "image"}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a red apple"}]}
    if shown:
        return [
            [{"role": "user", "content": content}]
            for content in ([image, text], [text, image], [text, image, text])
        ] + [
            [{"role": "user", "content": [text]}, answer, {"role": "user", "content": [image, text]}],
            [{"role": "user", "content": [image, image]}],
        ]
    return [
        [{"role": "user", "content": [text]}],
        [{"role": "user", "content": [text]}, answer, {"role": "user", "content": [text]}],
        [{"role": "system", "content": "be short"}, {"role": "user", "content": [text]}],
    ]


@pytest.mark.parametrize("chat", [*chats(True), *chats(False)], ids=lambda chat: f"{len(chat)}")
def test_turns_are_the_templates_with_and_without_images(
    oracle: Oracle, um: UniMM, chat: list[dict[str, Any]]
) -> None:
    """Without an image a system's words with the date come first, and the system's own, given as a text."""
    count = str(chat).count("'image'")
    one = picture(64, 52)
    expected = oracle.conversations([chat], [[one] * count])["input_ids"][0].tolist()
    ours = [
        {
            **turn,
            "content": [
                {**part, **({"image": one} if part["type"] == "image" else {})} for part in turn["content"]
            ],
        }
        if isinstance(turn["content"], list)
        else turn
        for turn in chat
    ]
    assert um.processor.chat(ours)[0] == expected


def test_a_systems_words_do_not_go_with_images_in_its_template(um: UniMM) -> None:
    content = [{"type": "image", "image": picture(30, 30)}, {"type": "text", "text": "what?"}]
    with pytest.raises(
        UserError, match=r"^chat_template.jinja: the chat template writes no user.image after system"
    ):
        um.processor.chat([{"role": "system", "content": "be short"}, {"role": "user", "content": content}])


def test_a_base_model_has_its_begin_token_behind_leading_images(
    folders: Path, tmp_path: Path, oracle: Oracle
) -> None:
    folder = copied(folders, "transformers", tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    um = unimm.load(folder, device="cpu")
    for count in (0, 1, 2):
        shown = [picture(30 + count, 41)] * count
        text = "<|image|>" * count + "If I had to write"
        expected = oracle.inputs_of([text], [shown])["input_ids"][0].tolist()
        assert um.processor.question("If I had to write", shown)[0] == expected
        assert expected[: count + 1] == [*oracle.placeholders * count, oracle.tokenizer.bos_token_id]


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2])
def test_files_of_several_devices_hold_the_same_model(
    folders: Path, oracle: Oracle, um: UniMM, devices: int, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    template = oracle.processor.chat_template
    original(oracle, source, devices)
    oracle.processor.chat_template = template
    other = unimm.load(source, device="cpu").model.state_dict()
    for name, own in um.model.state_dict().items():
        assert torch.equal(own, other[name]), name
    convert(source, tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "original")
    names = sorted(path.name for path in source.glob("*.pth"))
    assert names == (["consolidated.pth"] if devices == 1 else ["consolidated.00.pth", "consolidated.01.pth"])
    assert names == sorted(path.name for path in (tmp_path / "back").glob("*.pth"))
    for name in names:
        before, after = (
            torch.load(folder / name, weights_only=True) for folder in (source, tmp_path / "back")
        )
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def change(folder: Path, key: str, tensor: Tensor | None, number: int = 1) -> None:
    path = folder / f"consolidated.{number:02d}.pth"
    weights = torch.load(path, weights_only=True)
    weights.pop(key, None)
    if tensor is not None:
        weights[key] = tensor
    torch.save(weights, path)


NORM, QUERY = "text_model.norm.weight", "text_model.layers.1.attention.wq.weight"


@pytest.mark.parametrize(
    ("key", "tensor", "line"),
    [
        (NORM, torch.ones(48), rf"consolidated.01.pth: {NORM}: is another than in consolidated.00.pth$"),
        (
            NORM,
            torch.ones(47),
            rf"consolidated.01.pth: {NORM}: is \[47\], torch.float32, unlike in consolidated.00.pth$",
        ),
        (QUERY, None, rf"consolidated.01.pth: {QUERY}: is not in each of the 2 files of the checkpoint$"),
        (
            "more",
            torch.ones(3),
            r"consolidated.01.pth: more: is not in each of the 2 files of the checkpoint$",
        ),
    ],
    ids=["unequal", "misshapen", "missing", "surplus"],
)
def test_slices_that_do_not_go_together_are_a_line(
    folders: Path, tmp_path: Path, key: str, tensor: Tensor | None, line: str
) -> None:
    folder = copied(folders, "original", tmp_path / "own")
    change(folder, key, tensor)
    with pytest.raises(UserError, match=line):
        unimm.load(folder, device="cpu")


def test_a_missing_file_is_a_line(folders: Path, tmp_path: Path) -> None:
    folder = copied(folders, "original", tmp_path / "own")
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated.00.pth: missing; the checkpoint is not complete$"):
        unimm.load(folder, device="cpu")


def test_a_tensor_that_cannot_be_cut_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"consolidated.00.pth: a of \[3\] cannot be cut into 2$"):
        write_shards(tmp_path, 2, lambda name: 0, lambda: [("a", torch.ones(3))])


@pytest.mark.parametrize("table", ["places", "before", "after"])
def test_tables_that_were_trained_apart_are_not_given_back(folders: Path, tmp_path: Path, table: str) -> None:
    """Meta's have one vector for a row and column of tiles, here each arrangement has its own."""
    convert(folders / "original", tmp_path / "ours", "unimm")
    path = tmp_path / "ours" / "model.safetensors"
    weights = load_file(path)
    weights[f"vision.{table}.table"][1, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=rf"^vision.{table}.table: cannot be written as .*: it has more than one vector"
    ):
        convert(tmp_path / "ours", tmp_path / "back", "original")
    assert not (tmp_path / "back").exists()


def test_what_tables_hold_beyond_every_arrangement_is_kept(folders: Path, tmp_path: Path) -> None:
    convert(folders / "original", tmp_path / "ours", "unimm")
    kept = load_file(tmp_path / "ours" / "kept.safetensors")
    whole = {f"vision_model.vision_encoder.{TABLES[name][0]}": table for name, table in cells().items()}
    assert kept.keys() == whole.keys() and all(
        torch.equal(kept[name], table) for name, table in whole.items()
    )
    (tmp_path / "ours" / "kept.safetensors").unlink()
    save_file({}, tmp_path / "ours" / "kept.safetensors")
    with pytest.raises(
        UserError, match=r"^vision\.\w+\.table: is a part of .*, which was not kept; convert the source"
    ):
        convert(tmp_path / "ours", tmp_path / "back", "original")


def test_transformers_newer_names(folders: Path, tmp_path: Path, um: UniMM) -> None:
    folder = copied(folders, "transformers", tmp_path / "inner")
    weights = load_file(folder / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        if name == "language_model.lm_head.weight":
            renamed["lm_head.weight"] = tensor
            continue
        renamed[f"model.{name.replace('language_model.model.', 'language_model.')}"] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    other = unimm.load(folder, device="cpu").model.state_dict()
    assert all(torch.equal(other[name], own) for name, own in um.model.state_dict().items())
    convert(folder, tmp_path / "ours", "unimm")
    convert(tmp_path / "ours", tmp_path / "back", "transformers")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == renamed.keys() and all(torch.equal(back[name], renamed[name]) for name in back)


def test_info_says_what_it_is(folders: Path, um: UniMM) -> None:
    for layout in LLAMA_VISION.layouts:
        described = describe(folders / layout)
        assert described["parameters_total"] == sum(weight.numel() for weight in um.model.parameters())
        assert described["parameters"]["fusion"] == sum(
            weight.numel() for weight in um.model.fusion.parameters()
        )  # type: ignore[union-attr]


# --- the text tokenizer ---------------------------------------------------------------------------------------


def test_ids_are_tiktokens(folders: Path) -> None:
    path = folders / "original" / "tokenizer.model"
    lines = (line.split() for line in path.read_text().splitlines())
    ranks = {base64.b64decode(word): int(rank) for word, rank in lines}
    theirs = tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = read_llama_tokenizer(path)
    for text in (*TEXTS, "Ein Bär, 红苹果 <|image|> 12345 <|eot_id|>\n\n\n   x"):
        ids = ours.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == text and len(ids) > 3
        assert ids == theirs.encode(text, disallowed_special=())
    count = len(ranks)
    assert ours.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>", "<|image|>"]) == [
        count, count + 9, count + 256,
    ]  # fmt: skip
    assert ours("a")["input_ids"][0] == count
    known = text_tokenizer().get_vocab()
    assert [ours.convert_tokens_to_ids(token) for token in SPECIAL] == [known[token] for token in SPECIAL]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (3, "?? 2"),
        (3, "{first} 2"),
        (3, "Ag== 7"),
        (300, base64.b64encode(b"<|eot_id|>").decode() + " 299"),
    ],
    ids=["no base64", "twice", "no rank", "special"],
)
def test_a_table_of_words_that_is_wrong_is_a_line(
    folders: Path, tmp_path: Path, line: int, text: str
) -> None:
    lines = (folders / "original" / "tokenizer.model").read_text().splitlines()
    lines[line - 1] = text.format(first=lines[0].split()[0])
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=rf"^{path}: line {line}: "):
        read_llama_tokenizer(path)


def test_a_table_without_all_bytes_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("AA== 0\n")
    with pytest.raises(UserError, match="has no word of the byte 1 alone"):
        read_llama_tokenizer(path)


# --- what is not supported --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"vision_config": {"hidden_act": "silu"}},
            r"vision_config.hidden_act: 'silu' is not supported, only 'gelu'",
        ),
        (
            {"vision_config": {"norm_eps": 1e-6}},
            r"vision_config.norm_eps: 1e-06 is not supported, only 1e-05",
        ),
        (
            {"vision_config": {"vision_output_dim": 7}},
            r"vision_config.vision_output_dim: 7 is not supported, only 144",
        ),
        ({"vision_config": {"image_size": 30}}, r"encoder.patch|.*size: "),
        ({"vision_config": {"intermediate_layers_indices": [1, 2, 9]}}, r"encoder.layers: 9, but depth is 4"),
        (
            {"vision_config": {"supported_aspect_ratios": [[1, 1]]}},
            r"vision_config.supported_aspect_ratios: ",
        ),
        (
            {"text_config": {"hidden_act": "gelu"}},
            r"text_config.hidden_act: 'gelu' is not supported, only 'silu'",
        ),
        (
            {"text_config": {"cross_attention_layers": [1, 6]}},
            r"text_config.cross_attention_layers: expected layers",
        ),
        (
            {"text_config": {"cross_attention_layers": []}},
            r"text_config.cross_attention_layers: expected layers",
        ),
        ({"image_token_index": 5}, r"image_token_index: expected 576 \(<\|image\|>\), got 5"),
    ],
)
def test_a_line_for_what_is_not_supported(
    folders: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    folder = copied(folders, "transformers", tmp_path / "own")
    edit(folder / "config.json", **changes)
    with pytest.raises(UserError, match=rf"json: {line}") as caught:
        unimm.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"vision_encoder": {"return_intermediate": [3, 1]}},
            r"vision_encoder.return_intermediate: expected layers in",
        ),
        ({"vision_chunk_size": 0}, r"vision_chunk_size"),
        ({"vision_max_num_chunks": 5}, r"views.most: expected at most 4 \(tiles of the encoder\), got 5"),
        ({"quantization_args": {"scheme": "x"}}, r"quantization_args"),
        ({"vision_num_cross_attention_layers": 0}, r"vision_num_cross_attention_layers"),
    ],
)
def test_a_line_for_what_metas_file_may_not_say(
    folders: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    folder = copied(folders, "original", tmp_path / "own")
    path = folder / "params.json"
    document = json.loads(path.read_text())
    for name, value in changes.items():
        document[name] = {**document.get(name, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"params.json: {line}"):
        unimm.load(folder, device="cpu")


def test_limits_of_tiles(folders: Path) -> None:
    two = unimm.load(folders / "transformers", device="cpu", views={"max_tiles": 2})
    counts = [two.processor.look([picture(*size)]).views for size in ((90, 90), (13, 200))]
    assert np.concatenate(counts).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"^max_tiles: 5; this model's encoder takes 4 at most$"):
        unimm.load(folders / "transformers", device="cpu", views={"max_tiles": 5})
