"""The shapes against the published checkpoints, the inputs against transformers' own processors, and both at work."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_families import picture
from tiny_processors import PROCESSORS, square
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.random_models import random_inputs, random_model
from benchmarks.shapes import SHAPES
from transformers_sgl import AttentionRecorder, VisualTokenPruner, VisualTokens
from transformers_sgl.custom_generate import generate_with_small_model
from transformers_sgl.evaluation.cost import measure_cost
from transformers_sgl.transformers_interface import cache_of

pytestmark = pytest.mark.mechanics

# The number of parameters in each checkpoint; for the last three, as far as their names and pages on the Hub tell.
PARAMETERS = {
    "internvl-1b": 938_193_024,
    "internvl-2b": 2_205_754_368,
    "internvl-8b": 8_075_365_376,
    "internvl-26b": 25_514_186_112,
    "internvl-38b": 38_388_164_992,
    "internvl-78b": 78_408_318_336,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
}
ROUNDED_PARAMETERS = {"qwen2.5-vl-72b": 73.4e9, "llava-onevision-0.5b": 0.894e9, "llava-onevision-7b": 8.03e9}

FAMILIES = ["internvl-1b", "qwen2.5-vl-3b", "llava-onevision-0.5b"]
# The same processors with the settings that the checkpoints were published with.
PUBLISHED: dict[str, Any] = {
    "internvl": {"size": square(448), "max_patches": 12},
    "qwen2_5_vl": {"patch_size": 14, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
    "llava_onevision": {
        "size": square(384),
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
    },
}
TOKENS_PER_TILE = {"internvl": ("image_seq_length", 256), "llava_onevision": ("num_image_tokens", 729)}


def find_visual_tokens(model: Any, inputs: dict[str, torch.Tensor]) -> VisualTokens:
    return VisualTokens.from_input_ids(inputs["input_ids"], model.config.image_token_id, inputs["attention_mask"])


class TestShapes:
    def test_every_shape_is_compared_with_its_checkpoint(self) -> None:
        assert SHAPES.keys() == {*PARAMETERS, *ROUNDED_PARAMETERS}

    @pytest.mark.parametrize("name", SHAPES)
    def test_parameters_are_those_of_the_checkpoint(self, name: str) -> None:
        found = random_model(name, device="meta", dtype=torch.bfloat16).num_parameters()
        if name in PARAMETERS:
            assert found == PARAMETERS[name]
        else:
            assert found == pytest.approx(ROUNDED_PARAMETERS[name], rel=1e-3)

    @pytest.mark.parametrize("shrink", [1, 2, 3, 8, 64, 1000])
    def test_shrinking_leaves_depth_and_the_width_of_heads(self, shrink: int) -> None:
        for shape in SHAPES.values():
            small = shape.shrunk(shrink)
            assert small.family == shape.family
            for part in ("text", "vision"):
                before, after = getattr(shape, part), getattr(small, part)
                assert after.num_layers == before.num_layers
                assert after.hidden_size / after.num_heads == before.hidden_size / before.num_heads
                assert after.num_heads == max(1, round(before.num_heads / shrink))
                assert after.intermediate_size == max(1, round(before.intermediate_size / shrink))
            assert small.text.num_heads % small.text.num_key_value_heads == 0
            assert small.text.num_key_value_heads <= max(1, round(shape.text.num_key_value_heads / shrink))
        assert SHAPES["internvl-26b"].shrunk(1) == SHAPES["internvl-26b"]

    def test_fewer_layers_leave_everything_else(self) -> None:
        shape = SHAPES["internvl-26b"]
        shallow = shape.shallower(4)
        assert (shallow.vision.num_layers, shallow.text.num_layers) == (11, 12)
        assert replace(shallow.vision, num_layers=45) == shape.vision
        assert replace(shallow.text, num_layers=48) == shape.text
        model = random_model("internvl-26b", device="meta", shrink_depth=100)
        assert len(model.get_decoder().layers) == 1

    def test_key_value_heads_divide_the_heads_as_evenly_as_they_can(self) -> None:
        decoder = SHAPES["internvl-26b"].shrunk(3).text
        assert (decoder.num_heads, decoder.num_key_value_heads) == (
            16,
            2,
        )  # 8 / 3 is nearest to 3, which does not divide

    def test_proportions_stay(self) -> None:
        def ratio(shrink: int) -> tuple[float, float]:
            """How many times the operations of the decoder, and the parameters of the whole, are those of the 2B."""
            operations, parameters = [], []
            for name in ("internvl-26b", "internvl-2b"):
                model = random_model(name, shrink, "meta")
                parameters.append(model.num_parameters())
                decoder, prompt = model.get_decoder(), torch.zeros(1, 1800, dtype=torch.long, device="meta")
                decoder.layers, num_layers = decoder.layers[:1], len(decoder.layers)  # all layers are alike
                with torch.no_grad():
                    operations.append(num_layers * measure_cost(partial(decoder, prompt)).flops)
            return operations[0] / operations[1], parameters[0] / parameters[1]

        (operations, parameters), (shrunk_operations, shrunk_parameters) = ratio(1), ratio(8)
        assert shrunk_operations == pytest.approx(operations, rel=0.25)
        assert shrunk_parameters == pytest.approx(parameters, rel=0.05)
        assert (round(operations, 1), round(shrunk_operations, 1)) == (11.7, 9.3)  # as the documentation says

    def test_what_is_not_to_be_had(self) -> None:
        with pytest.raises(
            ValueError, match=r"no shape called 'internvl-3b'; there are internvl-1b, internvl-2b, .*-7b\."
        ):
            random_model("internvl-3b")
        for shrink in (0, 0.5):
            with pytest.raises(ValueError, match="a whole number from 1 on, not 0"):
                random_model("internvl-1b", shrink)  # type: ignore[arg-type]


class TestModels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_it_writes_words_as_long_as_it_is_asked_to(self, name: str, dtype: torch.dtype) -> None:
        model = random_model(name, 64, dtype=dtype)
        assert not model.training
        assert model.config._attn_implementation == "sdpa"
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        inputs = random_inputs(model, (200, 200), num_prompt_tokens=5)
        output = model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        assert answers.shape == (1, 6)
        assert all(logits.isfinite().all() and logits.std() > 0.01 for logits in output.logits)
        special = model.generation_config.suppress_tokens
        assert {model.config.image_token_id, model.generation_config.pad_token_id} <= set(special)
        assert not torch.isin(answers, torch.tensor(special)).any()

    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_seed_makes_every_weight(self, name: str) -> None:
        first, again, other = (random_model(name, 64, seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not any(torch.equal(first[key], other[key]) for key in first if first[key].ndim > 1)
        assert all(value.float().std() == pytest.approx(0.02, rel=0.2) for value in first.values() if value.ndim > 1)
        assert all(
            (value == (0 if key.endswith("bias") else 1)).all() for key, value in first.items() if value.ndim == 1
        )

    def test_an_embedding_is_shared_where_the_checkpoint_shares_it(self) -> None:
        for name, tied in {"qwen2.5-vl-3b": True, "llava-onevision-0.5b": True, "internvl-1b": False}.items():
            model = random_model(name, 64)
            assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied

    def test_transformers_initialises_again_afterwards(self) -> None:
        random_model("internvl-1b", 64)
        sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=8, vocab_size=2000))
        assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)

    @pytest.mark.gpu
    def test_weights_are_made_on_the_device(self) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = random_model("internvl-2b", device="cuda", dtype=torch.bfloat16)
        assert torch.cuda.max_memory_allocated() - before < 1.05 * 2 * model.num_parameters()
        inputs = random_inputs(model, (896, 1344))
        assert model(**inputs, logits_to_keep=1).logits.isfinite().all()


class TestInputs:
    @pytest.mark.parametrize("size", [(896, 1344), (1500, 420), (40, 30)])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_they_are_what_the_processor_makes(self, name: str, size: tuple[int, int]) -> None:
        model = random_model(name, 64)
        family = model.config.model_type
        processor = PROCESSORS[family](**PUBLISHED[family])
        if family in TOKENS_PER_TILE:
            setattr(processor, *TOKENS_PER_TILE[family])
        made = processor(images=picture(*size), text=processor.image_token, return_tensors="pt")
        inputs = random_inputs(model, size)
        assert inputs.keys() == made.keys() - {"token_type_ids"}  # which the tokenizer of these tests adds
        placeholders = made["input_ids"] == processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        visual_tokens = find_visual_tokens(model, inputs)
        assert visual_tokens.counts.tolist() == [placeholders.sum()]
        assert visual_tokens.positions[0].tolist() == list(range(4, 4 + placeholders.sum()))
        assert inputs["input_ids"].shape == (1, 4 + placeholders.sum() + 32)
        for key in inputs.keys() - {"input_ids", "attention_mask", "mm_token_type_ids"}:
            assert inputs[key].shape == made[key].shape
            assert inputs[key].dtype == made[key].dtype
            assert inputs[key].is_floating_point() or torch.equal(inputs[key], made[key])
        if "mm_token_type_ids" in inputs:
            assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == model.config.image_token_id)

    @pytest.mark.parametrize(("size", "num_tiles"), [((448, 448), 1), ((896, 1344), 7), ((3136, 4032), 64)])
    def test_internvl_reads_as_many_tiles_as_fit(self, size: tuple[int, int], num_tiles: int) -> None:
        model = random_model("internvl-2b", 64)
        inputs = random_inputs(model, size, num_prompt_tokens=3)
        assert inputs["pixel_values"].shape == (num_tiles, 3, 448, 448)
        assert find_visual_tokens(model, inputs).counts.tolist() == [256 * num_tiles]

    def test_samples_differ_and_the_seed_makes_them(self) -> None:
        model = random_model("internvl-1b", 64, dtype=torch.bfloat16)
        first, again, other = (random_inputs(model, (448, 448), 9, batch_size=2, seed=seed) for seed in (3, 3, 4))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["input_ids"], other["input_ids"])
        assert not torch.equal(first["pixel_values"], other["pixel_values"])
        assert first["pixel_values"].dtype == torch.bfloat16
        assert not torch.equal(*first["pixel_values"])
        assert not torch.equal(*first["input_ids"])
        assert first["attention_mask"].all()

    def test_models_of_different_vocabularies_read_the_same_prompt(self) -> None:
        small, large = random_model("internvl-1b", 64), random_model("internvl-2b", 32)
        assert small.config.text_config.vocab_size != large.config.text_config.vocab_size
        inputs = random_inputs(large, (448, 448))
        assert torch.equal(inputs["input_ids"], random_inputs(small, (448, 448))["input_ids"])

    def test_what_is_not_to_be_had(self) -> None:
        model = random_model("internvl-1b", 64)
        for arguments, sentence in {
            ((0, 448), 1, 1): "`image_size` has to be positive and in whole numbers, but is 0 x 448",
            ((448, 4.5), 1, 1): "`image_size` has to be positive and in whole numbers, but is 448 x 4.5",
            ((448, 448), 0, 1): "`num_prompt_tokens` has to be positive and in whole numbers, but is 0",
            ((448, 448), 1, 0): "`batch_size` has to be positive and in whole numbers, but is 0",
        }.items():
            with pytest.raises(ValueError, match=sentence):
                random_inputs(model, *arguments)  # type: ignore[arg-type]
        text = Qwen2ForCausalLM(Qwen2Config(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9))
        with pytest.raises(ValueError, match="types internvl, qwen2_5_vl, llava_onevision, and this one is a 'qwen2'"):
            random_inputs(text, (448, 448))


PAIRS = [
    ("internvl-8b", "internvl-2b"),
    ("qwen2.5-vl-7b", "qwen2.5-vl-3b"),
    ("llava-onevision-7b", "llava-onevision-0.5b"),
]


@pytest.mark.parametrize(("large", "small"), PAIRS)
def test_a_small_one_guides_a_large_one(large: str, small: str) -> None:
    guided, guide = random_model(large, 64), random_model(small, 64, seed=1)
    inputs = random_inputs(guided, (200, 200), num_prompt_tokens=6)
    visual_tokens = find_visual_tokens(guided, inputs)
    output = generate_with_small_model(
        guided,
        guide,
        **inputs,
        retention_ratio=0.2,
        prune_layer=2,
        selection="top_k",
        max_new_tokens=2,
        return_dict_in_generate=True,
    )
    assert output.importance.shape == visual_tokens.positions.shape
    assert (output.importance > 0).all()
    # Each of the prompt's last six tokens and of the two that were written gives at most 1 for a layer's head.
    decoder = SHAPES[small].shrunk(64).text
    assert output.importance.sum() < (6 + 2) * decoder.num_layers * decoder.num_heads
    keep = output.keep_mask[0]
    assert keep.sum() == math.floor(0.2 * len(keep))
    assert output.importance[0, keep].min() >= output.importance[0, ~keep].max()
    assert output.sequences.shape == (1, inputs["input_ids"].shape[1] + 2)


def test_the_parts_alone() -> None:
    model = random_model("internvl-2b", 64)
    inputs = random_inputs(model, (448, 448), num_prompt_tokens=6)
    visual_tokens = find_visual_tokens(model, inputs)
    with AttentionRecorder(model, visual_tokens) as recorder:
        model.generate(**inputs, max_new_tokens=2)
    assert recorder.importance.shape == (1, 256)
    assert (recorder.importance > 0).all()
    keep = visual_tokens.prompt_keep_mask(recorder.importance > recorder.importance.median())
    with VisualTokenPruner(model, keep, prune_layer=2), torch.no_grad():
        cache = cache_of(model(**inputs))
    assert [layer.get_seq_length() for layer in cache.layers] == 2 * [4 + 256 + 6] + 22 * [keep.sum()]


def test_a_draft_is_verified_where_vocabularies_are_equal() -> None:
    guided, guide = random_model("internvl-8b", 64), random_model("internvl-2b", 64)
    inputs = random_inputs(guided, (448, 448), num_prompt_tokens=6, batch_size=2)
    output = generate_with_small_model(
        guided,
        guide,
        **inputs,
        retention_ratio=1.0,
        verify_draft=True,
        max_new_tokens=4,
        return_dict_in_generate=True,
    )
    assert output.num_draft_tokens_accepted is not None
    assert torch.equal(output.sequences, guided.generate(**inputs, max_new_tokens=4))
