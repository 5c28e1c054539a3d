"""Decoding loops, inputs that grow with the answer, and defaults of generation settings."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from transformers_sgl.transformers_interface.lookup import changed

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["DecidedSettings", "ExtraSettings", "default_settings", "extended_inputs", "stock_settings", "view_of"]


class ExtraSettings:
    """Mixin for a generation configuration with further fields, which take `extra_defaults` where nobody set them.

    Assumes that unset fields are filled from `_get_default_generation_params()`, and that it lists the known fields.
    Without it, the further fields have no defaults, and files with them are not read.
    """

    @staticmethod
    def extra_defaults() -> dict[str, Any]:
        """The further fields and their defaults."""
        return {}

    @classmethod
    def _get_default_generation_params(cls) -> dict[str, Any]:
        return {**super()._get_default_generation_params(), **cls.extra_defaults()}  # type: ignore[misc]


class DecidedSettings:
    """Mixin for a generation configuration that is complete: what is unset stays unset.

    Assumes that `generate` fills unset fields of the configuration that it is given, from the model's own and from
    defaults, by its `update(defaults_only=True, ...)`. Without it, a field that was set to `None` is filled again.
    """

    def update(self, defaults_only: bool = False, **kwargs: Any) -> Any:
        """As in `GenerationConfig`, but nothing is a default that could be replaced."""
        return kwargs if defaults_only else super().update(**kwargs)  # type: ignore[misc]


@functools.cache
def default_settings() -> dict[str, Any]:
    """The values that `generate` gives to settings that nobody has set; those that are not in it stay `None`.

    Assumes `GenerationConfig._get_default_generation_params()`. Without it, a setting that equals its default is taken
    for one that asks for something.
    """
    from transformers import GenerationConfig

    defaults = getattr(GenerationConfig, "_get_default_generation_params", None)
    if defaults is None:
        raise changed("`GenerationConfig._get_default_generation_params`")
    return dict(defaults())


@functools.cache
def stock_settings() -> tuple[str, ...]:
    """The names of all settings that the installed version knows, without what tells where a file comes from.

    Assumes that an empty `GenerationConfig` has an attribute for each. Without it, a setting is taken for an entry of
    the user's own, which `generate` does not read.
    """
    from transformers import GenerationConfig

    return tuple(name for name in GenerationConfig().to_dict() if name[0] != "_" and name != "transformers_version")


def extended_inputs(model: PreTrainedModel, inputs: dict[str, Any], num_new_tokens: int = 1) -> dict[str, Any]:
    """The inputs of a pass that reads more tokens, as the model itself lengthens its masks and positions.

    Assumes `_update_model_kwargs_for_generation(outputs, inputs, num_new_tokens=...)`, which needs no outputs. Without
    it, drafts can neither be checked nor scored.
    """
    extend = getattr(model, "_update_model_kwargs_for_generation", None)
    if extend is None:
        raise changed(f"`{type(model).__name__}._update_model_kwargs_for_generation`")
    extended: dict[str, Any] = extend({}, inputs, num_new_tokens=num_new_tokens)
    return extended


def view_of(model: PreTrainedModel, owner: Any) -> Any:
    """A view of a model: the same weights, hooks and settings, but another object, whose calls go to `owner`.

    `owner` has `run_loop(view, loop, input_ids, stopping_criteria, **kwargs)` and `run_pass(forward, extend, inputs)`,
    which are called instead of the decoding loop and of the model.

    Assumes that greedy search and sampling run in `_sample`, which takes the prompts and `stopping_criteria`, and by
    keyword `logits_processor`, `generation_config`, a cache and the model's inputs; and which calls the model as
    `self(**inputs)`. Without it, drafts are not checked.
    """
    model_class: Any = type(model)
    view: Any = object.__new__(_view_class(model_class))
    object.__setattr__(view, "__dict__", model.__dict__)
    object.__setattr__(view, "owner", owner)
    return view


@functools.cache
def _view_class(model_class: Any) -> Any:
    """A class whose instances share a model's whole state."""
    loop = getattr(model_class, "_sample", None)
    if loop is None:
        raise changed(f"`{model_class.__name__}._sample`")

    class View(model_class):
        # A slot lies on the view itself, while everything in `__dict__` belongs to the model.
        __slots__ = ("owner",)

        def __call__(self, **inputs: Any) -> Any:
            return self.owner.run_pass(super().__call__, functools.partial(extended_inputs, self), inputs)

        def _sample(self, input_ids: Tensor, stopping_criteria: Any, **kwargs: Any) -> Any:
            return self.owner.run_loop(self, loop, input_ids, stopping_criteria, **kwargs)

    # transformers looks things up under a model class's name.
    View.__name__, View.__qualname__ = model_class.__name__, model_class.__qualname__
    View.__module__ = model_class.__module__
    return View
