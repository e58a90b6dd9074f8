"""The embedded model twice: once behind a server, once to say what the server has to answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

import unimm
from tests.server.serving import Client, serving
from unimm.data.emojiscenes.scenes import EmojiScenes
from unimm.pipeline import UniMM


@pytest.fixture(scope="session")
def um() -> UniMM:
    """What is served, in this process and by itself."""
    return unimm.load(device="cpu")


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A server in this process."""
    with serving(unimm.load(device="cpu")) as client:
        yield client


@pytest.fixture(scope="session")
def scenes() -> list[Image.Image]:
    """Scenes that the model can name."""
    source = EmojiScenes("seen", 7, 64, 6, ("single",))
    return [Image.fromarray(source[i].render()) for i in range(6)]
