"""The configuration of a pair: one large and one small vision-language model."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from transformers_sgl.storage.checkpoints import PARTS, attention_of, check_recipe
from transformers_sgl.storage.checks import blaming, check_claims
from transformers_sgl.transformers_interface import CACHE_NAMES, changed_settings, keep_attention_names

__all__ = ["PARTS", "SGLConfig"]

_SUB_CONFIGS = tuple(f"{part}_config" for part in PARTS)
_MODELS = (*_SUB_CONFIGS, *PARTS)


class SGLConfig(PreTrainedConfig):
    """Configuration of a large vision-language model (VLM) that is guided by a small one.

    It holds the two models' own configurations, of any architecture, or, as a recipe, their names. Settings of the
    method (how many visual tokens are kept, from which layer on) belong to [`SGLGenerationConfig`], because they may
    change with every call of `generate`.

    Args:
        large_config (`PreTrainedConfig` or `dict`): The configuration of the large VLM.
        small_config (`PreTrainedConfig` or `dict`): The configuration of the small VLM.
        large (`dict`): In a recipe, the checkpoint of the large VLM: `name_or_path` (a Hub repository, a folder, or a
            path relative to the recipe that begins with `./` or `../`), and optionally `revision`, `subfolder`,
            `variant`, `dtype`, `quantization_config`, `attn_implementation`, `device_map`, `max_memory`.
        small (`dict`): In a recipe, the checkpoint of the small VLM.

    Raises:
        ValueError: If only one of the two models is given, a `dict` names no `model_type`, a recipe is not sound, or
            models are both named and described.

    Example:
        ```python
        >>> from transformers import InternVLConfig
        >>> from transformers_sgl import SGLConfig

        >>> config = SGLConfig(large_config=InternVLConfig(), small_config=InternVLConfig())
        >>> config.model_type, config.large_config.model_type
        ('sgl', 'internvl')
        >>> recipe = SGLConfig(large={"name_or_path": "org/large"}, small={"name_or_path": "org/small"})
        >>> recipe.recipe["large"]
        {'name_or_path': 'org/large'}

        ```
    """

    model_type = "sgl"
    sub_configs: ClassVar[dict[str, Any]] = dict.fromkeys(_SUB_CONFIGS, AutoConfig)

    # What `Trainer.predict` leaves out, so that it collects the logits: the cache, and what towers return.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *CACHE_NAMES,
        *(f"{kind}_{what}" for kind in ("image", "video", "audio") for what in ("outputs", "hidden_states")),
    ]

    large_config: dict[str, Any] | PreTrainedConfig | None = None
    small_config: dict[str, Any] | PreTrainedConfig | None = None
    large: dict[str, Any] | None = None
    small: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Turns sub-configurations given as `dict` into configuration objects."""
        # transformers builds every configuration class once without arguments, to learn its defaults. So a pair may be
        # empty, but never half.
        given = [name for name in _SUB_CONFIGS if getattr(self, name) is not None]
        if len(given) == 1:
            missing = next(name for name in _SUB_CONFIGS if name not in given)
            raise ValueError(f"A pair needs two models, but `{missing}` is missing: pass it beside `{given[0]}`.")
        for name in given:
            setattr(self, name, _as_config(name, getattr(self, name)))
        if self.recipe is not None:
            check_recipe(self.recipe)
            if given:
                raise ValueError("A pair is either named or described: pass `large` and `small`, or their `*_config`.")
        attention = kwargs.get("attn_implementation")
        if isinstance(attention, dict):
            own = {name: choice for name, choice in attention.items() if name == ""}
            kwargs["attn_implementation"] = own | {f"{name}_config": attention_of(name, attention) for name in PARTS}
        super().__post_init__(**kwargs)
        if isinstance(attention, dict) and self.recipe is not None:
            keep_attention_names(self, attention)

    @property
    def recipe(self) -> dict[str, Any] | None:
        """A recipe's entries for its two models; `None` where the models are described here."""
        named = {name: getattr(self, name) for name in PARTS}
        return named if any(part is not None for part in named.values()) else None

    @property
    def text_config(self) -> PreTrainedConfig:
        """The large model's configuration of its decoder."""
        return self._of_large("text_config")

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The large model's configuration of its vision tower."""
        return self._of_large("vision_config")

    def _of_large(self, name: str) -> Any:
        """An attribute of the large model's configuration, missing where that lacks it."""
        if self.large_config is None:
            raise AttributeError(f"The pair has no models yet, and so no {name!r}.")
        return getattr(self.large_config, name)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that a `config.json` holds; see `PreTrainedConfig.from_dict`.

        Raises:
            ValueError: If a setting has a wrong type, or claims sizes that no model has.
        """
        owner = f"The pair {str(kwargs.get('name_or_path', ''))!r}"
        with blaming(owner, "config.json", kwargs):
            check_claims(owner, config_dict)
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `auto_map` already leads to this package, so saving copies none of its files."""

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of `config.json`: each model's differences from its architecture's defaults, without paths."""
        output = super().to_diff_dict()
        for name in _SUB_CONFIGS:
            if getattr(self, name) is not None:
                output[name] = changed_settings(getattr(self, name))
        # A bundle does not mention recipes, nor the other way round.
        return {key: value for key, value in output.items() if value is not None or key not in _MODELS}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The large model's text configuration, as its decoder writes the answers; while the pair is empty, itself."""
        if not isinstance(self.large_config, PreTrainedConfig):
            return self
        return self.large_config.get_text_config(decoder=decoder, encoder=encoder)


def _as_config(name: str, config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    """A sub-configuration as an object of its own class."""
    if isinstance(config, PreTrainedConfig):
        return config
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"`{name}` names no `model_type`: pass the configuration of a transformers model.")
    options = dict(config)
    return AutoConfig.for_model(options.pop("model_type"), **options)


AutoConfig.register(SGLConfig.model_type, SGLConfig, exist_ok=True)
