"""The training task of an image tokenizer: recipe, module, losses, previews and export."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unimm.data.emojiscenes.scenes import EmojiScenes, Split
from unimm.errors import UserError
from unimm.files import append
from unimm.images import save_image, to_tensor
from unimm.models.image_tokenizers.sizes import VQSizes
from unimm.models.image_tokenizers.vq import ImageTokenizer, ImageTokenizerConfig, Reconstruction
from unimm.sections import NotNegative, Positive, Rate, Section, near, validate
from unimm.training.batches import mix
from unimm.training.recipe import VALIDATION, BaseRecipe, Stage, ValidationSection, smoke_data
from unimm.training.records import BadItems, data_state
from unimm.training.tokenizer import losses
from unimm.training.tokenizer.data import IMAGE_KINDS, TokenizerImages
from unimm.training.tokenizer.held_out import HeldOutImages, as_it_was, begun, divided
from unimm.training.tokenizer.images import ImageFiles, RandomCrops, first_images
from unimm.training.tokenizer.metrics import RecentCodes, comparison, psnr

if TYPE_CHECKING:
    from unimm.training.task import SampleSource

Proportion = Annotated[float, Field(ge=0, le=1)]
PREVIEW = 24  # scenes in a preview
HELD_OUT_OF, TRAINED_ON = "held-out-", "trained-on-"  # what names of sheets of one's own images begin with
HELD_OUT: tuple[Split, ...] = ("seen", "composed", "vendor")


class ImageSection(Section):
    """Images of one's own, cropped at random as ADM (arXiv 2105.05233) and LlamaGen do."""

    path: Annotated[str, Field(min_length=1)]
    """A folder of images (subfolders too), a tar, or a pattern of tars."""
    shorter: Annotated[tuple[Proportion, Proportion], Field(strict=False)] = (0.8, 1.0)
    """Least and most share of an image's short side that the crop takes up."""
    flip: bool = True
    """Whether half of them are mirrored."""
    allow_outside: bool = False
    """Whether links may lead out of the folder."""

    @model_validator(mode="after")
    def _ordered(self) -> ImageSection:
        if not 0 < self.shorter[0] <= self.shorter[1]:
            raise ValueError(f"shorter: expected two growing shares above 0, got {list(self.shorter)}")
        return self


class Data(Section):
    """Images trained on; `Stage.mixture` says how much of each kind and source.

    Where it is empty, all sources in equal shares.
    """

    augmented: Proportion = 0.5
    """Share of scenes and artwork that are mirrored, turned or recoloured at random."""
    sources: dict[str, ImageSection] = Field(default_factory=dict)
    """Name -> images of one's own; the name may stand in a stage's mixture."""
    max_bad_items: NotNegative = 100
    """Most images of sources that may be unreadable before the run stops."""
    validation: ValidationSection[ImageSection] | None = None
    """Images of one's own that are not trained on, to measure on; null: none."""


class TokenizerOptions(Section):
    """What a stage's `options` may hold."""

    augmented: Proportion | None = None
    """Share of augmented images in this stage; null: that of `data`."""


class Perceptual(Section):
    """Distance of a frozen network's features."""

    network: str | None = None
    """`lpips:vgg` (alex, squeeze) for LPIPS by the package lpips; or a timm name, or `local-dir:FOLDER`."""
    weight: Rate = 1.0
    layers: Positive = 4
    """Of a timm network: how many of its last levels are compared."""
    pretrained: bool = True
    """False gives it random weights, to see whether a recipe runs."""


class Adversarial(Section):
    """PatchGAN with hinge loss, in effect from step `start`, its weight growing over `warmup` steps."""

    weight: Rate = 0.0
    start: NotNegative = 0
    warmup: NotNegative = 0
    adaptive: bool = False
    """Scale by the ratio of the gradients at the last layer, as VQGAN does; LlamaGen keeps it fixed."""
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = 32
    levels: Positive = 3
    full: bool = False
    """The layers of the paper: one more at stride 1, and a last kernel of 4."""

    def weight_at(self, step: int) -> float:
        """Weight of the generator's adversarial loss at a step."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / max(self.warmup, 1))


class Quantization(Section):
    """The decoder sees plain latents until step `start`, then codes blend in over `ramp` steps.

    From random weights an encoder quantised at once settles in two or three of the codebook's dimensions.
    """

    start: NotNegative = 0
    ramp: NotNegative = 0

    def blend_at(self, step: int) -> float:
        """Share of the quantisation that the decoder sees at a step."""
        if step < self.start:
            return 0.0
        return min(1.0, (step - self.start + 1) / max(self.ramp, 1))


class Loss(Section):
    """Weights of the losses; all are means over images."""

    l1: Rate = 1.0
    l2: Rate = 1.0
    edges: Rate = 0.0
    commitment: Rate = 1.0
    perceptual: Perceptual = Perceptual()
    adversarial: Adversarial = Adversarial()


class Evaluation(Section):
    """What `unimm tokenizer eval` looks at."""

    tokenizer: str | None = None
    """Folder of the tokenizer; null: the export of this recipe."""
    output: str | None = None
    """Where figures and sheets go; null: `evaluation` in the recipe's output."""
    splits: Annotated[list[Split], Field(min_length=1)] = Field(default_factory=lambda: list(HELD_OUT))
    samples: Positive = 2000
    """Scenes of each split."""
    seed: NotNegative = 1
    images: str | None = None
    """Images of one's own, held out of training, to look at too: a folder or tars."""


class TokenizerRecipe(BaseRecipe):
    """Recipe of `unimm tokenizer train`; the groups of `lr` are `tokenizer` and `discriminator`."""

    task: Literal["tokenizer"]
    model: VQSizes
    data: Data = Data()
    quantization: Quantization = Quantization()
    loss: Loss = Loss()
    evaluation: Evaluation = Evaluation()

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """As many levels of a few channels, a small quantiser of the same kind, the same images."""
        model = data["model"]
        levels = len(model.get("block_out_channels", [0]))
        stride = model.get("patch_size", 1) * 2 ** (levels - 1)
        model |= {"block_out_channels": [8] * levels, "norm_num_groups": 2, "latent_channels": 8}
        model["image_size"] = min(model.get("image_size", 64), max(4 * stride, 32))
        quantizer = model.get("quantizer", model)
        tiny = {"fsq": {"levels": [3, 3]}, "lfq": {"codebook_size": 16}}
        vector = {"codebook_size": 16, "codebook_dim": 4}
        quantizer |= tiny.get(quantizer.get("kind", "vq"), vector)
        loss = data.setdefault("loss", {})
        features = loss.setdefault("perceptual", {})
        features["pretrained"] = False
        if str(features.get("network")).startswith(losses.LPIPS):
            features["network"] = f"{losses.LPIPS}squeeze"  # the smallest of them
        gan = loss.setdefault("adversarial", {})
        gan |= {"start": min(gan.get("start", 0), 1), "channels": 8}
        data["data"] = smoke_data(data, {"scenes": 1})
        data["evaluation"] = {}

    @property
    def validation(self) -> ValidationSection[ImageSection] | None:
        """What is held out of the recipe's sources."""
        return self.data.validation

    def build_task(self) -> TokenizerTask:
        """Return the task, having checked what only the whole recipe can tell."""
        if self.validation is not None and self.validation.share and not self.data.sources:
            raise self.error("data.validation.share", "there are no sources to hold images out of; name them")
        if self.zero_stage == 3:
            raise self.error(
                "deepspeed.zero_optimization.stage", "a tokenizer's weights are not sharded; use 0, 1 or 2"
            )
        for name in self.data.sources:
            if name in IMAGE_KINDS:
                raise self.error(f"data.sources.{name}", "this is a kind of scenes; give it another name")
        known = (*IMAGE_KINDS, *self.data.sources)
        for number, stage in enumerate(self.stages):
            validate(TokenizerOptions, stage.options, f"{self.source}: stages[{number}].options")
            if not self.mixture(stage):
                message = "no data; give data.sources, or {scenes: 1} here for the built-in scenes"
                raise self.error(f"stages[{number}].mixture", message)
            for kind in stage.mixture:
                if kind not in known:
                    key = f"stages[{number}].mixture.{kind}"
                    raise self.error(key, f"unknown kind; one of {', '.join(known)}{near(kind, known)}")
        config = ImageTokenizerConfig(**self.model.model_dump())
        self.say_unread(self.data.sources)
        return TokenizerTask(self, config)

    def mixture(self, stage: Stage) -> dict[str, float]:
        """A stage's mixture over `IMAGE_KINDS` and sources; where it has none, all sources in equal shares."""
        return stage.mixture or dict.fromkeys(self.data.sources, 1.0)


class TokenizerTraining(nn.Module):
    """The tokenizer and all that is only needed to train it."""

    def __init__(self, config: ImageTokenizerConfig, loss: Loss) -> None:
        super().__init__()
        self.tokenizer = ImageTokenizer(config)
        gan, features = loss.adversarial, loss.perceptual
        self.discriminator: nn.Module | None = None
        if gan.weight:
            self.discriminator = losses.PatchDiscriminator(gan.channels, gan.levels, gan.full)
        self.perceptual: nn.Module | None = None
        if features.network and features.weight:
            self.perceptual = losses.make_perceptual(features.network, features.layers, features.pretrained)
        self.recent = RecentCodes(config.codebook_size)

    def forward(self, pixels: Tensor, blend: float = 1.0) -> Reconstruction:
        """Reconstruct pixels [B, 3, H, W]; `blend` is explained at `ImageTokenizer.forward`."""
        output: Reconstruction = self.tokenizer(pixels, blend)
        return output


class TokenizerTask:
    """Task of the trainer (see `unimm.training.task.Task`) that trains an `ImageTokenizer`."""

    def __init__(self, recipe: TokenizerRecipe, config: ImageTokenizerConfig) -> None:
        self.recipe = recipe
        self.config = config
        self.lockstep = recipe.zero_stage > 0  # see `unimm.training.task.Task.loss`
        self.files: dict[str, ImageFiles] = {}
        self.states: dict[str, str] = {}  # what each source is
        self.trained: dict[str, Sequence[int]] = {}  # which images of each source are trained on
        self.held: dict[str, Sequence[int]] = {}  # and which are held out
        self.measured: HeldOutImages | None = None

    def build(self) -> TokenizerTraining:
        """Return tokenizer, discriminator and perceptual network in one module."""
        return TokenizerTraining(self.config, self.recipe.loss)

    def groups(self, module: nn.Module) -> dict[str, list[nn.Parameter]]:
        """Parameters of the tokenizer and, if there is one, of its discriminator."""
        assert isinstance(module, TokenizerTraining)
        groups = {"tokenizer": list(module.tokenizer.parameters())}
        if module.discriminator is not None:
            groups["discriminator"] = list(module.discriminator.parameters())
        return groups

    def dataset(self, stage: Stage, seed: int) -> SampleSource:
        """Training images of a stage.

        Raises:
            UserError: a source has no images, or cannot be read.
        """
        data, size = self.recipe.data, self.config.image_size
        mixture = self.recipe.mixture(stage)
        options = validate(TokenizerOptions, stage.options, f"stage {stage.name}: options")
        share = data.augmented if options.augmented is None else options.augmented
        kinds = {name: part for name, part in mixture.items() if name in IMAGE_KINDS}
        own = [name for name, part in mixture.items() if name in data.sources and part]
        if not own:
            return TokenizerImages(seed, size, kinds, share, self.config.stride)
        bad = BadItems(Path(self.recipe.output) / "bad-items.jsonl", data.max_bad_items, self.recipe.source)
        files = {name: self._images(name, data.sources[name], "data.sources") for name in own}
        self._hold_out(stage, bad)
        sources: dict[str, Any] = {
            name: RandomCrops(
                files[name], size, data.sources[name].shorter, data.sources[name].flip,
                (seed, zlib.crc32(name.encode())), partial(bad.add, name), self.trained[name],
            )
            for name in own
        }  # fmt: skip
        weights = {name: mixture[name] for name in own}
        if any(kinds.values()):
            sources["scenes"] = TokenizerImages(seed, size, kinds, share, self.config.stride)
            weights["scenes"] = sum(kinds.values())
        source: SampleSource = mix(sources, weights, seed, shuffle=False)
        return source

    def _images(self, name: str, section: ImageSection, key: str) -> ImageFiles:
        """The files of a source, found once and divided."""
        if name in self.files:
            return self.files[name]
        where = f"{key}.{name.removeprefix(VALIDATION)}.path"
        try:
            files = self.files[name] = ImageFiles(section.path, section.allow_outside)
        except UserError as error:
            raise self.recipe.error(where, str(error)) from None
        self.states[name] = data_state(files, len(files))
        if name.startswith(VALIDATION):
            self.held[name] = range(len(files))
            return files
        self.trained[name] = range(len(files))
        if self.recipe.validation is not None and self.recipe.validation.share:
            try:
                self.trained[name], self.held[name] = divided(files, self.recipe.validation.share)
            except UserError as error:
                raise self.recipe.error("data.validation.share", str(error)) from None
        return files

    def _hold_out(self, stage: Stage, bad: BadItems) -> None:
        """Choose the images that the stage is measured on."""
        validation = self.recipe.validation
        if validation is None:
            return
        for name, section in validation.sources.items():
            self._images(VALIDATION + name, section, "data.validation.sources")
        self.measured = HeldOutImages(
            self.files, self.held, validation.items, self.config.image_size, stage.micro, bad.add
        )

    def held_out(self) -> Sequence[dict[str, Tensor]]:
        """Micro-batches of the stage's held-out images."""
        return () if self.measured is None else self.measured

    def held_out_sums(self, module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums and counts of the reconstruction loss and the PSNR, of reconstructions from codes."""
        assert isinstance(module, TokenizerTraining)
        target, quantizer = batch["pixels"], module.tokenizer.quantize
        with nullcontext() if begun(quantizer) else as_it_was(quantizer):
            pixels = module(target).pixels.float()
        sums = {
            "reconstruction": self._reconstruction(module, pixels, target),
            "psnr": psnr(pixels, target).sum(),
        }
        count = torch.tensor(float(len(target)), device=target.device).double()
        return {name: torch.stack([total.double(), count]) for name, total in sums.items()}

    def held_out_loss(self, means: Mapping[str, float]) -> float:
        """The reconstruction loss; commitment and discriminator are for training alone."""
        return means["reconstruction"]

    def data_state(self) -> dict[str, str]:
        """What the sources are."""
        return self.states

    def epochs(self, stage: Stage, samples: int) -> dict[str, float]:
        """Passes through each source of one's own."""
        mixture = self.recipe.mixture(stage)
        total = sum(mixture.values())
        return {
            name: samples * mixture[name] / total / len(indices)
            for name, indices in self.trained.items()
            if mixture.get(name)
        }

    def _reconstruction(self, module: TokenizerTraining, pixels: Tensor, target: Tensor) -> Tensor:
        """The weighted sum of the reconstruction losses over images."""
        settings = self.recipe.loss
        total = losses.pixel_loss(pixels, target, settings.l1, settings.l2)
        if settings.edges:
            total = total + settings.edges * losses.edge_loss(pixels, target)
        if module.perceptual is not None:
            total = total + settings.perceptual.weight * module.perceptual(pixels, target)
        return total

    def length(self, sample: Mapping[str, Any]) -> int:
        """One for all: micro-batches keep the order of the data."""
        return 1

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack images into pixels float [B, 3, H, W]."""
        return {"pixels": to_tensor(np.stack([sample["pixels"] for sample in samples]))}

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, int | float]:
        """Every loss here is a mean over images."""
        return {"images": len(batch["pixels"])}

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Weighted sum of the losses; the discriminator's own loss rides along, on detached images."""
        assert isinstance(module, TokenizerTraining)
        settings = self.recipe.loss
        target, images = batch["pixels"], totals["images"]
        output = module(target, self.recipe.quantization.blend_at(step))
        pixels = output.pixels.float()
        reconstruction = self._reconstruction(module, pixels, target) / images
        # the quantiser gives the mean over the micro-batch
        commitment = settings.commitment * output.commitment * (len(target) / images)
        total = reconstruction + commitment
        metrics: dict[str, float | Tensor] = {
            "reconstruction": reconstruction.detach(),
            "commitment": commitment.detach(),
            "psnr": psnr(pixels.detach(), target).sum() / images,
        }
        # a mean over micro-batches and processes, each of which counts the same codes
        used, perplexity = module.recent.add(output.codes)
        metrics |= {
            "codebook_use": used * (len(target) / images),
            "perplexity": perplexity * (len(target) / images),
        }
        if module.discriminator is None:
            return total, metrics
        metrics |= {"generator": 0.0, "discriminator": 0.0}  # the log keeps its columns
        if step >= settings.adversarial.start or self.lockstep:
            generator = losses.generator_loss(module.discriminator, pixels) / images
            discriminator = losses.discriminator_loss(module.discriminator, pixels, target) / images
            weight: float | Tensor = settings.adversarial.weight_at(step)
            if settings.adversarial.adaptive:
                last = module.tokenizer.last_layer
                weight = weight * losses.adaptive_weight(reconstruction, generator, last)
            learns = float(step >= settings.adversarial.start)
            total = total + weight * generator + learns * discriminator
            metrics |= {"generator": generator.detach(), "discriminator": discriminator.detach()}
        return total, metrics

    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Write originals over reconstructions of held-out images, and how good they are.

        Where a recipe holds none of its own out, those are images that are trained on, and are called so.
        """
        assert isinstance(module, TokenizerTraining)
        device = next(module.parameters()).device
        line: dict[str, float] = {"step": step}
        kind, shown = self._shown()
        for name, pixels in shown.items():
            codes = module.tokenizer.encode(pixels.to(device))
            output = module.tokenizer.decode(codes).cpu()
            save_image(comparison(pixels, output), folder / f"{kind}{name}-{step:07d}.png")
            line[name] = round(psnr(output, pixels).mean().item(), 2)
        file = "psnr-trained-on.jsonl" if kind == TRAINED_ON else "psnr.jsonl"
        append(folder / file, json.dumps(line) + "\n")

    def _shown(self) -> tuple[str, dict[str, Tensor]]:
        """Pixels [B, 3, H, W] that previews show, by source, and what the names of their sheets begin with."""
        size = self.config.image_size
        if self.measured is not None and self.measured.places:
            first = self.measured.first(PREVIEW)
            return HELD_OUT_OF, {name.removeprefix(VALIDATION): pixels for name, pixels in first.items()}
        if self.files:
            return TRAINED_ON, {
                name: first_images(files, PREVIEW, size) for name, files in self.files.items()
            }
        splits: tuple[Split, ...] = ("seen", "vendor")
        scenes = {split: EmojiScenes(split, seed=self.recipe.seed, size=size) for split in splits}
        return "", {
            split: to_tensor(np.stack([held_out[i].render() for i in range(PREVIEW)]))
            for split, held_out in scenes.items()
        }

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write the tokenizer alone, as `ImageTokenizer.from_pretrained` reads it."""
        assert isinstance(module, TokenizerTraining)
        module.tokenizer.save_pretrained(folder)
