"""One model of a pair: checked before it is loaded, loaded, and described for a recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from transformers_sgl.storage.adapters import check_is_no_adapter
from transformers_sgl.storage.checkpoints import Checkpoint, pinned, read_config
from transformers_sgl.storage.checks import (
    Weights,
    blaming,
    check_loaded,
    first_sentence,
    limited_to,
    read_generation_config,
    read_json,
    read_weights,
)

__all__ = ["NO_WEIGHTS", "as_recipe", "check_weights_can_be_saved", "checked", "has_weights", "load_model", "recorded"]

# The `device_map` of a model that is described, but not loaded: the half of a pair that runs elsewhere.
NO_WEIGHTS = "meta"
_IS_DESCRIBED = "is_described_only"  # an attribute of such a model

# Load options that a recipe records.
_RECORDED_OPTIONS = ("dtype", "quantization_config", "variant")
_PICKLED = (
    "The {name} model {checkpoint} has no weights in safetensors format, and pickled ones (such as *.bin) are never "
    "loaded, because they can run code: save it again with a current transformers."
)


def checked(name: str, checkpoint: Checkpoint, recipe: str | None = None) -> tuple[Checkpoint, PreTrainedConfig]:
    """The checkpoint at its commit, and its configuration, known before any weights are read.

    Raises:
        OSError: If it cannot be found.
        ValueError: If transformers has no code for it, it asks for foreign code, or it is an adapter.
    """
    try:
        where = pinned(checkpoint.path, checkpoint.where)
    except OSError as error:
        raise OSError(f"The {name} model {checkpoint} cannot be loaded: {first_sentence(error)}.") from error
    checkpoint = replace(checkpoint, where=where)
    check_is_no_adapter(name, checkpoint)
    config = read_config(name, checkpoint, recipe)
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"The {name} model {checkpoint} is of the type {config.get('model_type')!r}, for which transformers has "
            "no code of its own: name one of the types in `transformers_sgl.architectures.ARCHITECTURES`."
        )
    with blaming(f"The {name} model {checkpoint}", "config.json"):
        return checkpoint, AutoConfig.for_model(**config)


def load_model(name: str, checkpoint: Checkpoint, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """One of the two models with transformers' loading info; `options` are the user's.

    With `device_map="meta"` it has no weights, and none are read.
    """
    if options.get("use_safetensors") is False:
        raise ValueError(_PICKLED.format(name=name, checkpoint=checkpoint))
    check_is_no_adapter(name, checkpoint)
    owner = f"The {name} model {checkpoint}"
    arguments = {**checkpoint.options, **_without_auto_dtype(checkpoint, options)}
    if arguments.get("device_map") == NO_WEIGHTS:
        return _described(name, checkpoint, arguments), {}
    limits: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    where = checkpoint.where
    if not options.get("gguf_file"):
        # What is read here is in the cache afterwards, so nothing is downloaded twice.
        where = {key: value for key, value in where.items() if key != "force_download"}
        limits = limited_to(_checked_files(name, checkpoint, arguments), owner)
    arguments = {"trust_remote_code": False, **arguments, **where}
    # Where transformers looks for an adapter, too, once peft is installed; otherwise in another revision and cache.
    arguments["adapter_kwargs"] = where
    # transformers' own message about shapes that differ names no weight; `check_loaded` does.
    arguments |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with blaming(owner, "config.json, generation_config.json", options), limits:
        model, info = AutoModelForImageTextToText.from_pretrained(checkpoint.path, **arguments)
    check_loaded(owner, info, allow_mismatched=bool(options.get("ignore_mismatched_sizes")))
    return model, info


def has_weights(model: PreTrainedModel) -> bool:
    """Whether a model can run. One that is offloaded has its parameters on no device either, so that tells nothing."""
    return not getattr(model, _IS_DESCRIBED, False)


def _described(name: str, checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """A model without weights, in the type in which they would be loaded."""
    owner = f"The {name} model {checkpoint}"
    config = arguments.get("config")
    if not isinstance(config, PreTrainedConfig):
        _, config = checked(name, checkpoint)
    dtype = arguments.get("dtype", "auto")
    dtype = getattr(config, "dtype", None) if dtype in (None, "auto") else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    wanted = {"dtype": dtype, "attn_implementation": arguments.get("attn_implementation")}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    with blaming(owner, "config.json, generation_config.json"), torch.device(NO_WEIGHTS):
        model = AutoModelForImageTextToText.from_config(config, **wanted)
    if read_generation_config(owner, checkpoint.path, checkpoint.where) is not None:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, **checkpoint.where)
    model.name_or_path = model.config.name_or_path = checkpoint.path
    setattr(model, _IS_DESCRIBED, True)
    return model.eval()


def _checked_files(name: str, checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> Weights:
    """What a checkpoint's weights hold, if all its files are such as may be loaded."""
    owner, place = f"The {name} model {checkpoint}", (checkpoint.path, checkpoint.where)
    config = arguments.get("config") or read_config(name, checkpoint)
    config = config if isinstance(config, Mapping) else vars(config)
    read_json(owner, checkpoint.path, "config.json", checkpoint.where)
    read_generation_config(owner, *place)  # transformers ignores a broken one
    weights = read_weights(owner, *place, arguments.get("variant"), config.get("transformers_weights"))
    if weights is None:
        raise OSError(_PICKLED.format(name=name, checkpoint=checkpoint))
    return weights


def recorded(checkpoint: Checkpoint, options: dict[str, Any]) -> Checkpoint:
    """The checkpoint with the options that a recipe records, as the model was loaded."""
    given = {**checkpoint.options, **_without_auto_dtype(checkpoint, options)}
    names = {*checkpoint.options, *_RECORDED_OPTIONS} - {"config"}
    kept = {option: value for option, value in given.items() if option in names and value is not None}
    return replace(checkpoint, options=kept)


def as_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's entry in a recipe; without a token or anything else about how this user got at it."""
    is_folder = os.path.isdir(checkpoint.path)
    named = {"name_or_path": os.path.abspath(checkpoint.path) if is_folder else checkpoint.path}
    for name in ("revision", "subfolder"):
        if checkpoint.where.get(name) and not is_folder:
            named[name] = str(checkpoint.where[name])
    return {**named, **{name: _as_json(value) for name, value in checkpoint.options.items()}}


def check_weights_can_be_saved(name: str, model: PreTrainedModel) -> None:
    """Raises if bitsandbytes has repacked 4-bit weights for the CPU: unpacking mixes up their scales."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError(
            f"The {name} model has run on a CPU for which bitsandbytes repacked its 4-bit weights, and so they cannot "
            "be saved unharmed any more: load the pair again and save it before it answers anything."
        )


def _without_auto_dtype(checkpoint: Checkpoint, options: dict[str, Any]) -> dict[str, Any]:
    """The user's options; `dtype="auto"`, which pipelines pass unasked, leaves a recipe's own dtype alone."""
    if options.get("dtype") in ("auto", None) and "dtype" in checkpoint.options:
        return {name: value for name, value in options.items() if name != "dtype"}
    return options


def _as_json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.to_dict() if hasattr(value, "to_dict") else value
