"""What this package must know about a transformers architecture.

Floor 0: where a model keeps its decoder layers and which ids stand for visual tokens. An architecture is an entry in
a table; nothing outside this file asks for a model's type.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "attention_implementation",
    "attention_modules",
    "check_supported",
    "decoder",
    "decoder_layers",
    "visual_token_ids",
]


@dataclass(frozen=True)
class Architecture:
    """Where an image-text-to-text architecture keeps what guidance and pruning need.

    Attributes:
        visual_token_attributes (`tuple` of `str`): The configuration's attributes that hold the ids of visual tokens.
        layers_attribute (`str`): The attribute of `model.get_decoder()` that holds the decoder layers.
        attention_attribute (`str`): The attribute of a decoder layer that holds its self-attention.
        per_tile_inputs (`tuple` of `str`): Model inputs that hold one row for each image tile of the whole batch.
    """

    visual_token_attributes: tuple[str, ...] = ("image_token_id",)
    layers_attribute: str = "layers"
    attention_attribute: str = "self_attn"
    per_tile_inputs: tuple[str, ...] = ("pixel_values",)


ARCHITECTURES: dict[str, Architecture] = {
    # InternVL3, InternVL3.5 and the converted InternVL2.5: a decoder over placeholder tokens, nothing special.
    "internvl": Architecture(),
}


# Attention functions that are handed a block mask or a paged cache, which can neither be recorded nor cut.
_UNSUPPORTED_ATTENTION = ("flex_attention", "paged")


def check_supported(config: PreTrainedConfig) -> Architecture:
    """The table's entry for a model, if guidance and pruning are known to be right for it.

    Args:
        config (`PreTrainedConfig`): The model's configuration.

    Returns:
        `Architecture`: The entry.

    Raises:
        ValueError: If the architecture, or its text decoder's kind of attention, is not supported.
    """
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Models of type {config.model_type!r} are not supported, because guidance and pruning have not been "
            f"verified on them: use one of {', '.join(map(repr, sorted(ARCHITECTURES)))}."
        )
    layer_types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ValueError(
            f"The text decoder of this {config.model_type!r} model has layers of the types {sorted(layer_types)}, but "
            "importance and pruning need every layer to attend to the whole prompt: use a model whose decoder has "
            "only 'full_attention' layers."
        )
    return ARCHITECTURES[config.model_type]


def visual_token_ids(config: PreTrainedConfig) -> tuple[int, ...]:
    """The token ids that stand for visual tokens in a model's prompts.

    Args:
        config (`PreTrainedConfig`): The model's configuration.

    Returns:
        `tuple` of `int`: The ids.
    """
    return tuple(getattr(config, name) for name in check_supported(config).visual_token_attributes)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder of a vision-language model, without the language modelling head.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `PreTrainedModel`: The decoder.
    """
    check_supported(model.config)
    return model.get_decoder()


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that a model's decoder uses.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `str`: `"sdpa"`, `"eager"`, `"flash_attention_2"` or another that guidance and pruning can work with.

    Raises:
        ValueError: If they cannot work with it.
    """
    name: str = decoder(model).config._attn_implementation
    if any(unsupported in name for unsupported in _UNSUPPORTED_ATTENTION):
        raise ValueError(
            f"Guidance and pruning do not work with attn_implementation={name!r}, whose masks and caches they cannot "
            "read: load the model with 'sdpa', 'flash_attention_2' or 'eager'."
        )
    return name


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a vision-language model, first to last.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `nn.ModuleList`: The layers.
    """
    return getattr(decoder(model), check_supported(model.config).layers_attribute)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a model's decoder layers, first to last.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `list` of `nn.Module`: One module per layer.
    """
    attribute = check_supported(model.config).attention_attribute
    return [getattr(layer, attribute) for layer in decoder_layers(model)]
