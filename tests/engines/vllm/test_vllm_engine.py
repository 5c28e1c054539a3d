"""vLLM writes with a pruned prompt what transformers writes with a pruned model."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from tiny_checkpoints import RETENTIONS, Case, Large, questions
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from transformers_sgl import VisualTokenPruner
from transformers_sgl.engines.vllm import engine_arguments, num_free_positions
from transformers_sgl.engines.vllm.families import FAMILIES
from transformers_sgl.prompt import Prompt

pytestmark = [pytest.mark.slow]

NUM_PROMPTS, NUM_TOKENS = int(os.environ.get("SGL_ENGINE_PROMPTS", "20")), 6
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
SETTINGS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_logprobs": -1, "max_num_seqs": 16}


@pytest.fixture(scope="module", params=FAMILIES)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Large:
    return Large.load(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llm(large: Large) -> Iterator[LLM]:
    """An engine with room for a part of the longer prompts in each step, so that they are read in several."""
    engine = LLM(**engine_arguments(large.folder, large.model.config), max_num_batched_tokens=64, **SETTINGS)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def answers(llm: LLM, requests: list[Any], **settings: Any) -> list[Any]:
    outputs = llm.generate(requests, SamplingParams(**{**GREEDY, **settings}), use_tqdm=False)
    return [each.outputs[0] for each in outputs]


def cases_of(large: Large, number: int, retention: float) -> list[Case]:
    drawn = enumerate(questions(large.model.config.model_type, number))
    return [Case.of(large, images, text, retention, seed=index) for index, (images, text) in drawn]


def check_equal(large: Large, cases: list[Case], written: list[Any]) -> None:
    """The same first log probabilities, and the same tokens wherever the best two are not equally good."""
    for case, answer in zip(cases, written, strict=True):
        expected, scores = case.reference(large, NUM_TOKENS)
        first = torch.tensor([answer.logprobs[0][token].logprob for token in range(scores.shape[1])])
        torch.testing.assert_close(first, scores[0], atol=2e-4, rtol=1e-4)
        best = scores.topk(2).values
        clear = int(((best[:, 0] - best[:, 1]) > 1e-3).long().cumprod(dim=0).sum())
        assert list(answer.token_ids)[:clear] == expected[:clear]


@pytest.mark.parametrize("retention", RETENTIONS)
def test_vllm_writes_what_the_pruned_model_writes(large: Large, llm: LLM, retention: float) -> None:
    cases = cases_of(large, NUM_PROMPTS, retention)
    written = answers(llm, [case.request for case in cases], logprobs=-1)
    assert len({tuple(each.token_ids) for each in written}) > NUM_PROMPTS // 5  # the images matter
    check_equal(large, cases, written)


def test_positions_matter(large: Large, llm: LLM) -> None:
    """With consecutive positions, the answers to the same prompts are other ones."""
    cases = cases_of(large, 10, 0.35)
    closed = []
    for case in cases:
        images = case.request["multi_modal_data"]["image"]
        told = [each[:, :1].clone() for each in images["kept_positions"]]
        told[0][1:] = case.request["prompt_token_ids"].index(first_image_token(large))
        closed.append(
            {**case.request, "multi_modal_data": {"image": {**images, "kept_positions": told[:1] * len(told)}}}
        )
    closed = [each for each, case in zip(closed, cases, strict=True) if len(case.images) == 1]
    originals = [case.request for case in cases if len(case.images) == 1]
    first, second = (answers(llm, requests, logprobs=-1) for requests in (originals, closed))
    differences = [
        abs(a.logprobs[0][a.token_ids[0]].logprob - b.logprobs[0][a.token_ids[0]].logprob)
        for a, b in zip(first, second, strict=True)
    ]
    assert max(differences) > 0.05  # where an answer is beyond doubt, its probability hardly changes


def first_image_token(large: Large) -> int:
    return large.model.config.image_token_id


def test_requests_with_the_same_tokens_are_told_apart(large: Large, llm: LLM) -> None:
    """Same token ids, but other images, other kept tokens or only other positions: nothing of them is mixed up."""
    (images, text), (others, _) = _two(large)
    cases = [Case.of(large, images, text, 0.35, seed) for seed in range(4)]
    cases += [Case.of(large, others, text, 0.35, seed) for seed in range(2)]
    assert len({tuple(case.request["prompt_token_ids"]) for case in cases}) == 1
    for order in (range(6), reversed(range(6)), (0, 0, 3, 3, 1, 5)):  # the cache is empty, full, and hit in one batch
        chosen = [cases[index] for index in order]
        check_equal(large, chosen, answers(llm, [case.request for case in chosen], logprobs=-1))


def _two(large: Large) -> list[Any]:
    drawn = list(questions(large.model.config.model_type, 4))
    size = drawn[1][0][0].size
    return [drawn[1], ([drawn[2][0][0].resize(size)], drawn[2][1])]


def test_a_longer_prompt_reuses_what_is_cached_of_a_shorter_one(large: Large, llm: LLM) -> None:
    (images, text), _ = _two(large)
    text = "a " * 20 + text
    inputs = [large.inputs(images, text + more) for more in ("", " and why, and where, and when?")]
    tokens = [Prompt.of(large.model.config, each).visual_tokens for each in inputs]
    keep_mask = torch.zeros_like(tokens[0].valid)
    keep_mask[:, ::3] = True
    cases = [Case.keeping(large, each, keep_mask, images) for each in inputs]
    check_equal(large, cases[:1], answers(llm, [cases[0].request], logprobs=-1))
    (output,) = llm.generate([cases[1].request], SamplingParams(**GREEDY, logprobs=-1), use_tqdm=False)
    check_equal(large, cases[1:], [output.outputs[0]])
    block = llm.llm_engine.vllm_config.cache_config.block_size
    shared = len(cases[0].request["prompt_token_ids"]) // block * block
    assert shared == 0 or output.num_cached_tokens > 0


def test_an_image_may_lose_all_its_tokens(large: Large, llm: LLM) -> None:
    drawn = list(questions(large.model.config.model_type, 6))
    images = [*drawn[0][0], *drawn[1][0], *drawn[2][0]]
    inputs = large.inputs(images, "what is it?")
    index = Prompt.of(large.model.config, inputs).visual_tokens.image_index
    cases = [
        Case.keeping(large, inputs, torch.isin(index, torch.tensor(kept)), images) for kept in ([0], [1], [2], [0, 2])
    ]
    check_equal(large, cases, answers(llm, [case.request for case in cases], logprobs=-1))


def test_ordinary_requests_are_answered_as_ever(large: Large, llm: LLM) -> None:
    """Text alone, and pixels, together with pruned requests in one batch."""
    (images, text), _ = _two(large)
    pruned, whole = Case.of(large, images, text, 0.35, 0), Case.of(large, images, text, 1.0, 0)
    token_ids = whole.inputs["input_ids"][0].tolist()
    marker = first_image_token(large)
    short = [token for at, token in enumerate(token_ids) if token != marker or token_ids[at - 1] != marker]
    if large.model.config.model_type == "internvl":  # vLLM writes the image's start and end itself
        at = short.index(marker)
        short = [*short[: at - 1], marker, *short[at + 2 :]]
    words = large.processor.tokenizer("what is a shape")["input_ids"]
    requests = [
        {"prompt_token_ids": words},
        pruned.request,
        {"prompt_token_ids": short, "multi_modal_data": {"image": images}},
        whole.request,
    ]
    text_only, *written = answers(llm, requests, logprobs=-1)
    check_equal(large, [pruned, whole, whole], written)
    with torch.no_grad():
        scores = large.model(input_ids=torch.tensor([words])).logits[0, -1].log_softmax(dim=-1)
    first = torch.tensor([text_only.logprobs[0][token].logprob for token in range(len(scores))])
    torch.testing.assert_close(first, scores, atol=2e-4, rtol=1e-4)


def test_an_answer_may_run_to_the_last_position(large: Large, llm: LLM) -> None:
    """And beyond, where vLLM still has room, nothing breaks."""
    (images, text), _ = _two(large)
    case = Case.of(large, images, text, 0.09, 0)
    free = num_free_positions(large.model.config, case.request)
    limit = large.model.config.get_text_config().max_position_embeddings
    assert 0 < free < limit - len(case.request["prompt_token_ids"])
    (written,) = answers(llm, [case.request], max_tokens=limit, ignore_eos=True)
    assert len(written.token_ids) == limit - len(case.request["prompt_token_ids"])


@pytest.mark.parametrize("what", ["narrow", "integers", "unequal", "far", "before", "other tokens", "beyond", "video"])
def test_a_bad_request_is_refused_and_the_engine_runs_on(large: Large, llm: LLM, what: str) -> None:
    (images, text), _ = _two(large)
    case = Case.of(large, images, text, 0.35, 0)
    embeds, told = (case.request["multi_modal_data"]["image"][name][0] for name in ("kept_embeds", "kept_positions"))
    far, before, beyond = told.clone(), told.clone(), told.clone()
    far[1:, 0], before[0, 0], beyond[0, -1] = 10**6, -500, 500
    data = {
        "narrow": ([embeds[:, 1:]], [told]),
        "integers": ([embeds.long()], [told]),
        "unequal": ([embeds, embeds], [told]),
        "far": ([embeds], [far]),
        "before": ([embeds], [before]),
        "other tokens": ([embeds[1:]], [told]),
        "beyond": ([embeds], [beyond]),
        "video": ([embeds], [told]),
    }[what]
    request = {
        **case.request,
        "multi_modal_data": {"image": dict(zip(("kept_embeds", "kept_positions"), data, strict=True))},
    }
    if what == "video":
        request["multi_modal_data"]["video"] = [torch.zeros(2, 3, 16, 16)]
    with pytest.raises(
        (ValueError, VLLMValidationError),
        match="of a pruned request|of the pruned prompt|tell of positions|images alone",
    ):
        answers(llm, [request])
    check_equal(large, [case], answers(llm, [case.request], logprobs=-1))


@pytest.mark.parametrize("model_type", ["internvl", "qwen2_5_vl"])
def test_a_small_engine_without_a_vision_tower(model_type: str, tmp_path: Path) -> None:
    """Requests that are put off in the middle of their answers go on where they were."""
    large = Large.load(model_type, tmp_path)
    arguments = engine_arguments(large.folder, large.model.config, vision_tower=False)
    cases = cases_of(large, 24, 0.35)
    settings = {**SETTINGS, "max_num_batched_tokens": 64, "max_model_len": 512, "disable_log_stats": False}
    settings |= {"block_size": 32, "num_gpu_blocks_override": 20, "enable_prefix_caching": False}
    engine = LLM(**arguments, **settings)
    try:
        long = answers(engine, [case.request for case in cases], logprobs=-1, max_tokens=40, ignore_eos=True)
        counts = {each.name: each.value for each in engine.get_metrics() if hasattr(each, "value")}
        with pytest.raises(VLLMValidationError, match="At most 0 image"):
            answers(engine, [{"prompt_token_ids": [1], "multi_modal_data": {"image": cases[0].images}}])
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert counts["vllm:num_preemptions"] > 0
    for case, answer in zip(cases, long, strict=True):
        tokens = Prompt.of(large.model.config, case.inputs).visual_tokens
        with torch.no_grad(), VisualTokenPruner(large.model, tokens.prompt_keep_mask(case.keep_mask), prune_layer=0):
            output = large.model.generate(
                **case.inputs,
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        scores = torch.cat(output.logits).float().log_softmax(dim=-1)
        for step, token in enumerate(answer.token_ids):
            given = answer.logprobs[step]
            assert abs(given[token].logprob - float(scores[step, token])) < 2e-3
            if step + 1 < len(scores) and token != int(output.sequences[0, case.inputs["input_ids"].shape[1] + step]):
                break  # from here on, the two read other answers
