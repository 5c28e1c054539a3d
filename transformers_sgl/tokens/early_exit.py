"""How far the small model's answer can be trusted (paper, section 3.3). Pure tensors.

- *confidence*: how sure the small model was while it wrote its draft;
- *consistency*: how probable it finds the same draft when it sees only the most important visual tokens;
- *decision score*: the mean of both; from a threshold on, the draft is the answer.

Everywhere, `log_probs` and `draft_mask` have the shape `(batch, draft_length)`: the log-probability of each draft
token, and `True` for a draft's tokens, its end of sequence included. Scores have the shape `(batch,)` and lie in
`[0, 1]`.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["NEVER_EXIT", "confidence", "consistency", "decision_score", "exits_early", "token_log_probs"]

# A threshold above all scores. Unlike `None` in a configuration, it is not replaced by the pair's own threshold.
NEVER_EXIT = 2.0


def token_log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The log-probability of tokens `(...)` under the logits `(..., vocab_size)` that predict them, in float32."""
    logits = logits.float()
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(dim=-1)


def confidence(log_probs: Tensor, draft_mask: Tensor) -> Tensor:
    """How sure the small model was: `exp(mean of log p(x_i))` over the tokens of its draft as it wrote them."""
    return _mean(log_probs, draft_mask).exp()


def consistency(log_probs: Tensor, draft_mask: Tensor, reduction: str = "product") -> Tensor:
    """How probable the draft stays when the small model sees only its most important visual tokens.

    Each token's probability is given the pruned prompt and the draft tokens before it. `reduction` is their
    `"product"`, as in the paper, or their `"geometric_mean"`, which does not penalize long drafts.
    """
    if reduction == "geometric_mean":
        return _mean(log_probs, draft_mask).exp()
    return log_probs.masked_fill(~draft_mask, 0.0).sum(dim=1).exp()


def decision_score(confidence: Tensor, consistency: Tensor) -> Tensor:
    """The mean of both scores."""
    return (confidence + consistency) / 2


def exits_early(decision_score: Tensor, threshold: float, complete: Tensor) -> Tensor:
    """The samples that need no large model: their score reaches the threshold, and their draft is complete."""
    return (decision_score >= threshold) & complete


def _mean(log_probs: Tensor, draft_mask: Tensor) -> Tensor:
    return log_probs.masked_fill(~draft_mask, 0.0).sum(dim=1) / draft_mask.sum(dim=1).clamp(min=1)
