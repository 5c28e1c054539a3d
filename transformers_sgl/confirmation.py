"""Confirming drafts: whether the large model, pruned, would have written what the small model wrote.

Two readings that agree, each with a weakness of its own, are rarely both wrong: the small model saw everything, and
the large one sees what mattered to the small one. Where they disagree, either may be wrong, and the large model has to
read everything.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from transformers_sgl.hooks.context import one_at_a_time
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.pruning import Pruning
from transformers_sgl.prompt import Prompt
from transformers_sgl.whole_batch import WholeBatch, copied

__all__ = ["confirm"]

# What the answer's own call returns.
_DETAILS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


def confirm(
    large: PreTrainedModel,
    prompt: Prompt,
    pruning: Pruning | None,
    draft: Tensor,
    draft_mask: Tensor,
    threshold: float | None,
    settings: GenerationConfig,
    batch: WholeBatch | None = None,
    **generate_kwargs: Any,
) -> tuple[Tensor, Tensor, int]:
    """Which drafts the pruned large model confirms, `(batch,)`, how probable they are to it, and how often it ran.

    It would have written them, and they have a probability of at least `threshold`, the product over their tokens
    before any processor; that of a draft that it would not have written counts as 0.
    `draft` and `draft_mask`, `(batch, draft_length)`, are the drafts in its vocabulary; `settings` and
    `generate_kwargs` go to its `generate`, `batch` is what the caller's own objects among them see.
    """
    for name in _DETAILS:
        setattr(settings, name, None)
    settings.return_dict_in_generate = settings.output_logits = True
    kwargs = {**generate_kwargs, **copied(generate_kwargs), "generation_config": settings, "streamer": None}
    followed, length = draft.masked_fill(~draft_mask, -1), prompt.inputs["input_ids"].shape[1]
    # It is shown what the caller's own criteria are.
    leaves = (
        _LeavesDraft(followed, length)
        if batch is None
        else _LeavesDraft(batch.rows(followed, others=-1), batch.prompts.shape[1])
    )
    kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), leaves]
    verifier = DraftVerifier(large, draft, draft_mask, batch)
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time(large))
        if pruning is not None:
            stack.enter_context(pruning)
        output = verifier.generate(**prompt.inputs, **kwargs)
    written = output.sequences[:, length : length + draft.shape[1]]
    agrees, width = torch.zeros_like(draft_mask), written.shape[1]
    agrees[:, :width] = written == draft[:, :width]
    logits = torch.stack(output.logits, dim=1)[:, :width].float()  # (batch, answer_length, vocab_size)
    log_probs = logits.log_softmax(dim=-1).gather(-1, draft[:, :width, None].to(logits.device))[..., 0]
    probability = log_probs.masked_fill(~draft_mask[:, :width].to(logits.device), 0.0).sum(dim=1).exp()
    writes = (agrees | ~draft_mask).all(dim=1)
    scores = probability.to(draft.device).masked_fill(~writes, 0.0)
    return writes & (scores >= (threshold or 0.0)), scores, verifier.num_forward_passes


class _LeavesDraft(StoppingCriteria):
    """Ends an answer with the first token that is not its draft's: what would follow does not matter."""

    def __init__(self, draft: Tensor, prompt_length: int) -> None:
        self._draft = draft  # (batch, draft_length), -1 behind its end
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        step = input_ids.shape[1] - self._prompt_length - 1
        if step >= self._draft.shape[1]:
            return torch.ones_like(input_ids[:, 0], dtype=torch.bool)
        return input_ids[:, -1] != self._draft[:, step].to(input_ids.device)
