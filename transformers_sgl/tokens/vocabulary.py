"""Whether two models write in the same tokens, and how an answer is carried over where they do not.

A model does not know its tokenizer; a pair is told where both are, and reads them when it first has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

__all__ = ["Vocabularies", "load_tokenizers"]


def load_tokenizers(*checkpoints: tuple[str, dict[str, Any]]) -> list[Any]:
    """The tokenizers beside checkpoints.

    Nobody has asked for them, so none that needs code of its own is loaded.

    Args:
        *checkpoints (`tuple` of `str` and `dict`): Where a model was loaded from, in the words of `from_pretrained`.

    Returns:
        `list`: The tokenizers.

    Raises:
        OSError: If a model was not loaded from anywhere, or has no tokenizer beside it.
    """
    if not all(path for path, _ in checkpoints):
        raise OSError("A model that was not loaded has no tokenizer beside it.")
    return [AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where) for path, where in checkpoints]


class Vocabularies:
    """The vocabularies of a large and a small model.

    Args:
        load_tokenizers (`Callable`): Returns the large and the small model's tokenizer, or raises `OSError`; called
            once, when first needed.
        sizes (`tuple` of two `int`): The models' vocabulary sizes. Where no tokenizer is to be found, equal sizes are
            taken for equal vocabularies.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoTokenizer
        >>> from transformers_sgl.hub import embedded_pair
        >>> from transformers_sgl.tokens.vocabulary import Vocabularies

        >>> tokenizers = [AutoTokenizer.from_pretrained(embedded_pair() / name) for name in ("large", "small")]
        >>> vocabularies = Vocabularies(lambda: tokenizers, sizes=(512, 512))
        >>> vocabularies.shared
        True

        ```
    """

    def __init__(self, load_tokenizers: Callable[[], Any], sizes: tuple[int, int]) -> None:
        self._load_tokenizers = load_tokenizers
        self._sizes = sizes

    @cached_property
    def tokenizers(self) -> tuple[Any, Any] | None:
        """The large and the small model's tokenizer; `None` where they are not to be found."""
        try:
            large, small = self._load_tokenizers()
        except (ImportError, OSError, ValueError):  # a tokenizer may need a package that nobody else needs
            return None
        return large, small

    @cached_property
    def shared(self) -> bool | None:
        """Whether a token means the same to both models; `None` where nobody can tell."""
        if self.tokenizers is not None:
            large, small = self.tokenizers
            return large is small or large.get_vocab() == small.get_vocab()
        return True if self._sizes[0] == self._sizes[1] else None

    def to_large(self, draft: Tensor, draft_mask: Tensor, ended: Tensor, eos_token_id: int | None) -> list[list[int]]:
        """Re-encodes drafts where the vocabularies differ: the same text in the large model's tokens.

        Args:
            draft (`Tensor` of shape `(batch, draft_length)`): The drafts in the small model's tokens.
            draft_mask (`Tensor` of shape `(batch, draft_length)`): `True` for the tokens of a draft.
            ended (`Tensor` of shape `(batch,)`): Which drafts end with an end of sequence.
            eos_token_id (`int`, *optional*): The large model's own.

        Returns:
            `list` of `list` of `int`: One draft for each sample, of different lengths.
        """
        rows = [row[mask] for row, mask in zip(draft.cpu(), draft_mask.cpu(), strict=True)]
        assert self.tokenizers is not None  # only tokenizers tell that vocabularies differ
        large, small = self.tokenizers
        texts = [small.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in rows]
        end = [] if eos_token_id is None else [eos_token_id]
        return [
            large.encode(text, add_special_tokens=False) + (end if has_ended else [])
            for text, has_ended in zip(texts, ended.tolist(), strict=True)
        ]
