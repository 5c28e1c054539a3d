"""Attention functions, and the arguments of decoder layers and their attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from transformers_sgl.transformers_interface.lookup import changed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

__all__ = [
    "PER_TOKEN_ARGUMENTS",
    "AnyAttention",
    "attention_function",
    "attention_name",
    "is_attention",
    "keep_attention_names",
    "needs_position_ids",
    "register_attention",
    "set_attention_name",
]

PER_TOKEN_ARGUMENTS = {"position_embeddings": -2, "position_ids": -1}
"""The keyword arguments of decoder layers that hold one row per token, and along which dimension.

Assumes that layers are handed these, `hidden_states` and `attention_mask` for each token, and nothing else; what a
single architecture adds stands in the table of architectures. Without it, kept tokens lose their positions.
"""


def attention_name(config: PreTrainedConfig) -> str:
    """The name of the attention function that the modules with this configuration use.

    Assumes `config._attn_implementation`, and that it is read at every call. Without it, nothing can be recorded.
    """
    try:
        name: str = config._attn_implementation
    except AttributeError as error:
        raise changed("`_attn_implementation` on a configuration") from error
    return name


def set_attention_name(config: PreTrainedConfig, name: str | None) -> None:
    """Changes the attention function of the modules with this configuration, and of no others.

    Assumes what `attention_name` assumes. The public `set_attn_implementation` changes other configurations too, and
    knows only names that it could have loaded.
    """
    config._attn_implementation = name


def keep_attention_names(config: PreTrainedConfig, names: dict[str, Any]) -> None:
    """Lets `attention_name` return a choice for the parts of a model that this configuration does not describe yet.

    Assumes that it is stored as `_attn_implementation_internal`. Without it, a choice for parts is lost where a recipe
    is loaded through an Auto class.
    """
    config._attn_implementation_internal = names


def attention_function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of that name.

    Assumes that all are registered but "eager", which each modeling file defines as `eager_attention_forward`. Without
    it, eager attention cannot be recorded.
    """
    from transformers import AttentionInterface

    if name != "eager":
        return AttentionInterface()[name]
    file = sys.modules[type(module).__module__]
    if not hasattr(file, "eager_attention_forward"):
        raise changed(f"`eager_attention_forward` beside `{type(module).__name__}`")
    return file.eager_attention_forward


def register_attention(name: str, function: Callable[..., Any], like: str) -> None:
    """Registers an attention function whose masks are those of the function `like`, unless it is known already.

    Assumes that what is registered can be read again from `AttentionInterface()` and `AttentionMaskInterface()`.
    Without it, nothing can be recorded.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if name not in AttentionInterface():
        AttentionMaskInterface.register(name, AttentionMaskInterface()[like])
        AttentionInterface.register(name, function)


class AnyAttention:
    """Mixin for a model that leaves the choice of attention function to the models inside it.

    Assumes that `from_pretrained` reads these class attributes. Without them, it refuses `attn_implementation`.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


def is_attention(module: nn.Module) -> bool:
    """Whether a module of a decoder layer attends to other tokens.

    Assumes that attention has the attribute `is_causal`, and that linear attention and convolutions do not.
    Without it, the one is taken for the other.
    """
    return hasattr(module, "is_causal")


def needs_position_ids(attention: nn.Module) -> bool:
    """Whether an attention module reads position ids itself, besides handing them on.

    Assumes that such a module names them in its `forward`, without a default. Without it, flash attention would take
    gaps between positions for the borders of several prompts.
    """
    parameter = signature(type(attention).forward).parameters.get("position_ids")
    return parameter is not None and parameter.default is Parameter.empty
