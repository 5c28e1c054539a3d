"""Sorts the arguments of a `generate` call: settings, both models' inputs, and what only stock `generate` reads."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from transformers_sgl.generation_config_sgl import SGLGenerationConfig, preset_settings
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.transformers_interface import CACHE_NAMES, default_settings, with_installed_cache_name

__all__ = ["read_answer_arguments", "read_arguments", "split_inputs"]

_SMALL_PREFIX = "small_"
# Arguments of stock `generate` that are neither settings nor model inputs.
_GENERATE_ARGUMENTS = {*signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer"}
_GENERATE_ARGUMENTS -= {"self", "inputs", "generation_config", "kwargs"}
# Settings that say what is returned, and nothing about the answer.
_FORM = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Our own settings that a call can unset.
_MAY_BE_NONE = ("vision_prune_layer", "confirmation_threshold", "unsure_threshold")
# Plain inputs that the large model alone understands: what one of its parts has computed.
_LARGE_ONLY = (*CACHE_NAMES, "inputs_embeds", "mm_encoder_outputs")


def read_arguments(
    inputs: Tensor | None,
    generation_config: GenerationConfig | None,
    kwargs: dict[str, Any],
    model: GenerationConfig,
) -> tuple[SGLGenerationConfig, dict[str, Any], dict[str, Any]]:
    """The resolved settings, the model inputs and the remaining arguments of a call that looks like stock `generate`.

    Single settings among `kwargs` win over those of a `preset`, and these over `generation_config`; what is `None` in
    it comes from the `model`'s own settings. As in stock `generate`, a setting that is `None` among `kwargs` is unset;
    one of this package's own is as if it were not passed, but `early_exit_threshold=None` means never to exit,
    `vision_prune_layer=None` to leave out whole tiles, `confirmation_threshold=None` to let pruned answers stand, and
    `unsure_threshold=None` to keep as much of every sample.
    """
    if kwargs.get("early_exit_threshold", 0) is None:
        kwargs = {**kwargs, "early_exit_threshold": NEVER_EXIT}
    own = SGLGenerationConfig.extra_defaults()
    unset = [name for name in own if name not in _MAY_BE_NONE and kwargs.get(name, 0) is None]
    kwargs = {name: value for name, value in kwargs.items() if name not in unset}
    preset = kwargs.pop("preset", None)
    if preset is not None:
        kwargs = {**preset_settings(preset), **kwargs}
    settings = SGLGenerationConfig.from_generation_config(generation_config).resolved(model)
    # Now, so that `None` among `kwargs` unsets; a default length depends on the prompt, and comes later.
    defaults = {name: value for name, value in default_settings().items() if name not in ("max_length", "min_length")}
    settings.update(defaults_only=True, **defaults)
    return settings, *_without_settings(inputs, settings.update(**kwargs))


def read_answer_arguments(
    inputs: Tensor | None, settings: SGLGenerationConfig, kwargs: dict[str, Any]
) -> tuple[SGLGenerationConfig, dict[str, Any], dict[str, Any]]:
    """The same for a call that goes on with guidance, whose `settings` hold.

    Raises `ValueError` if `kwargs` have a setting that the guidance has decided.
    """
    known = {*settings.to_dict(), "preset", "generation_config"}
    decided = [name for name in kwargs if name in known and name not in _FORM]
    if decided:
        raise ValueError(
            f"`{decided[0]}` was decided when the guidance was made: pass it to `guide`; `answer` takes inputs, "
            f"{', '.join(f'`{name}`' for name in _FORM)} and the objects of stock `generate`, such as a `streamer`."
        )
    return settings, *_without_settings(inputs, settings.update(**kwargs))


def _without_settings(inputs: Tensor | None, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model inputs and the remaining arguments."""
    model_inputs = with_installed_cache_name(arguments)
    generate_kwargs = {name: model_inputs.pop(name) for name in _GENERATE_ARGUMENTS if name in model_inputs}
    if "tokenizer" in generate_kwargs:
        # transformers' server passes the processor, which stands for its tokenizer
        tokenizer = generate_kwargs["tokenizer"]
        generate_kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
    if inputs is not None:
        model_inputs["input_ids"] = inputs
    return model_inputs, generate_kwargs


def split_inputs(inputs: dict[str, Any], shares_tensors: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The large and the small model's inputs: `small_*` keys go to the small model, plain keys to both.

    Models of different families read different tensors; with `shares_tensors=False` plain ones are the large model's.
    """
    plain = {name: value for name, value in inputs.items() if not name.startswith(_SMALL_PREFIX)}
    own = {name.removeprefix(_SMALL_PREFIX): value for name, value in inputs.items() if name not in plain}
    shared = {
        name: value
        for name, value in plain.items()
        if name not in _LARGE_ONLY and (shares_tensors or not isinstance(value, (Tensor, list, tuple)))
    }
    return plain, {**shared, **own}
