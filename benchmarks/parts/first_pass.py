"""A large model's first pass over a prompt, done once for several answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.parts.profile import vision_tower
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.transformers_interface import cache_of, next_token_output

__all__ = ["FirstPass", "VerifierWithFirstPass", "remembered_features"]


@dataclass
class FirstPass:
    """What is known after a first pass; nothing before.

    Attributes:
        took_ms (`float`): The time to the first token.
        features (*optional*): What the vision tower has returned.
        logits (`Tensor`, *optional*): Those of the prompt's last token and of the draft.
        cache (`list` of two `Tensor`): Keys and values of each layer.
    """

    took_ms: float = 0.0
    features: Any = None
    logits: Tensor | None = None
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class VerifierWithFirstPass(DraftVerifier):
    """A verifier that makes the first pass where nobody has made it yet, and only goes on from it otherwise.

    What the prompt and the draft hold does not matter then, only how long they are.
    """

    first_pass: FirstPass

    def run_pass(self, forward: Callable[..., Any], extend: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """A call of the model, or what is known of the first one."""

        def known_or_run(**arguments: Any) -> Any:
            first, cache = self.first_pass, cache_of(arguments)
            assert cache is not None
            if cache.get_seq_length() > 0:
                return forward(**arguments)
            if first.logits is None:
                output = forward(**arguments)
                first.logits = output.logits
                first.cache = [(layer.keys, layer.values) for layer in cache.layers]  # which decoding does not change
                return output
            for index, (keys, values) in enumerate(first.cache):
                cache.update(keys, values, index)
            return next_token_output(first.logits, cache)

        return super().run_pass(known_or_run, extend, inputs)


@contextmanager
def remembered_features(model: PreTrainedModel, first_pass: FirstPass) -> Iterator[None]:
    """Lets the vision tower run the first time only, since `generate` encodes images before it calls the model."""
    tower: Any = vision_tower(model)
    inherited, forward = vars(tower).get("forward"), tower.forward

    def encode(*args: Any, **kwargs: Any) -> Any:
        if first_pass.features is None:
            first_pass.features = forward(*args, **kwargs)
        return first_pass.features

    tower.forward = encode
    try:
        yield
    finally:
        del tower.forward
        if inherited is not None:
            tower.forward = inherited
