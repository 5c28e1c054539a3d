"""The pair itself: pruning guided by the small model, with and without early exit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting
from transformers_sgl.generation_config_sgl import preset_settings
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["SGL", "SGP", "Confirmed", "ConfirmedSGL", "pair_answers"]

_CONFIRMED = "confirmed"  # the preset


@dataclass(frozen=True)
class SGP(Method):
    """Small-model-guided pruning (paper, section 3.2): `generate` of the pair, without early exit."""

    queries: str = "both"  # whose attention ranks the visual tokens: `"prompt"`, `"last"`, `"generated"` or `"both"`
    layers: float = 1.0  # the fraction of the small model's layers that count, from the first one on
    scores_draft: bool = False  # whether the draft is scored although nothing exits; a calibration needs that
    vision: bool = False  # whether the large model's vision tower is pruned, too
    from_first_layer: bool = False  # whether the decoder's first layer prunes, or the one that the presets imply
    settings: Mapping[str, Any] = field(default_factory=dict)  # further ones of `generate`, by name

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        # Where nothing is written, there is nothing to exit with.
        return self._generate(pair, batch, setting, None if self._reads_only else NEVER_EXIT)

    @property
    def _reads_only(self) -> bool:
        return self.settings.get("guidance") == "prompt"

    def _generate(self, pair: Pair, batch: Batch, setting: Setting, threshold: float | None) -> list[Answer]:
        fixed = {"do_sample": False, "num_beams": 1, "early_exit_threshold": threshold}
        return pair_answers(pair, batch, **fixed, score_draft=self.scores_draft, **self.facts(setting))

    def facts(self, setting: Setting) -> dict[str, Any]:
        queries = "prompt" if self._reads_only else self.queries
        guidance = {"guidance": "answer", "guidance_queries": queries, "guidance_layers": self.layers}
        guidance["selection"] = "top_k"
        return {**guidance, **self.pruning(setting), **self.settings}

    def pruning(self, setting: Setting) -> dict[str, Any]:
        """The settings of `generate` that say what the large model reads."""
        if self.vision:
            setting = setting.with_vision()
        elif self.from_first_layer:
            setting = setting.from_layer(0)
        return {
            "retention_ratio": setting.retention_ratio,
            "prune_layer": setting.prune_layer,
            "vision_retention_ratio": setting.vision_retention_ratio,
            "vision_prune_layer": setting.vision_prune_layer,
            "confirmation_threshold": None,
            "unsure_threshold": None,
        }


@dataclass(frozen=True)
class SGL(SGP):
    """The whole method: guided pruning with early exit (paper, section 3.3)."""

    # By average retention, the decision score from which on drafts are returned; chosen on other questions.
    thresholds: dict[float | None, float] = field(default_factory=dict)

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        return self._generate(
            pair, batch, setting, self.thresholds[setting.average_retention if self.prunes else None]
        )

    def without_exit(self) -> SGP:
        """The same with scored drafts, of which none is returned."""
        shared = {each.name: getattr(self, each.name) for each in fields(SGP)}
        return SGP(**{**shared, "scores_draft": True})


@dataclass(frozen=True)
class Confirmed(SGP):
    """The preset "confirmed": the pruned large model only confirms drafts, and else reads everything."""

    prunes = False

    def pruning(self, setting: Setting) -> dict[str, Any]:
        return preset_settings(_CONFIRMED)


@dataclass(frozen=True)
class ConfirmedSGL(SGL):
    """The same with early exit."""

    prunes = False

    def pruning(self, setting: Setting) -> dict[str, Any]:
        return preset_settings(_CONFIRMED)

    def without_exit(self) -> SGP:
        return Confirmed(self.queries, self.layers, scores_draft=True)


def pair_answers(pair: Pair, batch: Batch, **settings: Any) -> list[Answer]:
    """Answers with the pair's own `generate`, whose other settings are those of the pair."""
    inputs = pair.inputs(pair.processor, batch.samples, batch.images)
    own = pair.model.generation_config
    writes = settings.get("guidance", own.guidance) != "prompt"
    if writes and own.verify_draft is None and own.num_draft_tokens is None:
        # How many drafts pay goes by the clock, so with rounds no evaluation could be repeated to the letter.
        settings = {"verify_draft": "once", **settings}
    output = pair.model.generate(
        **inputs, max_new_tokens=pair.max_new_tokens, return_dict_in_generate=True, **settings
    )
    written = pair.read(pair.model.large, pair.processor, output.sequences[:, inputs["input_ids"].shape[1] :])
    drafts: list[str | None] = [None] * len(written)
    if output.draft_sequences is not None:
        read = pair.read(pair.model.small, pair.processor.small_processor, output.draft_sequences)
        drafts = [text for text, _ in read]
    names = ("exited_early", "num_draft_tokens_accepted", "decision_score", "draft_complete", "confirmation_score")
    values = (getattr(output, name, None) for name in names)
    exited, *scored = ([None] * len(written) if each is None else each.tolist() for each in values)
    retention = output.average_retention(pair.num_layers).tolist()
    found = zip(written, retention, exited, drafts, *scored, strict=True)
    return [
        Answer(text, length, None if early else share, early, *rest) for (text, length), share, early, *rest in found
    ]
