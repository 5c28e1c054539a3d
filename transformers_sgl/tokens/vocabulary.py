"""Whether two models write in the same tokens, and how to carry an answer over where they do not.

A model does not know its tokenizer; a pair is told where both are, and reads them when it first needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

__all__ = ["Vocabularies", "check_prompts_can_be_read", "load_tokenizers", "vocabulary_sizes"]


def vocabulary_sizes(*models: Any) -> tuple[int, ...]:
    """How many tokens each model knows."""
    return tuple(model.config.get_text_config(decoder=True).vocab_size for model in models)


def check_prompts_can_be_read(prompts: Tensor, small: Any) -> None:
    """Raises if prompts of shape `(batch, prompt_length)` have tokens that were added to the large model alone."""
    weight = getattr(small.get_input_embeddings(), "weight", None)
    size, token = None if weight is None else weight.shape[0], int(prompts.max())
    if size is not None and token >= size:
        raise ValueError(
            f"The small model's prompt has the token {token}, but it knows {size}: where tokens were added, prepare "
            "prompts with the pair's own `SGLProcessor`, or add them to the small model, too, as with "
            "`pair.small.resize_token_embeddings`."
        )


def load_tokenizers(*checkpoints: tuple[str, dict[str, Any]]) -> list[Any]:
    """The tokenizers beside checkpoints, each a path and keyword arguments of `from_pretrained`.

    Nobody asked for them, so none that needs code of its own is loaded. Raises `OSError` if there is none.
    """
    if not all(path for path, _ in checkpoints):
        raise OSError("A model that was not loaded has no tokenizer beside it.")
    return [AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where) for path, where in checkpoints]


class Vocabularies:
    """The vocabularies of a large and a small model.

    `load_tokenizers` returns both tokenizers, or raises `OSError`; it is called once, when first needed. Without
    tokenizers, equal `sizes` count as equal vocabularies.
    """

    def __init__(self, load_tokenizers: Callable[[], Any], sizes: tuple[int, ...]) -> None:
        self._load_tokenizers = load_tokenizers
        self.sizes = sizes

    def given(self, tokenizer: Any, small_tokenizer: Any) -> Vocabularies:
        """These vocabularies, or those of two tokenizers where both are passed."""
        if tokenizer is None or small_tokenizer is None:
            return self
        return Vocabularies(lambda: (tokenizer, small_tokenizer), self.sizes)

    @cached_property
    def tokenizers(self) -> tuple[Any, Any] | None:
        """The large and the small model's tokenizer; `None` where they cannot be found."""
        try:
            large, small = self._load_tokenizers()
        except (ImportError, OSError, ValueError):  # a tokenizer may need a package that nobody else needs
            return None
        return large, small

    @cached_property
    def shared(self) -> bool | None:
        """Whether a token means the same to both models; `None` where nothing tells."""
        if self.tokenizers is not None:
            large, small = self.tokenizers
            return large is small or large.get_vocab() == small.get_vocab()
        return True if self.sizes[0] == self.sizes[1] else None

    def to_large(self, draft: Tensor, draft_mask: Tensor, ended: Tensor, eos_token_id: int | None) -> list[list[int]]:
        """The same texts in the large model's tokens, a list for each draft of `(batch, draft_length)`.

        Drafts that have `ended`, `(batch,)`, get the large model's `eos_token_id`.
        """
        rows = [row[mask] for row, mask in zip(draft.cpu(), draft_mask.cpu(), strict=True)]
        assert self.tokenizers is not None  # only tokenizers tell that vocabularies differ
        large, small = self.tokenizers
        texts = [_text(small, row) for row in rows]
        end = [] if eos_token_id is None else [eos_token_id]
        return [
            large.encode(text, add_special_tokens=False) + (end if has_ended else [])
            for text, has_ended in zip(texts, ended.tolist(), strict=True)
        ]

    def in_small(self, answer: list[int]) -> list[int]:
        """The beginning of an answer, of the large model's tokens, in the small model's."""
        assert self.tokenizers is not None
        large, small = self.tokenizers
        return list(small.encode(_text(large, answer), add_special_tokens=False))

    def go_on(self, answer: list[int], small_answer: list[int], small_draft: list[int]) -> list[int]:
        """What a draft, of the small model's tokens, adds to an answer of the large model's.

        The text as a whole is encoded, so that it splits as the large model would split it. Where that would split
        the answer itself in another way than it is written, the added text is encoded alone.
        """
        assert self.tokenizers is not None
        large, small = self.tokenizers
        before, after = _text(small, small_answer), _text(small, small_answer + small_draft)
        added = after[len(before) :] if after.startswith(before) else _text(small, small_draft)
        whole = list(large.encode(_text(large, answer) + added, add_special_tokens=False))
        if whole[: len(answer)] == answer:
            return whole[len(answer) :]
        return list(large.encode(added, add_special_tokens=False))


def _text(tokenizer: Any, ids: list[int] | Tensor) -> str:
    """The text of an answer's tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
