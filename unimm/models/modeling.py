"""The unified model: one decoder over a stream of text tokens, image features and image codes.

Shape suffixes: B batch, T positions of the stream, C decoder width, V text vocabulary, K code vocabulary,
N images to understand, M images as codes, h x w grid of codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils.generic import ModelOutput

from unimm.errors import UserError
from unimm.models.attention import FLEX, block_mask, dense_mask, positions
from unimm.models.configuration import UniMMConfig
from unimm.models.connectors import Connector, mlp
from unimm.models.fusion import Embedded, scatter_rows
from unimm.models.image_tokenizers.movq import MoVQTokenizer
from unimm.models.image_tokenizers.vq import ImageTokenizer
from unimm.models.inputs import Images, Rows
from unimm.models.layout import IGNORED
from unimm.models.losses import most_chunks, position_scores, summed_loss
from unimm.models.parts import CodesEncoderConfig, SquareViewsConfig, TimmEncoderConfig
from unimm.models.quantization import (
    LARGE,
    Int4Linear,
    Int8Linear,
    MakeSmall,
    SmallWeights,
    quantise_linears,
    some_rows,
)
from unimm.models.vision import build_encoder
from unimm.models.weights import StrictModel


@dataclasses.dataclass
class UniMMOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: scalar mean over all counted positions, with labels.
        logits: text logits [B, T, V], without labels.
        text_loss: scalar sum over the `text_count` text positions.
        code_loss: scalar sum over the `code_count` code positions.
        cache: keys and values of what was read, if they were kept.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_loss: Tensor | None = None
    code_loss: Tensor | None = None
    text_count: int | None = None
    code_count: int | None = None
    cache: Any = None


class AnswerScores(NamedTuple):
    """How likely a model finds answers, each a float64 tensor [S] over S answers.

    Attributes:
        log_probs: log-probability of the answer's labels, summed.
        entropy: entropy of the predictions at the same positions, summed; without gradient.
        length: how many positions were counted.
    """

    log_probs: Tensor
    entropy: Tensor
    length: Tensor


class CodeEmbedding(nn.Module):
    """Embeds image codes: a small table, a learned position in the grid, and a connector to the decoder's width.

    Args:
        codes: size of the code vocabulary K.
        dim: dimension of the table.
        width: the decoder's width C.
        depth: linear layers of the connector.
        learned_positions: length of the table of positions, 0 for none (Janus leaves positions to the decoder).
    """

    def __init__(self, codes: int, dim: int, width: int, depth: int, learned_positions: int) -> None:
        super().__init__()
        self.table = nn.Embedding(codes, dim)
        self.connector = mlp(dim, width, depth)
        # called `places` in the files of models, and so in their state
        self.places = nn.Embedding(learned_positions, width) if learned_positions else None

    def forward(self, codes: Tensor, start: int | Tensor = 0) -> Tensor:
        """Return [B, L, C] for codes [B, L] that begin at position `start` of their image, one for all or [B]."""
        embedded: Tensor = self.connector(self.table(codes))
        if self.places is None:
            return embedded
        if isinstance(start, int):
            return embedded + self.places.weight[start : start + codes.shape[1]]
        where = start[:, None] + torch.arange(codes.shape[1], device=codes.device)
        return embedded + self.places.weight[where]


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
        self.loaded_parts = (
            parts  # "understand": without the code side and the image tokenizer; "draw": the encoder
        )
        decoder_config = config.decoder_config()
        width = decoder_config.hidden_size
        self.decoder = AutoModelForCausalLM.from_config(
            decoder_config, dtype=torch.get_default_dtype(), trust_remote_code=False
        )
        self.connector: Connector | None = None
        self.code_embedding: CodeEmbedding | None = None
        self.code_head: nn.Sequential | None = None
        self.image_tokenizer: ImageTokenizer | MoVQTokenizer | None = None
        encoder, depth = config.encoder_config(), config.connector_config().depth
        self.vision = None if parts == "draw" else build_encoder(encoder)
        if isinstance(encoder, TimmEncoderConfig) and parts != "draw":
            self.connector = Connector(encoder.width, width, depth, config.reducer_config().side)
        self.sees_codes = isinstance(encoder, CodesEncoderConfig)
        generation = None if parts == "understand" else config.generation_config()
        if generation is not None and not generation.shared:
            learned_positions = generation.grid**2 if generation.places else 0
            depth = generation.depth or depth
            inner = generation.head_width or width
            self.code_embedding = CodeEmbedding(
                generation.codes, generation.dim, width, depth, learned_positions
            )
            self.code_head = nn.Sequential(
                nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, generation.codes)
            )
        sizes = None if parts == "understand" else config.image_tokenizer_config()
        if sizes is not None:
            self.image_tokenizer = AutoModel.from_config(sizes, dtype=torch.get_default_dtype())
        self.layout = config.image_layout()
        self.post_init()
        if (small := config.small_weights()) is not None:
            others = (
                Int8Linear.like
                if small.group_size is None
                else partial(Int4Linear.like, group=small.group_size)
            )
            self._put_small(Int8Linear.like, others)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise our own layers; the decoder, the encoder and the tokenizer initialise theirs."""
        ours = (self.connector, self.code_embedding, self.code_head)
        if module not in ours:
            return
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                # By width (Glorot): a fixed 0.02 starves narrow models.
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of text tokens."""
        table: nn.Module = self.decoder.get_input_embeddings()
        return table

    def parts(self) -> dict[str, nn.Module]:
        """Return the trainable parts that this model has, by the names that recipes use."""
        parts = {
            "decoder": self.decoder,
            "vision": self.vision,
            "connector": self.connector,
            "code_embedding": self.code_embedding,
            "code_head": self.code_head,
        }
        return {name: part for name, part in parts.items() if part is not None}

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
        head = self.decoder.get_output_embeddings()
        tied = self.config.decoder_config().tie_word_embeddings  # transformers ties them after loading only
        if not tied and head.weight.numel() >= LARGE:
            self.decoder.set_output_embeddings(heads(head))
        quantise_linears(self.decoder, others, keep=[head])
        if self.code_head is not None:
            small = [layer for layer in self.code_head if sum(p.numel() for p in layer.parameters()) < LARGE]
            quantise_linears(self.code_head, heads, keep=small)

    def save_pretrained(self, *args: Any, **options: Any) -> None:
        """Write the model, as transformers does.

        Raises:
            UserError: it was loaded in part.
        """
        if self.loaded_parts != "all":
            raise UserError(
                f"parts: a model loaded with {self.loaded_parts!r} cannot be saved; load it with 'all'"
            )
        super().save_pretrained(*args, **options)

    def train(self, mode: bool = True) -> UniMMModel:
        """Switch to training; the image tokenizer stays as it is, since its codes must not move."""
        super().train(mode)
        if self.image_tokenizer is not None:
            nn.Module.eval(self.image_tokenizer)
        return self

    def embed(self, input_ids: Tensor, images: Images | None = None, lockstep: bool = False) -> Embedded:
        """Return what the decoder reads: the stream [B, T, C], and what goes with it.

        Args:
            input_ids: [B, T], with the layout's placeholders where images stand.
            images: in the order of the stream.
            lockstep: run parts that these inputs have no use for as well, on a blank that adds nothing.

        Raises:
            ValueError: the images do not fill the placeholders or their sizes do not fit, or the model lacks the
                part that reads them.
        """
        images = Images() if images is None else images
        if len(images) and self.vision is None and not self.sees_codes:
            raise ValueError("images: this model has no understanding encoder")
        if self.sees_codes and images.pixels is not None:
            input_ids = self.put_tokens(input_ids, images)
        # A code's placeholder need not be in the text vocabulary.
        own = not self.layout.shared
        known = input_ids.masked_fill(self.layout.code_positions(input_ids), 0) if own else input_ids
        stream: Tensor = self.get_input_embeddings()(known)
        if self.vision is not None:
            stream = self._put_features(stream, input_ids, images, lockstep)
        if own:
            return Embedded(self._put_codes(stream, input_ids, images.codes, lockstep))
        if images.codes is not None:
            raise ValueError("images: codes are tokens of this model's vocabulary; put them into input_ids")
        return Embedded(stream)

    def _put_features(self, stream: Tensor, input_ids: Tensor, images: Images, lockstep: bool) -> Tensor:
        """Fill the placeholders of images to understand."""
        assert self.vision is not None and self.connector is not None
        if len(images):
            features = self.connector(self._seen(images))
            mask = self.layout.feature_positions(input_ids)
            stream = scatter_rows(stream, mask, features.flatten(0, 1), "images: features")
        if lockstep and images.pixels is None:
            views = self.config.views_config()
            assert isinstance(views, SquareViewsConfig)
            blank = torch.zeros(1, 3, *[views.image_size] * 2, dtype=self.dtype, device=input_ids.device)
            nothing = self.vision(blank)
            nothing = self.connector(nothing) if images.features is None else nothing
            stream = stream + 0 * nothing.mean()
        return stream

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

    def _seen(self, images: Images) -> Tensor:
        """Return the encoder's features [N, tokens, width], computed or given, in the order of the stream."""
        assert self.vision is not None
        dtype: torch.dtype = self.dtype
        given = images.features
        seen: Tensor | None = None if images.pixels is None else self.vision(images.pixels.to(dtype))
        if given is None:
            assert seen is not None
            return seen
        if seen is None:
            return given.to(dtype)
        if images.featured is None:
            raise ValueError("featured: missing; it says which images are features where others are pixels")
        together = seen.new_empty(len(images.featured), *seen.shape[1:])
        together[images.featured], together[~images.featured] = given.to(seen.dtype), seen
        return together

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Return the encoder's features [N, tokens, width] of images [N, 3, H, W], as `Images.features` has them."""
        assert self.vision is not None
        features: Tensor = self.vision(pixels.to(self.dtype))
        return features

    def put_tokens(self, input_ids: Tensor, images: Images) -> Tensor:
        """Fill the placeholders of images that are understood by their codes with the tokens of these.

        Raises:
            ValueError: they do not fit the placeholders.
        """
        assert images.pixels is not None
        tokens = self._image_tokens(images.pixels, images.sizes)
        mask = self.layout.feature_positions(input_ids)
        if int(mask.sum()) != len(tokens):
            raise ValueError(f"images: {len(tokens)} tokens, but there is room for {int(mask.sum())}")
        return input_ids.masked_scatter(mask, tokens)

    def _image_tokens(self, pixels: Tensor, sizes: Tensor | None) -> Tensor:
        """Return the tokens [P] of images [N, 3, H, W], each cut to its size [N, 2] and encoded alone.

        What an encoder sees reaches far, so an image that is padded to a larger one has other codes. Images of one
        size would differ in the last bits of their latents, enough to turn a code now and then.
        """
        if self.image_tokenizer is None:
            raise ValueError("images: this model has no image tokenizer")
        cuts = [list(pixels.shape[-2:])] * len(pixels) if sizes is None else sizes.tolist()
        if len(cuts) != len(pixels):
            raise ValueError(f"images: {len(cuts)} sizes for {len(pixels)} images; give one for each")
        tokens = []
        for image, (height, width) in zip(pixels, cuts, strict=True):
            cut = image[None, :, :height, :width].contiguous()
            tokens.append(self.layout.tokens(self.image_tokenizer.encode(cut.to(self.dtype))[0]))
        return torch.cat(tokens)

    def embed_codes(self, codes: Tensor, start: int | Tensor = 0) -> Tensor:
        """Return [B, L, C] for codes [B, L] that begin at position `start` of their image, one for all or [B]."""
        if self.layout.shared:
            tokens: Tensor = self.get_input_embeddings()(codes + self.layout.code)
            return tokens
        if self.code_embedding is None:
            raise ValueError("image_codes: this model has no code vocabulary, so it cannot draw")
        embedded: Tensor = self.code_embedding(codes, start)
        return embedded

    def decode(self, stream: Tensor, **options: Any) -> Any:
        """Run the decoder without its head: [B, T, C] to an output with `last_hidden_state` [B, T, C]."""
        return self.decoder.get_decoder()(inputs_embeds=stream, **options)

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
            images: in the order of the stream. They may also come as keyword inputs, as transformers' processors
                name them (`pixel_values`, `image_sizes`, `image_features`, `image_codes`).
            rows: for rows that hold several samples or branches; `attention_mask` is then made from these.
            labels: [B, T], aligned with `input_ids` (shifted here); at code positions the code (its token,
                where codes are tokens), else a text token, and -100 at unlabelled positions.
            lockstep: run every part, and each as often as all other processes do, whatever this process's inputs
                need. Where weights or gradients are sharded, processes that ran different modules would wait for
                each other forever, or add up gradients of different weights. Needs a process group.
            **options: what else the decoder takes (`position_ids`, `cache`, `use_cache`).

        Returns:
            With labels the losses and no logits (they are never held whole); without, text logits [B, T, V].
        """
        given = Images.from_inputs(options)
        embedded = self.embed(input_ids, given if images is None else images, lockstep)
        if rows is not None:
            flexible = self.decoder.config._attn_implementation == FLEX
            attention_mask = (block_mask if flexible else dense_mask)(rows.samples, rows.branches)
            options["position_ids"] = rows.positions
        output = self._run(embedded, attention_mask, options.pop("position_ids", None), **options)
        hidden_BTC = output.last_hidden_state
        if labels is None:
            logits = self.decoder.get_output_embeddings()(hidden_BTC)
            return UniMMOutput(logits=logits, cache=output.cache)
        return self.losses(hidden_BTC, input_ids, labels, lockstep)

    def _run(
        self, embedded: Embedded, attention_mask: Tensor | None, position_ids: Tensor | None, **options: Any
    ) -> Any:
        """Decode a stream, with positions counted from a mask [B, T] where none are given."""
        if position_ids is None:
            position_ids = embedded.positions
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions(attention_mask)
        return self.decode(
            embedded.stream, attention_mask=attention_mask, position_ids=position_ids, **options
        )

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
        embedded = self.embed(input_ids, inputs.get("images"), lockstep)
        mask, position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
        hidden = self._run(embedded, mask, position_ids).last_hidden_state[:, :-1]
        targets, text, code = self._counted(input_ids, labels)
        # In float64: what matters are small differences of long sums.
        sums = torch.zeros(count, 3, dtype=torch.float64, device=hidden.device)
        first = self.layout.first_code
        heads = [(self.decoder.get_output_embeddings(), text, 0)]
        if self.code_head is not None or self.layout.shared:
            heads.append((self.code_logits, code, first))
        counts = [int(where.sum()) for _, where, _ in heads]
        if lockstep:  # a head runs even where no process has use for it, so that its gradient is 0
            chunks = [max(1, most) for most in most_chunks(*counts)]
        else:
            chunks = [min(1, count) for count in counts]
        for (head, where, offset), parts in zip(heads, chunks, strict=True):
            if not parts:
                continue
            arguments = (hidden[where], targets[where] - offset, temperature)
            sums = sums.index_add(0, answers[:, 1:][where], position_scores(head, *arguments, parts))
        return AnswerScores(*sums.unbind(1))

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
