"""EmojiScenes as a source of training samples: scenes to understand, captions as text, and scenes to draw.

Understanding samples show a scene once and ask many things about it: every question is a branch that sees the scene
and itself, but no other branch (positions restart, attention does not cross), so no answer can be read off another.
Generation samples are a caption followed by the image codes, which are computed once and stored. Everything about a
sample follows from the seed, its kind and its position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from unimm.data.codes import cached_codes, fingerprint
from unimm.data.emojiscenes.augment import augment, draw_numbers
from unimm.data.emojiscenes.scenes import BACKGROUNDS, EmojiScenes, Scene
from unimm.data.emojiscenes.settings import (
    EMOJISCENES,
    SAMPLE_KINDS,
    SceneSettings,
    UnderstandingSettings,
)
from unimm.images import to_tensor
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.models.inputs import Images
from unimm.processing.messages import DRAWN, SHOWN, Message
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor, grids_of
from unimm.processing.rows import branch
from unimm.processing.views import SquareViews

if TYPE_CHECKING:
    from unimm.data.samples import Sample

ENDLESS = 2**40  # scenes whose codes are not needed, and samples of any kind
SCENES_AT_ONCE = 128  # that go through the tokenizer


class EmojiScenesSource:
    """Training samples of scenes for one model.

    Args:
        settings: which scenes.
        processor: of the model.
        tokenizer: the model's image tokenizer; None where it does not draw.
        side: pixels a side of scenes to draw.
        seed: of the scenes to draw.
        folder: of the run, where the codes are cached unless the settings name another place.
        device: where codes are made.
    """

    def __init__(
        self,
        settings: SceneSettings,
        processor: UniMMProcessor,
        tokenizer: ImageTokenizer | None,
        side: int,
        seed: int,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.settings, self.processor, self.tokenizer, self.device = settings, processor, tokenizer, device
        self.drawn = EmojiScenes("train", seed, side, settings.scenes, settings.kinds, settings.lattice)
        self.path = Path(settings.codes or folder / "codes.safetensors")
        self.codes: SceneCodes | None = None

    @property
    def encoded(self) -> tuple[str, ...]:
        """Kinds of sample that have image codes in them."""
        return ("generation", "understanding") if self.processor.sees_codes else ("generation",)

    def samples(
        self, mixture: Mapping[str, float], seed: int, shown: UnderstandingSettings, prompt_dropout: float
    ) -> dict[str, SceneSamples]:
        """Endless samples of each kind that a mixture names; image codes are made first, where there are none yet.

        Args:
            mixture: name -> share; `emojiscenes/KIND` is a kind here.
            seed: of the samples, and of scenes that are not drawn.
            shown: what is shown and asked in samples to understand.
            prompt_dropout: share of prompts to draw that are blanked, for guidance.

        Raises:
            UserError: the file of codes is something else, or cannot be written.
        """
        names = {f"{EMOJISCENES}/{kind}": kind for kind in SAMPLE_KINDS}
        if self.codes is None and any(mixture.get(f"{EMOJISCENES}/{kind}") for kind in self.encoded):
            assert self.tokenizer is not None
            self.codes = SceneCodes(self.path, self.tokenizer, self.drawn, self.device)
        size = self.processor.image_size or self.drawn.size
        endless = EmojiScenes("train", seed, size, ENDLESS, shown.kinds)
        return {
            name: SceneSamples(
                self, kind, seed, self.drawn if kind in self.encoded else endless, shown, prompt_dropout
            )
            for name, kind in names.items()
            if name in mixture
        }

    def code_grid(self, index: int) -> Tensor:
        """Codes [h, w] of a scene to draw."""
        assert self.codes is not None
        return self.codes[index]


class SceneSamples:
    """Random access to samples of one kind.

    Args:
        source: whose processor and codes they are made with.
        kind: one of `SAMPLE_KINDS`.
        seed: of the samples.
        scenes: what they are made of.
        shown: what is shown and asked in samples to understand.
        prompt_dropout: share of prompts to draw that are blanked.
    """

    def __init__(
        self,
        source: EmojiScenesSource,
        kind: str,
        seed: int,
        scenes: EmojiScenes,
        shown: UnderstandingSettings,
        prompt_dropout: float,
    ) -> None:
        self.source, self.processor, self.scenes = source, source.processor, scenes
        self.shown, self.prompt_dropout = shown, prompt_dropout
        makers = {"understanding": self.understanding, "text": self.text, "generation": self.generation}
        self.make, self.seed, self.salt = makers[kind], seed, SAMPLE_KINDS.index(kind)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, which depends on that and the seed alone."""
        rng = np.random.default_rng([self.seed, int(index), self.salt])
        return self.make(rng, int(rng.integers(len(self.scenes))))

    def understanding(self, rng: np.random.Generator, index: int) -> Sample:
        """A scene, then every question and a caption, each in a branch of its own."""
        scene, processor = self.scenes[index], self.processor
        captions = scene.captions()
        questions = scene.questions() + (scene.placings() if self.shown.placings else [])
        asked = [(q.question, q.answer) for q in dict.fromkeys(questions)]
        request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
        asked.append((request, captions[rng.integers(len(captions))]))
        exchanges = [(Message("user", (SHOWN, q)), Message("assistant", (a,))) for q, a in asked]
        layout, write = processor.layout, processor.conversation.write
        if processor.sees_codes:
            codes = self.source.code_grid(index)
            grid = codes.shape[0], codes.shape[1]
            row = branch([write(exchange, [grid]) for exchange in exchanges]).arrays()
            row["ids"][row["ids"] == layout.feature] = layout.tokens(codes).numpy()
            return dict(row)
        images = self._shown(scene, rng)
        row = branch([write(exchange, grids_of(images)) for exchange in exchanges]).arrays()
        return {**row, "images": images}

    def _shown(self, scene: Scene, rng: np.random.Generator) -> Images:
        """A scene as the model sees it."""
        pixels = self._pixels(scene, rng)
        processor = self.processor
        if isinstance(processor.views, SquareViews):  # which the scenes are made for
            return Images(pixels, grids=torch.tensor([processor.image_grid]))
        return processor.look(processor.to_images(pixels))

    def _pixels(self, scene: Scene, rng: np.random.Generator) -> Tensor:
        """A scene to look at [1, 3, H, W] in [-1, 1], varied where that is wanted."""
        pixels = to_tensor(scene.render()[None])
        if not self.shown.augment:
            return pixels
        how = self.source.settings.augmentation
        background = torch.tensor([BACKGROUNDS[scene.background]]) / 127.5 - 1
        draws = torch.from_numpy(draw_numbers(rng))[None]
        return augment(pixels, background, torch.tensor([scene.mirrorable]), draws, how)

    def text(self, rng: np.random.Generator, index: int) -> Sample:
        """A caption as plain text, every token labelled."""
        captions = self.scenes[index].captions()
        caption = Message("assistant", (captions[rng.integers(len(captions))],))
        return dict(self.processor.conversation.write([caption]).arrays())

    def generation(self, rng: np.random.Generator, index: int) -> Sample:
        """A caption, sometimes blanked, then the image's codes."""
        captions, codes = self.scenes[index].captions(), self.source.code_grid(index)
        prompt = Message("user", (captions[rng.integers(len(captions))],))
        row = self.processor.conversation.write([prompt, Message("assistant", (DRAWN,))], [codes])
        if rng.random() < self.prompt_dropout:
            row = self.processor.conversation.drop_prompt(row, (codes.shape[0], codes.shape[1]))
        return {**row.arrays(), "images": self.processor.drawn([codes])}


class SceneCodes:
    """The image codes of the first `scenes` training scenes, computed once and cached in one file.

    Args:
        path: the safetensors file; made again if it is of another tokenizer or of other scenes, or too few.
        tokenizer: what encodes.
        scenes: the scenes to encode.
        device: where to encode.

    Raises:
        UserError: the file is no file of image codes, or cannot be written.
    """

    def __init__(
        self, path: Path, tokenizer: ImageTokenizer, scenes: EmojiScenes, device: torch.device
    ) -> None:
        data = {
            name: value for name, value in vars(scenes).items() if name != "length"
        }  # a file may have more
        tensors, _ = cached_codes(
            path,
            fingerprint(tokenizer, data),
            lambda: ({"codes": encode_scenes(tokenizer, scenes, device)}, {}),
            min_codes=len(scenes),
        )
        self.codes = tensors["codes"]

    def __getitem__(self, index: int) -> Tensor:
        """Codes [h, w] of a scene."""
        return self.codes[index].long()


def encode_scenes(tokenizer: ImageTokenizer, scenes: EmojiScenes, device: torch.device) -> Tensor:
    """Return the codes int16 [N, h, w] of all scenes, with a progress bar."""
    from rich.progress import track

    nn.Module.to(tokenizer, device)
    starts = range(0, len(scenes), SCENES_AT_ONCE)
    codes = []
    for start in track(starts, "image codes"):
        stop = min(start + SCENES_AT_ONCE, len(scenes))
        pixels = to_tensor(np.stack([scenes[i].render() for i in range(start, stop)])).to(device)
        codes.append(tokenizer.encode(pixels).to("cpu", torch.int16))
    return torch.cat(codes)
