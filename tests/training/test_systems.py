"""The table of published systems is what their recipes build, and says what was published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unimm.cli.main import main
from unimm.training.systems import COLUMNS, as_markdown, systems

ROOT = Path(__file__).resolve().parents[2]
# parameters as published, and tokens of a photo of 640 x 480 pixels by the rules of each system's own code; Molmo's
# recipe has no table of 128 rows beside the decoder's, Aria's no norm that nothing passes; Aria and Qwen2-VL count a
# token at each side of an image
PUBLISHED = {
    "Fuyu 8B": (9_408_238_592, 368),
    "Pixtral 12B": (12_682_739_712, 1230),
    "Qwen2-VL 7B": (8_291_375_616, 391 + 2),
    "NVLM-D 72B": (78_863_416_704, 1792),
    "Molmo 7B-D": (8_021_025_280 - 128 * 3584, 740),
    "Llama 3.2 Vision 11B": (10_670_220_835, 1),
    "Aria 25B": (25_307_311_216 - 2 * 1152, 256 + 2),
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return systems()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_tokens_are_the_published_ones(rows: list[dict[str, Any]], name: str) -> None:
    row = next(row for row in rows if row["system"] == name)
    assert (row["parameters"], row["photo"]) == PUBLISHED[name]


def test_every_system_has_a_row_and_every_cell_is_filled(rows: list[dict[str, Any]]) -> None:
    assert [row["year"] for row in rows] == sorted(row["year"] for row in rows)
    for row in rows:
        empty = {key for key in COLUMNS if row[key] is None}
        codes = row["encoder"] == "its image tokenizer"
        assert empty <= ({"draws"} | ({"reducer", "connector"} if codes else set())), row["system"]
        assert (ROOT / f"{row['recipe']}.yaml").exists()


def test_the_documents_have_this_table(rows: list[dict[str, Any]]) -> None:
    assert as_markdown(rows) in (ROOT / "docs/systems.md").read_text()


def test_the_command_prints_it(
    rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("unimm.training.systems.systems", lambda: rows)  # made once
    assert main(["systems", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["systems"] == json.loads(json.dumps(rows))
    assert main(["systems"]) == 0
    assert "Fuyu 8B, 2023" in capsys.readouterr().out
