"""Moves and casts the two models of a pair as one."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from transformers_sgl.storage.checkpoints import PARTS

__all__ = ["PairOfModels", "device_map"]

_Pair = TypeVar("_Pair", bound="PairOfModels")


class PairOfModels:
    """Mixin for a model of a large and a small one: both move together; decoder and embeddings are the large one's."""

    large: PreTrainedModel
    small: PreTrainedModel

    def to(self: _Pair, *args: Any, **kwargs: Any) -> _Pair:
        """Moves or casts both models, or neither where one refuses because it is quantized or offloaded."""
        return self._both("to", *args, **kwargs)

    def cuda(self: _Pair, *args: Any, **kwargs: Any) -> _Pair:
        """Moves both models to a CUDA device; see `to`."""
        return self._both("cuda", *args, **kwargs)

    def half(self: _Pair, *args: Any) -> _Pair:
        """Casts both models to float16; see `to`."""
        return self._both("half", *args)

    def float(self: _Pair, *args: Any) -> _Pair:
        """Casts both models to float32; see `to`."""
        return self._both("float", *args)

    def _both(self: _Pair, method: str, *args: Any, **kwargs: Any) -> _Pair:
        """Calls a method of both models, first of one that may refuse."""
        models = [getattr(self, name) for name in PARTS]
        for model in sorted(models, key=lambda model: not _may_refuse(model)):
            getattr(model, method)(*args, **kwargs)
        return self

    def get_decoder(self) -> nn.Module:
        """The large model's text decoder."""
        return self.large.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The large model's token embeddings."""
        return self.large.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The large model's language modelling head."""
        return self.large.get_output_embeddings()


def device_map(**models: PreTrainedModel) -> dict[str, Any]:
    """Where the modules of a pair lie, as accelerate tells it of one model; empty if it placed neither.

    Pipelines take the first entry for the device of the inputs, so "disk" comes last.
    """
    maps = {name: getattr(model, "hf_device_map", None) for name, model in models.items()}
    if not any(maps.values()):
        return {}
    placed = {
        f"{name}.{module}".rstrip("."): device
        for name, model in models.items()
        for module, device in (maps[name] or {"": model.device}).items()
    }
    return dict(sorted(placed.items(), key=lambda entry: entry[1] == "disk"))


def _may_refuse(model: PreTrainedModel) -> bool:
    """Whether a model may refuse to be moved or cast."""
    return bool(getattr(model, "is_quantized", False)) or any(
        each.device.type == "meta" for each in model.parameters()
    )
