"""Weight-only int8 and int4: linear layers that hold small weights, and what one step of them is worth.

Generation at small batches waits for weights to come from memory: int8 is a quarter of float32, int4 a seventh. The
fastest ways differ, by measure on one core of an AVX-512 CPU.

Int8 has a scale for each output row. 2048 x 5632 weights, one row: float32 4.2 ms, bfloat16 6.1 ms; torchao 0.18
without torch.compile 53 ms (8.1 ms on bfloat16 inputs), since it makes floats of the weights at every call; torch's
own kernel (`torch._weight_int8pack_mm`) 21 ms on float32 inputs, 1.8 ms on bfloat16 ones. So torch's kernel it is, on
inputs rounded to bfloat16, which adds little to the error of the int8 weights (0.83 % to 0.89 %). For hundreds of rows
it is slower than making floats of the weights once, which prompts therefore do.

Int4 has a scale and an offset for each group of 64 inputs. Milliseconds on a newer core, with bfloat16 instructions:

    2048 x 5632, rows                       1      2      4     16    300
    float32                              1.63   3.36   6.16   7.41    136
    bfloat16                             0.33   0.78   0.97   1.62     32
    int8, torch's kernel, bfloat16       0.25   0.33   0.50   2.01     83
    int4, torch's kernel, float32        21.6   75.9    217    853  16214
    int4, torch's kernel, bfloat16       0.29   0.36   0.52   2.12     98
    int4 to float32, then float32         128     41    142     39    335
    int4 to bfloat16, then bfloat16        21     22     22     20     67

    256 x 768, rows                         1      2      4     16    300
    float32                             0.010  0.019  0.029  0.072   1.11
    int8, torch's kernel, bfloat16      0.006  0.007  0.011  0.040   0.73
    int4, torch's kernel, bfloat16      0.006  0.007  0.010  0.038   0.69
    int4 to bfloat16, then bfloat16     0.198  0.207  0.207  0.220   0.45

Groups of 32 and 128 take the same time. torchao 0.18 has no int4 for CPUs without further packages. So it is torch's
kernel again (`torch._weight_int4pack_mm_for_cpu`), for prompts too, up to some hundred positions. Its layout of weights
depends on the CPU: blocks of 64 rows with AVX-512, of 32 with AVX2. Weights are held in that of the CPU, once.

An offset costs the kernel nothing and brings the logits nearer (embedded model, codes: 15.5 % off with, 17.5 %
without), as a smaller range does where it leaves less error (15.2 %). Groups of 128 are at 16.4 %, of 32 at 12.8 % for
half a bit more. Heads stay int8: with int4 heads the unguided logits are 9.6 % off in place of 6.9 %.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.errors import UserError
from unimm.sections import FieldError, Section

METHODS = ("int8", "int4")
SHORT = 4  # positions of a step up to which every kernel runs; a prompt has more, whatever it says
LARGE = 2**16  # weights from which a head is worth quantising
KERNEL_MULTIPLE = 64  # inputs must be a multiple of this for the int8 kernel
LEVELS = 127  # largest int8 value used, so that the range is symmetric
ALIGNED = 64  # bytes at a multiple of which the weights of kernels begin
GROUP = 64  # inputs that share a scale and an offset in int4
STORED_BLOCK = 64  # rows of a block of int4 weights in files
CLIPS = (1.0, 0.92, 0.84)  # shares of a group's range that int4 tries


class SmallWeights(Section):
    """`quantization` of a `config.json`: which weights the linear layers hold."""

    method: Literal["int8", "int4"]
    group_size: Literal[32, 64, 128, 256] | None = None

    @model_validator(mode="after")
    def _complete(self) -> SmallWeights:
        if (self.method == "int4") != (self.group_size is not None):
            raise FieldError("group_size: expected with int4, and there alone")
        return self

    @classmethod
    def of(cls, method: str) -> SmallWeights:
        """Return the description of a model that is quantised in this way."""
        return cls.model_validate({"method": method} | ({"group_size": GROUP} if method == "int4" else {}))


class QuantisedLinear(nn.Module, ABC):
    """A linear layer with small weights, y = (W x) + bias.

    Args:
        quantised: the weights.
        scale: bfloat16, what they are worth.
        bias: [O], or None.
        features: O and I.
    """

    longest: ClassVar[int]
    """Positions of an input up to which the kernel runs."""
    quantised: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, quantised: Tensor, scale: Tensor, bias: Tensor | None, features: tuple[int, int]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = features
        # Buffers, and none is named `weight`: nothing may take them for the weights of a linear layer.
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @abstractmethod
    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [O, I] in a number format of no less range than bfloat16."""

    @abstractmethod
    def multiply(self, inputs: Tensor) -> Tensor:
        """Return W x, bfloat16 [N, O] for bfloat16 [N, I], by torch's kernel."""

    @abstractmethod
    def has_kernel(self) -> bool:
        """Whether there is a kernel for weights of this shape on CPUs."""

    @abstractmethod
    def rows(self, start: int, end: int) -> QuantisedLinear:
        """Return the layer of some outputs only."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., O] for [..., I], in the inputs' number format.

        Which way it is computed depends on the positions (the last but one dimension), never on the batch, so
        that equal rows give equal results whatever else is in their batch.
        """
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        short = inputs.ndim < 3 or inputs.shape[-2] <= self.longest
        wants_gradient = inputs.requires_grad and torch.is_grad_enabled()
        if short and inputs.device.type == "cpu" and not wants_gradient and self.has_kernel():
            if self.quantised.data_ptr() % ALIGNED:  # as in the middle of a mapped file: kernels crash on it
                self.quantised = self.quantised.clone()
            outputs = self.multiply(inputs.reshape(-1, self.in_features).bfloat16()).to(inputs.dtype)
            outputs = outputs.view(*inputs.shape[:-1], self.out_features)
            return outputs if bias is None else outputs + bias
        # float16 has too narrow a range for scales: its weights are made in float32
        weights = self.weights(torch.promote_types(inputs.dtype, torch.bfloat16))
        return F.linear(inputs, weights.to(inputs.dtype), bias)

    def extra_repr(self) -> str:
        """Say the sizes, as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class Int8Linear(QuantisedLinear):
    """A linear layer with int8 weights [O, I] and a scale [O] for each output."""

    longest = SHORT

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a linear layer, each output row by its own largest weight."""
        weight = linear.weight.detach().float()
        # Rounded first, so that the weights make up for the scale's rounding.
        scale = (weight.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        quantised = (weight / scale.float()[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return cls(quantised, scale, _bias(linear), (weight.shape[0], weight.shape[1]))

    @classmethod
    def like(cls, linear: nn.Linear) -> Int8Linear:
        """Return a layer of the same shape, to be filled."""
        weight = linear.weight
        scale = torch.empty(weight.shape[0], dtype=torch.bfloat16, device=weight.device)
        return cls(
            torch.empty_like(weight, dtype=torch.int8),
            scale,
            _bias(linear),
            (weight.shape[0], weight.shape[1]),
        )

    @classmethod
    def join(cls, layers: Sequence[Int8Linear]) -> Int8Linear:
        """Return one layer in place of several on the same inputs, their results joined."""
        quantised = torch.cat([layer.quantised for layer in layers])
        scale = torch.cat([layer.scale for layer in layers])
        return cls(quantised, scale, _joined_bias(layers), (len(quantised), layers[0].in_features))

    def rows(self, start: int, end: int) -> Int8Linear:
        """Return the layer of some outputs only; the weights are shared."""
        bias = None if self.bias is None else self.bias[start:end]
        return Int8Linear(
            self.quantised[start:end], self.scale[start:end], bias, (end - start, self.in_features)
        )

    def weights(self, dtype: torch.dtype) -> Tensor:
        """See `QuantisedLinear`."""
        return self.quantised * self.scale.to(dtype)[:, None]

    def multiply(self, inputs: Tensor) -> Tensor:
        """See `QuantisedLinear`."""
        return torch._weight_int8pack_mm(inputs, self.quantised, self.scale.bfloat16())

    def has_kernel(self) -> bool:
        """See `QuantisedLinear`: rows of whole vectors have."""
        return self.in_features % KERNEL_MULTIPLE == 0 and hasattr(torch, "_weight_int8pack_mm")


class Int4Linear(QuantisedLinear):
    """A linear layer with int4 weights in groups of inputs, w = (level - 8) · scale + offset.

    `quantised` is uint8 [blocks, I, block / 2] as `pack_levels` makes it; `scale` is [groups, O, 2], scales and
    offsets. O is filled up to a multiple of 64 there, I to one of the group.
    """

    longest = 256

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear, group: int = GROUP) -> Int4Linear:
        """Quantise a linear layer, each group by its own range, or the part of it that leaves the least error."""
        found = [_nearest(_filled(part.float(), group), group) for part in linear.weight.detach().split(256)]
        levels, scale = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cls._packed(levels, scale.transpose(0, 1), _bias(linear), linear.in_features)

    @classmethod
    def like(cls, linear: nn.Linear, group: int = GROUP) -> Int4Linear:
        """Return a layer of the same shape, to be filled."""
        outputs, inputs = linear.weight.shape
        rows, columns = _multiple(outputs, STORED_BLOCK), _multiple(inputs, group)
        device = linear.weight.device
        blocks = (rows // STORED_BLOCK, columns, STORED_BLOCK // 2)
        quantised = torch.empty(blocks, dtype=torch.uint8, device=device)
        scale = torch.empty(columns // group, rows, 2, dtype=torch.bfloat16, device=device)
        return cls(quantised, scale, _bias(linear), (outputs, inputs))

    @classmethod
    def _packed(cls, levels: Tensor, scale: Tensor, bias: Tensor | None, inputs: int) -> Int4Linear:
        """Return the layer of levels [O, I] and scales [groups, O, 2], both with all their groups but no blocks."""
        outputs = len(levels)
        missing = _multiple(outputs, STORED_BLOCK) - outputs
        levels, scale = F.pad(levels, (0, 0, 0, missing)), F.pad(scale, (0, 0, 0, missing))
        return cls(pack_levels(levels, STORED_BLOCK), scale.contiguous(), bias, (outputs, inputs))

    @classmethod
    def join(cls, layers: Sequence[Int4Linear]) -> Int4Linear:
        """Return one layer in place of several on the same inputs, their results joined."""
        levels = torch.cat([unpack_levels(layer.quantised)[: layer.out_features] for layer in layers])
        scale = torch.cat([layer.scale[:, : layer.out_features] for layer in layers], dim=1)
        return cls._packed(levels, scale, _joined_bias(layers), layers[0].in_features)

    def rows(self, start: int, end: int) -> Int4Linear:
        """Return the layer of some outputs only."""
        block = 2 * self.quantised.shape[2]
        first = start // block
        levels = unpack_levels(self.quantised[first : -(-end // block)])[
            start - first * block : end - first * block
        ]
        bias = None if self.bias is None else self.bias[start:end]
        return self._packed(levels, self.scale[:, start:end], bias, self.in_features)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """See `QuantisedLinear`."""
        levels = unpack_levels(self.quantised).to(dtype).sub_(8)
        scale, offset = self.scale.to(dtype).transpose(0, 1).split(1, dim=2)  # each [O, groups, 1]
        grouped = levels.view(len(levels), scale.shape[1], -1)
        whole = grouped.mul_(scale).add_(offset).view(levels.shape)
        return whole[: self.out_features, : self.in_features]

    def multiply(self, inputs: Tensor) -> Tensor:
        """See `QuantisedLinear`."""
        block = kernel_block()
        assert block is not None
        if block != 2 * self.quantised.shape[2]:
            self.quantised = pack_levels(unpack_levels(self.quantised), block)
        columns = self.quantised.shape[1]
        packed = self.quantised.view(self.scale.shape[1], columns // 2)
        outputs = torch._weight_int4pack_mm_for_cpu(
            _filled(inputs, columns), packed, columns // self.scale.shape[0], self.scale.bfloat16()
        )
        return outputs[:, : self.out_features]

    def has_kernel(self) -> bool:
        """See `QuantisedLinear`."""
        return kernel_block() is not None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write the blocks of files, whichever this CPU has."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}quantised"] = self._stored()

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        """Read the blocks of files."""
        self.quantised = self._stored()
        super()._load_from_state_dict(*args, **options)

    def _stored(self) -> Tensor:
        as_stored = 2 * self.quantised.shape[2] == STORED_BLOCK
        return self.quantised if as_stored else pack_levels(unpack_levels(self.quantised), STORED_BLOCK)


def pack_levels(levels: Tensor, block: int) -> Tensor:
    """Pack levels of 0 to 15, uint8 [O, I], into uint8 [O / block, I, block / 2].

    A byte holds an input's weights of two rows: the lower half of the bits that of a row of the block's first half, the
    upper that of the row as far into the second.
    """
    blocks = levels.view(-1, block, levels.shape[1]).transpose(1, 2)
    first, second = blocks.chunk(2, dim=2)
    return (first | second << 4).contiguous()


def unpack_levels(packed: Tensor) -> Tensor:
    """Undo `pack_levels`."""
    blocks = torch.cat([packed & 15, packed >> 4], dim=2).transpose(1, 2)
    return blocks.reshape(-1, packed.shape[1])


@functools.cache
def kernel_block() -> int | None:
    """Return how many rows a block of torch's int4 kernel has on this CPU; None where there is no such kernel."""
    levels = torch.arange(64 * 64, device="cpu").mul(2654435761).bitwise_right_shift(7).view(64, 64) % 16
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
    except (AttributeError, RuntimeError):
        return None
    blocks = (64, 32)
    return next((b for b in blocks if torch.equal(pack_levels(levels.byte(), b).view(64, -1), packed)), None)


def _nearest(weights: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the levels, uint8 [O, I], that are nearest to weights [O, I], and scales and offsets [O, groups, 2]."""
    grouped = weights.view(len(weights), -1, group)
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    best: list[Tensor] = []
    for clip in CLIPS:
        # Rounded first, so that the levels make up for the rounding of both.
        scale = (clip * (high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        offset = (clip * low + 8 * scale.float()).bfloat16()
        levels = ((grouped - offset.float()) / scale.float()).round().clamp(-8, 7)
        error = (levels * scale.float() + offset.float() - grouped).square().sum(2, keepdim=True)
        found = [error, (levels + 8).byte(), torch.cat([scale, offset], 2)]
        if best:
            better = error < best[0]
            found = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        best = found
    return best[1].view(weights.shape), best[2]


def _filled(inputs: Tensor, multiple: int) -> Tensor:
    """Fill rows up with zeros, to a multiple of some length."""
    missing = _multiple(inputs.shape[1], multiple) - inputs.shape[1]
    return F.pad(inputs, (0, missing)) if missing else inputs


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _joined_bias(layers: Sequence[QuantisedLinear]) -> Tensor | None:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers))
    return torch.cat(biases) if biases else None


MakeSmall = Callable[[nn.Linear], QuantisedLinear]
"""Makes a quantised layer of a linear one."""


def check_method(method: str | None) -> None:
    """Check the name of a way to quantise; None is none.

    Raises:
        UserError: an unknown name.
    """
    if method is not None and method not in METHODS:
        raise UserError(f"quantize: {method!r}; use {' or '.join(METHODS)}, or leave it out")


def is_quantised(module: nn.Module) -> bool:
    """Whether any layer of a module holds int8 or int4 weights."""
    return any(isinstance(layer, QuantisedLinear) for layer in module.modules())


def count_weights(module: nn.Module) -> int:
    """Return how many weights a module has, quantised or not."""
    small = [layer for layer in module.modules() if isinstance(layer, QuantisedLinear)]
    sizes = [layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in small]
    return sum(p.numel() for p in module.parameters()) + sum(sizes)


def quantise_linears(module: nn.Module, make: MakeSmall, keep: Sequence[nn.Module] = ()) -> None:
    """Put a quantised layer in the place of every linear layer inside a module, one after the other.

    Args:
        module: changed in place.
        make: returns it.
        keep: layers to leave alone.
    """
    found = [
        (parent, name)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and not any(layer is kept for kept in keep)
    ]
    for parent, name in found:
        setattr(parent, name, make(getattr(parent, name)))


def quantise_decoder(decoder: Any, head: MakeSmall, others: MakeSmall, tied: bool) -> None:
    """Put quantised layers in the place of a decoder's linear layers, and of a large head.

    Args:
        decoder: a causal language model of transformers, changed in place.
        head: makes that of its head.
        others: makes those of its other layers.
        tied: whether the head shares its weights with the embedding, and so stays.
    """
    own = decoder.get_output_embeddings()
    if not tied and own.weight.numel() >= LARGE:
        decoder.set_output_embeddings(head(own))
    quantise_linears(decoder, others, keep=[own])


def quantise_large(layers: nn.Sequential, make: MakeSmall) -> None:
    """Put quantised layers in the place of the large ones of a few."""
    small = [layer for layer in layers if sum(p.numel() for p in layer.parameters()) < LARGE]
    quantise_linears(layers, make, keep=small)


def some_rows(head: nn.Module, hidden: Tensor, start: int, end: int) -> Tensor:
    """Return outputs `start` to `end` of a linear layer, [..., end - start], without computing the others."""
    if isinstance(head, QuantisedLinear):
        outputs: Tensor = head.rows(start, end)(hidden)
        return outputs
    if not isinstance(head, nn.Linear):  # one with an adapter, which is more than its weight
        whole: Tensor = head(hidden)
        return whole[..., start:end]
    return F.linear(hidden, head.weight[start:end], None if head.bias is None else head.bias[start:end])
