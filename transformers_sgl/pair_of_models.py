"""Which of the two models does what a caller asks of a pair: the large one, both, or neither."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from types import MethodType
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from transformers_sgl.storage.checkpoints import PARTS, attention_of
from transformers_sgl.storage.models import has_weights

__all__ = ["PairOfModels", "device_map", "with_signature_of_large"]

_Pair = TypeVar("_Pair", bound="PairOfModels")


class _OfLarge:
    """An attribute that is the large model's own: read and set there, and missing where the large model lacks it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pair: Any, owner: type) -> Any:
        return self if pair is None else getattr(pair.large, self.name)

    def __set__(self, pair: Any, value: Any) -> None:
        setattr(pair.large, self.name, value)


class PairOfModels(PreTrainedModel):
    """A model of a large and a small one. What is trained, and what is read from outside, is the large one.

    Whatever is neither here nor in the pair's own class is inherited and concerns both, as `train`, `parameters` and
    `gradient_checkpointing_enable` do.
    """

    large: PreTrainedModel
    small: PreTrainedModel

    # Its parts.
    base_model = _OfLarge()
    get_decoder = _OfLarge()
    set_decoder = _OfLarge()
    get_encoder = _OfLarge()
    set_encoder = _OfLarge()
    get_input_embeddings = _OfLarge()
    set_input_embeddings = _OfLarge()
    get_output_embeddings = _OfLarge()
    set_output_embeddings = _OfLarge()
    get_position_embeddings = _OfLarge()
    resize_position_embeddings = _OfLarge()
    resize_token_embeddings = _OfLarge()
    vocab_size = _OfLarge()

    # What it does with inputs.
    can_record_outputs = _OfLarge()
    get_image_features = _OfLarge()
    loss_function = _OfLarge()
    prepare_inputs_for_generation = _OfLarge()
    warn_if_padding_and_no_attention_mask = _OfLarge()

    # Its adapters.
    active_adapters = _OfLarge()
    add_adapter = _OfLarge()
    delete_adapter = _OfLarge()
    disable_adapters = _OfLarge()
    enable_adapters = _OfLarge()
    enable_peft_hotswap = _OfLarge()
    get_adapter_state_dict = _OfLarge()
    load_adapter = _OfLarge()
    set_adapter = _OfLarge()

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the large model, or to the small one where only that has weights."""
        return next((model for model in self._models() if has_weights(model)), self.large).device

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether both models do."""
        return all(getattr(self, name).supports_gradient_checkpointing for name in PARTS)

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Changes the attention of both models.

        A dictionary says it for their parts (`{"text_config": "eager"}`), or for each model (`{"large_config": ...}`).
        """
        if isinstance(attn_implementation, str):
            super().set_attn_implementation(attn_implementation, *args, **kwargs)
            return
        if "" in attn_implementation:  # as in any composite model, what is meant for none of its parts
            super().set_attn_implementation({"": attn_implementation[""]}, *args, **kwargs)
        for name in PARTS:
            getattr(self, name).set_attn_implementation(attention_of(name, attn_implementation), *args, **kwargs)

    def dequantize(self, dtype: Any = None) -> None:
        """Dequantizes each model that is quantized; raises `ValueError` if neither is."""
        quantized = [model for model in self._models() if getattr(model, "hf_quantizer", None) is not None]
        if not quantized:
            raise ValueError("Neither model of the pair is quantized, so there is nothing to dequantize.")
        for model in quantized:
            model.dequantize(dtype)

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
        for model in sorted(self._models(), key=lambda model: not _may_refuse(model)):
            getattr(model, method)(*args, **kwargs)
        return self

    def _models(self) -> list[PreTrainedModel]:
        return [getattr(self, name) for name in PARTS]


class with_signature_of_large:  # noqa: N801
    """Decorates a method of a pair: an instance's has the signature of the large model's method of the same name.

    `Trainer`, for example, reads there which columns of a data set a model takes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __get__(self, pair: Any, owner: type) -> Any:
        large = None if pair is None else getattr(pair, "large", None)
        if large is None:
            return self.function if pair is None else MethodType(self.function, pair)
        return MethodType(_with_signature(self.function, getattr(type(large), self.function.__name__)), pair)


@cache
def _with_signature(function: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """The same method with another one's signature."""
    others = signature(other)

    @wraps(function)
    def same(pair: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            _, *names = others.bind_partial(pair, *args).arguments
            return function(pair, **dict(zip(names, args, strict=True)), **kwargs)
        return function(pair, **kwargs)

    del same.__wrapped__  # accelerate takes what is wrapped for the original, to which it goes back
    same.__signature__ = others  # type: ignore[attr-defined]
    return same


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
