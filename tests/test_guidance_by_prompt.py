"""The small model that only reads: the importance of the prompt's rows, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import picture, tiny_family_pair
from tiny_models import near_copy, prompts, samples, state, tiny_internvl, tiny_tokenizer
from torch import Tensor

from transformers_sgl import SGLForConditionalGeneration, SGLGenerationConfig
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6}
DETAILS = {"return_dict_in_generate": True}
PROMPT = {"guidance": "prompt"}
NOTHING = {"verify_draft": False, "score_draft": False}


def tiny_pair(num_vision_layers: int = 1) -> SGLForConditionalGeneration:
    large = tiny_internvl(num_layers=4, num_vision_layers=num_vision_layers)
    return SGLForConditionalGeneration(large=large, small=tiny_internvl(num_layers=3, seed=54, hidden_size=16)).eval()


def num_passes(pair: SGLForConditionalGeneration, **call: Any) -> tuple[int, Any]:
    """How often the small model ran in a call, and what came of it."""
    passes: list[int] = []
    hook = pair.small.register_forward_hook(lambda *_: passes.append(1))
    try:
        output = pair.generate(**call)
    finally:
        hook.remove()
    return len(passes), output


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("queries", ["prompt", "last", None])
@pytest.mark.parametrize("own", [{}, {"guidance_layers": 0.5}], ids=str)
def test_importance_is_that_of_the_prompt_rows_in_one_pass(padding_side: str, queries: str | None, own: dict) -> None:
    pair, batch = tiny_pair(), prompts(padding_side=padding_side)
    for inputs in [batch, *samples(batch)]:
        call = {**inputs, **GREEDY, **DETAILS, **own}
        wanted = pair.generate(**call, guidance_queries=queries or "prompt")
        number, found = num_passes(pair, **call, **PROMPT, guidance_queries=queries)
        assert number == 1
        assert found.importance.any(dim=1).all()
        assert torch.equal(found.importance, wanted.importance)
        assert torch.equal(found.keep_mask, wanted.keep_mask)
        assert torch.equal(found.sequences, wanted.sequences)


DECODING = [
    {"do_sample": False},
    {"do_sample": True, "num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 2},
]


@pytest.mark.parametrize(
    ("decoding", "own"),
    [
        *((decoding, {}) for decoding in DECODING),
        *((decoding, {"prune_layer": 0, "retention_ratio": 0.1, "min_tokens_per_image": 0}) for decoding in DECODING),
        ({"do_sample": False}, {"vision_retention_ratio": 0.5, "retention_ratio": 1.0}),
        ({"do_sample": True}, {"vision_retention_ratio": 0.5, "vision_prune_layer": 1, "prune_layer": 1}),
    ],
    ids=str,
)
def test_answers_are_those_of_the_prompt_rows(decoding: dict, own: dict) -> None:
    pair, inputs = tiny_pair(num_vision_layers=3), prompts()
    outputs = []
    for how in ({"guidance_queries": "prompt", **NOTHING}, PROMPT):
        torch.manual_seed(3)
        outputs.append(pair.generate(**inputs, **DETAILS, **decoding, **own, **how, max_new_tokens=6))
    wanted, found = outputs
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.keep_mask, wanted.keep_mask)
    assert found.num_large_forward_passes == wanted.num_large_forward_passes


def test_what_did_not_run_is_none_and_the_pass_has_its_time() -> None:
    pair = tiny_pair()
    output = pair.generate(**prompts(), **GREEDY, **DETAILS, **PROMPT)
    nothing = ("draft_sequences", "draft_complete", "confidence", "consistency", "decision_score", "draft_confirmed")
    assert [getattr(output, name) for name in (*nothing, "num_draft_tokens_accepted")] == [None] * 7
    assert output.exited_early.tolist() == [False] * 3
    assert output.timings["guidance_ms"] > 0
    assert set(output.timings) == {"guidance_ms", "large_ms", "total_ms"}


def test_the_small_models_own_settings_lengthen_nothing() -> None:
    pair, inputs = tiny_pair(), prompts()
    wanted = pair.generate(**inputs, **GREEDY, **DETAILS, guidance_queries="prompt")
    pair.small.generation_config.update(
        min_new_tokens=3, num_beams=2, guidance_scale=2.0, stop_strings=["x"], max_length=5, prompt_lookup_num_tokens=2
    )
    number, found = num_passes(pair, **inputs, **GREEDY, **DETAILS, **PROMPT)
    assert number == 1
    assert torch.equal(found.sequences, wanted.sequences)


def test_rules_of_answers_are_the_large_models_alone() -> None:
    pair, inputs = tiny_pair(), prompts()
    rules = {"min_new_tokens": 3, "repetition_penalty": 1.5, "stop_strings": ["q"], "tokenizer": tiny_tokenizer()}
    number, found = num_passes(pair, **inputs, **GREEDY, **rules, **PROMPT)
    assert number == 1
    assert torch.equal(found, pair.generate(**inputs, **GREEDY, **rules, guidance_queries="prompt", **NOTHING))


@pytest.mark.parametrize("order", [None, 7])
def test_vocabularies_do_not_matter(order: int | None) -> None:
    large = tiny_internvl()
    pair = SGLForConditionalGeneration(large=large, small=near_copy(large, 0.1)).eval()
    known = {} if order is None else {"tokenizer": tiny_tokenizer(), "small_tokenizer": tiny_tokenizer(order=order)}
    inputs = prompts()
    wanted = pair.generate(**inputs, **GREEDY, **known, guidance_queries="prompt", **NOTHING)
    assert torch.equal(pair.generate(**inputs, **GREEDY, **known, **PROMPT), wanted)


@pytest.mark.parametrize(("large", "small"), [("internvl", "llava"), ("qwen2_vl", "internvl")])
def test_two_families(large: str, small: str) -> None:
    pair, processor = tiny_family_pair(large, small)
    question = {"type": "text", "text": "where?"}
    chats = [
        [{"role": "user", "content": [*({"type": "image", "image": one} for one in few), question]}]
        for few in ([picture(40, 24)], [picture(24, 24, 1), picture(16, 48, 2)])
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    tokenizers = {"tokenizer": processor.tokenizer, "small_tokenizer": processor.small_processor.tokenizer}
    call = {**inputs, **tokenizers, **GREEDY, **DETAILS}
    wanted = pair.generate(**call, guidance_queries="prompt")
    number, found = num_passes(pair, **call, **PROMPT)
    assert number == 1
    assert found.importance_transfer == "resampling"
    assert torch.equal(found.importance, wanted.importance)
    assert torch.equal(found.sequences, wanted.sequences)


def test_a_conversation_goes_on() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[2]], text=[4])
    settings = {**GREEDY, **DETAILS, **PROMPT, "prune_layer": 1}
    first = pair.generate(**inputs, **settings)
    ids = torch.cat([first.sequences, torch.tensor([[3, 4, 5]])], dim=1)
    turn = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = pair.generate(**turn, **settings)
    number, found = num_passes(pair, **turn, **settings, **{cache_name(): cache_of(first)})
    assert number == 1
    assert torch.equal(found.sequences, whole.sequences)


def test_a_sample_without_an_image_is_left_alone() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[1], []], text=[5, 8])
    mask = inputs["attention_mask"][1].bool()
    expected = pair.large.generate(input_ids=inputs["input_ids"][1, mask][None], **GREEDY)
    found = pair.generate(**inputs, **GREEDY, **PROMPT)
    assert torch.equal(found[1, -expected.shape[1] + int(mask.sum()) :], expected[0, int(mask.sum()) :])


def test_where_nothing_is_pruned_the_small_model_does_not_run() -> None:
    pair, inputs = tiny_pair(), prompts()
    number, found = num_passes(pair, **inputs, **GREEDY, **PROMPT, retention_ratio=1.0)
    assert number == 0
    assert torch.equal(found, pair.large.generate(**inputs, **GREEDY))


def test_settings_come_from_the_pair_too_and_an_answer_is_one_word_away() -> None:
    pair, inputs = tiny_pair(), prompts()
    usual = pair.generate(**inputs, **GREEDY, **DETAILS)
    pair.generation_config = SGLGenerationConfig.from_generation_config(pair.generation_config)
    pair.generation_config.guidance = "prompt"
    assert num_passes(pair, **inputs, **GREEDY)[0] == 1
    again = pair.generate(**inputs, **GREEDY, **DETAILS, guidance="answer", early_exit_threshold=2.0)
    assert torch.equal(again.importance, usual.importance)
    pair.generation_config.guidance, pair.generation_config.early_exit_threshold = None, 0.0
    assert num_passes(pair, **inputs, **GREEDY, **PROMPT, early_exit_threshold=None)[0] == 1


class TestRefuses:
    @pytest.fixture(autouse=True)
    def pair(self):
        self.pair, self.inputs = tiny_pair(), prompts()
        self.pair.generate(**self.inputs, **GREEDY)
        self.pair.small.generate(**self.inputs, **GREEDY)
        before = state(self.pair)
        yield
        assert state(self.pair) == before

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            ({"early_exit_threshold": 0.5}, "`early_exit_threshold`"),
            ({"confirmation_threshold": 0.0}, "`confirmation_threshold`"),
            ({"guidance_queries": "both"}, "`guidance_queries`"),
            ({"guidance_queries": "generated"}, "`guidance_queries`"),
            ({"guidance_max_new_tokens": 1}, "`guidance_max_new_tokens`"),
            ({"score_draft": True}, "`score_draft`"),
            ({"verify_draft": True, "retention_ratio": 1.0}, "`verify_draft`"),
            ({"preset": "confirmed", "early_exit_threshold": 0.0}, "`early_exit_threshold`, `confirmation_threshold`"),
        ],
        ids=str,
    )
    def test_what_needs_an_answer(self, settings: dict, names: str) -> None:
        sentence = rf'^With `guidance="prompt"` .* {names} .* leave .* or set `guidance="answer"`\.$'
        with pytest.raises(ValueError, match=sentence):
            self.pair.generate(**self.inputs, **GREEDY, **PROMPT, **settings)

    @pytest.mark.parametrize("value", ["both", "", True, 1, ["prompt"]])
    def test_another_guidance(self, value: Any) -> None:
        with pytest.raises(ValueError, match="`guidance` is .*: choose one of 'answer', 'prompt'"):
            self.pair.generate(**self.inputs, **GREEDY, guidance=value)

    def test_a_prompt_that_ends_with_its_image(self) -> None:
        inputs: dict[str, Tensor] = prompts(images=[[1]], text=[0])
        inputs = {**inputs, **{name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")}}
        with pytest.raises(ValueError, match="Nothing ranks .* put the question after the image or set `guidance="):
            self.pair.generate(**inputs, **GREEDY, **PROMPT)
