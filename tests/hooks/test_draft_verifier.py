import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    EOS,
    FLASH_STAND_IN,
    IMAGE,
    PAD,
    Banned,
    SumIsRound,
    answers,
    find_visual_tokens,
    near_copy,
    prompts,
    samples,
    state,
    tiny_internvl,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import DraftVerifier, SGLForConditionalGeneration, VisualTokenPruner
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

LARGE = tiny_internvl(num_layers=3)
LARGE.generate(**samples(prompts())[0], max_new_tokens=2)  # transformers leaves attributes on a model's first call


# What shapes an answer; `tokenizer` and the like are arguments of `generate`, the rest are settings.
SHAPES = {
    "plain": {"max_new_tokens": 12},
    "one token": {"max_new_tokens": 1},
    "long, without repetition": {"max_new_tokens": 40, "min_new_tokens": 30, "repetition_penalty": 1.5},
    "no end before": {"max_new_tokens": 12, "min_new_tokens": 9},
    "shorter than the draft": {"max_new_tokens": 3},
    "stop strings": {"max_new_tokens": 16, "stop_strings": ["b", "L", "xy"], "tokenizer": tiny_tokenizer()},
    "own processor": {"max_new_tokens": 12, "logits_processor": LogitsProcessorList([Banned()])},
    "own criterion": {"max_new_tokens": 16, "stopping_criteria": StoppingCriteriaList([SumIsRound()])},
    "n-grams and words": {"max_new_tokens": 12, "no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4], [11]]},
}
LAYOUTS = [[[1]], [[1, 1]], [[2]], [[1], [2], [1, 1], [1]], [[2], [1], [1], [1, 1]]]


def drafted(shape: dict, layout: list, seed: int, noise: float, **pruning) -> tuple[int, int]:
    """Asserts that a draft changes nothing; returns the forward passes with it and without."""
    pair = SGLForConditionalGeneration(large=LARGE, small=near_copy(LARGE, noise, seed)).eval()
    inputs = prompts(images=layout, text=[(seed + 3 * number) % 9 + 1 for number in range(len(layout))], seed=seed)
    draft_length = {"guidance_max_new_tokens": max(10, shape["max_new_tokens"])}
    runs = [
        pair.generate(
            **inputs,
            **shape,
            **pruning,
            **draft_length,
            do_sample=False,
            verify_draft="once" if verify else False,
            early_exit_threshold=None,
            return_dict_in_generate=True,
        )
        for verify in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    caches = [[layer.get_seq_length() for layer in cache_of(run).layers] for run in runs]
    assert caches[0] == caches[1]
    length = inputs["input_ids"].shape[1]
    if pruning["retention_ratio"] == 1:
        arguments = {**inputs, **shape, "do_sample": False}
        assert torch.equal(runs[0].sequences, LARGE.generate(**arguments))
        return runs[0].num_large_forward_passes, runs[0].sequences.shape[1] - length
    accepted, answer = runs[0].num_draft_tokens_accepted, runs[0].sequences[:, length:]
    for number, row in enumerate(runs[0].draft_sequences):
        width = min(len(row), answer.shape[1])
        assert accepted[number] <= int((row[:width] == answer[number, :width]).sum())
    return runs[0].num_large_forward_passes, runs[1].num_large_forward_passes


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("retention_ratio", [1.0, 0.3])
def test_a_draft_changes_how_often_the_large_model_runs_and_nothing_else(name: str, retention_ratio: float) -> None:
    # Nine shapes, twice, with 29 prompts of their own: 522 prompts, in batches of one and of four.
    first = 1000 + 100 * (2 * list(SHAPES).index(name) + (retention_ratio < 1))
    layouts = [LAYOUTS[number % 3] for number in range(9)] + [LAYOUTS[3 + number % 2] for number in range(5)]
    passes = [
        drafted(
            SHAPES[name], layout, seed, 0.01 + 0.04 * (seed % 3), retention_ratio=retention_ratio, prune_layer=seed % 3
        )
        for seed, layout in enumerate(layouts, start=first)
    ]
    with_draft, without = map(sum, zip(*passes, strict=True))
    assert with_draft <= without
    assert name == "one token" or with_draft < without


@pytest.mark.parametrize("implementation", ["sdpa", "eager", FLASH_STAND_IN])
@pytest.mark.parametrize("prune_layer", [None, 0, 2])
def test_every_kind_of_attention_verifies(implementation: str, prune_layer: int | None) -> None:
    large = tiny_internvl(num_layers=4, attn_implementation=implementation)
    for inputs in [prompts(), *samples(prompts())]:
        tokens = find_visual_tokens(inputs)
        keep = tokens.valid.clone()
        keep[:, ::3] = False

        def run(generate, inputs=inputs, tokens=tokens, keep=keep) -> Tensor:
            options = {**inputs, "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
            if prune_layer is None:
                return generate(**options)
            with VisualTokenPruner(large, tokens.prompt_keep_mask(keep), prune_layer):
                return generate(**options)

        expected = run(large.generate)
        draft = expected[:, inputs["input_ids"].shape[1] :].clone()
        draft[-1, 4] = (draft[-1, 4] + 1) % 50
        draft[:, 7] = (draft[:, 7] + 1) % 50
        verifier = DraftVerifier(large, draft, torch.ones_like(draft).bool())
        assert torch.equal(run(verifier.generate), expected)
        assert verifier.num_forward_passes == 3  # the prefill, and one after each wrong token
        assert verifier.num_accepted[-1] == 8


# --- how much a draft saves ------------------------------------------------------------------------------------------


def verified(
    inputs: dict[str, Tensor], draft: Tensor, mask: Tensor | None = None, **options
) -> tuple[Tensor, DraftVerifier]:
    verifier = DraftVerifier(LARGE, draft, torch.ones_like(draft).bool() if mask is None else mask)
    return verifier.generate(**inputs, do_sample=False, **options), verifier


def test_a_right_draft_costs_one_pass_whether_it_ends_or_not() -> None:
    inputs = prompts()
    for options in ({"max_new_tokens": 12}, {"max_new_tokens": 6, "min_new_tokens": 6}):
        expected = LARGE.generate(**inputs, do_sample=False, **options)
        found, verifier = verified(inputs, expected[:, inputs["input_ids"].shape[1] :], **options)
        assert torch.equal(found, expected)
        assert verifier.num_forward_passes == 1


def test_nothing_is_read_behind_the_longest_answer_or_the_end_of_every_draft() -> None:
    inputs, widths = prompts(), []
    length = inputs["input_ids"].shape[1]
    hook = LARGE.get_decoder().register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1] - length), with_kwargs=True
    )
    try:
        draft = torch.randint(0, 50, (3, 9))
        verified(inputs, draft, max_new_tokens=4, min_new_tokens=4)
        assert widths[0] == 3
        draft[:, 2], mask = EOS, torch.arange(9) < 3
        DraftVerifier(LARGE, draft, mask.expand(3, 9)).generate(**inputs, max_new_tokens=12)
        assert widths[4] == 2
    finally:
        hook.remove()


def test_a_wrong_draft_costs_no_pass_more_than_none() -> None:
    inputs, options = prompts(), {"max_new_tokens": 12, "min_new_tokens": 12}
    expected = LARGE.generate(**inputs, do_sample=False, **options)
    wrong = (expected[:, inputs["input_ids"].shape[1] :] + 1) % 50
    found, verifier = verified(inputs, wrong, **options)
    assert torch.equal(found, expected)
    assert verifier.num_forward_passes == 12
    assert verifier.num_accepted.tolist() == [0, 0, 0]


def test_a_sample_that_has_finished_holds_nobody_up() -> None:
    def answer_lengths(seed: int) -> list[int]:
        inputs = prompts(seed=seed)
        sequences = LARGE.generate(**inputs, max_new_tokens=12, do_sample=False)
        return [len(row) for row in answers(sequences, inputs["input_ids"].shape[1])]

    seed = next(seed for seed in range(200) if min(answer_lengths(seed)) <= 2 and max(answer_lengths(seed)) >= 8)
    inputs, ends = prompts(seed=seed), answer_lengths(seed)
    expected = LARGE.generate(**inputs, max_new_tokens=12, do_sample=False)
    draft = expected[:, inputs["input_ids"].shape[1] :].clone()
    first = ends.index(min(ends))
    draft[first] = (draft[first] + 1) % 50  # the one that finishes first leaves its draft at once
    found, verifier = verified(inputs, draft, max_new_tokens=12)
    assert torch.equal(found, expected)
    assert verifier.num_forward_passes <= min(ends) + 2


def test_a_draft_with_placeholders_of_an_image_is_read_up_to_them() -> None:
    inputs = prompts()
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    expected = LARGE.generate(**inputs, do_sample=False, **options)
    draft = expected[:, inputs["input_ids"].shape[1] :].clone()
    draft[1, 3] = IMAGE
    found, verifier = verified(inputs, draft, **options)
    assert torch.equal(found, expected)
    assert verifier.num_forward_passes == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data(), prune_layer=st.sampled_from([None, 0, 1]), max_new_tokens=st.integers(1, 10))
def test_any_draft_changes_nothing(data, prune_layer: int | None, max_new_tokens: int) -> None:
    inputs = prompts()
    tokens = find_visual_tokens(inputs)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=3, max_size=3))
    copied = data.draw(st.integers(0, 10))
    options = {**inputs, "max_new_tokens": max_new_tokens, "do_sample": False}

    def run(generate) -> Tensor:
        if prune_layer is None:
            return generate(**options)
        with VisualTokenPruner(LARGE, tokens.prompt_keep_mask(tokens.valid & (tokens.positions % 2 > 0)), prune_layer):
            return generate(**options)

    expected = run(LARGE.generate)
    draft = torch.randint(0, 62, (3, max(lengths)), generator=torch.Generator().manual_seed(copied))
    answer = expected[:, inputs["input_ids"].shape[1] :]
    width = min(copied, draft.shape[1], answer.shape[1])
    draft[:, :width] = answer[:, :width]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    verifier = DraftVerifier(LARGE, draft, mask)
    assert torch.equal(run(verifier.generate), expected)
    assert 1 <= verifier.num_forward_passes <= max_new_tokens


# --- where it steps aside --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_the_draft_is_not_used_where_it_could_change_something(options: dict) -> None:
    large = tiny_internvl(num_layers=3, attn_implementation="eager")
    inputs = samples(prompts())[0]
    draft = torch.randint(0, 50, (1, 4))
    options = {"do_sample": False, "max_new_tokens": 5, **options}
    torch.manual_seed(3)
    expected = large.generate(**inputs, **options)
    torch.manual_seed(3)
    verifier = DraftVerifier(large, draft, torch.ones_like(draft).bool())
    found = verifier.generate(**inputs, **options)
    if options.get("return_dict_in_generate"):
        assert len(found.attentions) == len(expected.attentions)
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)
    assert verifier.num_accepted is None


@pytest.mark.parametrize(("window", "is_used"), [(8, False), (26, False), (31, True)])
def test_a_sliding_window_verifies_where_it_loses_no_token(window: int, is_used: bool) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    large = tiny_internvl(num_layers=3, use_sliding_window=True, sliding_window=window, layer_types=kinds)
    options = {**samples(prompts())[0], "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = large.generate(**options)  # 24 tokens of the prompt, and 6
    draft = expected[:, 24:].clone()
    draft[:, 2] = (draft[:, 2] + 1) % 50
    verifier = DraftVerifier(large, draft, torch.ones_like(draft).bool())
    assert torch.equal(verifier.generate(**options), expected)
    assert (verifier.num_accepted is not None) == is_used


def test_what_is_compiled_is_compiled_from_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def get_compiled_call(model, _config):
        compiled.append(model)
        return model.__call__

    monkeypatch.setattr(type(LARGE), "_valid_auto_compile_criteria", lambda *_args: True)
    monkeypatch.setattr(type(LARGE), "get_compiled_call", get_compiled_call)
    inputs = samples(prompts())[0]
    _, verifier = verified(inputs, torch.randint(0, 50, (1, 4)), max_new_tokens=5, cache_implementation="static")
    assert compiled
    assert all(model is LARGE for model in compiled)
    assert verifier.num_forward_passes == 5


def test_sampling_with_a_pair_is_sampling_without_drafts() -> None:
    pair, inputs = SGLForConditionalGeneration(large=LARGE, small=near_copy(LARGE, 0.02)).eval(), prompts()
    runs = []
    for verify in ("rounds", "once", None, False):
        torch.manual_seed(5)
        runs.append(pair.generate(**inputs, do_sample=True, max_new_tokens=8, verify_draft=verify))
    assert all(torch.equal(run, runs[-1]) for run in runs)


def test_a_filled_cache_is_continued_without_the_draft() -> None:
    inputs = samples(prompts())[0]
    length = inputs["input_ids"].shape[1]
    turn = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, length + 3, dtype=torch.long)}
    draft = torch.randint(0, 50, (1, 4))
    verifier = DraftVerifier(LARGE, draft, torch.ones_like(draft).bool())
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = LARGE.generate(**turn, **options, **{cache_name(): cache_of(LARGE(**inputs))})
    assert torch.equal(verifier.generate(**turn, **options, **{cache_name(): cache_of(LARGE(**inputs))}), expected)
    assert verifier.num_accepted is None


# --- it is stock generate --------------------------------------------------------------------------------------------


def test_scores_and_the_cache_are_those_of_stock_generate() -> None:
    inputs = samples(prompts())[1]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    expected = LARGE.generate(**inputs, do_sample=False, output_logits=True, **options)
    draft = expected.sequences[:, inputs["input_ids"].shape[1] :].clone()
    draft[0, 5] = 1
    own = DynamicCache(config=LARGE.config)
    found, _ = verified(inputs, draft, output_logits=True, **{cache_name(): own}, **options)
    for name in ("scores", "logits"):
        for one, other in zip(found[name], expected[name], strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    assert cache_of(found) is own
    for one, other in zip(own.layers, cache_of(expected).layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-4)


@pytest.mark.parametrize("draft_is", ["right", "wrong in all", "wrong in one", "longer than the answers"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_scores_of_samples_that_have_ended_are_those_of_stock_generate(draft_is: str, padding_side: str) -> None:
    inputs = prompts(padding_side=padding_side)
    length = inputs["input_ids"].shape[1]
    plain = LARGE.generate(**inputs, max_new_tokens=10, do_sample=False)[:, length:]
    options = {"max_new_tokens": 10, "eos_token_id": [EOS, int(plain[0, 3]), int(plain[1, 5])]}
    options |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected = LARGE.generate(**inputs, do_sample=False, **options)
    draft = expected.sequences[:, length:].clone()
    mask = draft != PAD
    assert not mask.all(), "none has ended before the others"
    if draft_is == "wrong in all":
        draft[:, 2] = (draft[:, 2] + 1) % 50
    elif draft_is == "wrong in one":
        draft[0, 2] = (draft[0, 2] + 1) % 50
    elif draft_is == "longer than the answers":
        draft, mask = draft.masked_fill(draft == PAD, 3).repeat(1, 2), torch.ones_like(mask).repeat(1, 2)
    verifier = DraftVerifier(LARGE, draft, mask)
    found = verifier.generate(**inputs, do_sample=False, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert verifier.num_forward_passes < len(expected.scores)
    for name in ("scores", "logits"):
        for one, other in zip(found[name], expected[name], strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_a_batch_whose_answers_end_without_an_end_of_sequence_goes_on_as_stock_generate() -> None:
    inputs = prompts()
    options = {"max_new_tokens": 10, "eos_token_id": None, "stopping_criteria": StoppingCriteriaList([SumIsRound()])}
    stock = copy.deepcopy(LARGE)
    stock.generation_config.eos_token_id = None
    expected = stock.generate(**inputs, do_sample=False, **options)
    draft = expected[:, inputs["input_ids"].shape[1] :].clone()
    draft[1, 2] = 5
    found, _ = verified(inputs, draft, **options)
    assert torch.equal(found, expected)


def test_processors_criteria_and_streamers_are_asked_as_often() -> None:
    class Counting(LogitsProcessor, StoppingCriteria, BaseStreamer):
        def __init__(self) -> None:
            self.heard: list = []

        def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:
            self.heard.append((input_ids.tolist(), scores is None))
            return torch.zeros(len(input_ids), dtype=torch.bool) if scores is None else scores

        def put(self, value: Tensor) -> None:
            self.heard.append(value.tolist())

        def end(self) -> None:
            self.heard.append("end")

    inputs, heard = samples(prompts())[2], []
    expected = LARGE.generate(**inputs, max_new_tokens=9, do_sample=False)
    draft = expected[:, inputs["input_ids"].shape[1] :].clone()
    draft[0, 3] = (draft[0, 3] + 1) % 50
    for generate in (LARGE.generate, DraftVerifier(LARGE, draft, torch.ones_like(draft).bool()).generate):
        listener = Counting()
        sequences = generate(
            **inputs, max_new_tokens=9, do_sample=False, streamer=listener,
            logits_processor=LogitsProcessorList([listener]), stopping_criteria=StoppingCriteriaList([listener]),
        )  # fmt: skip
        assert torch.equal(sequences, expected)
        heard.append(listener.heard)
    assert heard[0] == heard[1]


def test_nothing_stays_on_the_model_also_after_an_exception() -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            raise RuntimeError("broken")

    inputs, before = samples(prompts())[0], state(LARGE)
    draft = torch.randint(0, 50, (1, 4))
    verified(inputs, draft, max_new_tokens=6)
    with pytest.raises(RuntimeError, match="broken"):
        verified(inputs, draft, max_new_tokens=6, logits_processor=LogitsProcessorList([Broken()]))
    assert state(LARGE) == before
    expected = LARGE.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(verified(inputs, draft, max_new_tokens=6)[0], expected)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 3).bool(), torch.ones(4).bool()], ids=["none", "short", "flat"])
def test_a_draft_without_its_mask_is_refused(mask: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"`draft` and `draft_mask` must both have the shape \(batch, draft_length\)"):
        DraftVerifier(LARGE, torch.ones(1, 4).long(), mask)
