"""Adapters of peft, such as LoRA: where the models of a pair may have one, and where it would silently be lost."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from transformers_sgl.storage.checkpoints import Checkpoint

__all__ = ["check_is_no_adapter", "check_no_adapter_is_lost", "unwrapped"]

_MERGE = "merge it, `PeftModel.from_pretrained(model, adapter).merge_and_unload()`"


def unwrapped(name: str, model: Any) -> Any:
    """The model inside a `PeftModel`, with the adapter's layers in it; other models and names are returned.

    Raises:
        ValueError: If the model is no transformers model, or its adapter is not in its layers.
    """
    if model is None or isinstance(model, str | os.PathLike | PreTrainedModel):
        return model
    is_adapted = _is_of_peft(model) and hasattr(model, "get_base_model")
    base = model.get_base_model() if is_adapted else model  # such as what `torch.compile` makes of a model
    if not isinstance(base, PreTrainedModel) and (is_adapted or not hasattr(base, "config")):
        raise ValueError(
            f"The {name} model is of the type {type(model).__name__}, which is no model of transformers: load one "
            "with `from_pretrained`, or pass what `merge_and_unload()` makes of a model with an adapter."
        )
    if is_adapted and any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            f"The {name} model has an adapter that puts tokens of its own before the prompt, which a pair would lose: "
            "train one that changes weights, such as LoRA, or pass the model without it, `get_base_model()`."
        )
    return base


def check_no_adapter_is_lost(name: str, model: nn.Module) -> None:
    """Raises `ValueError` if a model that is to be saved has an adapter."""
    if any(_is_of_peft(module) for module in model.modules()):
        raise ValueError(
            f"The {name} model has an adapter, which neither a bundle nor a recipe holds: {_MERGE}, and save a pair "
            "of the merged model; or save the adapter alone with peft."
        )


def check_is_no_adapter(name: str, checkpoint: Checkpoint) -> None:
    """Raises `ValueError` if a checkpoint holds an adapter, with or without the model that it belongs to.

    transformers would load it, and the model that it names, but only where peft is installed.
    """
    if find_adapter_config_file(checkpoint.path, **checkpoint.where) is not None:
        raise ValueError(
            f"The {name} model {checkpoint} is an adapter (`adapter_config.json`), which a pair does not load: "
            f"{_MERGE}, and pair the merged model."
        )


def _is_of_peft(module: Any) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"
