"""Pack the EmojiScenes artwork: SVG icon packages in, one small tar of WebP images for each family out.

The six families come as npm packages (`npm i --ignore-scripts @iconify-json/<family> emojibase-data`), each
with an `icons.json` of SVG bodies, an `info.json` with author and licence, and sometimes a `chars.json` that
maps code points to icon names. A concept is an emoji whose CLDR label has at most three words; it is kept if
at least `MIN_FAMILIES` families draw it. Rendering is by resvg, so the same packages give the same pixels.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from unimm.errors import UserError
from unimm.files import atomic_write
from unimm.outputs import check_output

PACKED_FAMILIES = ("noto", "noto-v1", "twemoji", "fluent-emoji-flat", "emojione", "fxemoji")
SPRITE = 64  # pixels a side of a packed image
MAX_WORDS = 3
MIN_FAMILIES = 6
TITLE = "EmojiScenes artwork: rendered, unchanged in shape and colour, from these icon sets."
SKIPPED_GROUPS = (1, 2, 8, 9)  # people, components, symbols and flags are no objects of a scene


class Concept(NamedTuple):
    """One emoji: its CLDR label, its code points in hex joined by dashes, and where Unicode files it."""

    label: str
    hexcode: str
    group: str
    subgroup: str


def slug(text: str) -> str:
    """Return `text` as icon sets spell their names: lower case, words joined by dashes."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("’", "")).strip("-")


def read_package_json(path: Path) -> Any:
    """Read a JSON file, or say which package is missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; install the package with `npm i --ignore-scripts`") from None


def concepts(modules: Path) -> Iterator[Concept]:
    """Yield the candidate concepts in Unicode order."""
    meta = read_package_json(modules / "emojibase-data/meta/groups.json")
    for entry in read_package_json(modules / "emojibase-data/en/data.json"):
        group = entry.get("group")
        if group is None or group in SKIPPED_GROUPS or len(entry["label"].split()) > MAX_WORDS:
            continue
        yield Concept(
            entry["label"],
            entry["hexcode"].lower(),
            meta["groups"][str(group)],
            meta["subgroups"][str(entry["subgroup"])],
        )


class ArtworkFamily:
    """One icon package: finds the icon of a concept and renders it."""

    def __init__(self, modules: Path, name: str) -> None:
        folder = modules / "@iconify-json" / name
        self.name = name
        self.icons = read_package_json(folder / "icons.json")
        self.info = read_package_json(folder / "info.json")
        self.version = read_package_json(folder / "package.json")["version"]
        self.chars: dict[str, str] = read_package_json(folder / "chars.json")

    def find(self, concept: Concept) -> tuple[str, dict[str, Any]] | None:
        """Return the SVG body and its properties for `concept`, or None where the family lacks it."""
        code = concept.hexcode.replace("-fe0f", "")
        names = [self.chars.get(code), slug(concept.label)]
        if "-" not in code:
            unicode_name = unicodedata.name(chr(int(code, 16)), "")
            names += [slug(unicode_name), slug(unicode_name).replace("-", "")]
        for name in names:
            if name and (found := self._resolve(name)):
                return found
        return None

    def _resolve(self, name: str) -> tuple[str, dict[str, Any]] | None:
        icon = self.icons["icons"].get(name)
        if icon is not None:
            return icon["body"], icon
        alias = self.icons.get("aliases", {}).get(name)
        if alias is None or (parent := self._resolve(alias["parent"])) is None:
            return None
        return parent[0], {**parent[1], **alias}

    def render(self, body: str, properties: dict[str, Any]) -> Image.Image:
        """Rasterise an SVG body to a square RGBA image of `SPRITE` pixels."""
        import resvg_py

        width = properties.get("width", self.icons.get("width", 16))
        height = properties.get("height", self.icons.get("height", 16))
        left, top = properties.get("left", 0), properties.get("top", 0)
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{body}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE, height=SPRITE))
        image = Image.open(io.BytesIO(png)).convert("RGBA")
        if properties.get("hFlip"):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if properties.get("vFlip"):
            image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if image.getchannel("A").getbbox() is None:
            raise UserError(f"{self.name}: an icon renders to nothing")
        return image


def notice(families: list[ArtworkFamily]) -> str:
    """Return the NOTICE of the artwork: who drew each family and under which licence."""
    lines = [TITLE]
    for family in families:
        author, licence = family.info["author"], family.info["license"]
        lines += [
            "",
            f"{family.info['name']} (npm @iconify-json/{family.name} {family.version})",
            f"  by {author['name']}, {author.get('url', '')}",
            f"  licence: {licence.get('spdx', licence['title'])}, {licence.get('url', '')}",
        ]
    lines += ["", "Names and categories: emojibase-data (MIT), after Unicode CLDR.", ""]
    return "\n".join(lines)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Write `files` as a tar without times or owners, so that the same input gives the same bytes."""
    with atomic_write(path) as temporary, tarfile.open(temporary, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _is_index(file: BinaryIO) -> bool:
    """Whether a file is a `concepts.json` of ours."""
    try:
        index = json.load(file)
    except (ValueError, RecursionError):
        return False
    return isinstance(index, dict) and all(
        isinstance(one, dict) and "hexcode" in one for one in index.values()
    )


def pack(modules: Path, folder: Path) -> dict[str, int]:
    """Render every concept that enough families draw, and write `<family>.tar`, `concepts.json` and NOTICE.

    Args:
        modules: the `node_modules` folder with the icon packages and emojibase-data.
        folder: where the shards go.

    Returns:
        How many images each family got.

    Raises:
        UserError: a package is missing, or the folder has such files of something else.
    """
    check_output(folder / "concepts.json", "concepts of packed artwork", _is_index)
    check_output(
        folder / "NOTICE",
        "the notice of packed artwork",
        lambda file: file.readline() == f"{TITLE}\n".encode(),
    )
    families = [ArtworkFamily(modules, name) for name in PACKED_FAMILIES]
    art: dict[str, dict[str, bytes]] = {name: {} for name in PACKED_FAMILIES}
    index: dict[str, dict[str, Any]] = {}
    for concept in concepts(modules):
        found = {family: icon for family in families if (icon := family.find(concept))}
        if len(found) < MIN_FAMILIES or concept.label in index:
            continue
        index[concept.label] = {
            "hexcode": concept.hexcode,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "families": [family.name for family in found],
        }
        for family, (body, properties) in found.items():
            buffer = io.BytesIO()
            family.render(body, properties).save(buffer, "WEBP", lossless=True, method=6, exact=False)
            art[family.name][f"{slug(concept.label)}.webp"] = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for name, files in art.items():
        write_tar(folder / f"{name}.tar", files)
    with atomic_write(folder / "concepts.json") as temporary:
        temporary.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_write(folder / "NOTICE") as temporary:
        temporary.write_text(notice(families), encoding="utf-8")
    return {name: len(files) for name, files in art.items()}
