"""What is counted, against sums that are worked out without PyTorch's counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl.evaluation import Scenes
from transformers_sgl.evaluation import cost as cost_module
from transformers_sgl.evaluation.cost import Cost, flop_counter, measure_cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import METHODS, SGL, SGP, Batch, Large, Pair, Setting
from transformers_sgl.evaluation.run import measure_costs, plan

THIRD = Setting(0.35, 2, 10)


@pytest.fixture(scope="module")
def pair(embedded_pair_path: Path) -> Pair:
    model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    return Pair(model, AutoProcessor.from_pretrained(embedded_pair_path), max_new_tokens=4)


def scenes(number: int, size: int = 128) -> list[Sample]:
    found = [Scenes("test", seed=5, size=size)[index] for index in range(number)]
    return [Sample(each.image, each.questions[0].question, (each.questions[0].answer,)) for each in found]


def as_batch(samples: list[Sample]) -> Batch:
    return Batch(samples, range(len(samples)), [sample.open_image() for sample in samples])


def flops(pair: Pair, name: str, batch: Batch) -> int:
    method = SGL(thresholds={0.35: 0.0}) if name == "sgl" else METHODS[name]
    return measure_cost(lambda: method.answer(pair, batch, THIRD)).flops


def matrices(module: Any) -> int:
    """The parameters of a module's matrices."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


@pytest.mark.parametrize("num_tiles", [1, 5])
def test_a_prefill_by_hand(pair: Pair, num_tiles: int) -> None:
    large = pair.model.large
    batch = as_batch(scenes(1, size=64 if num_tiles == 1 else 128))
    inputs = pair.inputs(pair.processor.large_processor, batch.samples, batch.images)
    assert len(inputs["pixel_values"]) == num_tiles
    with torch.no_grad():
        found = measure_cost(lambda: large(**inputs, logits_to_keep=1)).flops

    # Vision: in each tile 8 x 8 patches of 8 x 8 pixels in three colours become 96 numbers; with the class token they
    # make 65 tokens, and each looks at all 65 in three layers of width 96. The projector sees 64 tokens.
    vision = large.model.vision_tower
    per_tile = 2 * 64 * (8 * 8 * 3) * 96
    per_tile += 2 * 65 * matrices(vision.encoder) + 3 * 2 * 65 * 65 * (96 + 96)
    per_tile += 2 * 64 * matrices(large.model.multi_modal_projector)
    # Decoder: 10 layers of width 128, in four heads of 32; the last token alone is turned into one of 461 words.
    length = inputs["input_ids"].shape[1]
    decoder = 2 * length * matrices(large.model.language_model.layers) + 10 * 2 * length * length * (128 + 128)
    # Older versions of transformers multiply each position by 16 frequencies as matrices, newer ones do not.
    assert found - (num_tiles * per_tile + decoder + 2 * 128 * 461) in (0, 2 * 16 * length)


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_attention_of_a_gpu_whose_heads_share_keys(kernel: str) -> None:
    shapes = [(2, 6, 10, 16), (2, 3, 30, 16), (2, 3, 30, 16)]
    more = {"efficient_attention": [None, False], "cudnn_attention": [None, False]}.get(kernel, [])
    tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with flop_counter() as counter:
        getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")(*tensors, *more)
    assert counter.get_total_flops() == 2 * 6 * 2 * 10 * 30 * (16 + 16)


def test_what_is_pruned_is_not_computed(pair: Pair) -> None:
    batch = as_batch(scenes(2))
    found = {name: flops(pair, name, batch) for name in ("large", "random", "divprune", "oracle", "fastv", "small")}
    assert found["random"] < 0.6 * found["large"]
    assert found["large"] < found["oracle"]  # runs it before, unpruned
    assert found["random"] < found["fastv"] < 1.05 * found["random"]  # looks at one layer's attention
    # Of all decoders' work 35 % is left, and all of the vision encoder's.
    vision = measure_cost(lambda: pair.model.large.get_image_features(images(pair, batch))).flops
    assert found["random"] - vision == pytest.approx(0.35 * (found["large"] - vision), rel=0.1)


def images(pair: Pair, batch: Batch) -> Any:
    return pair.inputs(pair.processor.large_processor, batch.samples, batch.images)["pixel_values"]


def test_both_models_count(pair: Pair) -> None:
    batch, parts = as_batch(scenes(2)), {"large": 0, "small": 0}

    def watch(name: str, counter: FlopCounterMode) -> list[Callable[[], None]]:
        """Adds up what is counted while one of a model's parts runs."""

        def begin(*_: Any) -> None:
            parts[name] -= counter.get_total_flops()

        def end(*_: Any) -> None:
            parts[name] += counter.get_total_flops()

        model = getattr(pair.model, name)
        inner = model.model
        modules = (inner.vision_tower, inner.multi_modal_projector, inner.language_model, model.lm_head)
        hooks = [(part.register_forward_pre_hook(begin), part.register_forward_hook(end)) for part in modules]
        return [hook.remove for both in hooks for hook in both]

    with flop_counter() as counter:
        removals = [*watch("large", counter), *watch("small", counter)]
        try:
            SGP().answer(pair, batch, THIRD)
        finally:
            for remove in removals:
                remove()
    total = flops(pair, "sgp", batch)
    assert parts["small"] >= flops(pair, "small", batch)  # and looks at its attention
    assert parts["large"] == pytest.approx(flops(pair, "random", batch), rel=0.1)
    assert sum(parts.values()) == pytest.approx(total, rel=0.01)
    assert sum(parts.values()) <= total


@pytest.mark.parametrize("name", ["large", "small", "sgp", "sgp-vision", "fastv"])
def test_the_large_model_s_parts_are_told_apart(pair: Pair, name: str) -> None:
    batch = as_batch(scenes(2))
    found = measure_cost(lambda: METHODS[name].answer(pair, batch, THIRD), large=pair.model.large)
    assert found.flops == flops(pair, name, batch)
    vision = measure_cost(lambda: pair.model.large.get_image_features(images(pair, batch))).flops
    small = flops(pair, "small", batch)
    assert 0 <= found.vision_flops + found.decoder_flops <= found.flops
    rest = found.flops - found.vision_flops - found.decoder_flops
    if name == "sgp-vision":
        assert 0.3 * vision < found.vision_flops < 0.8 * vision
    else:
        assert found.vision_flops == (0 if name == "small" else vision)
    if name in ("large", "fastv"):
        assert rest == pytest.approx(0, abs=0.01 * found.flops)
    else:
        assert small <= rest < 1.2 * small  # which also looks at its attention
    assert (found.decoder_flops == 0) == (name == "small")
    assert not pair.model.large._forward_hooks
    assert not pair.model.large.model.language_model._forward_hooks


def test_an_early_exit_saves_the_large_model_but_not_its_own_scoring(pair: Pair) -> None:
    batch = as_batch(scenes(2))
    small, exits, pruned = (flops(pair, name, batch) for name in ("small", "sgl", "sgp"))
    assert small < exits < pruned


def test_it_is_counted_again_to_the_last_operation(pair: Pair) -> None:
    batch = as_batch(scenes(2))
    assert flops(pair, "sgp", batch) == flops(pair, "sgp", batch)


class TestMemory:
    def test_weights_are_in_it(self, pair: Pair) -> None:
        found = measure_cost(lambda: SGP().answer(pair, as_batch(scenes(1)), THIRD))
        assert found.peak_memory_bytes is None or found.peak_memory_bytes > sum(
            parameter.numel() * parameter.element_size() for parameter in pair.model.parameters()
        )

    def test_what_is_held_for_a_moment_is_in_it_and_then_forgotten(self) -> None:
        kept, peak = torch.zeros(1), measure_cost(lambda: None).peak_memory_bytes
        if peak is None:
            pytest.skip("this system does not tell")
        more = measure_cost(lambda: torch.ones(2**24) + kept).peak_memory_bytes  # twice 64 MiB
        assert more is not None
        assert more - peak == pytest.approx(2 * 2**26, rel=0.3)
        again = measure_cost(lambda: None).peak_memory_bytes
        assert again is not None
        assert again - peak < 2**25

    def test_a_system_that_does_not_tell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cost_module.sys, "platform", "darwin")
        assert measure_cost(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == Cost(2 * 2 * 3 * 4, None)


def test_costs_of_runs_are_for_a_question_and_counted_once(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = scenes(3)
    runs = plan({name: METHODS[name] for name in ("large", "random")}, [0.35], 10)
    found = measure_costs(pair, samples, runs, tmp_path, batch_size=2)
    assert list(found) == [("large", None), ("random", 0.35)]
    parts = [as_batch(samples[:2]), as_batch(samples[2:])]  # fewer batches than are asked for: each counts once
    assert found["large", None].flops == sum(flops(pair, "large", part) for part in parts) // 3
    assert found["random", 0.35].flops < found["large", None].flops

    file = tmp_path / "costs.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{second[:20]}")  # as if it had been cut off
    monkeypatch.setattr(Large, "answer", None)
    assert measure_costs(pair, samples, runs, tmp_path, batch_size=2).keys() == found.keys()
    assert file.read_text().splitlines()[0] == first
    file.write_text('{"method": "large"}\n')
    with pytest.raises(ValueError, match=r"costs\.jsonl', line 1: this is no record"):
        measure_costs(pair, samples, runs, tmp_path, batch_size=2)


@pytest.mark.gpu
def test_memory_of_a_gpu(embedded_pair_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path, device_map="cuda")
    pair = Pair(model, AutoProcessor.from_pretrained(embedded_pair_path), max_new_tokens=4)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    found = measure_cost(lambda: SGP().answer(pair, as_batch(scenes(1)), THIRD), model.device)
    assert found.peak_memory_bytes is not None
    assert weights < found.peak_memory_bytes < weights + 2**30
