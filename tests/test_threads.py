"""Threads that share a pair: each call's answer is what it would have been alone."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tiny_families import picture, tiny_family_pair
from tiny_models import FLASH_STAND_IN, find_visual_tokens, in_threads, prompts, samples, state, tiny_internvl
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import (
    AttentionRecorder,
    DraftVerifier,
    SGLForConditionalGeneration,
    SGLProcessor,
    VisualTokenPruner,
    VisualTokens,
)
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.opening import chat_inputs, user_turn

pytestmark = pytest.mark.mechanics

NUM_THREADS = 8
# The long form: SGL_THREAD_CALLS=500 pytest tests/test_threads.py
NUM_CALLS = int(os.environ.get("SGL_THREAD_CALLS", "12"))
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(autouse=True)
def impatient_threads() -> Iterator[None]:
    """Lets threads take turns after a few instructions, and not after the usual 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


# --- calls of all kinds --------------------------------------------------------------------------------------------


def calls_of_all_kinds(pair: SGLForConditionalGeneration, processor: SGLProcessor) -> dict[str, Callable[[], Any]]:
    """Calls that answer the same whenever they are made; each returns tensors."""
    calls: dict[str, Callable[[], Any]] = {}
    for number, sizes in enumerate([[(40, 30)], [(30, 40), (16, 16)]]):
        chats = [
            user_turn(f"What is {'it' * (index + number + 1)}?", [picture(*size, seed=number)])
            for index, size in enumerate(sizes)
        ]

        prepare = partial(chat_inputs, pair, processor, chats)
        both = dict(prepare())
        boxes = ("visual_token_boxes", "small_visual_token_boxes")
        large = {name: value for name, value in both.items() if not name.startswith("small_") and name not in boxes}
        own = {name: value for name, value in both.items() if name.startswith("small_") and name not in boxes}
        small = {name.removeprefix("small_"): value for name, value in own.items()} or large
        calls[f"processor {number}"] = prepare
        calls |= {f"{name} {number}": call for name, call in _calls_of(pair, both, large, small).items()}
    return calls


def _calls_of(pair: SGLForConditionalGeneration, both: Any, large: Any, small: Any) -> dict[str, Callable[[], Any]]:
    def guided(**settings: Any) -> Callable[[], Any]:
        def call() -> Any:
            output = pair.generate(**both, **GREEDY, return_dict_in_generate=True, **settings)
            return {
                name: output[name]
                for name in ("sequences", "importance", "keep_mask", "exited_early", "consistency")
                if output.get(name) is not None
            }

        return call

    def streamed() -> Any:
        streamer = _Collect()
        sequences = pair.generate(**both, **GREEDY, retention_ratio=0.3, streamer=streamer)
        return {"sequences": sequences, "streamed": torch.cat(streamer.tokens)}

    def pruned(prune_layer: int, seed: int) -> Callable[[], Any]:
        keep = random_choice(visual_tokens_of(pair.large.config, large), seed)

        def call() -> Any:
            with VisualTokenPruner(pair.large, keep, prune_layer):
                return {"sequences": pair.large.generate(**large, **GREEDY)}

        return call

    def recorded(model: Any, inputs: Any, layers: list[int] | None = None) -> Callable[[], Any]:
        def call() -> Any:
            with AttentionRecorder(model, visual_tokens_of(model.config, inputs), layers=layers) as recorder:
                sequences = model.generate(**inputs, **GREEDY)
            return {"sequences": sequences, "importance": recorder.importance}

        return call

    draft = pair.large.generate(**large, **GREEDY)[:, large["input_ids"].shape[1] :]
    draft = torch.cat([draft[:, :2], (draft[:, 2:] + 1) % 50], dim=1)

    def verified() -> Any:
        verifier = DraftVerifier(pair.large, draft, torch.ones_like(draft).bool())
        return {"sequences": verifier.generate(**large, **GREEDY), "accepted": verifier.num_accepted}

    @torch.no_grad()
    def forward(model: Any, inputs: Any) -> Any:
        return {"logits": model(**inputs).logits}

    calls = {
        "quality": guided(preset="quality"),
        "balanced": guided(preset="balanced"),
        "fast": guided(preset="fast"),
        "everything kept": guided(retention_ratio=1.0, verify_draft=True),
        "exit": guided(preset="balanced", early_exit_threshold=0.0),
        "perhaps an exit": guided(preset="balanced", early_exit_threshold=0.3),
        "without a draft": guided(retention_ratio=0.3, prune_layer=0, verify_draft=False),
        "pair.forward": lambda: forward(pair, both),
        "large.forward": lambda: forward(pair.large, large),
        "large.generate": lambda: {"sequences": pair.large.generate(**large, **GREEDY)},
        "small.generate": lambda: {"sequences": pair.small.generate(**small, **GREEDY)},
        "pruned from layer 0": pruned(0, seed=1),
        "pruned": pruned(2, seed=2),
        "recorded": recorded(pair.large, large),
        "last layer recorded": recorded(pair.large, large, layers=[3]),
        "small recorded": recorded(pair.small, small),
        "verified": verified,
    }
    return calls if both["input_ids"].shape[0] > 1 else {**calls, "streamed": streamed}


class _Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.reshape(-1))

    def end(self) -> None:
        pass


def random_choice(tokens: VisualTokens, seed: int) -> Tensor:
    keep = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    keep[:, 0] = True
    return tokens.prompt_keep_mask(keep)


def difference(found: Any, expected: Any) -> str | None:
    """What differs between two answers."""
    if found.keys() != expected.keys():
        return f"{sorted(found)} instead of {sorted(expected)}"
    for name in expected:
        if not torch.equal(found[name], expected[name]):
            return name
    return None


@pytest.mark.parametrize(("large", "small"), [("internvl", "internvl"), ("qwen2_vl", "internvl")])
def test_each_answer_is_what_it_would_have_been_alone(large: str, small: str) -> None:
    pair, processor = tiny_family_pair(large, small)
    calls = calls_of_all_kinds(pair, processor)
    expected = {name: call() for name, call in calls.items()}
    before = state(pair)
    draws = [random.Random(number) for number in range(NUM_THREADS)]

    def call(thread: int) -> str | None:
        name = draws[thread].choice(list(calls))
        try:
            wrong = difference(calls[name](), expected[name])
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
        return None if wrong is None else f"{name}: {wrong}"

    found = itertools.chain(*in_threads(NUM_THREADS, call, NUM_CALLS))
    assert [each for each in found if each is not None] == []
    assert state(pair) == before


@pytest.mark.parametrize("implementation", ["eager", FLASH_STAND_IN])
def test_recorders_and_pruners_of_one_model_do_not_hear_each_other(implementation: str) -> None:
    model = tiny_internvl(attn_implementation=implementation)
    batches = [prompts(seed=seed) for seed in range(4)]
    before = state(model)

    def call(thread: int) -> Tensor:
        inputs = batches[thread]
        tokens = find_visual_tokens(inputs)
        if thread % 2:
            with VisualTokenPruner(model, random_choice(tokens, thread), prune_layer=1):
                return model.generate(**inputs, **GREEDY)
        # Each records another layer: the first to finish must leave the attention function to the other.
        with AttentionRecorder(model, tokens, layers=[thread]) as recorder:
            model.generate(**inputs, **GREEDY)
        return recorder.importance

    expected = [call(number) for number in range(4)]
    for number, found in enumerate(in_threads(4, call, times=6)):
        assert all(torch.equal(each, expected[number]) for each in found)
    assert state(model)["attention"] == before["attention"]


# --- threads that are started inside the `with` ---------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Any:
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("kind", [VisualTokenPruner, AttentionRecorder])
def test_a_model_that_runs_in_other_threads_only_is_refused(kind: type) -> None:
    model, inputs = tiny_internvl(), prompts()
    tokens = find_visual_tokens(inputs)
    plain = model.generate(**inputs, **GREEDY)
    before = state(model)
    arguments = (random_choice(tokens, 1), 1) if kind is VisualTokenPruner else (tokens,)
    message = rf"other threads only, where this {kind.__name__} does not act: enter it"
    with pytest.raises(ValueError, match=message), kind(model, *arguments):
        assert torch.equal(in_a_thread(lambda: model.generate(**inputs, **GREEDY)), plain)
    assert state(model) == before


def test_threads_that_copy_the_context_are_inside() -> None:
    model, batches = tiny_internvl(), [prompts(), prompts(padding_side="right")]
    keep = random_choice(find_visual_tokens(batches[0]), 1)
    with VisualTokenPruner(model, keep, 1):
        expected = model.generate(**batches[0], **GREEDY)
    assert not torch.equal(expected, model.generate(**batches[0], **GREEDY))

    with VisualTokenPruner(model, keep, 1):
        copied = contextvars.copy_context()
        assert torch.equal(in_a_thread(lambda: copied.run(model.generate, **batches[0], **GREEDY)), expected)

    async def write(times: int) -> list[Tensor]:
        with VisualTokenPruner(model, keep, 1):
            calls = [asyncio.to_thread(model.generate, **batches[0], **GREEDY) for _ in range(times)]
            return await asyncio.gather(*calls)

    assert all(torch.equal(each, expected) for each in asyncio.run(write(4)))


def test_a_recorder_hears_one_call() -> None:
    model, inputs = tiny_internvl(), prompts()
    with AttentionRecorder(model, find_visual_tokens(inputs)) as recorder:
        model.generate(**inputs, **GREEDY)
        heard = recorder.importance.clone()
        copied = contextvars.copy_context()

        def refused() -> Any:
            with pytest.raises(ValueError, match="Another thread runs the call that is being recorded"):
                copied.run(model.generate, **inputs, **GREEDY)

        in_a_thread(refused)
    assert torch.equal(recorder.importance, heard)


def test_a_hook_that_is_being_removed_may_be_called_without_its_options() -> None:
    model, inputs = tiny_internvl(), prompts()
    decoder = model.get_decoder()
    with VisualTokenPruner(model, inputs["attention_mask"].bool(), 1):
        hooks = list(decoder._forward_pre_hooks.values())
    # As torch does in a thread that found the hook before its removal, and its options after it.
    assert [hook(decoder, ()) for hook in hooks] == [None] * len(hooks)


def test_recorders_that_overlap_each_leave_the_attention_to_the_other() -> None:
    model, inputs = tiny_internvl(), prompts()
    tokens = find_visual_tokens(inputs)
    first, second = (AttentionRecorder(model, tokens, layers=[layer]) for layer in (0, 3))
    name = model.get_decoder().config._attn_implementation
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model(**inputs)
    second.__exit__(None, None, None)
    assert second.importance.any()
    assert model.get_decoder().config._attn_implementation == name


# --- compiled code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [pytest.param("model", marks=pytest.mark.slow), pytest.param("decoder", marks=pytest.mark.slow), "layers"]
)
def test_a_model_that_was_compiled_without_hooks_has_them(part: str) -> None:
    model, inputs = tiny_internvl(), samples(prompts())[0]
    keep = random_choice(find_visual_tokens(inputs), 1)
    settings = {**GREEDY, "max_new_tokens": 2}
    plain = model.generate(**inputs, **settings)
    with VisualTokenPruner(model, keep, 1):
        expected = model.generate(**inputs, **settings)
    compiled = {"model": [model], "decoder": [model.get_decoder()], "layers": model.get_decoder().layers[1:2]}[part]
    for module in compiled:
        module.compile(backend="eager")
    assert torch.equal(model.generate(**inputs, **settings), plain)
    with VisualTokenPruner(model, keep, 1):
        assert torch.equal(model.generate(**inputs, **settings), expected)
    assert torch.equal(model.generate(**inputs, **settings), plain)
