"""The settings of guided generation, as an extension of transformers' `GenerationConfig`; the presets."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedConfig

from transformers_sgl.transformers_interface import DecidedSettings, ExtraSettings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "PAPER_PRESETS",
    "PRESETS",
    "VERIFICATIONS",
    "CompleteSettings",
    "SGLGenerationConfig",
    "average_retention",
    "preset_settings",
    "resolve_prune_layer",
    "resolve_vision_prune_layer",
]

# The paper's three settings on a large VLM of 48 decoder layers (section 4.1). The layer is a fraction of the depth:
# it means the same on every model.
PAPER_PRESETS: dict[str, dict[str, Any]] = {
    "paper-64": {"retention_ratio": 0.40, "prune_layer": 19 / 48},
    "paper-35": {"retention_ratio": 0.20, "prune_layer": 9 / 48},
    "paper-9": {"retention_ratio": 0.05, "prune_layer": 2 / 48},
}
# As many tokens on average as the paper's, chosen and pruned in the way that was the best for so many on the embedded
# pairs, and named for what a user wants of them.
PRESETS: dict[str, dict[str, Any]] = {
    "quality": {**PAPER_PRESETS["paper-64"], "selection": "facility_location"},
    "balanced": {"retention_ratio": 0.35, "prune_layer": 0, "selection": "facility_location"},
    "fast": {**PAPER_PRESETS["paper-9"], "selection": "facility_location"},
}

_DEFAULT_PRESET = "balanced"
# Both models read the image, the large one a small part of it; where they disagree, it reads everything.
_CONFIRMED = {
    "retention_ratio": 1.0,
    "prune_layer": 0,
    "vision_retention_ratio": 0.15,
    "vision_prune_layer": 0,
    "confirmation_threshold": 0.7,
}
_NAMED = {
    **PRESETS,
    **PAPER_PRESETS,
    "confirmed": _CONFIRMED,
}
_FRACTIONS = {
    "retention_ratio": "visual tokens that are kept",
    "consistency_retention_ratio": "visual tokens that are kept",
    "vision_retention_ratio": "visual tokens that the vision tower encodes",
    "guidance_layers": "the small model's layers that rank the visual tokens",
    "unsure_retention_ratio": "visual tokens that are kept where the small model is unsure",
    "draft_retention_ratio": "visual tokens that the small model keeps for drafts",
}
_CHOICES = {
    "selection": ("top_k", "dpp", "facility_location"),
    "guidance": ("answer", "prompt"),
    "guidance_queries": ("prompt", "last", "generated", "both"),
    "consistency_reduction": ("product", "geometric_mean"),
}
VERIFICATIONS = ("once", "rounds")
# What only sampling reads.
_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_h", "top_k", "top_p", "typical_p")


def preset_settings(preset: str) -> dict[str, Any]:
    """All settings that a preset stands for, those that it leaves unset included; raises `ValueError` as it should."""
    if preset not in _NAMED:
        raise ValueError(f"There is no preset {preset!r}: choose one of {', '.join(map(repr, _NAMED))}.")
    unset: dict[str, Any] = {"vision_retention_ratio": 1.0, "vision_prune_layer": None, "confirmation_threshold": None}
    unset |= {"unsure_threshold": None, "selection": "top_k"}
    return {**unset, **_NAMED[preset]}


def resolve_prune_layer(prune_layer: int | float, num_layers: int) -> int:
    """The index of the first decoder layer that sees fewer visual tokens.

    `prune_layer` is an index, or a fraction of the depth in `[0, 1)`, which is rounded to the nearest layer. Raises
    `ValueError` if a decoder of this depth has no such layer.
    """
    return _resolve_layer("prune_layer", "decoder", prune_layer, num_layers)


def resolve_vision_prune_layer(prune_layer: int | float | None, num_layers: int) -> int | None:
    """The same for the layers of the vision tower; `None` where it leaves out whole tiles only."""
    return None if prune_layer is None else _resolve_layer("vision_prune_layer", "vision", prune_layer, num_layers)


def _resolve_layer(name: str, kind: str, layer: int | float, num_layers: int) -> int:
    """The index of a layer, from an index or a fraction of the depth."""
    _check_layer(name, layer)
    if isinstance(layer, float):
        return min(int(layer * num_layers + 0.5), num_layers - 1)
    if layer >= num_layers:
        raise ValueError(
            f"`{name}` is {layer}, but the large model has {num_layers} {kind} layers: pass an index from 0 to "
            f"{num_layers - 1}, or a fraction of the depth such as 0.25."
        )
    return layer


def average_retention(
    retention_ratio: float, prune_layer: int, num_layers: int, vision_retention_ratio: float = 1.0
) -> float:
    """The fraction of visual tokens that the large model processes, averaged over its layers (paper, section 4.1).

    The layers below `prune_layer` see those that the vision tower encoded.

    Example:
        ```python
        >>> from transformers_sgl.generation_config_sgl import average_retention

        >>> round(average_retention(0.20, prune_layer=9, num_layers=48), 2)
        0.35

        ```
    """
    upper = num_layers - prune_layer
    return (prune_layer * vision_retention_ratio + upper * min(retention_ratio, vision_retention_ratio)) / num_layers


class SGLGenerationConfig(ExtraSettings, GenerationConfig):
    """Generation settings of a pair: all of `GenerationConfig`, and how the small model guides.

    As in `GenerationConfig`, a field that is `None` is not set. [`SGLForConditionalGeneration.generate`] takes it from
    the model's own `generation_config`, and last from the preset "balanced". So `early_exit_threshold=None` in a
    configuration leaves a calibrated pair's threshold in force; passed to `generate` itself, `None` means never to
    exit.

    Args:
        retention_ratio (`float`, *optional*, defaults to 0.35): The fraction of visual tokens, in `(0, 1]`, that the
            large model keeps from `prune_layer` on: `max(1, floor(retention_ratio * V))` of `V` tokens. With 1 nothing
            is dropped and the output is the stock large model's.
        prune_layer (`int` or `float`, *optional*, defaults to 0): The first decoder layer that sees fewer visual
            tokens: an `int` is an index, a `float` in `[0, 1)` a fraction of the depth.
        vision_retention_ratio (`float`, *optional*, defaults to 1.0): The fraction of visual tokens, in `(0, 1]`, that
            the large model's vision tower encodes. The decoder does not see the others in any layer.
        vision_prune_layer (`int` or `float`, *optional*): Where the tower drops them. By default before its first
            layer, as whole tiles, frames or images; what is kept is then encoded as ever. With a layer of the tower,
            an index or a fraction of its depth in `[0, 1)`, from that layer on every tile goes on with the patches
            behind its own most important tokens.
        min_tokens_per_image (`int`, *optional*, defaults to 1): How many tokens of every image or video frame are kept
            whatever their rank, so that none vanishes; with 0 some may.
        selection (`str`, *optional*, defaults to `"facility_location"`): Which tokens the large model's decoder keeps:
            `"top_k"`, the most important ones, as in the paper; `"facility_location"`, those that stand for what is
            important ([`FacilityLocationProcessor`]); or `"dpp"`, those that are important and unlike each other
            ([`ConditionalDPPProcessor`]). The vision tower has its own rule.
        guidance (`str`, *optional*, defaults to `"answer"`): What the small model does: it writes an `"answer"`, or it
            reads the `"prompt"` and stops. Then there is no draft to exit with, to score, to verify or to confirm,
            and the prompt alone ranks the visual tokens.
        guidance_queries (`str`, *optional*): Whose attention ranks the visual tokens: `"prompt"` (the prompt after the
            last visual token), its `"last"` token alone, `"generated"` (the small model's own answer) or `"both"`,
            prompt and answer (paper, section 3.2). By default `"both"`, or `"prompt"` where there is no answer.
        guidance_layers (`float`, *optional*, defaults to 1.0): The fraction, in `(0, 1]`, of the small model's layers
            whose attention counts, from the first one on.
        guidance_max_new_tokens (`int`, *optional*): The most tokens the small model may write; by default as many as
            the large model.
        early_exit_threshold (`float`, *optional*): The decision score, 0 or more, from which on the small model's
            answer is returned and the large model not called (paper, section 3.3). Scores lie between 0 and 1: 0 never
            calls the large model, a number above 1 always does. A prompt without visual tokens never exits, alone or
            beside others.
        consistency_retention_ratio (`float`, *optional*, defaults to 0.05): The fraction of visual tokens, in
            `(0, 1]`, that the small model sees when its answer's consistency is scored.
        consistency_reduction (`str`, *optional*, defaults to `"product"`): How the probabilities of an answer's tokens
            become one consistency: their `"product"`, as in the paper, or their `"geometric_mean"`, which does not
            penalize long answers.
        score_draft (`bool`, *optional*): Whether to score the small model's answer, which takes one more pass of it.
            By default where an early exit depends on it and with `return_dict_in_generate`; with `False` only for an
            early exit.
        verify_draft (`bool` or `str`, *optional*, defaults to `"rounds"`): How the large model is spared steps by the
            small one, which changes nothing about what it writes. With `"once"` it checks the small model's answer in
            its prefill and continues after the part it agrees with; with `"rounds"` the small model then goes on
            from there, and drafts a few tokens again and again; with `False` neither. With `True`, or a word, the
            small model answers for this even where nothing is pruned.
        num_draft_tokens (`int`, *optional*): How many tokens the small model drafts in each later round. By default
            as many as pay, by what earlier ones were worth and how long the models take, and none where none do.
        draft_retention_ratio (`float`, *optional*, defaults to 0.35): The fraction of visual tokens, in `(0, 1]`, that
            the small model keeps in its cache for the later rounds: those that it found the most important.
        confirmation_threshold (`float`, *optional*): With a number from 0 to 1 the pruned large model only confirms
            the small model's answer: where it would have written the same, with at least this probability, that is
            the answer; where not, it reads the prompt again with every visual token. By default its own pruned answer
            stands.
        unsure_threshold (`float`, *optional*): The decision score, 0 or more, below which the small model counts as
            unsure: of such a sample at least `unsure_retention_ratio` is kept, because the small model may have looked
            at the wrong place. By default every sample keeps the same fraction.
        unsure_retention_ratio (`float`, *optional*, defaults to 1.0): The least fraction of visual tokens, in
            `(0, 1]`, that is encoded and kept of such samples; with 1 the large model reads them whole.
        **kwargs: Every field of `GenerationConfig`.

    Raises:
        ValueError: If a field has a value that is not allowed; the sentence says what is.

    Example:
        ```python
        >>> from transformers_sgl import SGLGenerationConfig

        >>> fast = SGLGenerationConfig.from_preset("fast", max_new_tokens=32)
        >>> fast.retention_ratio
        0.05
        >>> round(fast.average_retention(num_layers=48), 2)
        0.09

        ```
    """

    def __init__(self, **kwargs: Any) -> None:
        # Set before `super().__init__`, which ends by calling `validate`.
        for field in self.extra_defaults():
            setattr(self, field, kwargs.pop(field, None))
        for name in kwargs:  # stock settings may have any name, so a typo would pass for one
            meant = get_close_matches(name, self.extra_defaults(), n=1, cutoff=0.85)
            if meant:
                raise ValueError(f"There is no setting `{name}`: did you mean `{meant[0]}`?")
        super().__init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **kwargs: Any) -> SGLGenerationConfig:
        """The settings of a preset.

        Args:
            preset (`str`): `"quality"`, `"balanced"` or `"fast"`: 64 %, 35 % and 9 % average retention on a large
                model of 48 layers, as the paper's three operating points (section 4.1). These themselves are
                `"paper-64"`, `"paper-35"` and `"paper-9"`: they keep the most important tokens, where ours select with
                `"facility_location"`, and `"balanced"` prunes from the first layer on. Or `"confirmed"`, which is not
                in the paper: the large model's vision tower encodes 15 % of every tile, enough to confirm the small
                model's answer; where it does not, the large model reads everything.
            **kwargs: Further fields; they win over the preset's.

        Raises:
            ValueError: If there is no preset of that name.
        """
        return cls(**{**preset_settings(preset), **kwargs})

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig | None) -> Self:
        """Extends a stock configuration: a copy with this class's fields, unset unless they were there."""
        fields = {} if generation_config is None else generation_config.to_dict()
        return cls(**{name: value for name, value in fields.items() if value is not None})

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict[str, Any]) -> SGLGenerationConfig:
        """The settings that a model's configuration implies, as in `GenerationConfig`."""
        return cls.from_generation_config(GenerationConfig.from_model_config(model_config))

    @staticmethod
    def extra_defaults() -> dict[str, Any]:
        """The fields that this class adds, with their defaults."""
        return {
            **PRESETS[_DEFAULT_PRESET],
            "vision_retention_ratio": 1.0,
            "vision_prune_layer": None,
            "min_tokens_per_image": 1,
            "guidance": "answer",
            "guidance_queries": None,
            "guidance_layers": 1.0,
            "guidance_max_new_tokens": None,
            "early_exit_threshold": None,
            "consistency_retention_ratio": 0.05,
            "consistency_reduction": "product",
            "score_draft": None,
            "verify_draft": None,
            "num_draft_tokens": None,
            "draft_retention_ratio": 0.35,
            "confirmation_threshold": None,
            "unsure_threshold": None,
            "unsure_retention_ratio": 1.0,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of `generation_config.json`: only fields that are set."""
        return {name: value for name, value in super().to_diff_dict().items() if value is not None}

    def with_defaults(self, *defaults: GenerationConfig) -> SGLGenerationConfig:
        """A copy whose unset fields come from `defaults`, the first one first."""
        settings = self.from_generation_config(self)
        for each in defaults:
            inherited = {key: value for key, value in each.to_dict().items() if value is not None}
            settings.update(defaults_only=True, allow_custom_entries=True, **inherited)
        return settings

    def completed_by(self, large: GenerationConfig) -> SGLGenerationConfig:
        """A pair's settings: what a file written by hand leaves out comes from the `large` model's settings.

        Sampling settings do not where the pair does not sample: transformers refuses to save them then.
        """
        settings = self.with_defaults(large)
        if not settings.do_sample:
            for name in _SAMPLING:
                setattr(settings, name, getattr(self, name))
        return settings

    def resolved(self, *defaults: GenerationConfig) -> SGLGenerationConfig:
        """The same, in which no SGL field is unset: last, they come from the class.

        Stock fields that no default sets stay `None`.
        """
        settings = self.with_defaults(*defaults)
        settings.update(defaults_only=True, **self.extra_defaults())
        return settings

    def average_retention(self, num_layers: int) -> float:
        """The average retention under these settings; see the function [`average_retention`].

        With an `unsure_threshold` it is that of the samples that the small model is sure of.
        """
        defaults = self.extra_defaults()
        ratio, layer, vision_ratio = (
            defaults[field] if getattr(self, field) is None else getattr(self, field)
            for field in ("retention_ratio", "prune_layer", "vision_retention_ratio")
        )
        return average_retention(ratio, resolve_prune_layer(layer, num_layers), num_layers, vision_ratio)

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Checks every field, the stock ones included; raises `ValueError` as the class says."""
        super().validate(*args, **kwargs)
        for name, meaning in _FRACTIONS.items():
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise ValueError(
                    f"`{name}` is {value!r}, but it is the fraction of {meaning}: pass a number above 0 and up to 1, "
                    "where 1 means all."
                )
        for name in ("prune_layer", "vision_prune_layer"):
            if getattr(self, name) is not None:
                _check_layer(name, getattr(self, name))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(map(repr, choices))}.")
        for name, cure in (
            ("early_exit_threshold", "never to exit early"),
            ("unsure_threshold", "to keep as much of every sample"),
        ):
            threshold = getattr(self, name)
            if threshold is not None and not (_is_number(threshold) and threshold >= 0):
                raise ValueError(
                    f"`{name}` is {threshold!r}, but it is compared with scores between 0 and 1: pass a number of 0 "
                    f"or more, or None {cure}."
                )
        confirmation = self.confirmation_threshold
        if confirmation is not None and not (_is_number(confirmation) and 0 <= confirmation <= 1):
            raise ValueError(
                f"`confirmation_threshold` is {confirmation!r}, but it is compared with the probability of an answer: "
                "pass a number from 0 to 1, or None to let the pruned answer stand."
            )
        if self.score_draft is not None and not isinstance(self.score_draft, bool):
            raise ValueError(f"`score_draft` is {self.score_draft!r}: pass True, False or None.")
        verification = self.verify_draft
        if not (verification is None or isinstance(verification, bool) or verification in VERIFICATIONS):
            raise ValueError(f"`verify_draft` is {verification!r}: pass 'rounds', 'once', True, False or None.")
        if self.num_draft_tokens is not None and not _is_count(self.num_draft_tokens):
            raise ValueError(
                f"`num_draft_tokens` is {self.num_draft_tokens!r}: pass a whole number of 1 or more, or None for as "
                "many as pay."
            )
        if self.min_tokens_per_image is not None and not _is_count(self.min_tokens_per_image, at_least=0):
            raise ValueError(
                f"`min_tokens_per_image` is {self.min_tokens_per_image!r}: pass a whole number of 1 or more, or 0 to "
                "let images vanish."
            )
        if self.guidance_max_new_tokens is not None and not _is_count(self.guidance_max_new_tokens):
            raise ValueError(
                f"`guidance_max_new_tokens` is {self.guidance_max_new_tokens!r}: pass a whole number of 1 or more, or "
                "None to let the small model write as much as the large one may."
            )


class CompleteSettings(DecidedSettings, SGLGenerationConfig):
    """The settings of one call, which no model's own settings change any more: what is `None` stays so."""


def _check_layer(name: str, layer: Any) -> None:
    is_index = isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0
    is_fraction = isinstance(layer, float) and 0 <= layer < 1
    if not (is_index or is_fraction):
        raise ValueError(
            f"`{name}` is {layer!r}: pass a layer index (a whole number of 0 or more) or a fraction of the "
            "depth (a float of at least 0 and below 1)."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value  # NaN is no number


def _is_count(value: Any, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least
