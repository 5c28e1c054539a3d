"""The arguments of a call mean what they mean in stock `generate`."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EOS, IMAGE, PAD, prompts, samples, tiny_internvl
from torch import Tensor
from transformers import GenerationConfig

from transformers_sgl import SGLForConditionalGeneration, SGLGenerationConfig
from transformers_sgl.arguments import read_arguments, split_inputs
from transformers_sgl.transformers_interface import cache_name, stock_settings

pytestmark = pytest.mark.mechanics

INPUTS = prompts()
LENGTH = INPUTS["input_ids"].shape[1]


@pytest.fixture(scope="module")
def large() -> Any:
    return tiny_internvl(seed=1)


@pytest.fixture(scope="module")
def small() -> Any:
    return tiny_internvl(num_layers=2, seed=2, hidden_size=16)


def paired(large: Any, small: Any, **own: Any) -> SGLForConditionalGeneration:
    """A pair of a copy of the large model with settings of its `own`."""
    large = copy.deepcopy(large)
    large.generation_config = GenerationConfig(**{**large.generation_config.to_dict(), **own})
    return SGLForConditionalGeneration(large=large, small=small)


# Each shows in an answer of eight tokens, and what must be set beside it.
VALUES: dict[str, Any] = {
    "bad_words_ids": [[token] for token in range(30)],
    "begin_suppress_tokens": list(range(50)),
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "eos_token_id": [*range(30, 50), EOS],
    "exponential_decay_length_penalty": (1, 5.0),
    "forced_eos_token_id": 7,
    "max_length": LENGTH + 4,
    "max_new_tokens": 3,
    "min_length": LENGTH + 7,
    "min_new_tokens": 7,
    "no_repeat_ngram_size": 1,
    "pad_token_id": 5,
    "repetition_penalty": 0.3,
    "sequence_bias": [[[5], 100.0]],
    "suppress_tokens": list(range(30)),
    "do_sample": True,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "min_p": 0.3,
    "temperature": 0.1,
    "top_h": 0.4,
    "top_k": 2,
    "top_p": 0.3,
    "typical_p": 0.3,
    "early_stopping": True,
    "output_scores": True,
    "return_dict_in_generate": True,
    "use_cache": False,
}
SAMPLING = {"epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_h", "top_k", "top_p", "typical_p"}


@pytest.mark.parametrize("where", ["call", "pair"])
@pytest.mark.parametrize("name", VALUES)
def test_none_unsets_a_setting_as_in_stock_generate(large: Any, small: Any, name: str, where: str) -> None:
    pair = paired(large, small, **{name: VALUES[name]})
    options: dict[str, Any] = {"do_sample": True} if name in SAMPLING else {}
    if name not in ("max_length", "max_new_tokens"):
        options["max_new_tokens"] = 8
    if where == "call":
        options[name] = None
        if name == "max_length":
            options["max_new_tokens"] = 5  # stock `generate` must know one of them
    else:
        stock = copy.deepcopy(pair.large)
        setattr(pair.generation_config, name, None)
        setattr(stock.generation_config, name, None)
    for own in ({},) if name in SAMPLING else ({}, {"verify_draft": True}):
        torch.manual_seed(3)
        expected = (pair.large if where == "call" else stock).generate(**INPUTS, **options)
        torch.manual_seed(3)
        written = pair.generate(**INPUTS, **options, **own, retention_ratio=1.0)
        assert isinstance(written, Tensor) == isinstance(expected, Tensor)
        assert torch.equal(getattr(written, "sequences", written), getattr(expected, "sequences", expected))


def test_the_setting_that_none_unsets_was_in_force(large: Any, small: Any) -> None:
    plain = large.generate(**INPUTS, max_new_tokens=8)
    for name in ("eos_token_id", "repetition_penalty", "suppress_tokens", "pad_token_id", "max_new_tokens"):
        pair = paired(large, small, **{name: VALUES[name]})
        options = {} if name == "max_new_tokens" else {"max_new_tokens": 8}
        assert not torch.equal(pair.generate(**INPUTS, **options, retention_ratio=1.0), plain)


def test_one_limit_takes_the_place_of_the_other(large: Any, small: Any) -> None:
    pair = paired(large, small, max_new_tokens=7)
    for own in ({"retention_ratio": 1.0}, {}, {"early_exit_threshold": 0.0, "retention_ratio": 1.0}):
        written = pair.generate(**INPUTS, max_length=LENGTH + 3, max_new_tokens=None, **own)
        assert written.shape[1] == LENGTH + 3


def test_an_answer_without_an_end_goes_on_to_its_limit_early_or_late(large: Any, small: Any) -> None:
    pair = paired(large, small, eos_token_id=[*range(30, 50), EOS])
    pair.small.generation_config.eos_token_id = list(range(50))
    try:
        for own in ({}, {"verify_draft": True}, {"early_exit_threshold": 0.0}, {"early_exit_threshold": 1.0}):
            written = pair.generate(**INPUTS, max_new_tokens=9, eos_token_id=None, retention_ratio=1.0, **own)
            assert written.shape[1] == LENGTH + 9
            assert not torch.isin(written[:, LENGTH:], torch.tensor([PAD])).any()
    finally:
        pair.small.generation_config.eos_token_id = EOS


def test_none_inherits_in_settings_of_guidance_but_never_exits_on_a_call() -> None:
    model = GenerationConfig(eos_token_id=3, top_k=7)
    calibrated = SGLGenerationConfig(early_exit_threshold=0.5, retention_ratio=0.3).with_defaults(model)
    kwargs = {"retention_ratio": None, "early_exit_threshold": None, "top_k": None}
    settings, inputs, arguments = read_arguments(None, None, kwargs, calibrated)
    assert (settings.retention_ratio, settings.top_k, settings.eos_token_id) == (0.3, None, 3)
    assert settings.early_exit_threshold > 1
    assert not inputs
    assert not arguments
    settings, _, _ = read_arguments(None, SGLGenerationConfig(early_exit_threshold=None), {}, calibrated)
    assert settings.early_exit_threshold == 0.5
    settings, _, _ = read_arguments(None, None, {"preset": "fast", "retention_ratio": None}, calibrated)
    assert settings.retention_ratio == 0.05


def test_what_settings_written_by_hand_leave_out_comes_from_the_large_model(
    large: Any, small: Any, tmp_path: Path
) -> None:
    paired(large, small, do_sample=True, top_k=7).save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    for own in ({}, {"do_sample": False}):
        file.write_text(json.dumps({"retention_ratio": 0.5, "pad_token_id": 9, **own}))
        settings = SGLForConditionalGeneration.from_pretrained(tmp_path).generation_config
        assert (settings.retention_ratio, settings.pad_token_id, settings.eos_token_id) == (0.5, 9, EOS)
        assert settings.top_k == (None if own else 7)
        settings.save_pretrained(tmp_path)  # transformers refuses sampling settings without sampling


def test_what_was_unset_stays_unset_after_saving(large: Any, small: Any, tmp_path: Path) -> None:
    pair = paired(large, small)
    pair.generation_config.eos_token_id = None
    pair.save_pretrained(tmp_path)
    again = SGLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.generation_config == pair.generation_config
    assert again.large.generation_config.eos_token_id == EOS


# --- inputs ----------------------------------------------------------------------------------------------------------


def test_what_a_part_of_the_large_model_has_computed_is_its_own() -> None:
    own = {"inputs_embeds": torch.ones(1, 2, 3), cache_name(): object(), "mm_encoder_outputs": {}}
    plain = {"input_ids": torch.ones(1, 2), "flag": True}
    for shares_tensors in (True, False):
        large, small = split_inputs({**plain, **own, "small_inputs_embeds": 3}, shares_tensors)
        assert large.keys() == {*plain, *own}
        assert small.keys() == {"flag", "inputs_embeds", *(["input_ids"] if shares_tensors else [])}
        assert small["inputs_embeds"] == 3


def embedded(large: Any, padding_side: str = "left") -> dict[str, Tensor]:
    """Prompts, and beside their ids embeddings that say something else."""
    inputs = prompts(padding_side=padding_side)
    embeddings = large.get_input_embeddings()(inputs["input_ids"]) + 0.01
    embeddings[inputs["input_ids"] == IMAGE] = large.get_input_embeddings()(torch.tensor(IMAGE))
    return {**inputs, "inputs_embeds": embeddings.detach()}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_embeddings_are_the_large_models_alone(large: Any, small: Any, padding_side: str) -> None:
    pair, inputs = paired(large, small), embedded(large, padding_side)
    stock = large.generate(**inputs, max_new_tokens=5)
    assert not torch.equal(stock, large.generate(**prompts(padding_side=padding_side), max_new_tokens=5))
    for own in ({}, {"verify_draft": True}):
        assert torch.equal(pair.generate(**inputs, max_new_tokens=5, retention_ratio=1.0, **own), stock)
    pruned = pair.generate(**inputs, max_new_tokens=5, retention_ratio=0.3)
    for number, alone in enumerate(samples(inputs)):
        mask = inputs["attention_mask"][number].bool()
        alone["inputs_embeds"] = inputs["inputs_embeds"][number][mask][None]
        answer = pair.generate(**alone, max_new_tokens=5, retention_ratio=0.3)[0, int(mask.sum()) :]
        assert torch.equal(pruned[number, LENGTH:][: len(answer)], answer)
    with pytest.raises(ValueError, match="An early exit cannot obey `inputs_embeds`"):
        pair.generate(**inputs, max_new_tokens=5, early_exit_threshold=0.5)


def test_the_names_of_the_settings_are_those_of_the_installed_version() -> None:
    assert set(VALUES) <= set(stock_settings())
