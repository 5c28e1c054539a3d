import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, IMAGES, answers, find_visual_tokens, in_threads, prompts, samples, state, tiny_internvl
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import (
    PRESETS,
    AttentionRecorder,
    ImportanceProcessor,
    MinimumPerImageProcessor,
    RetentionRatioProcessor,
    SGLForConditionalGeneration,
    SGLGenerateOutput,
    SGLGenerationConfig,
    VisualTokenPruner,
)
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def tiny_pair(attn_implementation: str = "sdpa", seed: int = 0) -> SGLForConditionalGeneration:
    large = tiny_internvl(num_layers=6, seed=seed, attn_implementation=attn_implementation)
    small = tiny_internvl(num_layers=2, seed=seed + 10, attn_implementation=attn_implementation, hidden_size=16)
    return SGLForConditionalGeneration(large=large, small=small).eval()


# --- identity: with everything kept, the pair is the large model ---------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(
    "decoding",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
    ids=["greedy", "sampling", "several samples", "beams"],
)
def test_retention_ratio_1_is_the_stock_large_model(implementation: str, padding_side: str, decoding: dict) -> None:
    pair, batch = tiny_pair(implementation), prompts(padding_side=padding_side)
    for inputs in [batch, *samples(batch)]:
        torch.manual_seed(3)
        expected = pair.large.generate(**inputs, **decoding, max_new_tokens=8)
        torch.manual_seed(3)
        assert torch.equal(pair.generate(**inputs, **decoding, max_new_tokens=8, retention_ratio=1.0), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "decoding", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_the_whole_machinery_with_everything_kept_is_the_stock_large_model(
    implementation: str, decoding: dict
) -> None:
    class KeepAll(ImportanceProcessor):
        def __call__(self, visual_tokens, importance):
            return importance

    pair, batch = tiny_pair(implementation), prompts()
    for inputs in [batch, *samples(batch)]:
        for prune_layer in (0, 2):
            torch.manual_seed(3)
            expected = pair.large.generate(**inputs, **decoding, max_new_tokens=8)
            torch.manual_seed(3)
            found = pair.generate(
                **inputs,
                **decoding,
                max_new_tokens=8,
                retention_ratio=1.0,
                prune_layer=prune_layer,
                importance_processor=KeepAll(),
            )
            assert torch.equal(found, expected)


def test_a_text_only_prompt_runs_the_large_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, inputs = tiny_pair(), prompts(images=[[], []], text=[4, 7])
    monkeypatch.setattr(pair.small, "forward", None)  # calling it would raise
    output = pair.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(output.sequences, pair.large.generate(**inputs, **GREEDY))
    assert output.importance is None
    assert output.keep_mask is None
    assert output.draft_sequences is None


def test_a_text_only_prompt_may_use_what_pruning_may_not() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[]], text=[4])
    expected = pair.large.generate(**inputs, **GREEDY, cache_implementation="static")
    assert torch.equal(pair.generate(**inputs, **GREEDY, cache_implementation="static"), expected)


def test_a_text_only_sample_beside_others_is_left_alone() -> None:
    pair = tiny_pair()
    inputs = prompts(images=[[1], []], text=[5, 8])
    alone = prompts(images=[[1], []], text=[5, 8])
    mask = alone["attention_mask"][1].bool()
    expected = pair.large.generate(input_ids=alone["input_ids"][1, mask][None], **GREEDY)
    found = pair.generate(**inputs, **GREEDY, retention_ratio=0.25)
    assert answers(found, inputs["input_ids"].shape[1])[1] == answers(expected, int(mask.sum()))[0]


# --- the mechanism, end to end --------------------------------------------------------------------------------------


def test_generate_is_its_parts_put_together() -> None:
    pair, inputs = tiny_pair(), prompts()
    settings = {"retention_ratio": 0.3, "prune_layer": 2, "selection": "top_k"}
    output = pair.generate(**inputs, **GREEDY, **settings, return_dict_in_generate=True)

    tokens = find_visual_tokens(inputs)
    with AttentionRecorder(pair.small, tokens) as recorder:
        draft = pair.small.generate(**inputs, **GREEDY)
    assert torch.equal(output.importance, recorder.importance)
    assert torch.equal(output.draft_sequences, draft[:, inputs["input_ids"].shape[1] :])

    for sample in range(3):
        count = int(tokens.counts[sample])
        best = recorder.importance[sample, :count].topk(max(1, math.floor(0.3 * count))).indices
        assert output.keep_mask[sample].nonzero()[:, 0].tolist() == sorted(best.tolist())

    with VisualTokenPruner(pair.large, tokens.prompt_keep_mask(output.keep_mask), 2):
        expected = pair.large.generate(**inputs, **GREEDY)
    assert torch.equal(output.sequences, expected)
    assert not torch.equal(output.sequences, pair.large.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("prune_layer", [0, 3])
@pytest.mark.parametrize("decoding", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_a_batch_gives_the_answers_of_its_samples(padding_side: str, prune_layer: int, decoding: dict) -> None:
    pair, batch = tiny_pair(), prompts(padding_side=padding_side)
    options = {**GREEDY, **decoding, "retention_ratio": 0.3, "prune_layer": prune_layer}
    sequences = pair.generate(**batch, **options)
    together = answers(sequences, batch["input_ids"].shape[1])
    alone = [answers(pair.generate(**one, **options), one["input_ids"].shape[1])[0] for one in samples(batch)]
    assert together == alone
    assert torch.equal(sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])  # prompts as they were passed


@settings(max_examples=25, deadline=None)
@given(
    ratio=st.floats(0.01, 0.99),
    prune_layer=st.integers(0, 5),
    images=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=2), min_size=1, max_size=3),
)
def test_caches_have_the_lengths_of_the_formula(ratio: float, prune_layer: int, images: list[list[int]]) -> None:
    pair, inputs = tiny_pair(), prompts(images=images, text=[3] * len(images))
    output = pair.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, retention_ratio=ratio, prune_layer=prune_layer,
        return_dict_in_generate=True,
    )  # fmt: skip
    counts = [16 * sum(numbers) for numbers in images]
    kept = [max(len(numbers), math.floor(ratio * count)) for numbers, count in zip(images, counts, strict=True)]
    assert output.keep_mask.sum(1).tolist() == kept
    assert output.num_visual_tokens.tolist() == counts
    # In a batch the longest sample gives a cache its length. Two of the three new tokens are read.
    prompt_lengths = inputs["attention_mask"].sum(1).tolist()
    pruned = max(length - count + keep for length, count, keep in zip(prompt_lengths, counts, kept, strict=True)) + 2
    lengths = [layer.get_seq_length() for layer in cache_of(output).layers]
    assert lengths == [max(prompt_lengths) + 2] * prune_layer + [pruned] * (6 - prune_layer)


def test_sampling_follows_the_seed() -> None:
    pair, inputs = tiny_pair(), prompts()
    sequences = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sequences.append(pair.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=6))
    assert torch.equal(sequences[0], sequences[1])
    assert not torch.equal(sequences[0], sequences[2])
    assert sequences[0].shape[0] == 6


def test_an_answer_of_one_token_is_ranked_by_the_prompt() -> None:
    pair, inputs = tiny_pair(), prompts()
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    ranked = [pair.generate(**inputs, **options, guidance_queries=name).importance for name in ("generated", "prompt")]
    assert ranked[0].any()
    assert torch.equal(*ranked)


def test_an_empty_cache_of_the_users_own_is_the_large_models() -> None:
    pair, inputs = tiny_pair(), prompts()
    cache = DynamicCache(config=pair.large.config)
    assert torch.equal(pair.generate(**inputs, **GREEDY, **{cache_name(): cache}), pair.generate(**inputs, **GREEDY))
    prompt, answer = inputs["input_ids"].shape[1], GREEDY["max_new_tokens"]
    assert 0 < cache.get_seq_length() < prompt + answer - 1  # pruned in the first layer, too


def test_a_cached_turn_is_continued_as_by_the_stock_large_model() -> None:
    pair, inputs = tiny_pair(), samples(prompts())[0]
    length = inputs["input_ids"].shape[1]
    turn = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, length + 3, dtype=torch.long)}
    continued = [
        model.generate(**turn, **GREEDY, **options, **{cache_name(): cache_of(pair.large(**inputs))})
        for model, options in ((pair.large, {}), (pair, {"retention_ratio": 1.0}))
    ]
    assert torch.equal(*continued)


@pytest.mark.parametrize("queries", ["prompt", "last", "generated"])
def test_guidance_may_come_from_some_queries_only(queries: str) -> None:
    pair, inputs = tiny_pair(), prompts()
    with AttentionRecorder(pair.small, find_visual_tokens(inputs), queries=queries) as recorder:
        pair.small.generate(**inputs, **GREEDY)
    output = pair.generate(**inputs, **GREEDY, guidance_queries=queries, return_dict_in_generate=True)
    assert torch.equal(output.importance, recorder.importance)


@pytest.mark.parametrize(("fraction", "num_layers"), [(0.1, 1), (0.5, 2), (0.7, 3), (1, 4)])
def test_guidance_may_come_from_the_first_layers_only(fraction: float, num_layers: int) -> None:
    pair, inputs = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(seed=1)).eval(), prompts()
    with AttentionRecorder(pair.small, find_visual_tokens(inputs), layers=range(num_layers)) as recorder:
        pair.small.generate(**inputs, **GREEDY)
    output = pair.generate(**inputs, **GREEDY, guidance_layers=fraction, return_dict_in_generate=True)
    assert torch.equal(output.importance, recorder.importance)


def test_the_small_model_writes_no_more_than_it_may() -> None:
    pair, inputs = tiny_pair(), samples(prompts())[0]
    pair.small.generation_config.eos_token_id = 63
    options = {"return_dict_in_generate": True, "do_sample": False}

    def written(**limits) -> int:
        return pair.generate(**inputs, **limits, **options).draft_sequences.shape[1]

    assert written(max_new_tokens=9) == 9
    assert written(max_new_tokens=9, guidance_max_new_tokens=2) == 2
    assert written(max_new_tokens=9, small_max_new_tokens=3) == 3
    assert written(max_length=inputs["input_ids"].shape[1] + 4) == 4


def test_small_inputs_are_the_small_models_own() -> None:
    pair, inputs = tiny_pair(), samples(prompts())[0]
    own = inputs["input_ids"].clone()
    own[0, -2:] = torch.tensor([7, 8])
    output = pair.generate(**inputs, small_input_ids=own, **GREEDY, return_dict_in_generate=True)
    expected = pair.small.generate(**{**inputs, "input_ids": own}, **GREEDY)
    assert torch.equal(output.draft_sequences, expected[:, own.shape[1] :])
    assert torch.equal(output.sequences[:, : own.shape[1]], inputs["input_ids"])


# --- the user's own steps -------------------------------------------------------------------------------------------


def test_an_own_importance_processor_runs_before_the_ratio() -> None:
    class LastFirst(ImportanceProcessor):
        def __call__(self, visual_tokens, importance):
            return visual_tokens.positions.float().masked_fill(~visual_tokens.valid, -torch.inf)

    pair, inputs = tiny_pair(), prompts()
    output = pair.generate(
        **inputs, **GREEDY, retention_ratio=0.25, min_tokens_per_image=0, importance_processor=LastFirst(),
        selection="top_k", return_dict_in_generate=True,
    )  # fmt: skip
    for sample, numbers in enumerate(IMAGES):
        count = 16 * sum(numbers)
        assert output.keep_mask[sample].nonzero()[:, 0].tolist() == list(range(count - count // 4, count))


@pytest.mark.parametrize("min_tokens", [None, 0, 3])
def test_every_image_keeps_as_many_tokens_as_the_settings_say(min_tokens: int | None) -> None:
    class LastFirst(ImportanceProcessor):
        def __call__(self, visual_tokens, importance):
            return visual_tokens.positions.float().masked_fill(~visual_tokens.valid, -torch.inf)

    settings = {} if min_tokens is None else {"min_tokens_per_image": min_tokens}
    output = tiny_pair().generate(
        **prompts(images=[[1, 1, 1]], text=[4]), **GREEDY, **settings, retention_ratio=0.25,
        importance_processor=LastFirst(), return_dict_in_generate=True,
    )  # fmt: skip
    least = 1 if min_tokens is None else min_tokens
    # Twelve tokens are kept; left to itself the processor would take all of them from the last image.
    assert output.keep_mask[0].unflatten(0, (3, 16)).sum(1).tolist() == [least, least, 12 - 2 * least]


def test_several_importance_processors() -> None:
    pair, inputs = tiny_pair(), prompts()
    output = pair.generate(
        **inputs, **GREEDY, retention_ratio=0.05, return_dict_in_generate=True,
        importance_processor=[MinimumPerImageProcessor(2), RetentionRatioProcessor(0.1)],
    )  # fmt: skip
    image_index = find_visual_tokens(inputs).image_index
    for sample, numbers in enumerate(IMAGES):
        for image in range(len(numbers)):
            assert (output.keep_mask[sample] & (image_index[sample] == image)).sum() >= 2


def test_stock_arguments_reach_the_large_model() -> None:
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    class Listener(BaseStreamer):
        def __init__(self) -> None:
            self.heard: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.heard.append(value)

        def end(self) -> None:
            self.heard.append(torch.tensor([-1]))

    pair, inputs, listener = tiny_pair(), samples(prompts())[0], Listener()
    sequences = pair.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([Only()]), streamer=listener)
    assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == [7] * 6
    assert [int(value[-1]) for value in listener.heard[1:]] == [7] * 6 + [-1]


# --- settings and output --------------------------------------------------------------------------------------------


def test_settings_come_from_the_call_then_the_object_then_the_model() -> None:
    pair, inputs = tiny_pair(), samples(prompts())[0]

    def kept(*args, **kwargs) -> tuple[int, int]:
        output = pair.generate(**inputs, **kwargs, max_new_tokens=2, return_dict_in_generate=True)
        return int(output.keep_mask.sum()), output.prune_layer

    assert kept() == (5, 0)  # "balanced": 0.35 of 16 from the first layer on
    pair.generation_config = SGLGenerationConfig.from_preset("quality")
    assert kept() == (6, 2)
    assert kept(generation_config=SGLGenerationConfig(prune_layer=4)) == (6, 4)
    assert kept(generation_config=SGLGenerationConfig(prune_layer=4), retention_ratio=0.5) == (8, 4)
    assert kept(generation_config=GenerationConfig(do_sample=False)) == (6, 2)
    assert pair.generation_config == SGLGenerationConfig.from_preset("quality")


def test_output_has_the_same_fields_whatever_the_settings() -> None:
    pair, inputs = tiny_pair(), prompts()
    for ratio in (1.0, 0.2):
        output = pair.generate(
            **inputs, **GREEDY, retention_ratio=ratio, return_dict_in_generate=True, output_scores=True
        )
        assert isinstance(output, SGLGenerateOutput)
        assert set(output.timings) == {"guidance_ms", "large_ms", "total_ms"}
        assert (output.timings["guidance_ms"] > 0) == (ratio < 1)
        assert len(output.scores) == output.sequences.shape[1] - inputs["input_ids"].shape[1]
        assert output.num_visual_tokens.tolist() == [16, 32, 32]
        assert (output.importance is None) == (ratio == 1)


# --- refusals: one clear sentence each, and the models unchanged ----------------------------------------------------


class TestRefusals:
    @pytest.fixture(autouse=True)
    def models_stay_as_they_were(self):
        self.pair, self.inputs = tiny_pair(), prompts()
        for cache in (None, "static"):  # transformers itself leaves attributes on a model at its first calls
            self.pair.generate(**self.inputs, **GREEDY, retention_ratio=1.0, cache_implementation=cache)
        self.pair.small.generate(**self.inputs, **GREEDY)
        before = state(self.pair)
        yield
        assert state(self.pair) == before

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"retention_ratio": 0}, "`retention_ratio` is 0, but .* a number above 0 and up to 1"),
            ({"retention_ratio": 1.5}, "`retention_ratio` is 1.5, but .* a number above 0 and up to 1"),
            ({"prune_layer": 6}, "`prune_layer` is 6, but the large model has 6 decoder layers: .* from 0 to 5"),
            ({"prune_layer": 1.5}, r"`prune_layer` is 1.5: pass a layer index .* or a fraction"),
            ({"cache_implementation": "static"}, "a static cache cannot do: leave `cache_implementation` unset"),
            ({"prefill_chunk_size": 8}, "does not work together with prefill_chunk_size: leave it out"),
            ({"prompt_lookup_num_tokens": 3}, "does not work together with assisted decoding: leave it out"),
            ({"guidance_scale": 1.5}, "does not work together with classifier-free guidance: leave it out"),
            ({"guidance_layers": 0}, "`guidance_layers` is 0, .* above 0 and up to 1"),
            ({"importance_processor": 5}, "`importance_processor` is or holds 5: pass an ImportanceProcessor"),
            (
                {"guidance_queries": "all"},
                "`guidance_queries` is 'all': choose one of 'prompt', 'last', 'generated', 'both'",
            ),
            ({"retention": 0.5}, r"`model_kwargs` are not used by the model: \['retention'\]"),
        ],
        ids=str,
    )
    def test_bad_settings(self, setting: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.pair.generate(**self.inputs, **{**GREEDY, **setting})

    def test_a_small_model_that_sees_another_number_of_visual_tokens(self) -> None:
        small_ids = self.inputs["input_ids"].clone()
        small_ids[0, small_ids[0].tolist().index(IMAGE)] = 5
        with pytest.raises(ValueError, match=r"have \[16, 32, 32\] visual tokens, but .* have \[15, 32"):
            self.pair.generate(**self.inputs, small_input_ids=small_ids, **GREEDY)

    def test_a_static_cache_of_the_users_own(self) -> None:
        cache = StaticCache(config=self.pair.large.config.get_text_config(), max_cache_len=64)
        with pytest.raises(ValueError, match="a static cache cannot do"):
            self.pair.generate(**self.inputs, **GREEDY, **{cache_name(): cache})

    def test_a_conversation_that_is_continued(self) -> None:
        cache = cache_of(self.pair.large(**self.inputs))
        with pytest.raises(ValueError, match="already holds 45 tokens: pass the whole conversation without a cache"):
            self.pair.generate(**self.inputs, **GREEDY, **{cache_name(): cache})

    def test_embeddings_instead_of_ids(self) -> None:
        embeddings = self.pair.get_input_embeddings()(self.inputs["input_ids"])
        with pytest.raises(ValueError, match="there are no `input_ids`: pass them, or set `retention_ratio=1.0`"):
            self.pair.generate(inputs_embeds=embeddings, **GREEDY)

    def test_a_prompt_that_nothing_ranks(self) -> None:
        inputs = prompts(images=[[1]], text=[0])
        inputs = {**inputs, **{name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}}
        with pytest.raises(ValueError, match="Nothing ranks the visual tokens of a sample: .* put the question after"):
            self.pair.generate(**inputs, max_new_tokens=1)

    def test_an_own_step_that_fails(self) -> None:
        class Broken(ImportanceProcessor):
            def __call__(self, visual_tokens, importance):
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            self.pair.generate(**self.inputs, **GREEDY, importance_processor=Broken())

    def test_the_large_model_failing_in_the_middle(self) -> None:
        class Broken(LogitsProcessor):
            def __call__(self, input_ids, scores):
                raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            self.pair.generate(**self.inputs, **GREEDY, logits_processor=LogitsProcessorList([Broken()]))

    def test_success(self) -> None:
        self.pair.generate(**self.inputs, **GREEDY, retention_ratio=0.2)


@pytest.mark.parametrize("shared", [False, True], ids=["two pairs", "one pair"])
def test_threads_do_not_disturb_each_other(shared: bool) -> None:
    batches = [prompts(seed=seed) for seed in range(2)]
    pairs = [tiny_pair()] * 2 if shared else [tiny_pair(seed=seed) for seed in range(2)]

    def write(number: int) -> Tensor:
        return pairs[number].generate(**batches[number], **GREEDY, retention_ratio=0.2)

    expected = [write(number) for number in range(2)]
    for number, found in enumerate(in_threads(2, write)):
        assert all(torch.equal(sequences, expected[number]) for sequences in found)


@pytest.mark.slow
def test_a_compiled_model_is_guided_like_any_other() -> None:
    inputs = samples(prompts())[1]
    settings = {"max_new_tokens": 2, "retention_ratio": 0.3, "prune_layer": 1}
    plain = tiny_pair().generate(**inputs, **settings)
    compiled = tiny_pair()
    compiled.large.compile(backend="eager")
    compiled.small.compile(backend="eager")
    assert torch.equal(compiled.generate(**inputs, **settings), plain)


@pytest.mark.parametrize("method", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="cannot run with continuous batching, .* call `generate` with a batch"):
        getattr(tiny_pair(), method)([[1, 2, 3]])


def test_the_cache_of_older_checkpoints_is_no_obstacle() -> None:
    plain, older = tiny_pair(), tiny_pair()
    for model in (older.large, older.small, older):
        model.generation_config.cache_implementation = "hybrid"
    settings = {**GREEDY, "retention_ratio": 0.3, "prune_layer": 1}
    assert torch.equal(older.generate(**prompts(), **settings), plain.generate(**prompts(), **settings))


def test_a_preset_stands_for_its_settings_and_single_ones_win() -> None:
    pair = SGLForConditionalGeneration(large=tiny_internvl(num_layers=6), small=tiny_internvl(seed=1))
    ask = {**prompts(), **GREEDY, "return_dict_in_generate": True}
    for asked, wanted in (
        ({"preset": "fast"}, PRESETS["fast"]),
        ({"preset": "quality", "prune_layer": 1}, {**PRESETS["quality"], "prune_layer": 1}),
        ({"preset": None}, {}),
    ):
        found, expected = pair.generate(**ask, **asked), pair.generate(**ask, **wanted)
        assert found.prune_layer == expected.prune_layer
        assert torch.equal(found.keep_mask, expected.keep_mask)
    with pytest.raises(ValueError, match="There is no preset 'faster': choose one of"):
        pair.generate(**ask, preset="faster")


def test_an_output_is_printed_on_a_few_lines() -> None:
    pair = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(seed=1))
    text = repr(pair.generate(**prompts(), **GREEDY, return_dict_in_generate=True, output_scores=True))
    assert text.startswith("SGLGenerateOutput(sequences=int64[3, ")
    assert "keep_mask=bool[3, 32]" in text
    assert "scores=<tuple>" in text
    assert "timings={guidance_ms: " in text
    assert len(text) < 1000
