"""How far the small model's answer can be trusted (paper, section 3.3).

Pure tensors. Two probabilities per sample and their mean:

- *confidence*: how sure the small model was while it wrote its draft;
- *consistency*: how probable it finds the same draft when it sees only the visual tokens that mattered most;
- *decision score*: the mean of both; from a threshold on, the draft is the answer.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["NEVER_EXIT", "confidence", "consistency", "decision_score", "exits_early", "token_log_probs"]

# A threshold above all scores, which end at 1. Unlike `None` it is not replaced by one that a pair already has.
NEVER_EXIT = 2.0


def token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The log-probability of every token under the logits that predict it.

    Args:
        logits (`Tensor` of shape `(..., vocab_size)`): Logits in any floating-point type.
        token_ids (`Tensor` of shape `(...)`): The tokens.

    Returns:
        `Tensor` of shape `(...)`: Log-probabilities in float32.
    """
    logits = logits.float()
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def confidence(log_probs: Tensor, draft_mask: Tensor) -> Tensor:
    """How sure the small model was: `exp(mean of log p(x_i))` over the tokens of its draft.

    Args:
        log_probs (`Tensor` of shape `(batch, draft_length)`): The log-probability of each draft token as it was
            written.
        draft_mask (`Tensor` of shape `(batch, draft_length)`): `True` for the tokens of a draft, its end of sequence
            included, `False` for the padding behind it.

    Returns:
        `Tensor` of shape `(batch,)`: Values in `[0, 1]`.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl.tokens.early_exit import confidence

        >>> log_probs = torch.tensor([[0.5, 0.125], [0.75, 0.1]]).log()
        >>> confidence(log_probs, torch.tensor([[True, True], [True, False]])).tolist()
        [0.25, 0.75]

        ```
    """
    return _mean(log_probs, draft_mask).exp()


def consistency(log_probs: Tensor, draft_mask: Tensor, reduction: str = "product") -> Tensor:
    """How probable the draft stays when the small model sees only its most important visual tokens.

    Args:
        log_probs (`Tensor` of shape `(batch, draft_length)`): The log-probability of each draft token, given the
            pruned prompt and the draft tokens before it.
        draft_mask (`Tensor` of shape `(batch, draft_length)`): `True` for the tokens of a draft.
        reduction (`str`, defaults to `"product"`): `"product"` of the probabilities, as in the paper, or their
            `"geometric_mean"`, which does not punish long drafts.

    Returns:
        `Tensor` of shape `(batch,)`: Values in `[0, 1]`.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl.tokens.early_exit import consistency

        >>> log_probs, draft_mask = torch.tensor([[0.5, 0.125]]).log(), torch.tensor([[True, True]])
        >>> consistency(log_probs, draft_mask).item(), consistency(log_probs, draft_mask, "geometric_mean").item()
        (0.0625, 0.25)

        ```
    """
    if reduction == "geometric_mean":
        return _mean(log_probs, draft_mask).exp()
    return log_probs.masked_fill(~draft_mask, 0.0).sum(dim=1).exp()


def decision_score(confidence: Tensor, consistency: Tensor) -> Tensor:
    """The mean of both scores.

    Args:
        confidence (`Tensor` of shape `(batch,)`): From [`confidence`].
        consistency (`Tensor` of shape `(batch,)`): From [`consistency`].

    Returns:
        `Tensor` of shape `(batch,)`: Values in `[0, 1]`.
    """
    return (confidence + consistency) / 2


def exits_early(decision_score: Tensor, threshold: float, complete: Tensor) -> Tensor:
    """Which samples need no large model.

    Args:
        decision_score (`Tensor` of shape `(batch,)`): From [`decision_score`].
        threshold (`float`): The least score that is trusted.
        complete (`Tensor` of shape `(batch,)`): `True` where the draft is a whole answer and not cut off before one.

    Returns:
        `Tensor` of shape `(batch,)`: `True` where the draft is the answer.
    """
    return (decision_score >= threshold) & complete


def _mean(log_probs: Tensor, draft_mask: Tensor) -> Tensor:
    return log_probs.masked_fill(~draft_mask, 0.0).sum(dim=1) / draft_mask.sum(dim=1).clamp(min=1)
