"""The pair itself: pruning guided by the small model, with and without early exit."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting, answer_lengths
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["SGL", "SGP"]


@dataclass(frozen=True)
class SGP(Method):
    """Small-model-guided pruning (paper, section 3.2): `generate` of the pair, without early exit.

    Attributes:
        queries: Whose attention ranks the visual tokens: `"prompt"`, `"last"`, `"generated"` or `"both"`.
        layers: The fraction of the small model's layers that count, from the first one on.
        scores_draft: Whether the draft is scored although nothing exits; a calibration needs that.
    """

    queries: str = "both"
    layers: float = 1.0
    scores_draft: bool = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        return self._generate(pair, batch, setting, NEVER_EXIT)

    def _generate(self, pair: Pair, batch: Batch, setting: Setting, threshold: float) -> list[Answer]:
        inputs = pair.inputs(pair.processor, batch.samples, batch.images)
        output = pair.model.generate(
            **inputs,
            max_new_tokens=pair.max_new_tokens,
            do_sample=False,
            num_beams=1,
            retention_ratio=setting.retention_ratio,
            prune_layer=setting.prune_layer,
            guidance_queries=self.queries,
            guidance_layers=self.layers,
            early_exit_threshold=threshold,
            score_draft=self.scores_draft,
            return_dict_in_generate=True,
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        exited, retention = output.exited_early.tolist(), output.average_retention(pair.num_layers).tolist()
        scores, accepted = (
            [None] * len(exited) if values is None else values.tolist()
            for values in (output.decision_score, output.num_draft_tokens_accepted)
        )
        texts, lengths = pair.texts(pair.processor, written), answer_lengths(written, pair.model.large)
        drafts = pair.texts(pair.processor.small_processor, output.draft_sequences)
        return [
            Answer(
                text,
                lengths[index],
                None if exited[index] else retention[index],
                exited_early=exited[index],
                draft=drafts[index],
                num_draft_tokens_accepted=accepted[index],
                decision_score=scores[index],
                draft_complete=bool(output.draft_complete[index]),
            )
            for index, text in enumerate(texts)
        ]


@dataclass(frozen=True)
class SGL(SGP):
    """The whole method: guided pruning with early exit (paper, section 3.3).

    Attributes:
        thresholds: By average retention, the decision score from which on the small model's answer is returned; chosen
            on questions that are not evaluated.
    """

    thresholds: dict[float, float] = field(default_factory=dict)

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        return self._generate(pair, batch, setting, self.thresholds[setting.average_retention])
