"""Checkpoints by hub id: what is fetched, at which revision, and what is said where something is not there.

The hub is a server on this machine, asked by huggingface_hub's own client.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

import unimm
from tests.families import emu3_checkpoints, janus_checkpoints
from tests.families.hub_server import Hub, serve
from unimm.cli.main import main
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.loading import describe, load_processor

TOKENIZER = "Emu3-VisionTokenizer"
WEIGHTS = (".safetensors", ".bin")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints; Emu3's vision tokenizer is a folder of its own, and not beside the model's."""
    root = tmp_path_factory.mktemp("checkpoints")
    emu3_checkpoints.original(root / "emu3", emu3_checkpoints.emu3(root / "emu3-transformers"))
    (root / "apart").mkdir()
    (root / "emu3" / TOKENIZER).rename(root / "apart" / "vision")
    model = janus_checkpoints.janus(root / "janus")
    janus_checkpoints.original(root / "janus-original", model)
    janus_checkpoints.original(root / "janus-binary", model, binary=True)
    return {path.name: path for path in (*root.iterdir(), root / "apart" / "vision")}


@pytest.fixture
def hub(tmp_path: Path, folders: dict[str, Path], tiny: Path) -> Iterator[Hub]:
    with serve(tmp_path / "cache") as hub:
        hub.add("BAAI/Emu3-Chat", folders["emu3"])
        hub.add(f"BAAI/{TOKENIZER}", folders["vision"])
        hub.add("me/tiny", tiny)
        for name in ("janus", "janus-original", "janus-binary", "emu3-transformers"):
            hub.add(f"me/{name}", folders[name])
        yield hub


def refused(call: Any) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same_weights(one: unimm.UniMM, two: unimm.UniMM) -> bool:
    first, second = one.model.state_dict(), two.model.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- Emu3's vision tokenizer, which is a repository of its own -------------------------------------------------


def test_emu3_is_loaded_by_its_id(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    um = unimm.load("BAAI/Emu3-Chat", device="cpu")
    named = unimm.load(folders["emu3"], device="cpu", image_tokenizer=folders["vision"])
    assert same_weights(um, named)
    shutil.copytree(folders["emu3"], tmp_path / "both")
    shutil.copytree(folders["vision"], tmp_path / "both" / TOKENIZER)
    assert same_weights(um, unimm.load(tmp_path / "both", device="cpu"))
    assert load_processor("BAAI/Emu3-Chat").views.mean == um.processor.views.mean == (0.5, 0.4, 0.5)


def test_one_that_the_user_names_is_taken(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    unimm.load("BAAI/Emu3-Chat", device="cpu", image_tokenizer=folders["vision"])
    describe("BAAI/Emu3-Chat", image_tokenizer=folders["vision"])
    assert not hub.files() & {f"BAAI/{TOKENIZER}/config.json", f"BAAI/{TOKENIZER}/model.safetensors"}
    hub.add("me/vision", folders["vision"])
    unimm.load(folders["emu3"], device="cpu", image_tokenizer="me/vision")
    assert "me/vision/model.safetensors" in hub.files()
    shutil.copytree(folders["emu3"], tmp_path / "both")
    shutil.copytree(folders["vision"], tmp_path / "both" / TOKENIZER)
    hub.add("me/both", tmp_path / "both")
    unimm.load("me/both", device="cpu")
    assert f"BAAI/{TOKENIZER}/config.json" not in hub.files()


def test_a_folder_without_one_is_told_where_it_may_be(folders: dict[str, Path], tmp_path: Path) -> None:
    for call in (
        lambda: unimm.load(folders["emu3"]),
        lambda: describe(folders["emu3"]),
        lambda: convert(folders["emu3"], tmp_path / "new", "unimm"),
    ):
        line = refused(call)
        assert f"put {TOKENIZER} in that folder or beside it, or name its folder or hub id" in line
    assert "image_tokenizer: only Emu3's original layout" in refused(
        lambda: unimm.load(folders["janus"], image_tokenizer=folders["vision"])
    )
    assert "model_type: 'Emu3'; the vision tokenizer of Emu3 is" in refused(
        lambda: unimm.load(folders["emu3"], image_tokenizer=folders["emu3"])
    )
    assert "nowhere: no such folder" in refused(
        lambda: unimm.load(folders["emu3"], image_tokenizer="nowhere")
    )


@pytest.mark.parametrize("to", ["unimm", "original", "transformers"])
def test_emu3_is_converted_by_its_id(hub: Hub, folders: dict[str, Path], tmp_path: Path, to: str) -> None:
    straight = unimm.load(folders["emu3"], device="cpu", image_tokenizer=folders["vision"])
    assert main(["convert", "BAAI/Emu3-Chat", str(tmp_path / "id"), "--to", to]) == 0
    arguments = ["--image-tokenizer", str(folders["vision"])]
    assert main(["convert", str(folders["emu3"]), str(tmp_path / "named"), "--to", to, *arguments]) == 0
    for name in ("id", "named"):
        assert same_weights(straight, unimm.load(tmp_path / name, device="cpu"))


# --- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("BAAI/Emu3-Chat", None),
        ("me/emu3-transformers", "emu3-transformers"),
        ("me/janus", "janus"),
        ("me/janus-original", "janus-original"),
        ("me/tiny", None),
    ],
)
def test_describing_fetches_no_weights(
    hub: Hub, folders: dict[str, Path], name: str, same: str | None
) -> None:
    said = describe(name)
    if same is not None:
        assert said["parameters"] == describe(folders[same])["parameters"]
    for asked in hub.asked:  # headers are asked for by their first 100 kB
        assert not asked.file.endswith(WEIGHTS) or asked.sent <= 100_001
    cached = list(Path(huggingface_hub.constants.HF_HUB_CACHE).rglob("*"))
    assert not [path for path in cached if path.name.endswith(WEIGHTS)]
    load_processor(name)
    assert not hub.sent(f"BAAI/{TOKENIZER}", "model.safetensors")


def test_headers_of_shards_are_enough(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["janus-original"], tmp_path / "large")
    for shard in folder.glob("*.safetensors"):
        with shard.open("ab") as file:
            file.truncate(shard.stat().st_size + 10**6)
    hub.add("me/large", folder)
    said = describe("me/large")
    assert said["parameters"] == describe(folders["janus-original"])["parameters"]
    assert 0 < hub.sent("me/large", "model-00001-of-00002.safetensors") <= 100_001


def test_what_has_no_headers_is_described_without(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["janus-binary"], tmp_path / "published")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["params"] |= {"model_name": "siglip_large_patch16_384", "image_size": 384}
    (folder / "config.json").write_text(json.dumps(config))
    hub.add("me/published", folder)
    assert describe("me/published")["understands"] == "384x384"
    assert "no published tower" in refused(lambda: describe("me/janus-binary"))
    assert not [name for name in hub.files(".bin") if name.endswith(".bin")]


def test_weights_that_are_here_are_read_for_their_sizes(hub: Hub, folders: dict[str, Path]) -> None:
    unimm.load("me/janus-binary", device="cpu")
    hub.asked.clear()
    said = describe("me/janus-binary")
    assert said["parameters"] == describe(folders["janus-binary"])["parameters"]
    assert not hub.files(*WEIGHTS)


def test_a_damaged_header_is_a_line(hub: Hub, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["janus"], tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    hub.add("me/damaged", folder)
    assert "me/damaged: the headers of its weights are not readable" in refused(
        lambda: describe("me/damaged")
    )


# --- revisions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def revised(hub: Hub, folders: dict[str, Path], tiny: Path, tmp_path: Path) -> dict[str, str]:
    """A model of which there are two: main and an earlier one with other weights, context and tokenizer."""
    first = unimm.load(tiny, device="cpu")
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.mul_(0.5)
    first.model.config.decoder["max_position_embeddings"] = 96
    first.save(tmp_path / "first")
    return {
        "v1": hub.add("me/revised", tmp_path / "first", "v1"),
        "main": hub.add("me/revised", tiny),
    }


def test_all_files_are_of_the_revision(hub: Hub, revised: dict[str, str], tmp_path: Path, tiny: Path) -> None:
    first = unimm.load(tmp_path / "first", device="cpu")
    for name, revision in (
        ("me/revised", "v1"),
        ("me/revised", revised["v1"]),
        ("me/revised@v1", None),
    ):
        hub.asked.clear()
        assert describe(name, revision=revision)["context"] == 96
        um = unimm.load(name, device="cpu", revision=revision)
        assert same_weights(um, first) and um.processor.context == 96
        assert {asked.commit for asked in hub.asked} <= {revised["v1"]}
    assert same_weights(unimm.load("me/revised", device="cpu"), unimm.load(tiny, device="cpu"))
    assert describe("me/revised", revision="main")["context"] == 128


def test_the_command_line_takes_a_revision(
    hub: Hub, revised: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["me/revised", "--revision", "v1"]
    assert main(["info", *source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 96
    assert main(["convert", *source, str(tmp_path / "new"), "--to", "unimm"]) == 0
    assert describe(tmp_path / "new")["context"] == 96
    drawing = ["draw", "a star", "--model", *source, "-o", str(tmp_path), "--seed", "1", "--json"]
    assert main(drawing) == 0
    assert {asked.commit for asked in hub.asked} == {revised["v1"]}


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_a_revision_that_is_not_there_is_named(hub: Hub, revision: str) -> None:
    line = refused(lambda: unimm.load("me/tiny", revision=revision))
    assert line == f"me/tiny: has no revision '{revision}'; give a branch, a tag or a commit"


@pytest.mark.parametrize("revision", ["", "../../x", "/etc/passwd", "a b", "a\nb", "-x"])
def test_what_is_no_revision_is_refused(hub: Hub, revision: str) -> None:
    assert "give a branch, a tag or a commit" in refused(lambda: unimm.load("me/tiny", revision=revision))
    assert not hub.asked


@pytest.mark.parametrize("source", [None, "embedded", "folder", "me/tiny@main"])
def test_only_hub_ids_have_revisions(hub: Hub, tiny: Path, source: str | None) -> None:
    given = tiny if source == "folder" else source
    assert "revision: 'main'; " in refused(lambda: unimm.load(given, revision="main"))


# --- what cannot be fetched ----------------------------------------------------------------------------------------


def test_what_is_not_there_is_one_line(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    assert "nobody/nothing: no such folder, and not on the hub" in refused(
        lambda: unimm.load("nobody/nothing")
    )
    hub.add("me/gated", tiny)
    hub.gated.add("me/gated")
    assert "me/gated: is gated; accept its terms" in refused(lambda: unimm.load("me/gated"))
    (tmp_path / "no-config").mkdir()
    (tmp_path / "no-config" / "readme.txt").touch()
    hub.add("me/no-config", tmp_path / "no-config")
    assert "config.json: not found" in refused(lambda: unimm.load("me/no-config"))


def test_what_was_fetched_is_read_without_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    um = unimm.load("BAAI/Emu3-Chat", device="cpu")
    describe("me/janus")  # its weights were not fetched
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert same_weights(um, unimm.load("BAAI/Emu3-Chat", device="cpu"))
    assert describe("BAAI/Emu3-Chat")["layout"] == "original"
    assert describe("me/janus")["family"] == "janus"
    assert "me/janus: no such folder, and not available from the hub" in refused(
        lambda: unimm.load("me/janus")
    )
    assert "me/tiny: no such folder, and not available from the hub" in refused(lambda: unimm.load("me/tiny"))
    assert not hub.asked
