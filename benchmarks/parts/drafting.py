"""A small model that drafts in rounds and is right as often as is asked for, with all that its passes cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from benchmarks.parts.answers import Prescribed, first_draft, prescribed, random_draft
from benchmarks.parts.pairing import Pairing
from benchmarks.parts.profile import vision_tower
from benchmarks.settings import Drafts
from transformers_sgl.architectures import check_supported, visual_tokens_of
from transformers_sgl.clock import now_ms
from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.drafter import Drafter
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.small_answer import SmallAnswer, ask
from transformers_sgl.tokens.selection import decoder_processors

__all__ = ["counted_calls", "drafter_behind", "guided_answer", "one_tile_encoded", "told"]


def told(pairing: Pairing, draft: Tensor, max_answer_tokens: int | None = None, **settings: Any) -> SmallAnswer:
    """The small model's answer, which is the `draft`, `(batch, draft_length)`, with the importance it gives.

    With `max_answer_tokens` it stays ready to draft for answers of so many. `settings` are some of
    [`SGLGenerationConfig`].
    """
    small, inputs = pairing.small, pairing.for_small
    return ask(
        small,
        inputs,
        visual_tokens_of(small.config, inputs),
        SGLGenerationConfig.from_preset("balanced", **settings).resolved(),
        features=True,
        max_answer_tokens=max_answer_tokens,
        logits_processor=_writing(draft, inputs),
        max_new_tokens=draft.shape[1],
    )


def drafter_behind(drafter: Drafter, written: Tensor, later: Tensor, inputs: dict[str, Tensor]) -> Drafter:
    """The small model as if it had just `written` an answer; of `later`, it writes the tokens wherever it goes on.

    Both have the shape `(batch, answer_tokens)`. Nothing else is prescribed: it still runs all its passes, and its
    cache holds what the answers have become. What was before is used up.
    """
    drafter = replace(drafter, processors=_writing(later, inputs))
    drafter.go_on(written[:, :-1].tolist(), 1)
    return drafter


def guided_answer(pairing: Pairing, answer_tokens: int, drafts: Drafts, acceptance: float, seed: int = 0) -> Any:
    """One answer of the pair at the preset "balanced", with all that it takes; returns the [`DraftVerifier`].

    The answer is prescribed; each token that the small model writes behind a right one is right with the probability
    `acceptance`. What it writes first is taken as a draft unless there are none, and in `"rounds"` it goes on after
    each correction.
    """
    large, inputs, preset = pairing.large, pairing.inputs, PRESETS["balanced"]
    first = first_draft(large, inputs, answer_tokens, acceptance, seed)
    found = told(pairing, first, answer_tokens if drafts == "rounds" else None)
    tokens = replace(visual_tokens_of(large.config, inputs), features=found.features)
    processors = decoder_processors(preset["retention_ratio"], min_tokens_per_image=1, selection=preset["selection"])
    assert found.importance is not None
    kept = processors.keep_mask(tokens, found.importance)
    drafter = found.drafter
    if drafter is not None:
        later = random_draft(large, inputs, answer_tokens, acceptance, seed)
        drafter = replace(drafter, processors=_writing(later, pairing.for_small))
    verifier = DraftVerifier(
        large,
        None if drafts == "none" else found.draft_sequences,
        None if drafts == "none" else found.draft_mask,
        drafter=drafter,
    )
    with VisualTokenPruner(large, tokens.prompt_keep_mask(kept), preset["prune_layer"]):
        verifier.generate(**inputs, max_new_tokens=answer_tokens, **prescribed(large, inputs, answer_tokens, seed))
    return verifier


def _writing(draft: Tensor, inputs: dict[str, Tensor]) -> LogitsProcessorList:
    return LogitsProcessorList([Prescribed(draft, inputs["input_ids"].shape[1])])


@contextmanager
def counted_calls(model: PreTrainedModel) -> Iterator[list[int]]:
    """The number of calls of a model, which grows."""
    count = [0]

    def note(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


@contextmanager
def one_tile_encoded(*models: PreTrainedModel) -> Iterator[Callable[[], float]]:
    """Lets vision towers on a CPU encode one tile of each prompt and give its features to all of them.

    The shrunk towers of large models take most of a call's time, which is proportional to the number of tiles there,
    and is no other with drafts than without. Yields a function that tells how many milliseconds the tiles would have
    taken that were not encoded. On a GPU, which a single tile does not fill, and where images are no tiles, everything
    is encoded.
    """
    left_out = [0.0]
    with ExitStack() as stack:
        for model in models:
            tower: Any = vision_tower(model)
            if model.device.type == "cpu" and check_supported(model.config).inputs == {"pixel_values": "tile"}:
                stack.callback(delattr, tower, "forward")
                tower.forward = _of_one_tile(tower.forward, left_out, model.device)
        yield lambda: left_out[0]


def _of_one_tile(forward: Callable[..., Any], left_out: list[float], device: torch.device) -> Callable[..., Any]:
    def encode(pixel_values: Tensor, **kwargs: Any) -> Any:
        start = now_ms(device)
        output = forward(pixel_values[:1], **kwargs)
        left_out[0] += (len(pixel_values) - 1) * (now_ms(device) - start)
        tiled = {
            name: value.expand(len(pixel_values), *value.shape[1:])
            for name, value in output.items()
            if isinstance(value, Tensor)
        }
        return type(output)(**tiled)

    return encode
