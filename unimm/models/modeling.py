"""The unified model: one decoder over a stream of text tokens, image features and image codes.

Shape suffixes: B batch, T positions of the stream, C decoder width, V text vocabulary, K code vocabulary,
N images to understand, M images as codes, h x w grid of codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from unimm.errors import UserError
from unimm.models.attention import (
    FLEX,
    Mrope,
    block_mask,
    dense_mask,
    find_blocks,
    positions,
    raster_positions,
)
from unimm.models.code_tokens import put_tokens
from unimm.models.configuration import UniMMConfig
from unimm.models.connectors import CodeEmbedding, Connector
from unimm.models.experts import losses_of_routers, quantise_experts
from unimm.models.fusion import Attended, Embedded, Fusion, Looks, Memory, scatter_rows
from unimm.models.image_tokenizers.movq import MoVQTokenizer
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.models.inputs import Images, Rows
from unimm.models.layout import IGNORED
from unimm.models.losses import most_chunks, sum_scores, summed_loss
from unimm.models.memory import Remembering, who_looks
from unimm.models.model_outputs import AnswerScores, UniMMOutput
from unimm.models.parts import (
    CodesEncoderConfig,
    ImageGenerationConfig,
    MropePositionsConfig,
)
from unimm.models.quantization import (
    Int4Linear,
    Int8Linear,
    MakeSmall,
    SmallWeights,
    quantise_decoder,
    quantise_large,
    quantise_linears,
    some_rows,
)
from unimm.models.reducers import build_reducer
from unimm.models.seeing import check_room, feature_counts, in_order, read_inputs, seen_of
from unimm.models.vision import build_encoder
from unimm.models.weights import StrictModel


class UniMMModel(StrictModel):
    """Decoder, understanding encoder, code embedding and the two heads, assembled from a `UniMMConfig`.

    The text head is the decoder's own. The image tokenizer belongs to the model so that one folder holds all,
    but takes no part in `forward`: images to generate come in as codes.
    """

    config: UniMMConfig
    config_class = UniMMConfig
    base_model_prefix = "unimm"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: UniMMConfig, parts: str = "all") -> None:
        super().__init__(config)
        # "understand": without the code side and the image tokenizer; "draw": the encoder
        self.loaded_parts = parts
        decoder_config = config.decoder_config()
        width = decoder_config.hidden_size
        self.decoder = AutoModelForCausalLM.from_config(
            decoder_config, dtype=torch.get_default_dtype(), trust_remote_code=False
        )
        self.connector: Connector | None = None
        self.code_embedding: CodeEmbedding | None = None
        self.code_head: nn.Sequential | None = None
        self.image_tokenizer: ImageTokenizer | MoVQTokenizer | None = None
        self.extra_embedding: nn.Embedding | None = None
        if config.extra_tokens:
            self.extra_embedding = nn.Embedding(config.extra_tokens, width)
        encoder = config.encoder_config()
        self.seeing = config.seeing()
        self.sees_codes = isinstance(encoder, CodesEncoderConfig)
        self.vision = None if parts == "draw" else build_encoder(encoder)
        if self.vision is not None:
            assert encoder is not None and not isinstance(encoder, CodesEncoderConfig)
            reducer = build_reducer(self.seeing, encoder.width)
            self.connector = Connector(config.connector_config(), reducer, encoder.width, width)
        self.fusion: Fusion | None = None
        self.remembering: Remembering | None = None
        places = config.positions_config()
        self.rotary = isinstance(places, MropePositionsConfig)
        if isinstance(places, MropePositionsConfig):
            body: Any = self.decoder.get_decoder()
            body.rotary_emb = Mrope(body.rotary_emb, places.sections)
        generation = None if parts == "understand" else config.generation_config()
        if generation is not None and not generation.shared:
            self._add_codes(generation, width)
        sizes = None if parts == "understand" else config.image_tokenizer_config()
        if sizes is not None:
            self.image_tokenizer = AutoModel.from_config(sizes, dtype=torch.get_default_dtype())
        self.layout = config.image_layout()
        if self.vision is not None and (remembering := Remembering.of(config)) is not None:
            self.fusion = Fusion(remembering.fusion, self.decoder.get_decoder())
            self.remembering = remembering
        self.post_init()
        if (small := config.small_weights()) is not None:
            others = (
                Int8Linear.like
                if small.group_size is None
                else partial(Int4Linear.like, group=small.group_size)
            )
            self._put_small(Int8Linear.like, others)

    def _add_codes(self, generation: ImageGenerationConfig, width: int) -> None:
        """Add the layers of a code vocabulary of its own."""
        depth = generation.depth or max(self.config.connector_depth(), 1)
        inner = generation.head_width or width
        learned_positions = generation.grid**2 if generation.places else 0
        self.code_embedding = CodeEmbedding(generation.codes, generation.dim, width, depth, learned_positions)
        self.code_head = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, generation.codes))

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise our own layers; the decoder, the encoder and the tokenizer initialise theirs."""
        fill: Any = getattr(module, "init_non_persistent_buffers", None)
        if fill is not None:  # tables of timm, which no file holds
            fill()
        ours = (self.connector, self.fusion, self.code_embedding, self.code_head, self.extra_embedding)
        if module not in ours:
            return
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                # By width (Glorot): a fixed 0.02 starves narrow models.
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of text tokens."""
        table: nn.Module = self.decoder.get_input_embeddings()
        return table

    def parts(self) -> dict[str, nn.Module]:
        """Return the trainable parts that this model has, by the names that recipes use."""
        names = (
            "decoder", "vision", "connector", "fusion", "code_embedding", "code_head", "extra_embedding",
        )  # fmt: skip
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def quantise(self, method: str = "int8") -> None:
        """Give the decoder's linear layers small weights, in place; not to be undone or trained.

        Large heads get int8 ones whatever the method. Embeddings (and a head that is tied to them), encoder, connectors
        and image tokenizer stay as they are.

        Args:
            method: one of `unimm.models.quantization.METHODS`.

        Raises:
            UserError: the weights are small already, by another method.
        """
        held = self.config.quantization
        if held is not None and held["method"] != method:
            raise UserError(f"quantize: the weights are {held['method']} already; leave it out")
        if held is None:
            self._put_small(Int8Linear.of, Int8Linear.of if method == "int8" else Int4Linear.of)
            self.config.quantization = SmallWeights.of(method).model_dump(exclude_none=True)

    def _put_small(self, heads: MakeSmall, others: MakeSmall) -> None:
        """Put quantised layers in the place of the decoder's linear layers and large heads."""
        tied = self.config.decoder_config().tie_word_embeddings  # transformers ties them after loading only
        quantise_decoder(self.decoder, heads, others, tied)
        quantise_experts(self.decoder, others)
        if self.fusion is not None:
            quantise_linears(self.fusion, others, keep=())
        if self.code_head is not None:
            quantise_large(self.code_head, heads)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Write the model, as transformers does, but under its own names, whatever checkpoints of its decoder have.

        Raises:
            UserError: it was loaded in part.
        """
        if self.loaded_parts != "all":
            raise UserError(
                f"parts: a model loaded with {self.loaded_parts!r} cannot be saved; load it with 'all'"
            )
        super().save_pretrained(*args, **{"save_original_format": False, **options})

    def train(self, mode: bool = True) -> UniMMModel:
        """Switch to training; the image tokenizer stays as it is, since its codes must not move."""
        super().train(mode)
        if self.image_tokenizer is not None:
            nn.Module.eval(self.image_tokenizer)
        return self

    def embed(
        self,
        input_ids: Tensor,
        images: Images | None = None,
        lockstep: bool = False,
        counted: Tensor | None = None,
        visible: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Embedded:
        """Return what the decoder reads: the stream [B, T, C], and what goes with it.

        Args:
            input_ids: [B, T], with the layout's placeholders where images stand.
            images: in the order of the stream.
            lockstep: run parts that these inputs have no use for as well, on a blank that adds nothing.
            counted: [B, T], positions as they count the tokens of each sample; None: all of a row count.
            visible: who may look where, bool [B, 1, T, T]; None: everything that came before.
            rows: the same of rows that hold several samples or branches.

        Raises:
            ValueError: the images do not fill the placeholders or their sizes do not fit, or the model lacks the
                part that reads them.
        """
        images = Images() if images is None else images
        if len(images) and self.vision is None and not self.sees_codes:
            raise ValueError("images: this model has no understanding encoder")
        if self.sees_codes and images.pixels is not None:
            input_ids = self.put_tokens(input_ids, images)
        stream, memory = self._tokens(input_ids), None
        if self.vision is not None:
            looks = who_looks(input_ids.shape[1], rows, visible, input_ids.device)
            stream, memory = self._put_features(stream, input_ids, images, lockstep, looks)
        if not self.layout.shared:
            stream = self._put_codes(stream, input_ids, images.codes, lockstep)
        elif images.codes is not None:
            raise ValueError("images: codes are tokens of this model's vocabulary; put them into input_ids")
        if not self.rotary:
            return Embedded(stream, memory)
        if counted is None:
            counted = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        return Embedded(stream, positions=self.place(input_ids, images, counted, visible))

    def _tokens(self, input_ids: Tensor) -> Tensor:
        """Embed tokens; a code's placeholder need not be in the text vocabulary."""
        own = not self.layout.shared
        known = input_ids.masked_fill(self.layout.code_positions(input_ids), 0) if own else input_ids
        table = self.get_input_embeddings()
        if self.extra_embedding is None:
            stream: Tensor = table(known)
            return stream
        first = table.num_embeddings
        assert isinstance(first, int)
        extra = known >= first
        stream = table(known.masked_fill(extra, 0))
        return torch.where(extra[..., None], self.extra_embedding((known - first).clamp(min=0)), stream)

    def place(
        self, input_ids: Tensor, images: Images, counted: Tensor, visible: Tensor | None = None
    ) -> Tensor:
        """Return positions of time, row and column [3, B, T], for `embed`'s arguments."""
        grids = [] if not len(images) else seen_of(self.seeing, images, self.layout).grids
        rasters = [raster for grid in grids for raster in self.layout.rasters(*grid)]
        blocks = find_blocks(self.layout.feature_positions(input_ids), rasters, images.each_times())
        if images.codes is not None:
            drawn = [(images.codes.shape[1], images.codes.shape[2])] * len(images.codes)
            blocks += find_blocks(self.layout.code_positions(input_ids), drawn)
        return raster_positions(counted, blocks, visible)

    def _put_features(
        self, stream: Tensor, input_ids: Tensor, images: Images, lockstep: bool, looks: Looks
    ) -> tuple[Tensor, Memory | None]:
        """Fill the placeholders of images to understand; return what they are a memory of, too."""
        assert self.vision is not None and self.connector is not None
        mask = self.layout.feature_positions(input_ids)
        seen = seen_of(self.seeing, images, self.layout)
        check_room(self.layout, seen, int(mask.sum()))
        memory: Memory | None = None
        if len(images):
            tokens = self.connector(self._features(images, lockstep), seen)
            tokens = tokens.flatten(0, 1) if tokens.ndim == 3 else tokens
            if self.remembering is not None:
                tokens, memory = self.remembering(tokens, seen.grids, mask, looks, self._tokens)
            if tokens is not None:
                add = self.layout.picture is not None and self.layout.picture.add
                stream = scatter_rows(stream, mask, tokens, "images: features", add)
        if lockstep and images.pixels is None:
            blank = torch.zeros(self.seeing.blank, dtype=self.dtype, device=input_ids.device)
            nothing = self.vision(blank, lockstep=True)
            if images.features is None:
                nothing = self.connector(nothing, self.seeing.blank_seen)
            stream = stream + 0 * nothing.mean()
        if lockstep and self.fusion is not None and memory is None:
            memory = Memory.unseen(stream)
        return stream, memory

    def _put_codes(self, stream: Tensor, input_ids: Tensor, codes: Tensor | None, lockstep: bool) -> Tensor:
        """Fill the placeholders of images to generate [M, h, w], whose codes have a vocabulary of their own."""
        if codes is not None:
            embedded = self.embed_codes(codes.flatten(1))
            mask = self.layout.code_positions(input_ids)
            stream = scatter_rows(stream, mask, embedded.flatten(0, 1), "images: codes")
        elif lockstep and self.code_embedding is not None:
            blank = torch.zeros(1, self.layout.grid[0] * self.layout.grid[1], dtype=torch.long)
            stream = stream + 0 * self.embed_codes(blank.to(input_ids.device)).mean()
        return stream

    def _features(self, images: Images, lockstep: bool = False) -> Tensor:
        """Return the encoder's features, computed or given, in the order of the stream."""
        assert self.vision is not None
        dtype: torch.dtype = self.dtype
        given = images.features
        if images.pixels is None:
            assert given is not None
            return given.to(dtype)
        tiles = None if images.grids is None else images.grids[~images.which().to(images.grids.device)]
        seen: Tensor = self.vision(images.pixels.to(dtype), images.sizes, lockstep, tiles)
        if given is None:
            return seen
        return in_order(self.seeing, images, seen, given.to(seen.dtype))

    def as_features(self, images: Images) -> Images:
        """Return images to understand with their encoder's features in the place of pixels."""
        grids = torch.tensor(seen_of(self.seeing, images, self.layout).grids)
        features, lengths = self._features(images), None
        if features.ndim == 2 or images.views is not None:
            lengths = torch.tensor(feature_counts(self.seeing, images, self.layout))
            features = features.flatten(0, 1) if features.ndim == 3 else features
        return Images(
            features=features, lengths=lengths, grids=grids, owners=images.owners, padding=images.padding,
            times=images.times,
        )  # fmt: skip

    def put_tokens(self, input_ids: Tensor, images: Images) -> Tensor:
        """Fill the placeholders of images that are understood by their codes; see `unimm.models.code_tokens`."""
        assert images.pixels is not None
        given = dataclasses.replace(images, pixels=images.pixels.to(self.dtype))
        return put_tokens(self.image_tokenizer, self.layout, input_ids, given)

    def embed_codes(self, codes: Tensor, start: int | Tensor = 0) -> Tensor:
        """Return [B, L, C] for codes [B, L] that begin at position `start` of their image, one for all or [B]."""
        if self.layout.shared:
            tokens: Tensor = self.get_input_embeddings()(codes + self.layout.code)
            return tokens
        if self.code_embedding is None:
            raise ValueError("image_codes: this model has no code vocabulary, so it cannot draw")
        embedded: Tensor = self.code_embedding(codes, start)
        return embedded

    def decode(self, stream: Tensor, memory: Attended | None = None, **options: Any) -> Any:
        """Run the decoder without its head: [B, T, C] to an output with `last_hidden_state` [B, T, C]."""
        looking = {} if self.fusion is None else self.fusion.looking(memory)
        return self.decoder.get_decoder()(inputs_embeds=stream, **looking, **options)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Return [..., K] for hidden states [..., C]."""
        if self.layout.shared:  # the rows of the codes, of a head that has many more
            first = self.layout.code
            return some_rows(self.decoder.get_output_embeddings(), hidden, first, first + self.layout.codes)
        assert self.code_head is not None
        logits: Tensor = self.code_head(hidden)
        return logits

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Images | None = None,
        rows: Rows | None = None,
        labels: Tensor | None = None,
        lockstep: bool = False,
        **options: Any,
    ) -> UniMMOutput:
        """Run the model.

        Args:
            input_ids: [B, T], with the layout's placeholders where images stand.
            attention_mask: [B, T] with 0 at padding, or bool [B, 1, T, T] with True where a row may look.
            images: in the order of the stream; also as keyword inputs, as transformers' processors give them.
            rows: for rows that hold several samples or branches; `attention_mask` is then made from these.
            labels: [B, T], aligned with `input_ids` (shifted here); at code positions the code (its token,
                where codes are tokens), else a text token, and -100 at unlabelled positions.
            lockstep: run every part, and each as often as all other processes do, whatever this process's inputs
                need. Where weights or gradients are sharded, processes that ran different modules would wait for
                each other forever, or add up gradients of different weights. Needs a process group.
            **options: what else the decoder takes (`position_ids`, `cache`, `use_cache`, `output_router_logits`).

        Returns:
            With labels the losses and no logits (they are never held whole); without, text logits [B, T, V].
        """
        given = read_inputs(options, self.seeing)
        images = given if images is None else images
        output = self._run(input_ids, images, attention_mask, lockstep, rows, **options)
        hidden_BTC = output.last_hidden_state
        if labels is None:
            logits = self.decoder.get_output_embeddings()(hidden_BTC)
            return UniMMOutput(logits=logits, cache=output.cache)
        found = self.losses(hidden_BTC, input_ids, labels, lockstep)
        found.router = losses_of_routers(output, self.decoder.config, attention_mask, rows)
        return found

    def _run(
        self,
        input_ids: Tensor,
        images: Images | None,
        attention_mask: Tensor | None,
        lockstep: bool,
        rows: Rows | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Embed and decode, with positions counted from a mask [B, T] where none are given."""
        visible = None if attention_mask is None or attention_mask.ndim == 2 else attention_mask
        if rows is not None:
            flexible = self.decoder.config._attn_implementation == FLEX
            attention_mask = (block_mask if flexible else dense_mask)(rows.samples, rows.branches)
            position_ids = rows.positions
            visible = dense_mask(rows.samples, rows.branches) if self.rotary else None
        elif position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions(attention_mask)
        embedded = self.embed(input_ids, images, lockstep, position_ids, visible, rows)
        if embedded.positions is not None:
            position_ids = embedded.positions
        options |= {"attention_mask": attention_mask, "position_ids": position_ids}
        return self.decode(embedded.stream, embedded.memory, **options)

    def score(
        self, inputs: Mapping[str, Any], count: int, temperature: float = 1.0, lockstep: bool = False
    ) -> AnswerScores:
        """Return how likely answers are, in words through the text head and in codes through the code head.

        Args:
            inputs: `input_ids` [B, T], `labels` [B, T], and, where there are any, `attention_mask`, `position_ids`
                and `images`, as `forward` has them; `answers`, int64 [B, T], is at each labelled position the number
                (0 to `count` - 1) of its answer. A row may hold several answers, and an answer may be spread over
                rows.
            count: number of answers S.
            temperature: what logits are divided by, where answers were sampled so.
            lockstep: see `forward`.
        """
        input_ids, labels, answers = inputs["input_ids"], inputs["labels"], inputs["answers"]
        mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
        output = self._run(input_ids, inputs.get("images"), mask, lockstep, position_ids=position_ids)
        hidden = output.last_hidden_state[:, :-1]
        targets, text, code = self._counted(input_ids, labels)
        heads = [(self.decoder.get_output_embeddings(), text, 0)]
        if self.code_head is not None or self.layout.shared:
            heads.append((self.code_logits, code, self.layout.first_code))
        scored = [
            (head, hidden[where], targets[where] - first, answers[:, 1:][where])
            for head, where, first in heads
        ]
        return AnswerScores(*sum_scores(scored, count, temperature, lockstep).unbind(1))

    def _counted(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the shifted labels [B, T - 1], and which of them the text head and the code head are to predict."""
        targets = labels[:, 1:]
        counted = targets != IGNORED
        is_code = self.layout.code_positions(input_ids[:, 1:])
        return targets, counted & ~is_code, counted & is_code

    def losses(
        self, hidden: Tensor, input_ids: Tensor, labels: Tensor, lockstep: bool = False
    ) -> UniMMOutput:
        """Return summed text and code losses; each head sees its own positions and no others."""
        hidden = hidden[:, :-1]
        targets, text, code = self._counted(input_ids, labels)
        chunks = most_chunks(int(text.sum()), int(code.sum())) if lockstep else (1, 1)
        text_loss = summed_loss(self.decoder.get_output_embeddings(), hidden[text], targets[text], chunks[0])
        code_loss = text_loss.new_zeros(())
        if self.code_head is not None or self.layout.shared:
            first = self.layout.first_code
            code_loss = summed_loss(self.code_logits, hidden[code], targets[code] - first, chunks[1])
        text_count, code_count = int(text.sum()), int(code.sum())
        return UniMMOutput(
            loss=(text_loss + code_loss) / max(text_count + code_count, 1),
            text_loss=text_loss,
            code_loss=code_loss,
            text_count=text_count,
            code_count=code_count,
        )


AutoModel.register(UniMMConfig, UniMMModel)
