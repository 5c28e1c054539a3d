"""Every setting that the installed transformers knows means the same in an early answer, or is refused."""

import copy
import inspect
from typing import Any

import pytest
import torch
from tiny_models import EOS, IMAGE, PAD, prompts, state, tiny_internvl
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.generation_settings import ARGUMENTS, SETTINGS, is_set
from transformers_sgl.transformers_interface import stock_settings

pytestmark = pytest.mark.mechanics

INPUTS = prompts()
LENGTH = INPUTS["input_ids"].shape[1]


@pytest.fixture(scope="module")
def twins() -> SGLForConditionalGeneration:
    """A pair whose small model is the large one again, so that an early answer must be the stock large model's."""
    large = tiny_internvl(seed=1)
    return SGLForConditionalGeneration(large=large, small=copy.deepcopy(large)).eval()


@pytest.fixture(scope="module")
def plain(twins: SGLForConditionalGeneration) -> Tensor:
    return twins.large.generate(**INPUTS, max_new_tokens=8)


def test_each_setting_and_argument_of_the_installed_version_is_classified() -> None:
    assert sorted(SETTINGS) == sorted(stock_settings())
    assert sorted(ARGUMENTS) == sorted({*inspect.signature(GenerationMixin.generate).parameters, *OUTSIDE_SIGNATURE})


# Read by `generate` from its `**kwargs`.
OUTSIDE_SIGNATURE = ("tokenizer", "assistant_tokenizer")


class Banned(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(40), -torch.inf)


class ThreeTokens(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= LENGTH + 3)


class Silent(BaseStreamer):
    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


# A value of each setting that asks for something, and what it needs beside it; those that change the answer first.
CHANGES: dict[str, Any] = {
    "bad_words_ids": lambda plain: [[int(token)] for token in plain[:, LENGTH:].unique() if token < IMAGE],
    "begin_suppress_tokens": lambda plain: plain[:, LENGTH].tolist(),
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "eos_token_id": lambda plain: [EOS, int(plain[0, LENGTH + 1])],
    "exponential_decay_length_penalty": (1, 5.0),
    "forced_eos_token_id": 7,
    "logits_processor": [Banned()],
    "max_length": LENGTH + 4,
    "max_new_tokens": 3,
    "no_repeat_ngram_size": 1,
    "prefix_allowed_tokens_fn": lambda plain: lambda number, ids: [3, 4 + number, 5 + len(ids) % 3],
    "repetition_penalty": 0.3,
    "sequence_bias": [[[5], 100.0]],
    "stopping_criteria": [ThreeTokens()],
    "suppress_tokens": lambda plain: [IMAGE, *plain[:, LENGTH].tolist()],
}
KEEPS: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "assistant_tokenizer": object(),
    "bos_token_id": 3,
    "cache_implementation": "dynamic",
    "decoder_start_token_id": 3,
    "disable_compile": True,
    "diversity_penalty": 0.5,
    "early_stopping": True,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "forced_bos_token_id": 3,  # the first token of all is in the prompt
    "length_penalty": 3.0,
    "low_memory": True,
    "max_cache_len": 99,
    "max_matching_ngram_size": 3,
    "max_time": 1000.0,
    "min_length": LENGTH + 1,
    "min_new_tokens": 1,
    "min_p": 0.5,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 5,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "speculation_type": "ngram",
    "streamer": Silent(),
    "target_lookbehind": 3,
    "temperature": 0.5,
    "top_h": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "typical_p": 0.5,
}
REFUSED: dict[str, Any] = {
    "assistant_ensemble_weight": 0.5,
    "constraints": [object()],
    "custom_generate": "some/repository",
    "do_sample": True,
    "dola_layers": "low",
    "force_words_ids": [[[3]]],
    "guidance_scale": 1.5,
    "is_assistant": True,
    "negative_prompt_attention_mask": INPUTS["attention_mask"],
    "negative_prompt_ids": INPUTS["input_ids"],
    "num_beam_groups": 2,
    "num_beams": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "synced_gpus": True,
    "token_healing": True,
    "watermarking_config": WatermarkingConfig(),
}
# Tested elsewhere, or speeds and outputs that random models, one CPU or guidance rule out by themselves.
ELSEWHERE = {
    *("assistant_early_exit", "assistant_model", "prompt_lookup_num_tokens", "use_mtp"),
    *("cache_config", "compile_config", "continuous_batching_config", "prefill_chunk_size", "use_cache"),
    *("generation_config", "inputs", "kwargs", "self"),
    *("output_attentions", "output_hidden_states", "return_dict_in_generate"),
    *("stop_strings", "tokenizer"),
}


def test_each_setting_and_argument_is_tried() -> None:
    assert {*SETTINGS, *ARGUMENTS} == {*CHANGES, *KEEPS, *REFUSED, *ELSEWHERE}


@pytest.mark.parametrize("name", [*CHANGES, *KEEPS])
def test_an_early_answer_obeys_what_a_stock_answer_obeys(
    twins: SGLForConditionalGeneration, plain: Tensor, name: str
) -> None:
    value = {**CHANGES, **KEEPS}[name]
    value = value(plain) if callable(value) and name in CHANGES else value
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, name: value}
    if name == "max_length":
        del options["max_new_tokens"]
    stock = twins.large.generate(**INPUTS, **options)
    output = twins.generate(**INPUTS, **options, early_exit_threshold=0.0)
    assert output.exited_early.all()
    assert torch.equal(output.sequences, stock.sequences)
    assert torch.equal(stock.sequences, plain) == (name in KEEPS and name != "pad_token_id")


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_early_answer_cannot_obey_is_refused(twins: SGLForConditionalGeneration, name: str) -> None:
    before = state(twins.large), state(twins.small)
    options = {"max_new_tokens": 3, "early_exit_threshold": 0.0, "retention_ratio": 1.0, name: REFUSED[name]}
    if name == "num_return_sequences":
        options["do_sample"] = True
    with pytest.raises(
        ValueError, match=r"(pass|no) `early_exit_threshold(=None`, which never exits|` to run the large .*)\."
    ):
        twins.generate(**INPUTS, **options)
    assert (state(twins.large), state(twins.small)) == before


def test_a_setting_that_nobody_classified_is_refused(
    twins: SGLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(SETTINGS, "no_repeat_ngram_size")
    options = {"max_new_tokens": 3, "early_exit_threshold": 0.0}
    with pytest.raises(ValueError, match="An early exit cannot obey `no_repeat_ngram_size`, because"):
        twins.generate(**INPUTS, **options, no_repeat_ngram_size=2)
    assert torch.equal(
        twins.generate(**INPUTS, **options, no_repeat_ngram_size=0), twins.large.generate(**INPUTS, max_new_tokens=3)
    )


def test_a_draft_obeys_the_call_and_not_the_small_models_own_settings(plain: Tensor) -> None:
    large = tiny_internvl(seed=1)
    twins = SGLForConditionalGeneration(large=large, small=copy.deepcopy(large)).eval()
    twins.small.generation_config = GenerationConfig(
        eos_token_id=EOS, pad_token_id=PAD, repetition_penalty=0.3, guidance_scale=2.0, no_repeat_ngram_size=1
    )
    assert torch.equal(twins.generate(**INPUTS, max_new_tokens=8, early_exit_threshold=0.0), plain)


def test_an_end_forced_on_a_draft_that_is_cut_off_is_no_end(twins: SGLForConditionalGeneration) -> None:
    output = twins.generate(
        **INPUTS,
        max_new_tokens=6,
        guidance_max_new_tokens=3,
        forced_eos_token_id=EOS,
        early_exit_threshold=0.0,
        retention_ratio=1.0,
        return_dict_in_generate=True,
    )
    assert not output.exited_early.any()
    assert torch.equal(output.sequences, twins.large.generate(**INPUTS, max_new_tokens=6, forced_eos_token_id=EOS))


@pytest.mark.parametrize("length", [3, 9], ids=["shorter", "longer"])
def test_a_length_criterion_of_the_caller_takes_the_place_of_the_limit(
    twins: SGLForConditionalGeneration, length: int
) -> None:
    own = {"max_new_tokens": 6, "stopping_criteria": [MaxLengthCriteria(LENGTH + length)], "eos_token_id": None}
    output = twins.generate(**INPUTS, **own, early_exit_threshold=0.0, return_dict_in_generate=True)
    assert output.exited_early.all()
    assert torch.equal(output.sequences, twins.large.generate(**INPUTS, **own))
    assert output.sequences.shape[1] == LENGTH + length


def test_an_early_answer_may_write_what_stands_for_an_image_in_a_prompt(twins: SGLForConditionalGeneration) -> None:
    own = {"max_new_tokens": 4, "suppress_tokens": None, "sequence_bias": [[[IMAGE], 100.0]]}
    stock = twins.large.generate(**INPUTS, **own)
    assert (stock[:, LENGTH:] == IMAGE).all()
    for threshold in (0.0, 1.0):
        assert torch.equal(twins.generate(**INPUTS, **own, early_exit_threshold=threshold, retention_ratio=1.0), stock)


def test_an_end_may_be_given_as_a_tensor(twins: SGLForConditionalGeneration, plain: Tensor) -> None:
    own = {"max_new_tokens": 8, "eos_token_id": torch.tensor([EOS, int(plain[0, LENGTH + 1])])}
    assert torch.equal(
        twins.generate(**INPUTS, **own, early_exit_threshold=0.0), twins.large.generate(**INPUTS, **own)
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("guidance_scale", 1, False),
        ("guidance_scale", 1.0, False),
        ("suppress_tokens", [], False),
        ("forced_eos_token_id", 0, True),
        ("no_repeat_ngram_size", 0, False),
        ("repetition_penalty", 1.0, False),
        ("use_mtp", None, False),
    ],
)
def test_what_differs_from_what_nobody_has_set(name: str, value: Any, expected: bool) -> None:
    assert is_set(name, value) == expected
