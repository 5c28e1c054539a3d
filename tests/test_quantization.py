"""The large model in 4 or 8 bit, the small one in full precision: bitsandbytes computes both on the CPU, too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from tiny_models import near_copy, prompts, state, tiny_internvl
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.architectures import decoder_layers
from transformers_sgl.transformers_interface import cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6}
# Blocks of 64 weights do not fit into the narrow vision towers of tiny models.
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
QUANTIZATION: dict[str, tuple[type[nn.Linear], dict[str, Any]]] = {
    "4 bit": (Linear4bit, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "4 bit, twice": (
        Linear4bit,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    # LLM.int8 looks for outliers among all tokens that it reads at once: with them, it depends on what these are.
    "8 bit": (Linear8bitLt, {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
}


@pytest.fixture(scope="module", params=["4 bit", "8 bit"])
def quantization(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    large = tiny_internvl(num_layers=3, hidden_size=64)
    folder = tmp_path_factory.mktemp("bundle")
    SGLForConditionalGeneration(large=large, small=near_copy(large, 0.01)).save_pretrained(folder)
    return folder


def load(folder: Path, quantization: str, part: str = "large_", **kwargs: Any) -> Any:
    config = BitsAndBytesConfig(**QUANTIZATION[quantization][1], llm_int8_skip_modules=NOT_QUANTIZED)
    return AutoModelForImageTextToText.from_pretrained(folder, **{f"{part}quantization_config": config}, **kwargs)


@pytest.fixture(scope="module")
def full(bundle: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(bundle)


@pytest.fixture(scope="module")
def pair(bundle: Path, quantization: str) -> Any:
    return load(bundle, quantization)


def linear_classes(model: nn.Module) -> set[type[nn.Module]]:
    return {
        type(module) for layer in decoder_layers(model) for module in layer.modules() if isinstance(module, nn.Linear)
    }


def test_only_the_large_model_is_quantized(pair: Any, full: Any, quantization: str) -> None:
    assert linear_classes(pair.large) == {QUANTIZATION[quantization][0]}
    assert linear_classes(pair.small) == {nn.Linear}
    weights = full.small.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pair.small.state_dict().items())
    assert pair.large.get_memory_footprint() < 0.7 * full.large.get_memory_footprint()
    assert pair.get_memory_footprint() == pair.large.get_memory_footprint() + pair.small.get_memory_footprint()


def test_a_plain_configuration_quantizes_both(bundle: Path, quantization: str) -> None:
    pair = load(bundle, quantization, part="")
    assert linear_classes(pair.large) == linear_classes(pair.small) == {QUANTIZATION[quantization][0]}
    assert pair.generate(**prompts(), **GREEDY).shape[1] > prompts()["input_ids"].shape[1]


@pytest.mark.parametrize("quantization", QUANTIZATION)
def test_a_quantized_bundle_is_saved_and_loaded(bundle: Path, quantization: str, tmp_path: Path) -> None:
    asked = {**prompts(), **GREEDY, "retention_ratio": 0.4, "prune_layer": 2, "return_dict_in_generate": True}
    pair = load(bundle, quantization)
    pair.save_pretrained(tmp_path / "once")
    expected, alone = pair.generate(**asked), pair.large.generate(**prompts(), **GREEDY)
    SGLForConditionalGeneration.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        assert linear_classes(loaded.large) == {QUANTIZATION[quantization][0]}
        assert linear_classes(loaded.small) == {nn.Linear}
        assert loaded.large.get_memory_footprint() == pair.large.get_memory_footprint()
        output = loaded.generate(**asked)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.importance, expected.importance)
        large = AutoModelForImageTextToText.from_pretrained(folder / "large")  # an ordinary checkpoint still
        assert linear_classes(large) == {QUANTIZATION[quantization][0]}
        assert torch.equal(large.generate(**prompts(), **GREEDY), alone)


def test_saving_after_an_answer_writes_the_same_weights_or_nothing(
    bundle: Path, quantization: str, tmp_path: Path
) -> None:
    pair = load(bundle, quantization)
    expected = pair.generate(**prompts(), **GREEDY)
    states = [getattr(parameter, "quant_state", None) for parameter in pair.large.parameters()]
    # Where the processor can compute in bfloat16, bitsandbytes changes its 4-bit weights in the first pass.
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        with pytest.raises(
            ValueError, match=r"The large model has run on a CPU .* save it before it answers anything"
        ):
            pair.save_pretrained(tmp_path / "pair")
        assert not (tmp_path / "pair").exists()
    else:
        pair.save_pretrained(tmp_path / "pair")
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "pair")
        assert torch.equal(loaded.generate(**prompts(), **GREEDY), expected)
    assert torch.equal(pair.generate(**prompts(), **GREEDY), expected)


@pytest.mark.parametrize("settings", [{"vision_prune_layer": 0}, {"confirmation_threshold": 0.0}])
def test_the_tower_of_a_quantized_model_is_pruned_as_in_full_precision(
    pair: Any, full: Any, settings: dict[str, float]
) -> None:
    asked = {**prompts(), **GREEDY, "vision_retention_ratio": 0.5, **settings, "return_dict_in_generate": True}
    found, expected = pair.generate(**asked), full.generate(**asked)
    assert torch.equal(found.vision_keep_mask, expected.vision_keep_mask)
    assert torch.equal(found.keep_mask, expected.keep_mask)
    again = pair.generate(**asked)
    assert torch.equal(again.sequences, found.sequences)


@pytest.mark.parametrize("prune_layer", [0, 2])
def test_guidance_and_pruning_are_as_in_full_precision(pair: Any, full: Any, prune_layer: int) -> None:
    asked = {**prompts(), **GREEDY, "retention_ratio": 0.4, "prune_layer": prune_layer, "verify_draft": False}
    found, expected = (model.generate(**asked, return_dict_in_generate=True) for model in (pair, full))
    for name in ("importance", "keep_mask", "draft_sequences"):  # the small model's work
        assert torch.equal(found[name], expected[name])
    lengths = [[layer.get_seq_length() for layer in cache_of(output).layers] for output in (found, expected)]
    assert lengths[0] == lengths[1]
    assert lengths[0][0] > lengths[0][-1] or prune_layer == 0
    assert not torch.equal(found.sequences, pair.large.generate(**prompts(), **GREEDY))  # and it makes a difference


def test_everything_kept_is_the_quantized_large_model(pair: Any) -> None:
    expected = pair.large.generate(**prompts(), **GREEDY)
    assert torch.equal(pair.generate(**prompts(), **GREEDY, retention_ratio=1.0), expected)


@pytest.mark.parametrize("retention_ratio", [1.0, 0.4])
def test_a_draft_changes_no_token(pair: Any, retention_ratio: float) -> None:
    asked = {**prompts(), **GREEDY, "retention_ratio": retention_ratio, "prune_layer": 2}
    without = pair.generate(**asked, verify_draft=False)
    assert torch.equal(pair.generate(**asked, verify_draft=True), without)


def test_a_draft_that_fits_saves_passes(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The quantised model drafts for itself.
    twin = SGLForConditionalGeneration(large=pair.large, small=pair.large)
    asked = {**prompts(), **GREEDY, "retention_ratio": 1.0, "return_dict_in_generate": True}
    output = twin.generate(**asked, verify_draft=True)
    assert torch.equal(output.sequences, pair.large.generate(**prompts(), **GREEDY))
    assert output.num_large_forward_passes < GREEDY["max_new_tokens"]


def test_an_early_exit_does_not_run_the_large_model(pair: Any, full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.large, "forward", None)  # calling it would raise
    asked = {**prompts(), **GREEDY, "early_exit_threshold": 0.0, "return_dict_in_generate": True}
    found, expected = pair.generate(**asked), full.generate(**asked)
    assert found.exited_early.all()
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.decision_score, expected.decision_score)


def test_the_models_stay_as_they_were(pair: Any) -> None:
    pair.generate(**prompts(), **GREEDY)  # transformers installs hooks of its own in the first call
    before = state(pair.large), state(pair.small)
    # not `state_dict()`, which makes bitsandbytes change its weights
    weights = {name: value.clone() for name, value in pair.large.named_parameters()}
    pair.generate(**prompts(), **GREEDY, retention_ratio=0.4, early_exit_threshold=0.1)
    assert (state(pair.large), state(pair.small)) == before
    assert all(torch.equal(value, weights[name]) for name, value in pair.large.named_parameters())


def test_a_quantized_pair_refuses_to_be_cast(pair: Any) -> None:
    for cast in (pair.half, pair.float, lambda: pair.to(torch.float16), lambda: pair.to("cpu", dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="quantized|cast"):
            cast()
    assert pair.small.dtype == torch.float32
    assert pair.to("cpu") is pair


@pytest.mark.parametrize("quantization", ["4 bit", "8 bit"])
def test_the_embedded_pair_still_reads(quantization: str, embedded_pair_path: Path) -> None:
    pair, processor = load(embedded_pair_path, quantization), AutoProcessor.from_pretrained(embedded_pair_path)
    image = {"type": "image", "path": str(embedded_pair_path / "example.png")}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image, {"type": "text", "text": "describe the red triangle."}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for settings in (
        {"retention_ratio": 0.2},
        {"retention_ratio": 0.2, "verify_draft": False},
        {"retention_ratio": 1.0},
    ):
        sequences = pair.generate(**inputs, max_new_tokens=16, **settings)
        answer = processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == "a red triangle labelled B in the bottom left"


@pytest.mark.gpu
@pytest.mark.parametrize("placement", [{"device_map": 0}, {"large_device_map": 0, "small_device_map": "cpu"}], ids=str)
def test_on_a_gpu(placement: dict, bundle: Path, quantization: str, tmp_path: Path) -> None:
    pair = load(bundle, quantization, **placement)
    inputs = {name: value.to("cuda:0") for name, value in prompts().items()}
    asked = {**inputs, **GREEDY, "retention_ratio": 0.4, "prune_layer": 2, "return_dict_in_generate": True}
    expected = pair.generate(**asked, verify_draft=False)
    assert torch.equal(pair.generate(**asked, verify_draft=True).sequences, expected.sequences)
    assert torch.equal(pair.generate(**inputs, **GREEDY, retention_ratio=1.0), pair.large.generate(**inputs, **GREEDY))
    pair.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, **placement).generate(**asked, verify_draft=False)
    assert torch.equal(again.sequences, expected.sequences)
