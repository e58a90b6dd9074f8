"""Near ties settled in float64, so that a drawing does not depend on how it was computed.

Logits in float32 differ in their last bits with the shape of a pass: the rows beside, the places looked at in one
pass, the CPU. Where that could turn a choice (about once in a hundred images), the row is read again in float64, whose
own rounding is too small to matter. So every way of sampling gives what float64 would give, code for code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unimm.models.modeling import UniMMModel
from unimm.models.placing import is_spread
from unimm.models.quantization import is_quantised
from unimm.sampling.cache import RowCache, RowsAt
from unimm.sampling.decoder import Layer, LlamaRunner, Runner
from unimm.sampling.looking import RowMemory, looking_of
from unimm.sampling.slots import SlotRow

_KEPT = 2**26  # weights up to which the layers' copies in float64 are kept


class Exact:
    """A model in float64, made when it is first asked.

    Args:
        model: in float32.
    """

    def __init__(self, model: UniMMModel) -> None:
        self.model = model
        self._copy: UniMMModel | None = None
        self._runner: Runner | None = None

    @staticmethod
    def runs(model: UniMMModel) -> bool:
        """Whether a model's choices can be settled: its weights are float32, and a copy is not too large."""
        decoder = model.decoder.get_decoder()
        small = LlamaRunner.runs(decoder) or sum(p.numel() for p in decoder.parameters()) <= _KEPT
        has_float64 = model.device.type != "mps"
        return (
            model.dtype == torch.float32
            and has_float64
            and not is_quantised(model)
            and not is_spread(model)
            and small
        )

    def hidden(self, row: ExactRow) -> Tensor:
        """Return the last hidden state float64 [C] of a row.

        Args:
            row: what the row holds.
        """
        model, runner = self._prepared()
        device = self.model.device
        ids = torch.tensor([row.ids], device=device)
        embedded = model.embed(ids, row.images)
        stream = torch.cat([embedded.stream[0], *self._drawn(model, row)])
        cache = RowCache(runner.layers_count)
        cache.reserve(1, len(stream))
        at = RowsAt(0, [0], len(stream), device)
        places = None if row.places is None else row.places[:, None]
        looking = None
        if model.fusion is not None and embedded.memory is not None:
            memory = RowMemory(model.fusion.read(embedded.memory.states), embedded.memory.visible[0])
            looking = looking_of(model.fusion, [memory], at.positions)
        return runner(cache, at, stream[None], places, looking)[0, -1]

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Return the code logits float64 [K]."""
        return self._prepared()[0].code_logits(hidden)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Return the text logits float64 [V]."""
        logits: Tensor = self._prepared()[0].decoder.get_output_embeddings()(hidden)
        return logits

    @staticmethod
    def _drawn(model: UniMMModel, row: ExactRow) -> list[Tensor]:
        """Return the steps of a drawing up to now [t, C]: its codes, and the tokens that are forced between them."""
        if not row.steps:
            return []
        steps = torch.tensor(row.steps, device=model.device)
        stream: Tensor = model.get_input_embeddings()(steps.where(steps != model.layout.code, 0))
        if row.codes:
            codes = torch.tensor(row.codes, device=model.device)
            stream = stream.clone()
            stream[steps == model.layout.code] = model.embed_codes(codes[None])[0]
        return [stream]

    def _prepared(self) -> tuple[UniMMModel, Runner]:
        if self._copy is None or self._runner is None:
            decoder = self.model.decoder.get_decoder()
            layered = LlamaRunner.runs(decoder)
            memo: dict[int, Any] = {id(self.model.image_tokenizer): None}
            if layered:
                memo[id(decoder.layers)] = nn.ModuleList()
            self._copy = copy.deepcopy(self.model, memo).double().eval()
            own = self._copy.decoder.get_decoder()
            self._runner = LlamaRunner(own, _DoubleLayers(decoder.layers)) if layered else Runner(own)
        return self._copy, self._runner


class ExactRow:
    """What a row holds, as the model takes it.

    Args:
        ids: its tokens up to the drawing's first code, or up to now.
        steps: the steps of the drawing up to now, see `ImageLayout.drawing_steps`; None in an answer.
        codes: the codes among them.
        line: the row that it is, which knows its positions.
    """

    def __init__(
        self, line: SlotRow, ids: list[int], steps: list[int] | None = None, codes: list[int] | None = None
    ) -> None:
        self.ids, self.images, self.steps, self.codes = ids, line.images, steps, codes or []
        length = len(ids) + len(steps or ())
        self.places = None if line.places is None else line.positions(0, length)


class _DoubleLayers:
    """A decoder's layers in float64: kept if they are small, else each made when it is its turn."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        small = sum(p.numel() for p in layers.parameters()) <= _KEPT
        self.made = [Layer(copy.deepcopy(layer).double(), joined=True) for layer in layers] if small else None

    def __iter__(self) -> Iterator[Layer]:
        if self.made is not None:
            yield from self.made
            return
        for layer in self.layers:
            yield Layer(copy.deepcopy(layer).double(), joined=False)
