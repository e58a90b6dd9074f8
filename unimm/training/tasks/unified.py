"""Task `unified`: train the unified model in stages, on a mixture of sources in every step.

Sources are one's own data (`unimm.training.records`), and EmojiScenes and synthetic tables where a mixture names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedConfig

from unimm.data.codes import fingerprint
from unimm.data.emojiscenes.settings import (
    BOTH_SIDES,
    EMOJISCENES,
    SCENE_NAMES,
    SceneSettings,
    UnderstandingSettings,
    expand_mixture,
)
from unimm.data.tables.settings import TABLE_NAMES, TableChanges, TableSettings, expand_tables
from unimm.errors import UserError
from unimm.models.attention import FLEX
from unimm.models.experts import routing
from unimm.models.inputs import Images, Rows
from unimm.models.layout import IGNORED
from unimm.models.lora import LoraSection, add_adapters, save_model
from unimm.models.memory import Remembering, who_looks
from unimm.models.modeling import UniMMModel
from unimm.models.seeing import seen_of
from unimm.pipeline import UniMM
from unimm.processing.rows import stack_rows
from unimm.processing.views import TargetSize
from unimm.sections import FieldError, Fraction, NotNegative, Positive, Rate, Section, validate
from unimm.training.batches import mix
from unimm.training.engine import pick_device
from unimm.training.flops import Counts, Operations
from unimm.training.held_out import HeldOut, Items
from unimm.training.item_previews import PreviewItems, preview_items
from unimm.training.logging import OPERATIONS
from unimm.training.model_builder import Assembly, model_groups
from unimm.training.model_section import ModelSection, tiny_model
from unimm.training.modes import plain_attention, set_gradient_checkpointing
from unimm.training.previews import PREVIEW_PROMPTS, draw_prompts
from unimm.training.recipe import BaseRecipe, Stage, ValidationSection, smoke_data
from unimm.training.records import Records, SourceSection, leave_out_encoded
from unimm.training.sides import check_mixture_names

if TYPE_CHECKING:
    from unimm.data.emojiscenes.source import EmojiScenesSource
    from unimm.data.samples import Sample
    from unimm.training.task import Batch, Metrics

LONG = 16_384  # tokens that `--smoke` has room for, whatever one's own data


class DataSection(Section):
    """Sources of one's own, and the scenes of EmojiScenes and synthetic tables where a mixture names them."""

    sources: dict[str, SourceSection] = Field(default_factory=dict)
    """Name -> data; a stage's mixture gives it a share."""
    max_bad_items: NotNegative = 100
    """Most items of sources that may be unusable before the run stops."""
    validation: ValidationSection[SourceSection] | None = None
    """Items of one's own that are not trained on, to measure losses on; null: none."""
    emojiscenes: SceneSettings = SceneSettings()
    """The scenes of `emojiscenes` and `emojiscenes/KIND` in a mixture."""
    tables: TableSettings = TableSettings()
    """The tables of `tables` and `tables/KIND` in a mixture."""
    size: Positive | None = None
    """Pixels a side of images to draw, where a model draws any size, as Emu3 does; null: the model's own."""
    keep_ratio: bool = False
    """Whether those of sources keep their ratio, in an area of that side squared."""


class LossSection(Section):
    """Weights of the mean losses over text and over code positions, and of those of a decoder's experts."""

    text: Rate = 1.0
    code: Rate = 1.0
    balance: Rate | None = None
    """Of experts that get unlike many tokens; null: the decoder's `router_aux_loss_coef` if it has
    `output_router_logits`, else 0."""
    router_z: Rate = 0.0
    """Of the size of routers' logits (Aria's fine-tuning: 1e-5)."""

    def of_routers(self, decoder: PreTrainedConfig) -> tuple[float, float]:
        """Return the weights of balance and size for a decoder.

        Raises:
            FieldError: it has no experts.
        """
        balance = self.balance
        if balance is None:
            asked = getattr(decoder, "output_router_logits", False)
            balance = float(getattr(decoder, "router_aux_loss_coef", 0.0)) if asked else 0.0
        if routing(decoder) is None:
            for key in ("balance", "router_z"):
                if getattr(self, key):
                    raise FieldError(
                        f"loss.{key}: a decoder of the kind {decoder.model_type} has no experts; remove it"
                    )
            return 0.0, 0.0
        return balance, self.router_z


class UnifiedOptions(Section):
    """What a stage may set under `options`."""

    prompt_dropout: Fraction = 0.1
    """Share of generation samples whose prompt is blanked, for guidance."""
    emojiscenes: UnderstandingSettings = UnderstandingSettings()
    """What is other in this stage than `data.emojiscenes.understanding` says."""
    tables: TableChanges = TableChanges()
    """What is other in this stage than `data.tables` says."""


class SystemSection(Section):
    """The published system that a recipe is of, for `unimm systems`."""

    name: str
    year: Annotated[int, Field(ge=2000, le=2100)]
    paper: str


class UnifiedRecipe(BaseRecipe):
    """Recipe of the task `unified`; groups are the model's parts, mixtures are over sources and `SCENE_NAMES`."""

    task: Literal["unified"]
    system: SystemSection | None = None
    """Null: it is of none."""
    model: ModelSection
    lora: LoraSection | None = None
    """Adapters, trained as the group `lora`; the export is merged, the adapters alone are beside it."""
    data: DataSection = DataSection()
    loss: LossSection = LossSection()
    prompts: Annotated[tuple[str, ...], Field(max_length=PREVIEW_PROMPTS, strict=False)] = ()
    """Drawn at every preview; by default captions of held-out scenes, in stages on scenes."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the exported weights; 16 bits halve the file."""

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """Tiny parts with random weights, on the same data and few scenes; on scenes alone where there is none."""
        data["model"] = tiny_model(data["model"])
        leave_out_encoded(data)
        data["model"]["decoder"]["max_position_embeddings"] = LONG
        scenes = {**((data.get("data") or {}).get("emojiscenes") or {}), "scenes": 8, "codes": None}
        tables = (data.get("data") or {}).get("tables") or {}
        data["data"] = {"emojiscenes": scenes, "tables": tables, **smoke_data(data, {EMOJISCENES: 1})}

    @property
    def validation(self) -> ValidationSection[SourceSection] | None:
        """What is held out of the recipe's sources."""
        return self.data.validation

    def build_task(self) -> UnifiedTask:
        """The task that this recipe describes."""
        if self.validation is not None and self.validation.share and not self.data.sources:
            raise self.error("data.validation.share", "there are no sources to hold items out of; name them")
        self.check_mixtures()
        for stage in self.stages:
            self.options(stage)
            self.tables(stage)
        self.say_unread(self.data.sources)
        return UnifiedTask(self)

    def check_mixtures(self) -> None:
        """Refuse mixtures of names that no data has.

        Raises:
            UserError: the first of them, and what may stand there; or a stage has no data at all.
        """
        check_mixture_names(self)

    def mixture(self, stage: Stage, sides: Sequence[str] = BOTH_SIDES) -> dict[str, float]:
        """A stage's mixture over sources, `SCENE_NAMES` and `TABLE_NAMES`; where it has none, all sources alike.

        Args:
            stage: whose.
            sides: those of `BOTH_SIDES` that the model has.
        """
        named = expand_tables(expand_mixture(stage.mixture, sides))
        return named or dict.fromkeys(self.data.sources, 1.0)

    def options(self, stage: Stage) -> UnifiedOptions:
        """What a stage sets under `options`."""
        return validate(UnifiedOptions, stage.options, f"{self.source}: stages.{stage.name}.options")

    def tables(self, stage: Stage) -> TableSettings:
        """The tables of a stage."""
        key = f"stages.{stage.name}.options.tables"
        return self.data.tables.changed_by(self.options(stage).tables, self.source, key)


class UnifiedTask:
    """Trains and exports a `UniMMModel`; see the module's docstring and `unimm.training.task.Task`."""

    def __init__(self, recipe: UnifiedRecipe) -> None:
        self.recipe = recipe
        self._assembly = Assembly(recipe)
        self.config, self.processor = self._assembly.config, self._assembly.processor
        self.remembering = Remembering.of(self.config)
        self.image_tokenizer: Any = self._assembly.image_tokenizer
        self.target_size: TargetSize | None = None  # what images to draw are brought to
        if self.processor.drawing_size is not None:
            try:
                self.target_size = self.processor.target_size(recipe.data.size, recipe.data.keep_ratio)
            except UserError as error:
                raise recipe.error("data", str(error)) from None
        self.scenes: EmojiScenesSource | None = None
        self.records: Records | None = None
        self.stage: Stage | None = None  # that runs, and what it is measured on
        self.measured: HeldOut | None = None
        self.shown: PreviewItems | None = None  # in previews, of one's own data
        self.operations: Operations | None = None  # of the stage
        try:
            self.routers = recipe.loss.of_routers(self.config.decoder_config())
        except FieldError as error:
            raise UserError(f"{recipe.source}: {error}") from None
        self.lockstep = recipe.zero_stage > 0  # see `Task.loss`

    def build(self) -> nn.Module:
        """The model, assembled as the recipe says, with adapters where it has some."""
        model = self._assembly.build()
        if self.recipe.lora is not None:
            add_adapters(model, self.recipe.lora, self._assembly.renewed)
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
        used = self.mixture(stage)
        sources = self.records.sources if self.records is not None else {}
        marks = {
            name: source.encoder for name, source in sources.items() if used.get(name) and source.encoder
        }
        if not marks:
            return
        name, way = next(iter(marks)), "give its images (encode without --features)"
        if "vision" in stage.lr:
            message = (
                f"data.sources.{name} holds features of an encoder that does not train; remove it, or {way}"
            )
            raise self.recipe.error(f"stages.{stage.name}.lr.vision", message)
        mark = None if module.vision is None else fingerprint(module.vision, self.processor.views)
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
        options, mixture = self.recipe.options(stage), self.mixture(stage)
        sources: dict[str, Any] = {}
        if any(name in mixture for name in SCENE_NAMES):
            shown = self.recipe.data.emojiscenes.understanding.changed_by(options.emojiscenes)
            sources |= self._open_scenes().samples(mixture, seed, shown, options.prompt_dropout)
        if any(name in mixture for name in TABLE_NAMES):
            from unimm.data.tables.source import table_samples

            sources |= table_samples(self.processor, mixture, seed, self.recipe.tables(stage))
        if any(name in mixture for name in self.recipe.data.sources):
            sources |= self._open_records().samples(seed, options.prompt_dropout, stage.pack)
        self._hold_out(stage, mixture)
        return mix(sources, mixture, seed, shuffle=False)

    def mixture(self, stage: Stage) -> dict[str, float]:
        """A stage's mixture, of what the model can learn where it names `emojiscenes`."""
        sides = {"understanding": self.processor.views, "generation": self.target_size}
        return self.recipe.mixture(stage, [kind for kind, part in sides.items() if part is not None])

    def _open_scenes(self) -> EmojiScenesSource:
        """The scenes of EmojiScenes."""
        from unimm.data.emojiscenes.scenes import CANVAS
        from unimm.data.emojiscenes.source import EmojiScenesSource

        if self.scenes is None:
            recipe = self.recipe
            side = (
                (self.processor.image_size or CANVAS) if self.target_size is None else self.target_size.side
            )
            parts = (self.processor, self.image_tokenizer, side, recipe.seed, Path(recipe.output))
            self.scenes = EmojiScenesSource(recipe.data.emojiscenes, *parts, pick_device(recipe))
        return self.scenes

    def _open_records(self) -> Records:
        """The sources of one's own."""
        if self.records is None:
            data = self.recipe.data
            parts = (self.processor, self.image_tokenizer, self.target_size, pick_device(self.recipe))
            self.records = Records(self.recipe, data.sources, data.max_bad_items, *parts)
        return self.records

    def _hold_out(self, stage: Stage, mixture: Mapping[str, float]) -> None:
        """Choose the items that the stage is measured on, and those that previews show."""
        validation, first = self.recipe.validation, self.stage is None
        self.stage, self.shown = stage, None
        if self.records is None:
            return
        if validation is None:
            if self.recipe.logging.samples_every:
                items = Items(self.records, self.records.trained, mixture, pack=stage.pack)
                self.shown = PreviewItems(items, False)
            return
        self.measured = HeldOut(self.records, mixture, validation.items, stage.pack)
        self.shown = PreviewItems(self.measured, True)
        if first:
            self.measured.say_what_is_shared()

    def held_out(self) -> Sequence[Batch]:
        """Micro-batches of the stage's held-out items."""
        if self.measured is None or self.stage is None:
            return ()
        return self.measured.batches(self.stage, self.collate)

    def held_out_sums(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums and counts of the losses over text and over code positions."""
        assert isinstance(module, UniMMModel)
        counts = self.targets(batch)
        inputs = {name: value for name, value in batch.items() if name != "skipped"}
        with plain_attention(module):
            output = module(**inputs)
        sums = {"text_loss": output.text_loss, "code_loss": output.code_loss}
        return {
            name: torch.stack([total.double(), torch.tensor(float(counts[kind])).to(total.device).double()])
            for (name, total), kind in zip(sums.items(), ("text_tokens", "code_tokens"), strict=True)
        }

    def held_out_loss(self, means: Mapping[str, float]) -> float:
        """The mean losses, weighted as in training."""
        weights = self.recipe.loss
        return weights.text * means.get("text_loss", 0.0) + weights.code * means.get("code_loss", 0.0)

    def data_state(self) -> dict[str, str]:
        """What the sources are."""
        return self.records.states if self.records is not None else {}

    def epochs(self, stage: Stage, samples: int) -> dict[str, float]:
        """Passes through each source of one's own."""
        mixture, trained = (
            self.mixture(stage),
            self.records.trained if self.records is not None else {},
        )
        total = sum(mixture.values())
        return {
            name: samples * mixture[name] / total / len(indices)
            for name, indices in trained.items()
            if mixture.get(name)
        }

    def length(self, sample: Sample) -> int:
        """Tokens of the row."""
        return len(sample["ids"])

    def images(self, sample: Sample) -> int:
        """Images to understand of a sample."""
        return len(sample.get("images", ()))

    def collate(self, samples: list[Sample]) -> Batch:
        """A row for each sample."""
        return self.collate_rows([[sample] for sample in samples])

    def collate_rows(self, rows: list[list[Sample]]) -> Batch:
        """Rows of samples, filled up to the longest; images and codes are stacked in the order of the stream."""
        fills = {"ids": self.processor.pad, "labels": IGNORED, "positions": 0, "branches": 0}
        stacked = {
            name: stack_rows([np.concatenate([s[name] for s in row]) for row in rows], fill)
            for name, fill in fills.items()
        }
        numbers = [np.repeat(np.arange(len(row)), [len(s["ids"]) for s in row]) for row in rows]
        samples = stack_rows(numbers, -1)  # padding is a sample that nobody looks at
        batch: Batch = {
            "input_ids": stacked["ids"],
            "labels": stacked["labels"],
            "rows": Rows(stacked["positions"], samples, stacked["branches"]),
            "images": Images.cat(
                sample["images"].owned_by(i)
                for i, row in enumerate(rows)
                for sample in row
                if "images" in sample
            ),
        }
        if self.recipe.data.sources:
            skipped = sum(sample.get("skipped", 0) for row in rows for sample in row)
            batch["skipped"] = torch.tensor(float(skipped))
        return batch

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """Positions that the text loss and the code loss count, and once a stage is prepared operations."""
        counted = batch["labels"] != IGNORED
        codes = int((counted & self.processor.layout.code_positions(batch["input_ids"])).sum())
        words = int(counted.sum()) - codes
        found: dict[str, int | float] = {"text_tokens": words, "code_tokens": codes}
        real = batch["rows"].samples >= 0
        if any(self.routers):
            found["positions"] = int(real.sum())
        if self.operations is None:
            return found
        rows, images = batch["rows"], batch["images"]
        # A position sees as many as come before it in its sample or branch: its number says so.
        pairs = int((rows.positions + 1)[real].sum())
        encoded = images is not None and images.pixels is not None and not self.processor.sees_codes
        seeing = self.processor.seeing
        seen = None if images is None else seen_of(seeing, images, self.processor.layout)
        features = seeing.passes_of(seen) if seen is not None and encoded else []
        looked = {}
        if seen is not None and self.remembering is not None:
            marks = self.processor.layout.feature_positions(batch["input_ids"])
            looks = who_looks(marks.shape[1], rows, None, marks.device)
            looked = self.remembering.counts(marks, seen.grids, looks)
        counts = Counts(
            int(real.sum()),
            pairs,
            words,
            codes,
            sum(features),
            sum(count**2 for count in features),
            **looked,
        )
        return {**found, OPERATIONS: self.operations.of(counts)}

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Weighted sum of the mean text loss and the mean code loss, and of what a decoder's routers add."""
        inputs = dict(batch)
        skipped = inputs.pop("skipped", None)
        asked = {"output_router_logits": True} if any(self.routers) else {}
        output = module(**inputs, lockstep=self.lockstep, **asked)
        text = output.text_loss / max(totals["text_tokens"], 1)
        code = output.code_loss / max(totals["code_tokens"], 1)
        weights = self.recipe.loss
        metrics: dict[str, float | Tensor] = {"text_loss": text.detach(), "code_loss": code.detach()}
        if skipped is not None:
            metrics["skipped"] = skipped
        total = weights.text * text + weights.code * code
        if asked:  # means, weighted by the positions that they are of
            share = float((batch["rows"].samples >= 0).sum()) / max(totals["positions"], 1)
            balance, size = (share * loss for loss in output.router)
            metrics |= {"balance_loss": balance.detach(), "router_z_loss": size.detach()}
            total = total + self.routers[0] * balance + self.routers[1] * size
        return total, metrics

    @torch.no_grad()
    def preview(self, module: nn.Module, folder: Path, step: int) -> None:
        """Answer and draw items of one's own data, and scenes and tables trained on; sheets and lines of JSON."""
        assert isinstance(module, UniMMModel)
        mixture = self.mixture(self.stage) if self.stage is not None else {}
        scenes = any(mixture.get(name) for name in SCENE_NAMES)
        prompts: Sequence[str] = self.recipe.prompts
        if scenes:
            from unimm.data.emojiscenes.captions import caption_held_out, held_out_prompts

            prompts = prompts or held_out_prompts(PREVIEW_PROMPTS)
        um = UniMM(module, self.processor)
        with plain_attention(module):
            if prompts and self.target_size is not None:
                draw_prompts(um, prompts, self.target_size, folder, step)
            if scenes and self.processor.views is not None:
                caption_held_out(module, self.processor, folder, step)
            if mixture.get(TABLE_NAMES[0]):
                from unimm.data.tables.held_out import read_held_out

                read_held_out(module, self.processor, self.recipe.data.tables, folder, step)
            if self.shown is not None:
                preview_items(um, self.shown, self.target_size, folder, step)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write a folder that `unimm.load` takes."""
        assert isinstance(module, UniMMModel)
        dtype = getattr(torch, self.recipe.export_dtype)
        save_model(module, folder, dtype, self.recipe.model.pretrained)
        self.processor.save_pretrained(folder)
