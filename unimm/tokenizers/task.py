"""The training task of an image tokenizer: recipe, module, losses, previews and export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from unimm.data.emojiscenes import EmojiScenes, Split
from unimm.images import save_image, to_tensor
from unimm.tokenizers import losses
from unimm.tokenizers.data import KINDS, TokenizerPictures
from unimm.tokenizers.metrics import comparison, psnr
from unimm.tokenizers.model import ImageTokenizer, ImageTokenizerConfig, Reconstruction
from unimm.training.recipe import BaseRecipe, NotNegative, Positive, Rate, Section, Stage, near, validate

if TYPE_CHECKING:
    from unimm.training.task import Source

Share = Annotated[float, Field(ge=0, le=1)]
PREVIEW = 24  # scenes in a preview
HELD_OUT: tuple[Split, ...] = ("seen", "composed", "vendor")


class Model(Section):
    """Sizes of the tokenizer; each key is explained at `ImageTokenizerConfig`."""

    image_size: Positive = 64
    patch_size: Positive = 1
    block_out_channels: Annotated[list[Positive], Field(min_length=1)]
    layers_per_block: Positive = 1
    attention_levels: list[NotNegative] = Field(default_factory=list)
    mid_attention: bool = False
    norm_num_groups: Positive = 8
    latent_channels: Positive = 64
    linear_shortcut: bool = False
    latent_norm: bool = False
    codebook_size: Positive = 512
    codebook_dim: Positive = 8
    commitment_weight: Rate = 0.25
    codebook_decay: Share = 0.99
    dead_code_threshold: Rate = 0.5
    kmeans_init: bool = True
    rotation_trick: bool = False


class Data(Section):
    """Pictures trained on; `Stage.mixture` says how much of each kind (scenes alone if it is empty)."""

    augmented: Share = 0.5
    """Share of pictures that are mirrored, turned or recoloured at random."""


class Options(Section):
    """What a stage's `options` may hold."""

    augmented: Share | None = None
    """Share of augmented pictures in this stage; null: that of `data`."""


class Perceptual(Section):
    """Features of a frozen timm network: a name, or `local-dir:FOLDER`."""

    network: str | None = None
    weight: Rate = 1.0
    layers: Positive = 4


class Adversarial(Section):
    """PatchGAN with hinge loss, in effect from step `start`, its weight growing over `warmup` steps."""

    weight: Rate = 0.0
    start: NotNegative = 0
    warmup: NotNegative = 0
    adaptive: bool = False
    """Scale by the ratio of the gradients at the last layer, as VQGAN does; LlamaGen keeps it fixed."""
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = 32
    levels: Positive = 3

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
    """Weights of the losses; all are means over pictures."""

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


class TokenizerRecipe(BaseRecipe):
    """Recipe of `unimm tokenizer train`; the groups of `lr` are `tokenizer` and `discriminator`."""

    task: Literal["tokenizer"]
    model: Model
    data: Data = Data()
    quantization: Quantization = Quantization()
    loss: Loss = Loss()
    evaluation: Evaluation = Evaluation()

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """As many levels, of a few channels."""
        levels = len(data["model"].get("block_out_channels", [0]))
        data["model"] |= {"block_out_channels": [8] * levels, "norm_num_groups": 2, "latent_channels": 8}
        data["model"] |= {"codebook_size": 16, "codebook_dim": 4}

    def build_task(self) -> TokenizerTask:
        """Return the task, having checked what only the whole recipe can tell."""
        for number, stage in enumerate(self.stages):
            validate(Options, stage.options, f"{self.source}: stages[{number}].options")
            for kind in stage.mixture:
                if kind not in KINDS:
                    key = f"stages[{number}].mixture.{kind}"
                    raise self.error(key, f"unknown kind; one of {', '.join(KINDS)}{near(kind, KINDS)}")
        config = ImageTokenizerConfig(**self.model.model_dump())
        if config.image_size % config.stride:
            raise self.error("model.image_size", f"expected a multiple of the stride {config.stride}")
        for number, channels in enumerate(config.block_out_channels):
            if channels % config.norm_num_groups:
                key = f"model.block_out_channels[{number}]"
                raise self.error(key, f"expected a multiple of norm_num_groups ({config.norm_num_groups})")
        return TokenizerTask(self, config)


class TokenizerTraining(nn.Module):
    """The tokenizer and all that is only needed to train it."""

    def __init__(self, config: ImageTokenizerConfig, loss: Loss) -> None:
        super().__init__()
        self.tokenizer = ImageTokenizer(config)
        gan, features = loss.adversarial, loss.perceptual
        self.discriminator = losses.PatchDiscriminator(gan.channels, gan.levels) if gan.weight else None
        self.perceptual: losses.PerceptualLoss | None = None
        if features.network and features.weight:
            self.perceptual = losses.PerceptualLoss(features.network, features.layers)

    def forward(self, pixels: Tensor, blend: float = 1.0) -> Reconstruction:
        """Reconstruct pixels [B, 3, H, W]; `blend` is explained at `ImageTokenizer.forward`."""
        output: Reconstruction = self.tokenizer(pixels, blend)
        return output


class TokenizerTask:
    """Task of the trainer (see `unimm.training.task.Task`) that trains an `ImageTokenizer`."""

    def __init__(self, recipe: TokenizerRecipe, config: ImageTokenizerConfig) -> None:
        self.recipe = recipe
        self.config = config

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

    def dataset(self, stage: Stage, seed: int) -> Source:
        """Training pictures of a stage."""
        mixture = stage.mixture or {"scenes": 1.0}
        options = validate(Options, stage.options, f"stage {stage.name}: options")
        share = self.recipe.data.augmented if options.augmented is None else options.augmented
        return TokenizerPictures(seed, self.config.image_size, mixture, share, self.config.stride)

    def length(self, sample: Mapping[str, Any]) -> int:
        """One for all: micro-batches keep the order of the data."""
        return 1

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack pictures into pixels float [B, 3, H, W]."""
        return {"pixels": to_tensor(np.stack([sample["pixels"] for sample in samples]))}

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, int | float]:
        """Every loss here is a mean over pictures."""
        return {"images": len(batch["pixels"])}

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Weighted sum of the losses; the discriminator's own loss rides along, on detached pictures."""
        assert isinstance(module, TokenizerTraining)
        settings = self.recipe.loss
        target, images = batch["pixels"], totals["images"]
        output = module(target, self.recipe.quantization.blend_at(step))
        pixels = output.pixels.float()
        reconstruction = losses.pixel_loss(pixels, target, settings.l1, settings.l2) / images
        if settings.edges:
            reconstruction = reconstruction + settings.edges * losses.edge_loss(pixels, target) / images
        if module.perceptual is not None:
            distance = module.perceptual(pixels, target) / images
            reconstruction = reconstruction + settings.perceptual.weight * distance
        # the quantiser gives the mean over the micro-batch
        commitment = settings.commitment * output.commitment * (len(target) / images)
        total = reconstruction + commitment
        metrics: dict[str, float | Tensor] = {
            "reconstruction": reconstruction.detach(),
            "commitment": commitment.detach(),
            "psnr": psnr(pixels.detach(), target).sum() / images,
        }
        if module.discriminator is None:
            return total, metrics
        metrics |= {"generator": 0.0, "discriminator": 0.0}  # the log keeps its columns
        if step >= settings.adversarial.start:
            generator = losses.generator_loss(module.discriminator, pixels) / images
            discriminator = losses.discriminator_loss(module.discriminator, pixels, target) / images
            weight: float | Tensor = settings.adversarial.weight_at(step)
            if settings.adversarial.adaptive:
                last = module.tokenizer.last_layer
                weight = weight * losses.adaptive_weight(reconstruction, generator, last)
            total = total + weight * generator + discriminator
            metrics |= {"generator": generator.detach(), "discriminator": discriminator.detach()}
        return total, metrics

    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Write originals over reconstructions of held-out scenes, and how good they are."""
        assert isinstance(module, TokenizerTraining)
        device = next(module.parameters()).device
        lines = []
        for split in ("seen", "vendor"):
            scenes = EmojiScenes(split, seed=self.recipe.seed, size=self.config.image_size)
            pixels = to_tensor(np.stack([scenes[i].render() for i in range(PREVIEW)])).to(device)
            codes = module.tokenizer.encode(pixels)
            output = module.tokenizer.decode(codes)
            save_image(comparison(pixels, output), folder / f"{split}-{step:07d}.png")
            lines.append(f'"{split}": {psnr(output, pixels).mean().item():.2f}')
        with (folder / "psnr.jsonl").open("a", encoding="utf-8") as log:
            log.write(f'{{"step": {step}, {", ".join(lines)}}}\n')

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write the tokenizer alone, as `ImageTokenizer.from_pretrained` reads it."""
        assert isinstance(module, TokenizerTraining)
        module.tokenizer.save_pretrained(folder)
