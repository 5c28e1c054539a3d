"""The cache of a pruned call.

Its upper layers lack the visual tokens that did not matter for one question, so stock `generate` cannot go on with it.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache

__all__ = ["PrunedCache"]


class PrunedCache(DynamicCache):
    """The cache of a pruned call, which nothing can be added to."""

    @classmethod
    def seal(cls, cache: Any) -> None:
        """Makes the cache of a pruned call that has ended one of this class, in place."""
        if isinstance(cache, DynamicCache):
            cache.__class__ = cls

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ValueError`, whichever model tries to add tokens."""
        raise ValueError(
            "This cache comes from a pruned call, so its upper layers lack visual tokens that the next question may "
            "need: pass the whole conversation without it."
        )
