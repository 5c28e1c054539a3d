"""Running the large model on prompt and draft.

Stock `generate` asks its model for the next token's logits, step by step. Here it asks a view of the large model,
which reads the prompt *and* the draft at the first call and so knows the logits of every step in which the answer
follows the draft. It returns those without running the model again. Where the chosen token is not the draft's, the
cache is cut back to the right part, and the model runs as usual; the rest of the draft is read along with the next
token where that may save a step.

Logits processors, stopping criteria, streamers and the choice of tokens stay with `generate`: the draft changes how
often the model runs, and not the output.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from transformers_sgl.architectures import check_supported, visual_token_ids
from transformers_sgl.batching import append_tokens
from transformers_sgl.hooks.answer_run import AnswerRun, GoesOn
from transformers_sgl.tokens.draft_length import DraftLength
from transformers_sgl.transformers_interface import cache_of, can_be_cut_back, view_of
from transformers_sgl.whole_batch import WholeBatch

__all__ = ["DraftVerifier"]


class DraftVerifier:
    """Lets a model check a draft in its prefill and continue after the part that it agrees with.

    With beams, several answers to a prompt, a static cache, `inputs_embeds`, classifier-free guidance, or where
    attentions or hidden states are asked for, the model writes as if there were no draft. A batch advances together,
    up to the first token at which an unfinished sample leaves its draft; where scores or logits are returned, which
    tell of ended samples too, any sample.

    The output is the model's own, token for token, within the limits of its arithmetic: reading several tokens in one
    pass rounds differently than reading them one by one, which can turn a tie, as in any assisted generation.

    Args:
        model (`PreTrainedModel`): The model; it is not changed.
        draft (`Tensor` of shape `(batch, draft_length)`): Drafts in the model's vocabulary, without the prompts.
        draft_mask (`Tensor` of shape `(batch, draft_length)`): `True` for the tokens of a draft, its end of sequence
            included, `False` for padding.
        batch (`WholeBatch`, *optional*): What the caller's own logits processors and stopping criteria see, where it
            is more than the model runs.
        drafter ([`GoesOn`], *optional*): What goes on where an answer has left its draft. With it, the first pass
            reads no more than the beginning of a draft, and each sample keeps what it has accepted.
        lengths ([`DraftLength`], *optional*): How many tokens are drafted then; by default as many as pay.

    Attributes:
        num_forward_passes (`int`): How often the model has run.
        num_accepted (`Tensor` of shape `(batch,)`, *optional*): How many tokens of each draft were confirmed; `None`
            where the draft was not used.
        num_drafted (`Tensor` of shape `(batch,)`, *optional*): How many tokens were drafted.
        num_rounds (`Tensor` of shape `(batch,)`, *optional*): How many drafts there were.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl import DraftVerifier
        >>> from transformers_sgl.hub import embedded_pair

        >>> large = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "large")
        >>> prompt = torch.arange(20, 32)[None]  # any twelve tokens
        >>> answer = large.generate(input_ids=prompt, max_new_tokens=8)
        >>> draft = answer[:, 12:]
        >>> verifier = DraftVerifier(large, draft, torch.ones_like(draft).bool())
        >>> torch.equal(verifier.generate(input_ids=prompt, max_new_tokens=8), answer), verifier.num_forward_passes
        (True, 1)

        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: Tensor | None = None,
        draft_mask: Tensor | None = None,
        batch: WholeBatch | None = None,
        drafter: GoesOn | None = None,
        lengths: DraftLength | None = None,
    ) -> None:
        if (draft is None) != (draft_mask is None) or (
            draft is not None and draft_mask is not None and (draft.dim() != 2 or draft.shape != draft_mask.shape)
        ):
            raise ValueError(
                "`draft` and `draft_mask` must both have the shape (batch, draft_length), but they have "
                f"{None if draft is None else tuple(draft.shape)} and "
                f"{None if draft_mask is None else tuple(draft_mask.shape)}."
            )
        self.num_forward_passes = 0
        self.num_accepted: Tensor | None = None
        self.num_drafted: Tensor | None = None
        self.num_rounds: Tensor | None = None
        self._model = model
        self._draft = draft
        self._draft_mask = draft_mask
        self._batch = batch
        self._drafter, self._lengths = drafter, lengths
        self._own: list[Any] = []
        self._run: AnswerRun | None = None

    def generate(self, **kwargs: Any) -> Any:
        """Stock `generate` of the model, with the draft; arguments and result are the model's own."""
        self._own = [*(kwargs.get("logits_processor") or ()), *(kwargs.get("stopping_criteria") or ())]
        allowed = kwargs.get("prefix_allowed_tokens_fn")
        if self._batch is not None and allowed is not None:
            kwargs["prefix_allowed_tokens_fn"] = self._batch.function(allowed, kwargs["input_ids"].shape[1])
        # A repository's `custom_generate` lies on the model itself, bound to it and not to its view.
        return type(self._model).generate(view_of(self._model, self), **kwargs)

    def run_loop(
        self,
        view: Any,
        loop: Callable[..., Any],
        input_ids: Tensor,
        stopping_criteria: StoppingCriteriaList,
        logits_processor: LogitsProcessorList,
        **kwargs: Any,
    ) -> Any:
        """Runs the model's decoding loop, called in its place by the view; `input_ids` are the prompts."""
        if self._batch is not None and len(input_ids) == int(self._batch.runs.sum()):
            stopping_criteria = self._shown(stopping_criteria, self._batch.criterion, input_ids.shape[1])
            logits_processor = self._shown(logits_processor, self._batch.processor, input_ids.shape[1])
        kwargs["logits_processor"] = logits_processor
        config, past = kwargs["generation_config"], cache_of(kwargs)
        if past is not None and past.is_compileable:
            # Compiled code stays on the model, so it must be compiled from the model, not from a view of it.
            output = loop(self._model, input_ids=input_ids, stopping_criteria=stopping_criteria, **kwargs)
            sequences = output if isinstance(output, Tensor) else output.sequences
            self.num_forward_passes += sequences.shape[1] - input_ids.shape[1]
            return output
        if self._draft is None or self._draft_mask is None or not _can_verify(self._draft, input_ids, **kwargs):
            return loop(view, input_ids=input_ids, stopping_criteria=stopping_criteria, **kwargs)
        eos = [criterion.eos_token_id for criterion in stopping_criteria if hasattr(criterion, "eos_token_id")]
        run = AnswerRun(
            self._draft,
            self._draft_mask,
            past,
            config.max_length - input_ids.shape[1],
            placeholders=list(visual_token_ids(self._model.config)),
            ends=[int(token) for ids in eos for token in ids.reshape(-1)],
            pad_token_id=config.pad_token_id,
            follows_ended=bool(config.output_scores or config.output_logits),
            drafter=self._drafter,
            lengths=self._lengths,
        )
        self._run = run
        try:
            criteria = _WatchedCriteria(stopping_criteria, run.note)
            output = loop(view, input_ids=input_ids, stopping_criteria=criteria, **kwargs)
            run.cut_back(run.num_chosen - 1)
            self.num_accepted, self.num_drafted, self.num_rounds = run.num_accepted, run.num_drafted, run.num_rounds
        finally:
            self._run = None
        return output

    def _shown(self, objects: Any, show: Callable[[Any, int], Any], prompt_length: int) -> Any:
        """A loop's processors or criteria, of which the caller's own see the whole batch."""
        own = {id(each) for each in self._own}
        return type(objects)(show(each, prompt_length) if id(each) in own else each for each in objects)

    def run_pass(self, forward: Callable[..., Any], extend: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Makes a call of the model, or only returns the next token's logits where they are known already.

        `forward` is the call, `inputs` are its arguments, and `extend` is the model's own way to lengthen them by new
        tokens.
        """
        run = self._run
        if run is None:
            self.num_forward_passes += 1
            return forward(**inputs)
        if not run.knows_next():
            self.num_forward_passes += 1
            run.cut_back(run.num_chosen - 1)
            draft = run.rest()
            if draft.shape[1]:
                token_type = check_supported(self._model.config).answer_token_type
                inputs = append_tokens(inputs, draft, extend, token_type)
                if "logits_to_keep" in inputs:
                    inputs["logits_to_keep"] = draft.shape[1] + 1
            start = time.perf_counter()
            run.learn(forward(**inputs).logits, draft.shape[1], start)
        return run.next_output()


def _can_verify(draft: Tensor, input_ids: Tensor, generation_config: GenerationConfig, **kwargs: Any) -> bool:
    """Whether a decoding loop with these arguments needs nothing that only a pass of its own can give."""
    past = cache_of(kwargs)
    return (
        draft.shape[0] == input_ids.shape[0]
        and isinstance(past, DynamicCache)
        and past.get_seq_length() == 0
        and bool(kwargs.get("use_cache", True))  # where not, each pass reads everything again
        and all(can_be_cut_back(layer, generation_config.max_length) for layer in past.layers)
        and kwargs.get("logits_to_keep") in (None, 1)  # None where a model always gives all
        and kwargs.get("inputs_embeds") is None  # to which tokens cannot be appended
        and not (generation_config.output_attentions or generation_config.output_hidden_states)
        and generation_config.guidance_scale in (None, 1)
        and generation_config.prefill_chunk_size is None
        and not kwargs.get("synced_gpus")  # several processes have to run their passes in step
    )


class _WatchedCriteria(StoppingCriteriaList):
    """The stopping criteria of a loop, whose verdicts `note` is told."""

    def __init__(self, criteria: StoppingCriteriaList, note: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__(criteria)
        self._note = note

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        finished = super().__call__(input_ids, scores, **kwargs)
        self._note(input_ids[:, -1], finished)
        return finished
