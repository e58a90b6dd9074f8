"""Task `siglip`: train an understanding encoder from nothing on images and captions (Zhai et al. 2023).

Image and text towers are compared with the sigmoid loss: every pair of an image and a text is one yes/no
decision, "is this text true of this image?". Truth is decided by what scene and text *say*, not by which
text came with which image, so two scenes that read the same are not each other's negatives. Beside the
captions the batch is scored against the bare name of every concept and background, texts like any other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from safetensors.torch import save_file
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipTextConfig, SiglipTextModel

from unimm.data.emojiscenes.augment import Augmentation, augment, draw_numbers
from unimm.data.emojiscenes.concepts import NOUNS, with_article
from unimm.data.emojiscenes.scenes import BACKGROUNDS, CONCEPTS, SCENE_KINDS, EmojiScenes, Scene, Split
from unimm.data.text_tokenizer import train_text_tokenizer
from unimm.files import append, atomic_write
from unimm.images import save_image, to_tensor
from unimm.models.vision import create_encoder
from unimm.processing.tokenizer_files import without_bounds
from unimm.sections import Fraction, Positive, Section, validate
from unimm.sheet import Card, Line, SheetSection, draw_sheet
from unimm.training.recipe import BaseRecipe, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unimm.data.samples import Sample
    from unimm.training.task import Batch, Metrics

WATCHED: tuple[Split, ...] = ("seen", "vendor")  # splits of the preview
SHOWN_IMAGES = 16  # images a split on the preview sheet
Fact = tuple[str, ...]


class Vision(Section):
    """A timm SigLIP ViT; `name` gives the architecture, the rest its size."""

    name: str = "vit_base_patch16_siglip_224"
    image_size: Positive = 64
    patch_size: Positive = 8
    embed_dim: Positive = 192
    depth: Positive = 6
    num_heads: Positive = 3
    stem: Literal["patch", "conv"] = "patch"
    """How patches are embedded: by SigLIP's one wide convolution, or by several small ones."""

    def kwargs(self) -> dict[str, Any]:
        """What `unimm.models.vision.create_encoder` takes besides the name."""
        sizes = self.model_dump(exclude={"name", "image_size"})
        return {"img_size": self.image_size, **sizes}

    def config(self) -> dict[str, Any]:
        """Fields of `unimm.models.configuration.VisionConfig`."""
        return {
            "name": self.name,
            "image_size": self.image_size,
            "tokens": (self.image_size // self.patch_size) ** 2,
            "width": self.embed_dim,
            "kwargs": self.kwargs(),
        }


class TextTowerSection(Section):
    """The text tower, a small transformers `SiglipTextModel` over our BPE; thrown away after training."""

    vocab_size: Positive = 1024
    hidden_size: Positive = 128
    depth: Positive = 2
    num_heads: Positive = 2
    length: Positive = 24
    """Tokens a text is padded or cut to."""
    corpus: Positive = 4000
    """Scenes whose captions and questions the tokenizer learns from."""


class SiglipModelSection(Section):
    """Both towers, and where the learnt temperature and bias start.

    The bias starts near the log-odds of a pair being true. At the paper's -10, meant for large batches, all
    images and texts are first pulled together, and small batches do not pull them apart again.
    """

    vision: Vision = Vision()
    text: TextTowerSection = TextTowerSection()
    temperature: Annotated[float, Field(gt=0)] = 16.0
    bias: float = -5.0


class SiglipData(Section):
    """How training scenes are varied, and how many scenes to watch retrieval on."""

    augmentation: Augmentation = Augmentation()
    watch: Positive = 256
    """Held-out single-object scenes a split for the preview."""


class SiglipOptions(Section):
    """What a stage may set under `options`."""

    patch_drop: Fraction = 0.0
    """Share of patches left out of every training image (FLIP, Li et al. 2022): cheaper steps."""
    augment: bool = True
    texts: Literal["objects", "all"] = "all"
    """What images are scored against: the names of concepts alone, or those of backgrounds and the captions too.

    From nothing, start with the objects: backgrounds are distinguished at once and then fill the features, and the
    first object takes tens of thousands of images instead of a few hundred.
    """


class SiglipRecipe(BaseRecipe):
    """Recipe of the task `siglip`: groups are vision, text and scale, a mixture is of kinds of scene."""

    task: Literal["siglip"]
    model: SiglipModelSection = SiglipModelSection()
    data: SiglipData = SiglipData()

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """Two narrow towers of a block each."""
        model = data.setdefault("model", {})
        model["vision"] = {**model.get("vision", {}), "embed_dim": 32, "depth": 1, "num_heads": 2}
        model["text"] = {**model.get("text", {}), "hidden_size": 16, "depth": 1, "num_heads": 2, "corpus": 50}

    def build_task(self) -> SiglipTask:
        """The task that this recipe describes."""
        for index, stage in enumerate(self.stages):
            for kind in stage.mixture:
                if kind not in SCENE_KINDS:
                    raise self.error(
                        f"stages[{index}].mixture.{kind}", f"expected one of {', '.join(SCENE_KINDS)}"
                    )
        return SiglipTask(self)


def sigmoid_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """The sum over all pairs of -log sigmoid(±logit).

    Args:
        logits: [B, N], scaled similarity plus bias of image b and text n.
        truth: bool [B, N], whether text n is true of image b.

    Returns:
        A scalar; divide it by the number of images.

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", equation 1 (with more than one
    positive text an image).
    """
    return F.softplus(torch.where(truth, -logits, logits)).sum()


def content(scene: Scene) -> Fact:
    """What a scene shows, the background apart, the same for all scenes that read the same.

    Sameness is of meaning: "A right of B" is "B left of A".
    """
    concepts = [placed.concept for placed in scene.objects]
    if scene.relation is None:
        return (str(len(concepts)), concepts[0])
    if scene.relation in ("right of", "below"):
        return ("left of" if scene.relation == "right of" else "above", concepts[1], concepts[0])
    return (scene.relation, *concepts)


def truth_table(shown: list[tuple[Fact, str]], said: list[tuple[Fact, str]]) -> Tensor:
    """Which texts are true of which images.

    Args:
        shown: content and background of each of B images.
        said: content and background of each of N captions.

    Returns:
        bool [B, concepts + backgrounds + N]: the bare names of all concepts, of all backgrounds, the captions.
    """
    concepts = torch.tensor([[concept in fact[1:] for concept in CONCEPTS] for fact, _ in shown])
    backgrounds = torch.tensor([[name == background for name in BACKGROUNDS] for _, background in shown])
    codes = {fact: code for code, fact in enumerate({*shown, *said})}
    images = torch.tensor([codes[fact] for fact in shown])
    captions = torch.tensor([codes[fact] for fact in said])
    return torch.cat([concepts, backgrounds, images[:, None] == captions[None]], dim=1)


class ContrastiveModel(nn.Module):
    """Image tower (timm), text tower (transformers), temperature and bias."""

    def __init__(self, section: SiglipModelSection, pad_token_id: int, vocab_size: int) -> None:
        super().__init__()
        vision, text = section.vision, section.text
        self.vision = create_encoder(vision.name, **vision.kwargs())
        self.vision.patch_drop = PatchDropout(0.0, num_prefix_tokens=0)
        widen(self.vision)
        config = SiglipTextConfig(
            vocab_size=vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=2 * text.hidden_size,
            num_hidden_layers=text.depth,
            num_attention_heads=text.num_heads,
            max_position_embeddings=text.length,
            projection_size=vision.embed_dim,
            pad_token_id=pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.text = SiglipTextModel(config)
        self.pad_token_id = pad_token_id
        # One element, not none: DeepSpeed cannot broadcast parameters without dimensions.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(section.temperature)]))
        self.bias = nn.Parameter(torch.tensor([section.bias]))

    def drop_patches(self, share: float) -> None:
        """Leave out this share of the patches of every image while training; in eval mode all are kept."""
        assert isinstance(self.vision.patch_drop, PatchDropout)
        self.vision.patch_drop.prob = share

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit features [B, D] of images [B, 3, H, W] in [-1, 1]."""
        features: Tensor = F.normalize(self.vision(pixels).float(), dim=-1)
        return features

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """Unit features [N, D] of padded texts [N, L]."""
        pooled = self.text(input_ids=input_ids, attention_mask=input_ids != self.pad_token_id).pooler_output
        features: Tensor = F.normalize(pooled.float(), dim=-1)
        return features

    def forward(self, pixels: Tensor, input_ids: Tensor) -> Tensor:
        """Logits [B, N] of "this text is true of this image"."""
        similarity = self.encode_images(pixels) @ self.encode_texts(input_ids).T
        return similarity * self.log_temperature.exp() + self.bias


def widen(vision: nn.Module) -> None:
    """Draw the matrices of a small ViT anew, by their own width (Glorot and Bengio 2010).

    timm's standard deviation of 0.02 suits widths of 768; at 192 the blocks add next to nothing at first, and
    the tower takes several times as many images to distinguish its first objects.
    """
    for name, parameter in vision.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)


class SceneSource:
    """Endless training samples: a scene of the mixture, one of its captions, numbers for its augmentation."""

    def __init__(self, mixture: Mapping[str, float], image_size: int, seed: int) -> None:
        shares = mixture or SCENE_KINDS
        self.kinds = [kind for kind in SCENE_KINDS if shares.get(kind, 0) > 0]
        weights = np.array([shares[kind] for kind in self.kinds])
        self.weights = weights / weights.sum()
        self.seed = seed
        self.scenes = [
            EmojiScenes("train", seed, image_size, length=2**40, kinds=(kind,)) for kind in self.kinds
        ]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, which depends on that and the seed alone."""
        rng = np.random.default_rng([self.seed, index, 2])
        scene = self.scenes[rng.choice(len(self.kinds), p=self.weights)][index]
        captions = scene.captions()
        return {
            "pixels": scene.render(),
            "caption": captions[rng.integers(len(captions))],
            "content": content(scene),
            "background": scene.background,
            "mirrored": scene.mirrorable,
            "draws": draw_numbers(rng),
        }


class SiglipTask:
    """Trains and exports a SigLIP encoder; see the module's docstring and `unimm.training.task.Task`."""

    def __init__(self, recipe: SiglipRecipe) -> None:
        self.recipe = recipe
        text = recipe.model.text
        self.tokenizer: PreTrainedTokenizerBase = train_text_tokenizer(_corpus(text.corpus), text.vocab_size)
        self.options = SiglipOptions()
        backgrounds = [f"{with_article(name)} background" for name in BACKGROUNDS]
        self.name_ids = self.tokenize([*CONCEPTS, *backgrounds])

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids [N, length], padded on the left: the tower reads its feature from the last position.

        A pad there, as in the paper, makes all texts start out nearly the same (cosine 0.99), and a small
        tower on small batches stays there.
        """
        length = self.recipe.model.text.length
        encoded = self.tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            padding_side="left",
            return_tensors="pt",
        )
        ids: Tensor = encoded["input_ids"]
        return ids

    def build(self) -> nn.Module:
        """Both towers, from nothing."""
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return ContrastiveModel(self.recipe.model, pad, len(self.tokenizer))

    def groups(self, module: nn.Module) -> dict[str, list[nn.Parameter]]:
        """`vision`, `text`, and `scale`, which is temperature and bias."""
        assert isinstance(module, ContrastiveModel)
        return {
            "vision": list(module.vision.parameters()),
            "text": list(module.text.parameters()),
            "scale": [module.log_temperature, module.bias],
        }

    def dataset(self, stage: Stage, seed: int) -> SceneSource:
        """The stage's scenes; its options are remembered for `collate` and `loss`."""
        self.options = validate(
            SiglipOptions, stage.options, f"{self.recipe.source}: stages.{stage.name}.options"
        )
        return SceneSource(stage.mixture, self.recipe.model.vision.image_size, seed)

    def length(self, sample: Sample) -> int:
        """One for all: micro-batches keep the order of the data."""
        return 1

    def collate(self, samples: list[Sample]) -> Batch:
        """Pixels [B, 3, H, W], texts [N, L] and which of them are true [B, N]."""
        pixels = to_tensor(np.stack([sample["pixels"] for sample in samples]))
        if self.options.augment:
            colours = np.array([BACKGROUNDS[sample["background"]] for sample in samples], np.float32)
            pixels = augment(
                pixels,
                torch.from_numpy(colours / 127.5 - 1),
                torch.tensor([sample["mirrored"] for sample in samples]),
                torch.from_numpy(np.stack([sample["draws"] for sample in samples])),
                self.recipe.data.augmentation,
            )
        facts = [(sample["content"], sample["background"]) for sample in samples]
        ids = torch.cat([self.name_ids, self.tokenize([sample["caption"] for sample in samples])])
        truth = truth_table(facts, facts)
        texts = len(CONCEPTS) if self.options.texts == "objects" else len(ids)
        return {"pixels": pixels, "input_ids": ids[:texts], "truth": truth[:, :texts]}

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """The loss is a mean over images."""
        return {"images": len(batch["pixels"])}

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Sigmoid loss, with the texts of this micro-batch (and no other) as negatives."""
        assert isinstance(module, ContrastiveModel)
        module.drop_patches(self.options.patch_drop)
        logits = module(batch["pixels"], batch["input_ids"])
        images = totals["images"]
        best = logits.detach()[:, : len(CONCEPTS)].argmax(1, keepdim=True)
        metrics = {"named": batch["truth"].gather(1, best).sum() / images}
        return sigmoid_loss(logits, batch["truth"]) / images, metrics

    @torch.no_grad()
    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Name held-out single objects by retrieval among all concepts; writes a sheet and a JSON line."""
        assert isinstance(module, ContrastiveModel)
        report: dict[str, Any] = {"step": step}
        sections = []
        for split in WATCHED:
            scenes = EmojiScenes(
                split, 1, self.recipe.model.vision.image_size, self.recipe.data.watch, ("single",)
            )
            shown = [scenes[index] for index in range(len(scenes))]
            images = np.stack([scene.render() for scene in shown])
            objects, backgrounds = retrieve(module, self.name_ids, images)
            right = [scene.concept == guess for scene, guess in zip(shown, objects, strict=True)]
            behind = [scene.background == guess for scene, guess in zip(shown, backgrounds, strict=True)]
            report |= {
                f"{split}_object": float(np.mean(right)),
                f"{split}_background": float(np.mean(behind)),
            }
            cards = [
                Card([Image.fromarray(image)], [Line(guess, "good" if good else "bad")])
                for image, guess, good in zip(images[:SHOWN_IMAGES], objects, right, strict=False)
            ]
            sections.append(SheetSection(split, cards, f"{np.mean(right):.1%} of {len(right)} objects named"))
        append(folder / "retrieval.jsonl", json.dumps(report) + "\n")
        title = "Retrieval among the names of all concepts"
        save_image(draw_sheet(title, f"step {step}", sections, columns=8), folder / f"step-{step:06d}.png")

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write `vision.safetensors` (timm's keys), `vision.json` and the text tokenizer's files."""
        assert isinstance(module, ContrastiveModel)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in module.vision.state_dict().items()
        }
        with atomic_write(folder / "vision.safetensors") as path:
            save_file(weights, path, metadata={"format": "pt"})
        with atomic_write(folder / "vision.json") as path:
            path.write_text(json.dumps(self.recipe.model.vision.config(), indent=2) + "\n")
        without_bounds(self.tokenizer).save_pretrained(folder)


@torch.no_grad()
def retrieve(
    model: ContrastiveModel, name_ids: Tensor, images: NDArray[np.uint8]
) -> tuple[list[str], list[str]]:
    """The best concept name and the best background name for each image.

    Args:
        model: the two towers, in eval mode.
        name_ids: token ids [concepts + backgrounds, L].
        images: uint8 [N, H, W, 3].

    Returns:
        N names of concepts and N names of backgrounds.
    """
    device = model.bias.device
    names = model.encode_texts(name_ids.to(device))
    encoded = [model.encode_images(chunk.to(device)) for chunk in torch.split(to_tensor(images), 64)]
    similarity = torch.cat(encoded) @ names.T
    concepts, backgrounds = similarity[:, : len(CONCEPTS)].argmax(1), similarity[:, len(CONCEPTS) :].argmax(1)
    colours = list(BACKGROUNDS)
    return [CONCEPTS[i] for i in concepts.tolist()], [colours[i] for i in backgrounds.tolist()]


def _corpus(scenes: int) -> list[str]:
    """Captions and questions of training scenes, and every word of the vocabulary once over."""
    source = EmojiScenes("train", length=scenes)
    texts = [text for noun in NOUNS.values() for text in (noun.label, noun.plural)]
    for index in range(scenes):
        scene = source[index]
        texts += scene.captions()
        texts += [part for question in scene.questions() for part in (question.question, question.answer)]
    return texts
