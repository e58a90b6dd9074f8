"""Whether a model's weights are still those that an engine has copied or computed with."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from unimm.models.modeling import UniMMModel

SAMPLED = 24  # tensors of a model of which a few values tell whether they have changed


class WeightsNow:
    """What a model's weights are now, so that a change is seen: what was copied or held would be stale.

    Args:
        model: of which all but the image tokenizer is looked at.
    """

    def __init__(self, model: UniMMModel) -> None:
        self.model = model
        self.tensors = [
            tensor
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
            if not name.startswith("image_tokenizer.") and tensor.numel()
        ]
        # Writing to `.data` leaves no trace but the values; whatever trains or merges changes many tensors.
        self.sampled = self.tensors[:: max(1, len(self.tensors) // SAMPLED)]
        self.before = self._now()

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        return self._now() == self.before

    def _now(self) -> tuple[object, ...]:
        modules = [id(module) for layer in self._layers() for module in layer.modules()]
        with torch.no_grad():
            some = [t.reshape(-1)[:: max(1, t.numel() // 8)].float().sum() for t in self.sampled]
            sums: list[float] = torch.stack(some).tolist()
        return (*modules, *(t.data_ptr() for t in self.tensors), *(_version(t) for t in self.tensors), *sums)

    def _layers(self) -> Iterable[torch.nn.Module]:
        layers: Iterable[torch.nn.Module] = getattr(self.model.decoder.get_decoder(), "layers", ())
        return layers


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; tensors of inference do not count."""
    return 0 if tensor.is_inference() else tensor._version
