"""The weights of a pair in one state dict, as `pair.state_dict()` and accelerate's `get_state_dict` return them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from transformers_sgl.storage.checkpoints import PARTS

__all__ = ["check_state_dict", "split_state_dict"]


def split_state_dict(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Both models' state dicts, by the models' names; raises `ValueError` if an entry is of neither model."""
    parts: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
    for key, value in state_dict.items():
        name, _, rest = key.partition(".")
        if name not in parts:
            raise ValueError(
                f"The state dict has {key!r}, but a pair's names begin with `large.` or `small.`: pass the state dict "
                "of the pair, or save a model alone, as with `pair.large.save_pretrained`."
            )
        parts[name][rest] = value
    return parts


def check_state_dict(name: str, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless a state dict holds exactly the weights of the large or the small model."""
    known = model.state_dict()
    unknown = sorted(set(state_dict) - set(known))
    # Of parameters that are tied one is enough.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    given = {id(parameters[key]) for key in state_dict if key in parameters}
    missing = [key for key in known if key not in state_dict and id(parameters.get(key)) not in given]
    # Parameters that are sharded, and so empty here, have their shape in the state dict alone.
    shapes = {key: (tuple(known[key].shape), tuple(state_dict[key].shape)) for key in known.keys() & state_dict.keys()}
    other = sorted(key for key, (own, shape) in shapes.items() if own != shape and known[key].numel() > 0)
    for keys, what in ((unknown, "is unknown"), (missing, "is missing"), (other, "is of another shape")):
        if keys:
            raise ValueError(
                f"The state dict does not fit the {name} model, where {keys[0]!r} {what}: pass that of this pair, as "
                "`pair.state_dict()` returns it."
            )
