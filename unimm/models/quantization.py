"""Weight-only int8: linear layers that hold int8 weights and a scale for each output row.

Generation at small batches waits for weights to come from memory, and int8 is a quarter of float32. Measured on one
core of an AVX-512 CPU, 2048 x 5632 weights, one row: float32 4.2 ms, bfloat16 6.1 ms; torchao 0.18 without
torch.compile 53 ms (8.1 ms on bfloat16 inputs), since it makes floats of the weights at every call; torch's own kernel
(`torch._weight_int8pack_mm`) 21 ms on float32 inputs, 1.8 ms on bfloat16 ones. So torch's kernel it is, on inputs
rounded to bfloat16, which adds little to the error of the int8 weights (0.83 % to 0.89 %). For hundreds of rows it is
slower than making floats of the weights once, which prompts therefore do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.errors import UserError

METHODS = ("int8",)
SHORT = 4  # positions of a step up to which the kernel runs; a prompt has more, whatever it says
LARGE = 2**16  # weights from which a head is worth quantising
KERNEL_MULTIPLE = 64  # inputs must be a multiple of this for the kernel
LEVELS = 127  # largest int8 value used, so that the range is symmetric


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, y = (W8 x) · scale + bias.

    Args:
        quantised: int8 [O, I].
        scale: bfloat16 [O], what one step of a row's weights is worth.
        bias: [O], or None.
    """

    quantised: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, quantised: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantised.shape
        # Buffers, and none is named `weight`: nothing may take them for the weights of a linear layer.
        self.register_buffer("quantised", quantised)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a linear layer, each output row by its own largest weight."""
        weight = linear.weight.detach().float()
        # Rounded first, so that the weights make up for the scale's rounding.
        scale = (weight.abs().amax(1) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        quantised = (weight / scale.float()[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return cls(quantised, scale, None if linear.bias is None else linear.bias.detach())

    @classmethod
    def join(cls, layers: Sequence[Int8Linear]) -> Int8Linear:
        """Return one layer in place of several on the same inputs, their results joined."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers))
        return cls(
            torch.cat([layer.quantised for layer in layers]),
            torch.cat([layer.scale for layer in layers]),
            torch.cat(biases) if biases else None,
        )

    def rows(self, start: int, end: int) -> Int8Linear:
        """Return the layer of some outputs only; the weights are shared."""
        bias = None if self.bias is None else self.bias[start:end]
        return Int8Linear(self.quantised[start:end], self.scale[start:end], bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., O] for [..., I], in the inputs' number format.

        Which way it is computed depends on the positions (the last but one dimension), never on the batch, so
        that equal rows give equal results whatever else is in their batch.
        """
        short = inputs.ndim < 3 or inputs.shape[-2] <= SHORT
        if short and self._has_kernel(inputs):
            flat = inputs.reshape(-1, self.in_features).bfloat16()
            outputs = torch._weight_int8pack_mm(flat, self.quantised, self.scale.bfloat16()).to(inputs.dtype)
            outputs = outputs.view(*inputs.shape[:-1], self.out_features)
            return outputs if self.bias is None else outputs + self.bias.to(inputs.dtype)
        # float16 has too narrow a range for scales: its weights are made in float32
        scale = self.scale.to(torch.promote_types(inputs.dtype, torch.bfloat16))
        weight = (self.quantised * scale[:, None]).to(inputs.dtype)
        return F.linear(inputs, weight, None if self.bias is None else self.bias.to(inputs.dtype))

    def _has_kernel(self, inputs: Tensor) -> bool:
        """Whether torch's kernel takes these inputs: on CPUs, without gradients, rows of whole vectors."""
        return (
            inputs.device.type == "cpu"
            and not (inputs.requires_grad and torch.is_grad_enabled())
            and self.in_features % KERNEL_MULTIPLE == 0
            and hasattr(torch, "_weight_int8pack_mm")
        )

    def extra_repr(self) -> str:
        """Say the sizes, as `nn.Linear` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def check_method(method: str | None) -> None:
    """Check the name of a way to quantise; None is none.

    Raises:
        UserError: an unknown name.
    """
    if method is not None and method not in METHODS:
        raise UserError(f"quantize: {method!r}; use {' or '.join(METHODS)}, or leave it out")


def is_quantised(module: nn.Module) -> bool:
    """Whether any layer of a module holds int8 weights."""
    return any(isinstance(layer, Int8Linear) for layer in module.modules())


def quantise_linears(module: nn.Module, keep: Sequence[nn.Module] = ()) -> None:
    """Put an `Int8Linear` in the place of every linear layer inside a module, one after the other.

    Args:
        module: changed in place.
        keep: layers to leave alone.
    """
    found = [
        (parent, name)
        for parent in module.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and not any(layer is kept for kept in keep)
    ]
    for parent, name in found:
        setattr(parent, name, Int8Linear.of(getattr(parent, name)))


def some_rows(head: nn.Module, hidden: Tensor, start: int, end: int) -> Tensor:
    """Return outputs `start` to `end` of a linear layer, [..., end - start], without computing the others."""
    if isinstance(head, Int8Linear):
        outputs: Tensor = head.rows(start, end)(hidden)
        return outputs
    if not isinstance(head, nn.Linear):  # one with an adapter, which is more than its weight
        whole: Tensor = head(hidden)
        return whole[..., start:end]
    return F.linear(hidden, head.weight[start:end], None if head.bias is None else head.bias[start:end])
