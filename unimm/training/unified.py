"""Task `unified`: train the unified model in stages, on understanding, text and generation in every step.

Understanding samples show a picture once and ask many things about it: every question is a branch that sees the
picture and itself, but no other branch (positions restart, attention does not cross), so no answer can be read
off another. Generation samples are a caption followed by the image codes, which are computed once and stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.attention import FLEX
from unimm.data.emojiscenes import BACKGROUNDS, EmojiScenes, Kind
from unimm.data.emojiscenes import KINDS as KIND_SHARES
from unimm.data.encode import encoder_mark
from unimm.errors import UserError
from unimm.images import to_tensor
from unimm.modeling import IGNORED, UniMMModel
from unimm.processing import CAPTION_REQUESTS
from unimm.sampling.choose import streams
from unimm.sampling.images import sample_codes
from unimm.sections import Fraction, NotNegative, Positive, Rate, Section, validate
from unimm.sheet import Card, Line, draw_sheet
from unimm.sheet import Section as SheetSection
from unimm.training.augment import Augmentation, augment, draw_numbers
from unimm.training.batches import mix
from unimm.training.branches import Branches, stack_rows
from unimm.training.engine import pick_device
from unimm.training.flops import Counts, Operations
from unimm.training.logging import OPERATIONS
from unimm.training.lora import LoraSection, add_adapters, save_model
from unimm.training.parts import Assembly, ModelSection, model_groups, tiny_model
from unimm.training.recipe import BaseRecipe, Stage
from unimm.training.records import Records, SourceSection
from unimm.training.scenes import SceneCodes, caption_scenes

if TYPE_CHECKING:
    from unimm.training.task import Batch, Metrics, Sample

KINDS = ("understanding", "text", "generation")
PREVIEW_PROMPTS = 16


class DataSection(Section):
    """Sources of one's own, the scenes to learn drawing from, and how pictures to understand are varied."""

    sources: dict[str, SourceSection] = Field(default_factory=dict)
    """Name -> data; the name may stand in a stage's mixture beside the kinds of scenes."""
    max_bad_items: NotNegative = 100
    """Most items of sources that may be unusable before the run stops."""
    scenes: Positive = 24_000
    """Training scenes whose codes are computed."""
    lattice: Positive = 8
    """Pixels that their objects' places are multiples of; best the tokenizer's stride."""
    kinds: dict[Kind, Rate] = Field(default_factory=lambda: dict(KIND_SHARES))
    """Shares of the kinds of scene among them."""
    codes: str | None = None
    """Where the codes are kept; null: in the run's folder."""
    size: Positive | None = None
    """Pixels a side of pictures to draw, where a model draws any size, as Emu3 does; null: the model's own."""
    keep_ratio: bool = False
    """Whether those of sources keep their ratio, in an area of that side squared."""
    augmentation: Augmentation = Augmentation()


class LossSection(Section):
    """Weights of the mean losses over text and over code positions."""

    text: Rate = 1.0
    code: Rate = 1.0


class UnifiedOptions(Section):
    """What a stage may set under `options`."""

    prompt_dropout: Fraction = 0.1
    """Share of generation samples whose prompt is blanked, for guidance."""
    augment: bool = False
    """Whether pictures to understand are varied in colour and place."""
    kinds: dict[Kind, Rate] = Field(default_factory=lambda: dict(KIND_SHARES))
    """Shares of the kinds of scene among pictures to understand."""
    placings: bool = False
    """Whether all is asked about where two objects stand, not one question of each kind only."""


class UnifiedRecipe(BaseRecipe):
    """Recipe of the task `unified`; groups are the model's parts, the mixture is over `KINDS`."""

    task: Literal["unified"]
    model: ModelSection
    lora: LoraSection | None = None
    """Adapters, trained as the group `lora`; the export is merged, the adapters alone are beside it."""
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    prompts: Annotated[tuple[str, ...], Field(max_length=PREVIEW_PROMPTS, strict=False)] = ()
    """Drawn at every preview; by default captions of held-out scenes."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the exported weights; 16 bits halve the file."""

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """Tiny parts with random weights, on a few built-in scenes, which sources of one's own make way for."""
        data["model"] = tiny_model(data["model"])
        data["data"] = {"scenes": 8}
        for stage in data["stages"]:
            kinds = {name: share for name, share in stage.get("mixture", {}).items() if name in KINDS}
            stage["mixture"] = kinds if any(kinds.values()) else {"understanding": 1, "generation": 1}

    def build_task(self) -> UnifiedTask:
        """The task that this recipe describes."""
        for name in self.data.sources:
            if name in KINDS:
                raise self.error(f"data.sources.{name}", "this is a kind of scenes; give it another name")
        known = (*KINDS, *self.data.sources)
        for index, stage in enumerate(self.stages):
            for kind in stage.mixture:
                if kind not in known:
                    raise self.error(f"stages[{index}].mixture.{kind}", f"expected one of {', '.join(known)}")
        return UnifiedTask(self)


class Samples:
    """Random access to samples of one kind."""

    def __init__(
        self, task: UnifiedTask, kind: str, seed: int, scenes: EmojiScenes, options: UnifiedOptions
    ) -> None:
        self.make = {"understanding": task.understanding, "text": task.text, "generation": task.generation}[
            kind
        ]
        self.seed, self.scenes, self.options = seed, scenes, options
        self.salt = KINDS.index(kind)

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`, which depends on that and the seed alone."""
        rng = np.random.default_rng([self.seed, int(index), self.salt])
        return self.make(rng, int(rng.integers(len(self.scenes))), self.scenes, self.options)


class UnifiedTask:
    """Trains and exports a `UniMMModel`; see the module's docstring and `unimm.training.task.Task`."""

    def __init__(self, recipe: UnifiedRecipe) -> None:
        self.recipe = recipe
        self._assembly = Assembly(recipe)
        self.config, self.processor = self._assembly.config, self._assembly.processor
        self.image_tokenizer: Any = self._assembly.image_tokenizer
        try:
            self.canvas = self.processor.canvas(recipe.data.size, recipe.data.keep_ratio)
        except UserError as error:
            raise recipe.error("data", str(error)) from None
        self.codes: SceneCodes | None = None
        self.records: Records | None = None
        self.operations: Operations | None = None  # of the stage
        self.lockstep = recipe.zero_stage > 0  # see `Task.loss`

    def build(self) -> nn.Module:
        """The model, assembled as the recipe says, with adapters where it has some."""
        model = self._assembly.build()
        if self.recipe.lora is not None:
            add_adapters(model, self.recipe.lora)
        return model

    def prepare(self, module: nn.Module, stage: Stage) -> None:
        """Set attention, gradient checkpointing and compilation as the stage wants them."""
        assert isinstance(module, UniMMModel)
        self.operations = Operations(module, stage.lr)
        on_cuda = pick_device(self.recipe).type == "cuda"
        module.decoder.set_attn_implementation(FLEX if on_cuda and stage.pack is not None else "sdpa")
        set_gradient_checkpointing(module, stage.gradient_checkpointing)
        self._check_features(module, stage)
        decoder = module.decoder.get_decoder()
        decoder._compiled_call_impl = None
        if stage.compile:
            decoder.compile(dynamic=True)

    def _check_features(self, module: UniMMModel, stage: Stage) -> None:
        """Refuse features of an encoder that this stage trains, or of another than the model's as it now is."""
        used = stage.mixture or dict.fromkeys(self.recipe.data.sources, 1.0)
        sources = self.records.sources if self.records is not None else {}
        marks = {
            name: source.encoder for name, source in sources.items() if used.get(name) and source.encoder
        }
        if not marks:
            return
        name, way = next(iter(marks)), "give its pictures (encode without --features)"
        if "vision" in stage.lr:
            message = (
                f"data.sources.{name} holds features of an encoder that does not train; remove it, or {way}"
            )
            raise self.recipe.error(f"stages.{stage.name}.lr.vision", message)
        mark = None if module.vision is None else encoder_mark(module.vision, self.processor.image_size)
        for name, wanted in marks.items():
            if wanted != mark:
                message = (
                    f"features of another understanding encoder than the model's; encode it anew, or {way}"
                )
                raise self.recipe.error(f"data.sources.{name}", message)

    def groups(self, module: nn.Module) -> dict[str, list[nn.Parameter]]:
        """One group for each part, and one for all adapters; the image tokenizer is in none, so it never trains."""
        assert isinstance(module, UniMMModel)
        return model_groups(module, self.recipe.lora is not None)

    def dataset(self, stage: Stage, seed: int) -> Any:
        """The stage's mixture; image codes are made first, where they are not there yet."""
        self.options = validate(
            UnifiedOptions, stage.options, f"{self.recipe.source}: stages.{stage.name}.options"
        )
        mixture = stage.mixture or (
            dict.fromkeys(self.recipe.data.sources, 1.0) or {"understanding": 1.0, "generation": 1.0}
        )
        sources: dict[str, Any] = self._scenes(stage, mixture, seed)
        if any(name in mixture for name in self.recipe.data.sources):
            if self.records is None:
                data = self.recipe.data
                parts = (self.processor, self.image_tokenizer, self.canvas, pick_device(self.recipe))
                self.records = Records(self.recipe, data.sources, data.max_bad_items, *parts)
            sources |= self.records.samples(seed, self.options.prompt_dropout)
        return mix(sources, mixture, seed, shuffle=False)

    def _scenes(self, stage: Stage, mixture: Mapping[str, float], seed: int) -> dict[str, Samples]:
        """The kinds of EmojiScenes; their codes are made where the mixture asks for them."""
        size, shared = self.canvas.side, self.processor.layout.shared
        data, kinds = self.recipe.data, self.options.kinds
        for key, shares in (("data.kinds", data.kinds), (f"stages.{stage.name}.options.kinds", kinds)):
            if not any(shares.values()):
                raise self.recipe.error(key, "expected a share above 0")
        scenes = EmojiScenes("train", self.recipe.seed, size, data.scenes, data.kinds, data.lattice)
        encoded = ("generation", "understanding") if shared else ("generation",)
        if any(mixture.get(kind, 0) for kind in encoded) and self.codes is None:
            path = Path(data.codes or Path(self.recipe.output) / "codes.safetensors")
            self.codes = SceneCodes(path, self.image_tokenizer, scenes, pick_device(self.recipe))
        endless = EmojiScenes("train", seed, self.processor.image_size or size, 2**40, kinds)
        return {
            kind: Samples(self, kind, seed, scenes if kind in encoded else endless, self.options)
            for kind in KINDS
        }

    def understanding(
        self, rng: np.random.Generator, index: int, scenes: EmojiScenes, options: UnifiedOptions
    ) -> Sample:
        """A picture, then every question and a caption, each in a branch of its own."""
        scene, processor = scenes[index], self.processor
        captions = scene.captions()
        questions = scene.questions() + (scene.placings() if options.placings else [])
        asked = [(q.question, q.answer) for q in dict.fromkeys(questions)]
        request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
        asked.append((request, captions[rng.integers(len(captions))]))
        codes, grid = None, processor.layout.grid
        if processor.layout.shared:
            assert self.codes is not None
            codes = self.codes[index]
            grid = (codes.shape[0], codes.shape[1])
        prefix = np.array(processor.ids(*processor.opening([grid])))
        if codes is not None:
            places = prefix == processor.layout.feature
            prefix[places] = processor.layout.tokens(codes).numpy()
        sample = Branches(prefix.tolist())
        closing = processor.marks(processor.conversation.assistant)
        for question, answer in asked:
            sample.add(
                processor.ids(question, *closing),
                [*processor.text_ids(answer), processor.eos],
            )
        if processor.layout.shared:
            return sample.arrays()
        return {
            **sample.arrays(),
            "pixels": scene.render(),
            "background": BACKGROUNDS[scene.background],
            "mirrored": scene.mirrorable,
            "draws": draw_numbers(rng) if options.augment else None,
        }

    def text(
        self, rng: np.random.Generator, index: int, scenes: EmojiScenes, options: UnifiedOptions
    ) -> Sample:
        """A caption as plain text, every token learnt."""
        captions = scenes[index].captions()
        sample = Branches([self.processor.bos])
        sample.add([], [*self.processor.text_ids(captions[rng.integers(len(captions))]), self.processor.eos])
        return sample.arrays()

    def generation(
        self, rng: np.random.Generator, index: int, scenes: EmojiScenes, options: UnifiedOptions
    ) -> Sample:
        """A caption, sometimes blanked, then the image's codes."""
        assert self.codes is not None
        captions, codes = scenes[index].captions(), self.codes[index]
        rows, columns = codes.shape
        prompt = self.processor.drawing_ids(captions[rng.integers(len(captions))], (rows, columns))
        if rng.random() < options.prompt_dropout:
            prompt = self.processor.unconditional_ids(prompt)
        sample = Branches(prompt)
        layout = self.processor.layout
        if layout.shared:
            sample.add([], [*layout.tokens(codes).tolist(), *layout.closing(), self.processor.eos])
            return sample.arrays()
        sample.add([], layout.drawing_steps(*codes.shape), codes.flatten().tolist())
        return {**sample.arrays(), "codes": codes}

    def length(self, sample: Sample) -> int:
        """Tokens of the row."""
        return len(sample["ids"])

    def pictures(self, sample: Sample) -> int:
        """Pictures to understand of a sample."""
        if "background" in sample:  # a scene
            return 1
        return sum(len(sample[name]) for name in ("pixels", "features") if name in sample)

    def collate(self, samples: list[Sample]) -> Batch:
        """A row for each sample."""
        return self.collate_rows([[sample] for sample in samples])

    def collate_rows(self, rows: list[list[Sample]]) -> Batch:
        """Rows of samples, filled up to the longest; pictures and codes are stacked in the order of the stream."""
        fills = {"ids": self.processor.pad, "labels": IGNORED, "positions": 0, "branches": 0}
        names = {"ids": "input_ids", "positions": "position_ids"}
        batch: Batch = {
            names.get(name, name): stack_rows([np.concatenate([s[name] for s in row]) for row in rows], fill)
            for name, fill in fills.items()
        }
        numbers = [np.repeat(np.arange(len(row)), [len(s["ids"]) for s in row]) for row in rows]
        batch["samples"] = stack_rows(numbers, -1)  # padding is a sample that nobody looks at
        samples = [sample for row in rows for sample in row]
        if pictures := [sample for sample in samples if "pixels" in sample]:
            batch |= self._pixels(pictures)
        if features := [sample["features"] for sample in samples if "features" in sample]:
            batch["image_features"] = torch.cat(features)
            seen = [s for s in samples if "pixels" in s or "features" in s]
            batch["featured"] = torch.tensor(
                [one for sample in seen for one in [("features" in sample)] * self.pictures(sample)]
            )
        if codes := [sample["codes"] for sample in samples if "codes" in sample]:
            batch["image_codes"] = torch.cat([one.reshape(-1, *one.shape[-2:]) for one in codes])
        if self.recipe.data.sources:
            batch["skipped"] = torch.tensor(float(sum(sample.get("skipped", 0) for sample in samples)))
        return batch

    def _pixels(self, pictures: Sequence[Sample]) -> Batch:
        """The pictures of samples, one after the other: scenes, one each, and those of records, already tensors."""
        scenes = [sample for sample in pictures if "background" in sample]
        drawn = iter(self._scene_pixels(scenes) if scenes else ())
        stacks = [next(drawn)[None] if "background" in sample else sample["pixels"] for sample in pictures]
        if not any("sizes" in sample for sample in pictures):
            return {"pixel_values": torch.cat(stacks)}
        height, width = (max(stack.shape[side] for stack in stacks) for side in (2, 3))
        padded = [F.pad(stack, (0, width - stack.shape[3], 0, height - stack.shape[2])) for stack in stacks]
        sizes = torch.cat([sample["sizes"] for sample in pictures])
        return {"pixel_values": torch.cat(padded), "image_sizes": sizes}

    def _scene_pixels(self, pictures: Sequence[Sample]) -> Tensor:
        pixels = to_tensor(np.stack([sample["pixels"] for sample in pictures]))
        if pictures[0]["draws"] is None:
            return pixels
        return augment(
            pixels,
            torch.tensor([sample["background"] for sample in pictures]) / 127.5 - 1,
            torch.tensor([sample["mirrored"] for sample in pictures]),
            torch.from_numpy(np.stack([sample["draws"] for sample in pictures])),
            self.recipe.data.augmentation,
        )

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """Positions that the text loss and the code loss count, and once a stage is prepared operations."""
        counted = batch["labels"] != IGNORED
        codes = int((counted & self.processor.layout.code_positions(batch["input_ids"])).sum())
        words = int(counted.sum()) - codes
        found: dict[str, int | float] = {"text_tokens": words, "code_tokens": codes}
        if self.operations is None:
            return found
        real = batch["samples"] >= 0
        # A position sees as many as come before it in its sample or branch: its number says so.
        pairs = int((batch["position_ids"] + 1)[real].sum())
        pictures = 0 if self.processor.layout.shared else len(batch.get("pixel_values", ()))
        counts = Counts(int(real.sum()), pairs, words, codes, pictures)
        return {**found, OPERATIONS: self.operations.of(counts)}

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Weighted sum of the mean text loss and the mean code loss."""
        inputs = dict(batch)
        skipped = inputs.pop("skipped", None)
        output = module(**inputs, lockstep=self.lockstep)
        text = output.text_loss / max(totals["text_tokens"], 1)
        code = output.code_loss / max(totals["code_tokens"], 1)
        weights = self.recipe.loss
        metrics: dict[str, float | Tensor] = {"text_loss": text.detach(), "code_loss": code.detach()}
        if skipped is not None:
            metrics["skipped"] = skipped
        return weights.text * text + weights.code * code, metrics

    @torch.no_grad()
    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Draw fixed prompts, caption held-out scenes; a picture and a line of JSON."""
        assert isinstance(module, UniMMModel) and module.image_tokenizer is not None
        with plain_attention(module):
            self._preview(module, folder, step)

    def _preview(self, module: UniMMModel, folder: Path, step: int) -> None:
        assert module.image_tokenizer is not None
        held_out = EmojiScenes("seen", 7, self.processor.image_size or 64, 64, ("single",))
        prompts = list(self.recipe.prompts) or [held_out[i].captions()[0] for i in range(PREVIEW_PROMPTS)]
        side = self.canvas.side // self.canvas.stride
        codes = sample_codes(
            module, self.processor, prompts, streams(0, len(prompts), side**2), grid=(side, side)
        )
        folder.mkdir(parents=True, exist_ok=True)
        drawings = self.processor.to_images(module.image_tokenizer.decode(codes))
        cards = [Card([drawing], [Line(prompt)]) for drawing, prompt in zip(drawings, prompts, strict=True)]
        sheet = draw_sheet("Drawings", f"step {step}", [SheetSection("Fixed prompts and seeds", cards)])
        sheet.save(folder / f"{step:06d}.png")
        line: dict[str, Any] = {"step": step}
        for split in ("seen", "vendor"):
            scenes = list(EmojiScenes(split, 7, self.processor.image_size or 64, 128, ("single",)))
            captions = caption_scenes(module, self.processor, scenes)
            line[split] = float(np.mean([c in s.captions() for s, c in zip(scenes, captions, strict=True)]))
            line[f"{split}_captions"] = captions[:4]
        with (folder / "captions.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write a folder that `unimm.load` takes."""
        assert isinstance(module, UniMMModel)
        dtype = getattr(torch, self.recipe.export_dtype)
        save_model(module, folder, dtype, self.recipe.model.pretrained)
        self.processor.save_pretrained(folder)


@contextmanager
def plain_attention(model: UniMMModel) -> Iterator[None]:
    """Within, the decoder attends through SDPA: FlexAttention is for training, on rows of one length."""
    before = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.decoder.set_attn_implementation(before)


def set_gradient_checkpointing(model: UniMMModel, wanted: bool) -> None:
    """Switch gradient checkpointing of the decoder and the understanding encoder on or off."""
    if wanted:
        model.decoder.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.decoder.activation_checkpointing_disable()
    if model.vision is not None:
        model.vision.model.set_grad_checkpointing(wanted)
