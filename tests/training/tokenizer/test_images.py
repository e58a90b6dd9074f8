"""Images of one's own: folders and tars give crops that seed and position decide; bad ones are replaced."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unimm.errors import UserError
from unimm.training.tokenizer.images import ImageFiles, RandomCrops, crop_randomly


def ramp(width: int, height: int, shade: int) -> Image.Image:
    across = np.linspace(0, 255, width, dtype=np.uint8)[None].repeat(height, 0)
    return Image.fromarray(np.stack([across, np.full_like(across, shade), np.zeros_like(across)], -1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in folders by class, one of them broken."""
    for number in range(6):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp(60 + number, 40, 40 * number).save(path)
    (tmp_path / "images" / "class0" / "2.png").write_bytes(b"not an image")
    return tmp_path / "images"


@pytest.fixture
def tars(folder: Path, tmp_path: Path) -> Path:
    """The same images in two tars, with labels that nobody reads."""
    paths = sorted(folder.rglob("*.png"))
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for path in paths[3 * number : 3 * number + 3]:
                for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", b"7")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return tmp_path / "{0..1}.tar"


@pytest.mark.parametrize("place", ["folder", "tars"])
def test_crops_follow_from_seed_and_position(place: str, request: pytest.FixtureRequest) -> None:
    location = str(request.getfixturevalue(place))
    bad: list[str] = []

    def crops(seed: int) -> RandomCrops:
        files = ImageFiles(location)
        assert len(files) == 6
        return RandomCrops(files, 32, (0.8, 1.0), True, (seed, 5), lambda error: bad.append(error.reason))

    one, same, other = crops(0), crops(0), crops(1)
    shades = []
    for position in (3, 0, 1, 2, 4, 5, 40):
        pixels = one[position]["pixels"]
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, same[position]["pixels"])
        shades.append(int(pixels[0, 0, 1]))
    assert len(set(shades)) >= 4, "a pass reaches every image"
    assert bad and all("image" in reason for reason in bad)
    assert any(not np.array_equal(one[i]["pixels"], other[i]["pixels"]) for i in range(4))


def test_crops_are_as_large_as_asked_and_flip() -> None:
    image = ramp(300, 100, 9)
    rng = np.random.default_rng(0)
    spans = []
    for _ in range(40):
        pixels = crop_randomly(image, 50, (0.5, 1.0), rng)
        assert pixels.shape == (50, 50, 3)
        spans.append(int(pixels[0, -1, 0]) - int(pixels[0, 0, 0]))
    # a square of the whole height spans a third of the ramp, one of half of it a sixth
    assert 40 <= min(spans) <= 55 and 72 <= max(spans) <= 86


def test_places_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no images"):
        ImageFiles(str(tmp_path))
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"a\.txt: expected a folder of images, or tars"):
        ImageFiles(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="no such file or folder"):
        ImageFiles(str(tmp_path / "none"))
