"""The output of guided generation is one of stock `generate`, wherever a client looks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import prompts, tiny_internvl
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from transformers_sgl import SGLForConditionalGeneration, SGLGenerateOutput

pytestmark = pytest.mark.mechanics

STOCK = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
CASES: dict[str, dict[str, Any]] = {
    "pruned": {"verify_draft": False},
    "draft": {"verify_draft": True},
    "unpruned": {"retention_ratio": 1.0, "verify_draft": True},
    "exits": {"early_exit_threshold": 0.0},
    "large alone": {"retention_ratio": 1.0, "verify_draft": False},
    "beams": {"verify_draft": False, "num_beams": 2, "output_scores": True},
    "beams, large alone": {"retention_ratio": 1.0, "verify_draft": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def pair() -> SGLForConditionalGeneration:
    return SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16)).eval()


def through_torch(output: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(output, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("case", CASES)
def test_it_is_an_output_of_stock_generate(case: str, pair: SGLForConditionalGeneration) -> None:
    settings = CASES[case]
    output = pair.generate(**prompts(), **STOCK, **settings)
    own = {name: settings[name] for name in settings if name in ("num_beams", "num_return_sequences", "output_scores")}
    stock = pair.large.generate(**prompts(), **STOCK, **own)
    assert isinstance(output, SGLGenerateOutput)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert isinstance(output, type(stock))
    assert isinstance(output, GenerateBeamDecoderOnlyOutput) == ("beams" in case)
    shared = [name for name in stock if name in output]
    if not case.startswith("exits"):  # nothing of the large model's where it was not called
        assert set(stock) <= set(output)
        assert list(output)[: len(stock)] == [name for name in output if name in stock]
    assert shared[0] == "sequences"
    assert output[0] is output["sequences"] is output.sequences is output.to_tuple()[0]
    assert len(output.to_tuple()) == len(list(output.keys())) == len(output[:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda output: pickle.loads(pickle.dumps(output)), through_torch])
@pytest.mark.parametrize("case", CASES)
def test_a_copy_has_all_of_it(copied: Callable[[Any], Any], case: str, pair: SGLForConditionalGeneration) -> None:
    output = pair.generate(**prompts(), **STOCK, **CASES[case])
    other = copied(output)
    assert type(other) is type(output)
    assert list(other) == list(output)
    assert other is not output
    assert repr(other) == repr(output)
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(other[name], value)
            assert getattr(other, name) is other[name]
    assert other.timings == output.timings
