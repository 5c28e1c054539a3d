"""What guided generation returns, and how long its parts took."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from transformers_sgl.transformers_interface import CacheUnderBothNames

__all__ = ["Clock", "SGLGenerateOutput", "passed_on", "sequences_of"]


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
        num_draft_tokens_accepted (`Tensor` of shape `(batch,)`, *optional*): The tokens of each draft that the large
            model confirmed.
        num_large_forward_passes (`int`, *optional*): How often the large model ran, its prefill included.
        timings (`dict`, *optional*): Wall-clock milliseconds: `guidance_ms` and `large_ms` (0 where that model did not
            run) and `total_ms`.
        scores, logits, attentions, hidden_states, cache, sequences_scores, beam_indices (*optional*): As the large
        model's `generate` returns them, for the samples that it was called for; in pruned layers shorter. The cache
        can be read under its name before and since transformers 5.24.
    """

    importance: Tensor | None = None
    importance_transfer: str | None = None
    keep_mask: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    prune_layer: int | None = None
    draft_sequences: Tensor | None = None
    draft_complete: Tensor | None = None
    exited_early: Tensor | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None
    decision_score: Tensor | None = None
    num_draft_tokens_accepted: Tensor | None = None
    num_large_forward_passes: int | None = None
    timings: dict[str, float] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None

    def __repr__(self) -> str:
        """The shapes of tensors instead of their values, which would fill pages."""
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in self.items())})"


def sequences_of(output: ModelOutput | Tensor) -> Tensor:
    """The sequences that stock `generate` returned, alone or in an output."""
    return output if isinstance(output, Tensor) else output["sequences"]


def passed_on(output: ModelOutput | Tensor | None) -> dict[str, Any]:
    """The fields of the large model's output that an [`SGLGenerateOutput`] keeps as they are."""
    if output is None or isinstance(output, Tensor):
        return {}
    names = [field.name for field in fields(SGLGenerateOutput) if field.name != "sequences"]
    return {name: output[name] for name in names if name in output}


class Clock:
    """Wall-clock milliseconds of each step; waits for the devices to finish."""

    def __init__(self, *devices: torch.device) -> None:
        self._devices = {device for device in devices if device.type == "cuda"}
        self._started = self._last = self._now()
        self._laps = {"guidance_ms": 0.0, "large_ms": 0.0}

    def lap(self, name: str) -> None:
        """Names the time since the last lap."""
        now = self._now()
        self._laps[name] = (now - self._last) * 1000
        self._last = now

    @property
    def timings(self) -> dict[str, float]:
        """The laps and their total."""
        return {**self._laps, "total_ms": (self._last - self._started) * 1000}

    def _now(self) -> float:
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()


def _shown(value: Any) -> str:
    """A field of an output as it is printed."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {number:.1f}' for name, number in value.items())}}}"
    return repr(value) if isinstance(value, int | str) else f"<{type(value).__name__}>"
