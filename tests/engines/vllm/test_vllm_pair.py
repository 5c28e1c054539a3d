"""A pair whose large model runs in vLLM answers as the pair in transformers does."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.engines.vllm import PairEngine
from transformers_sgl.evaluation.data import load_samples
from transformers_sgl.opening import chat_inputs, user_turn

pytestmark = [pytest.mark.slow]

NUM_QUESTIONS = int(os.environ.get("SGL_ENGINE_QUESTIONS", "32"))
MOST_DIFFERENT = max(1, NUM_QUESTIONS // 200)  # where two tokens are equally good


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(embedded_pair_path: Path) -> Iterator[PairEngine]:
    engine = PairEngine.open(
        embedded_pair_path, dtype="float32", device="cpu", enforce_eager=True, max_num_seqs=64, max_guide_batch=8
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def questions(engine: PairEngine) -> list[tuple[Any, Any]]:
    """Questions about scenes, and their inputs."""
    samples = load_samples("scenes", limit=NUM_QUESTIONS)
    turns = [user_turn(each.prompt, [each.open_image()]) for each in samples]
    return [
        (sample, chat_inputs(engine.pair, engine.processor, [turn]))
        for sample, turn in zip(samples, turns, strict=True)
    ]


def text_of(processor: Any, ids: Any) -> str:
    return str(processor.decode(ids, skip_special_tokens=True)).strip()


def sequential(pair: Any, processor: Any, inputs: Any, settings: SGLGenerationConfig) -> str:
    sequences = pair.generate(**inputs, generation_config=settings)
    return text_of(processor, sequences[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"retention_ratio": 1.0},
        {"retention_ratio": 0.09},
        {"early_exit_threshold": 0.8},
        {"vision_retention_ratio": 0.6},
        {"vision_retention_ratio": 0.6, "vision_prune_layer": 1, "repetition_penalty": 1.05},
        {"unsure_threshold": 0.6, "unsure_retention_ratio": 0.9},
        {"guidance": "prompt", "min_new_tokens": 4},
    ],
    ids=str,
)
def test_every_answer_is_the_sequential_one(
    engine: PairEngine, runner: asyncio.Runner, pair: Any, questions: list[tuple[Any, Any]], given: dict[str, Any]
) -> None:
    settings = SGLGenerationConfig(max_new_tokens=24, **given)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(engine.answer(inputs, settings) for _, inputs in questions))

    found = runner.run(all_at_once())
    answers = [text_of(engine.processor, each.token_ids) for each in found]
    wanted = [sequential(pair, engine.processor, inputs, settings) for _, inputs in questions]
    assert sum(a != b for a, b in zip(answers, wanted, strict=True)) <= MOST_DIFFERENT
    exits = [bool(each.guidance.exited_early[0]) for each in found]
    assert [each.num_prompt_tokens == 0 for each in found] == exits
    assert any(exits) == ("early_exit_threshold" in given)
    assert not all(exits)


def test_what_is_pruned_in_the_middle_is_pruned_from_the_first_layer_with_the_same_average(
    engine: PairEngine, runner: asyncio.Runner, pair: Any, questions: list[tuple[Any, Any]]
) -> None:
    middle = SGLGenerationConfig(max_new_tokens=24, retention_ratio=0.2, prune_layer=0.5)
    first = SGLGenerationConfig(max_new_tokens=24, retention_ratio=0.6, prune_layer=0)
    inputs = questions[0][1]
    answer = runner.run(engine.answer(inputs, middle))
    kept = answer.guidance.keep_mask
    assert kept is not None
    assert int(kept.sum()) == int(0.6 * int(answer.guidance.num_visual_tokens))
    assert text_of(engine.processor, answer.token_ids) == sequential(pair, engine.processor, inputs, first)


def test_text_alone_and_several_images(
    engine: PairEngine, runner: asyncio.Runner, pair: Any, questions: list[tuple[Any, Any]]
) -> None:
    images = [questions[0][0].open_image(), questions[1][0].open_image()]
    turns = [user_turn("hello", []), user_turn(questions[0][0].prompt, images)]
    inputs = [chat_inputs(engine.pair, engine.processor, [turn]) for turn in turns]
    settings = SGLGenerationConfig(max_new_tokens=12)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(engine.answer(each, settings) for each in inputs))

    answers = [text_of(engine.processor, each.token_ids) for each in runner.run(all_at_once())]
    assert answers == [sequential(pair, engine.processor, each, settings) for each in inputs]


def test_tokens_arrive_while_they_are_written(
    engine: PairEngine, runner: asyncio.Runner, questions: list[tuple[Any, Any]]
) -> None:
    arrived: list[list[int]] = []
    settings = SGLGenerationConfig(max_new_tokens=16, min_new_tokens=16)
    answer = runner.run(engine.answer(questions[0][1], settings, lambda ids: arrived.append(list(ids))))
    assert [token for ids in arrived for token in ids] == answer.token_ids
    assert len(answer.token_ids) == 16
    assert answer.is_cut
    assert len(arrived) > 3


def test_a_cancelled_request_frees_its_place(
    engine: PairEngine, runner: asyncio.Runner, questions: list[tuple[Any, Any]]
) -> None:
    settings = SGLGenerationConfig(max_new_tokens=1500, min_new_tokens=1500, early_exit_threshold=None)
    settings = SGLGenerationConfig(**settings.to_dict() | {"guidance_max_new_tokens": 4})

    async def leave() -> tuple[int, int]:
        begun = asyncio.Event()
        answering = asyncio.create_task(engine.answer(questions[0][1], settings, lambda ids: begun.set()))
        await asyncio.wait_for(begun.wait(), 60)
        running = engine.llm.output_processor.get_num_unfinished_requests()
        answering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answering
        return running, engine.llm.output_processor.get_num_unfinished_requests()

    started = time.monotonic()
    assert runner.run(leave()) == (1, 0)
    again = runner.run(engine.answer(questions[1][1], SGLGenerationConfig(max_new_tokens=4)))
    assert 0 < len(again.token_ids) <= 4
    assert time.monotonic() - started < 60


def test_who_leaves_before_guidance_does_not_stop_the_others(
    engine: PairEngine, runner: asyncio.Runner, questions: list[tuple[Any, Any]]
) -> None:
    settings = SGLGenerationConfig(max_new_tokens=8)

    async def some_leave() -> list[Any]:
        answering = [asyncio.create_task(engine.answer(inputs, settings)) for _, inputs in questions[:12]]
        await asyncio.sleep(0)
        for each in answering[::3]:
            each.cancel()
        return await asyncio.gather(*answering, return_exceptions=True)

    found = runner.run(some_leave())
    assert [isinstance(each, asyncio.CancelledError) for each in found] == [number % 3 == 0 for number in range(12)]


def test_sampling_with_a_seed_is_repeated(
    engine: PairEngine, runner: asyncio.Runner, questions: list[tuple[Any, Any]]
) -> None:
    settings = SGLGenerationConfig(max_new_tokens=8, do_sample=True, temperature=2.0, top_k=0)
    drawn = [runner.run(engine.answer(questions[0][1], settings, seed=seed)).token_ids for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) > 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_beams": 2}, "`num_beams` is 2, which vLLM cannot obey"),
        ({"no_repeat_ngram_size": 3}, "`no_repeat_ngram_size` is 3, which vLLM cannot obey"),
        ({"confirmation_threshold": 0.5}, "`confirmation_threshold` lets the large model read a prompt twice"),
        ({"verify_draft": True}, "vLLM takes no draft with a request"),
        ({"sequence_bias": {(1, 2): 3.0}}, "`sequence_bias` has a sequence of several tokens"),
    ],
)
def test_what_vllm_cannot_do_is_refused(
    engine: PairEngine, runner: asyncio.Runner, questions: list[tuple[Any, Any]], given: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        runner.run(engine.answer(questions[0][1], SGLGenerationConfig(max_new_tokens=4, **given)))


def test_one_refused_prompt_does_not_stop_the_others(
    engine: PairEngine, runner: asyncio.Runner, questions: list[tuple[Any, Any]]
) -> None:
    broken = dict(questions[1][1])
    broken["pixel_values"] = broken["pixel_values"][:-1]
    settings = SGLGenerationConfig(max_new_tokens=8)
    inputs = [questions[0][1], broken, questions[2][1]]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(engine.answer(each, settings) for each in inputs), return_exceptions=True)

    found = runner.run(all_at_once())
    assert [isinstance(each, Exception) for each in found] == [False, True, False]


def test_the_decoder_is_not_loaded_twice(engine: PairEngine) -> None:
    decoder = engine.pair.large.get_decoder()
    assert {each.device.type for each in decoder.parameters()} == {"meta"}
    assert {each.device.type for each in engine.pair.small.parameters()} == {"cpu"}
