"""What guided generation returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from transformers_sgl.generation_config_sgl import average_retention
from transformers_sgl.transformers_interface import CacheUnderBothNames
from transformers_sgl.whole_batch import WholeBatch

__all__ = ["SGLGenerateOutput", "output_class", "passed_on", "sequences_of"]


@dataclass(repr=False)
class SGLGenerateOutput(CacheUnderBothNames, GenerateDecoderOnlyOutput):
    """The output of guided generation with `return_dict_in_generate=True`: stock `generate`'s output, and more.

    The fields are the same whatever the settings; `None` where a part did not run or was not asked for.

    Attributes:
        sequences (`Tensor` of shape `(batch, prompt_length + answer_length)`): Prompts and answers in the large
            model's vocabulary, as from any `generate`.
        importance (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): The attention that each visual token
            received in the small model, in float32, carried over to the large model's visual tokens.
        importance_transfer (`str`, *optional*): How it was carried over: `"identity"`, token by token, or
            `"resampling"`, through image coordinates, where the models cut the images differently.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for the visual tokens that the
            large model kept; none in a sample that exited early.
        num_visual_tokens (`Tensor` of shape `(batch,)`, *optional*): The number of visual tokens in each prompt.
        prune_layer (`int`, *optional*): The first decoder layer of the large model that saw only the kept tokens.
        vision_keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for the visual tokens
            that the large model's vision tower encoded, where it left some out.
        vision_prune_layer (`int`, *optional*): The tower's first layer that saw only their patches; `None` where only
            whole tiles were left out.
        vision_share (`Tensor` of shape `(batch,)`, *optional*): The part of the tower's layers that ran, by patches: 0
            in a sample that exited early, and 1 more where the large model has read the prompt again.
        draft_sequences (`Tensor` of shape `(batch, draft_length)`, *optional*): The small model's own answers, in the
            small model's vocabulary.
        draft_complete (`Tensor` of shape `(batch,)`, *optional*): `True` where such an answer is whole; one that was
            cut off, or is too short, never exits early.
        exited_early (`Tensor` of shape `(batch,)`, *optional*): `True` where the small model's answer was returned and
            the large model not called.
        confidence (`Tensor` of shape `(batch,)`, *optional*): How sure the small model was of its answer.
        consistency (`Tensor` of shape `(batch,)`, *optional*): How probable its answer stays when it sees only the
            most important visual tokens.
        decision_score (`Tensor` of shape `(batch,)`, *optional*): The mean of both, to which `early_exit_threshold` is
            compared.
        draft_confirmed (`Tensor` of shape `(batch,)`, *optional*): With a `confirmation_threshold`, `True` where the
            pruned large model would have written the small model's answer, which then is the answer; where not, it
            has read everything afterwards.
        confirmation_score (`Tensor` of shape `(batch,)`, *optional*): With a `confirmation_threshold`, which it is
            compared to: how probable the pruned large model finds the small model's answer, and 0 where it would have
            written another.
        num_draft_rounds (`Tensor` of shape `(batch,)`, *optional*): How many drafts the small model wrote, its own
            answer included.
        num_draft_tokens (`Tensor` of shape `(batch,)`, *optional*): The tokens of these drafts.
        num_draft_tokens_accepted (`Tensor` of shape `(batch,)`, *optional*): Those that the large model confirmed.
        num_large_forward_passes (`int`, *optional*): How often the large model ran, its prefill included.
        timings (`dict`, *optional*): Wall-clock milliseconds: `guidance_ms` (the small model's answer and its scores,
            or with `guidance="prompt"` its one pass), `large_ms` (0 where that model did not run) and `total_ms`.
        scores, logits (tuples of `Tensor` of shape `(batch, vocab_size)`, *optional*): As the large model's `generate`
            returns them, one for each token of the answers; NaN where an answer exited early, because then the
            large model has none.
        attentions, hidden_states, cache, sequences_scores, beam_indices (*optional*): As the large model's `generate`
            returns them, for the samples that it was called for, in their order; in pruned layers shorter. The cache
            can be read under its name before and since transformers 5.24; that of a pruned call can be passed to the
            pair's `generate` with the next turn of the conversation, and to nothing else.
    """

    importance: Tensor | None = None
    importance_transfer: str | None = None
    keep_mask: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    prune_layer: int | None = None
    vision_keep_mask: Tensor | None = None
    vision_prune_layer: int | None = None
    vision_share: Tensor | None = None
    draft_sequences: Tensor | None = None
    draft_complete: Tensor | None = None
    exited_early: Tensor | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None
    decision_score: Tensor | None = None
    draft_confirmed: Tensor | None = None
    confirmation_score: Tensor | None = None
    num_draft_rounds: Tensor | None = None
    num_draft_tokens: Tensor | None = None
    num_draft_tokens_accepted: Tensor | None = None
    num_large_forward_passes: int | None = None
    timings: dict[str, float] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None

    def __repr__(self) -> str:
        """The shapes of tensors instead of their values, which would fill pages."""
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in self.items())})"

    def average_retention(self, num_layers: int) -> Tensor:
        """Visual tokens that the large model processed, averaged over its layers (paper, section 4.1).

        Args:
            num_layers (`int`): The number of the large model's decoder layers.

        Returns:
            `Tensor` of shape `(batch,)`: Fractions in float64: 1 where nothing was pruned, 0 for an early exit, and 1
            more where the large model has read the prompt again.
        """
        if self.keep_mask is None or self.prune_layer is None or self.num_visual_tokens is None:
            found = [1.0] * len(self.sequences)
        else:
            kept = self.keep_mask.sum(dim=1)
            encoded = self.num_visual_tokens if self.vision_keep_mask is None else self.vision_keep_mask.sum(dim=1)
            number = self.num_visual_tokens.clamp(min=1)
            ratios = zip(*((each.cpu().double() / number.cpu()).tolist() for each in (kept, encoded)), strict=True)
            found = [average_retention(ratio, self.prune_layer, num_layers, first) for ratio, first in ratios]
        retention = torch.tensor(found, dtype=torch.float64)
        if self.draft_confirmed is not None and self.keep_mask is not None:  # those it has read once more
            retention += (~self.draft_confirmed).cpu()
        return retention if self.exited_early is None else retention.masked_fill(self.exited_early.cpu(), 0.0)


@dataclass(repr=False)
class _OutputOfBeams(SGLGenerateOutput, GenerateBeamDecoderOnlyOutput):
    """The same from beam search, for which stock `generate` has an output of its own, and in its order."""


def output_class(output: ModelOutput | Tensor | None) -> type[SGLGenerateOutput]:
    """The class of output that stands for what stock `generate` returned."""
    return _OutputOfBeams if isinstance(output, GenerateBeamDecoderOnlyOutput) else SGLGenerateOutput


def sequences_of(output: ModelOutput | Tensor) -> Tensor:
    """The sequences that stock `generate` returned, alone or in an output."""
    return output if isinstance(output, Tensor) else output["sequences"]


def passed_on(
    output: ModelOutput | Tensor | None,
    batch: WholeBatch | None = None,
    answer_length: int = 0,
    settings: GenerationConfig | None = None,
    vocab_size: int = 0,
) -> dict[str, Any]:
    """The fields of the large model's output that an [`SGLGenerateOutput`] keeps.

    Where it ran only a part of a `batch`, or nothing of it, the scores and logits that the `settings` ask for cover
    all of it: one of shape `(batch, vocab_size)` for each token of the answers, NaN where the large model did not run.
    """
    kept = {}
    if output is not None and not isinstance(output, Tensor):
        names = [field.name for field in fields(SGLGenerateOutput) if field.name != "sequences"]
        kept = {name: output[name] for name in names if name in output}
    if batch is not None and not batch.runs.all():
        for name in ("scores", "logits"):
            if getattr(settings, f"output_{name}", False):
                steps = [batch.rows(step, others=torch.nan) for step in kept.get(name, ())]
                nothing = torch.full((len(batch.runs), 1), torch.nan, device=batch.runs.device).expand(-1, vocab_size)
                kept[name] = (*steps, *[nothing] * (answer_length - len(steps)))
    return kept


def _shown(value: Any) -> str:
    """A field of an output as it is printed."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {number:.1f}' for name, number in value.items())}}}"
    return repr(value) if isinstance(value, int | str) else f"<{type(value).__name__}>"
