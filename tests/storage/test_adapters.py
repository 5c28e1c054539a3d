"""A pair runs with adapters in its models, and neither loses one silently nor loads one unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import prompts, tiny_internvl
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.custom_generate import generate_with_small_model

peft = pytest.importorskip("peft")

GREEDY = {"do_sample": False, "max_new_tokens": 5}
# What is pruned shows which importance the small model gave.
PRUNED = {**GREEDY, "retention_ratio": 0.5, "prune_layer": 0, "return_dict_in_generate": True}


def with_lora(model: PreTrainedModel) -> Any:
    """A `PeftModel` that answers differently than the model did."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, r=4)
    return peft.get_peft_model(model, config).eval()


def small() -> PreTrainedModel:
    return tiny_internvl(2, seed=1, hidden_size=16)


def answer(model: Any, **settings: Any) -> Tensor:
    return model.generate(**prompts(), **GREEDY, **settings)


@pytest.fixture(params=["from_large_small_pretrained", "the class"])
def paired(request: pytest.FixtureRequest) -> Callable[..., SGLForConditionalGeneration]:
    if request.param == "the class":
        return lambda large, small: SGLForConditionalGeneration(large=large, small=small).eval()
    return SGLForConditionalGeneration.from_large_small_pretrained


class TestAPeftModel:
    def test_as_the_large_model_it_answers_with_its_adapter(
        self, paired: Callable[..., SGLForConditionalGeneration]
    ) -> None:
        large = with_lora(tiny_internvl())
        wanted = answer(large)
        assert not torch.equal(wanted, answer(tiny_internvl()))
        pair = paired(large, small())
        assert pair.large is large.get_base_model()
        for verify_draft in (False, True):
            assert torch.equal(answer(pair, retention_ratio=1.0, verify_draft=verify_draft), wanted)

    def test_as_the_small_model_it_guides_with_its_adapter(
        self, paired: Callable[..., SGLForConditionalGeneration]
    ) -> None:
        plain = paired(tiny_internvl(), small()).generate(**prompts(), **PRUNED)
        adapted = paired(tiny_internvl(), with_lora(small())).generate(**prompts(), **PRUNED)
        merged = paired(tiny_internvl(), with_lora(small()).merge_and_unload()).generate(**prompts(), **PRUNED)
        torch.testing.assert_close(adapted.importance, merged.importance, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(adapted.importance, plain.importance, rtol=1e-2)
        by_function = generate_with_small_model(tiny_internvl(), with_lora(small()), **prompts(), **PRUNED)
        assert torch.equal(by_function.importance, adapted.importance)

    def test_merged_it_is_a_model_like_any_other(self, tmp_path: Path) -> None:
        large = with_lora(tiny_internvl())
        wanted = answer(large)
        pair = SGLForConditionalGeneration.from_large_small_pretrained(large.merge_and_unload(), small())
        pair.save_pretrained(tmp_path)
        for each in (pair, SGLForConditionalGeneration.from_pretrained(tmp_path)):
            assert torch.equal(answer(each, retention_ratio=1.0), wanted)

    def test_an_adapter_that_is_not_in_the_layers_is_refused(
        self, paired: Callable[..., SGLForConditionalGeneration]
    ) -> None:
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=16, num_layers=2)
        config.num_attention_heads = 2
        tuned = peft.get_peft_model(small(), config)
        with pytest.raises(ValueError, match="The small model has an adapter that puts tokens of its own .*: train"):
            paired(tiny_internvl(), tuned)
        with pytest.raises(ValueError, match="The small model has an adapter that puts tokens of its own"):
            generate_with_small_model(tiny_internvl(), tuned, **prompts())

    @pytest.mark.parametrize("model", [torch.nn.Linear(1, 1), 3], ids=["module", "number"])
    def test_what_is_no_model_is_refused(
        self, paired: Callable[..., SGLForConditionalGeneration], model: object
    ) -> None:
        with pytest.raises(ValueError, match="The large model is of the type .*, which is no model of"):
            paired(model, small())

    def test_a_compiled_model_stays_as_it_is(self, paired: Callable[..., SGLForConditionalGeneration]) -> None:
        compiled = torch.compile(tiny_internvl(), backend="eager")
        assert paired(compiled, small()).large is compiled


def loaded_into(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds an adapter as transformers does."""
    # A new transformers may ask for a peft that is not published yet; what is used of it is in both.
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.19.0")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4))
    model.eval()


def injected_into(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds an adapter as peft does."""
    with_lora(model)


@pytest.mark.parametrize("add_adapter", [loaded_into, injected_into])
@pytest.mark.parametrize("name", ["large", "small"])
def test_an_adapter_is_never_lost_in_a_save(
    embedded_pair_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    add_adapter: Callable[..., None],
    name: str,
) -> None:
    pair = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    add_adapter(getattr(pair, name), monkeypatch)
    for save in (pair.save_pretrained, pair.save_recipe):
        with pytest.raises(ValueError, match=rf"The {name} model has an adapter, .*: merge it, .*merge_and_unload"):
            save(tmp_path / "pair")
    assert not (tmp_path / "pair").exists()
    assert any("lora" in each for each, _ in getattr(pair, name).named_parameters())


def test_a_model_that_transformers_gave_an_adapter_answers_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    large = tiny_internvl()
    loaded_into(large, monkeypatch)
    wanted = answer(large)
    assert not torch.equal(wanted, answer(tiny_internvl()))
    pair = SGLForConditionalGeneration(large=large, small=small()).eval()
    assert torch.equal(answer(pair, retention_ratio=1.0), wanted)


class TestACheckpointWithAnAdapter:
    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Path:
        pair = SGLForConditionalGeneration(large=tiny_internvl(), small=small()).eval()
        pair.save_pretrained(tmp_path / "pair")
        return tmp_path / "pair"

    @pytest.mark.parametrize("beside_the_model", [False, True])
    def test_named_it_is_refused(self, bundle: Path, tmp_path: Path, beside_the_model: bool) -> None:
        folder = bundle / "small"
        if not beside_the_model:
            folder = tmp_path / "adapter"
            adapted = with_lora(AutoModelForImageTextToText.from_pretrained(bundle / "small"))
            adapted.save_pretrained(folder)
            assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        (folder / "adapter_config.json").touch()
        with pytest.raises(ValueError, match=r"The small model '.*' is an adapter \(`adapter_c.*: merge"):
            SGLForConditionalGeneration.from_large_small_pretrained(bundle / "large", folder)

    def test_in_a_bundle_it_is_refused(self, bundle: Path) -> None:
        (bundle / "large" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/other"}))
        with pytest.raises(ValueError, match=r"The large model '.*' is an adapter"):
            AutoModelForImageTextToText.from_pretrained(bundle)
