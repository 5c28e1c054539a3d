"""What a pair does with everything that transformers offers of a model: by the large one, by both, or not at all."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import prompts, state, tiny_internvl
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from transformers_sgl import SGLConfig, SGLForConditionalGeneration

pytestmark = pytest.mark.mechanics


def words(text: str) -> list[str]:
    return text.split()


# Every public name of the classes that a pair inherits from transformers. A new version's new name has to be entered.
OF_LARGE = words("""
    active_adapters add_adapter base_model can_record_outputs delete_adapter disable_adapters enable_adapters
    enable_peft_hotswap get_adapter_state_dict get_decoder get_encoder get_input_embeddings get_output_embeddings
    get_position_embeddings load_adapter loss_function prepare_inputs_for_generation resize_position_embeddings
    resize_token_embeddings set_adapter set_decoder set_encoder set_input_embeddings set_output_embeddings
    warn_if_padding_and_no_attention_mask
""")
# The pair's own: they call what they stand for on both models, or are the pair's.
OWN = words("""
    base_model_prefix config_class cuda dequantize device float from_pretrained generate generation_config_class
    half init_weights input_modalities main_input_name register_for_auto_class save_pretrained set_attn_implementation
    supports_gradient_checkpointing to
""")
# As inherited: they walk over all parameters and modules, and so concern both models.
BOTH = words("""
    activation_checkpointing_disable activation_checkpointing_enable disable_input_require_grads
    enable_input_require_grads eval get_expanded_tied_weights_keys get_memory_footprint get_parameter_or_buffer
    gradient_checkpointing_disable gradient_checkpointing_enable initialize_weights is_activation_checkpointing
    is_gradient_checkpointing named_non_persistent_buffers num_parameters retrieve_modules_from_names
    set_experts_implementation set_use_kernels tie_weights train use_kernels
""")
# As inherited: about the pair as a whole, or about its first parameters, which are the large model's.
WHOLE = words("""
    add_model_tags can_generate compute_transition_scores dtype dummy_inputs get_compiled_call
    get_experts_implementation heal_tokens is_backend_compatible is_custom_code is_remote_code load_custom_generate
    model_tags output_modalities post_init push_to_hub supports_context_parallel supports_pp_plan supports_tp_plan
""")
# As inherited: steps of transformers' own `from_pretrained` and `save_pretrained`, which run for each model alone.
STEPS = words("""
    adjust_generation_fn barrier_after_gathered_checkpoint_save ep_plan fsdp_plan fsdp_size
    gather_sharded_state_dict_for_save get_correct_attn_implementation get_correct_experts_implementation
    get_init_context init_parallel_plans is_distributed_loading_by_transformers mark_tied_weights_as_initialized
    maybe_distribute_model pp_plan prepare_distribute_model save_distributed_checkpoint should_save_on_this_rank
    tp_plan tp_size
""")
REFUSED = words("""
    continuous_batching_context_manager destroy_cached_continuous_batching_manager generate_batch
    init_continuous_batching
""")
DECIDED = [*OF_LARGE, *OWN, *BOTH, *WHOLE, *STEPS, *REFUSED]


@pytest.fixture
def pair() -> SGLForConditionalGeneration:
    return SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16)).eval()


def test_every_public_name_is_decided_upon() -> None:
    inherited = [each for each in SGLForConditionalGeneration.__mro__ if each.__module__.startswith("transformers.")]
    names = {name for each in inherited for name in vars(each) if not name.startswith("_")}
    assert len(DECIDED) == len(set(DECIDED))
    assert sorted(names - set(DECIDED)) == []  # say above who does it, and let the class do so
    own = {
        name
        for each in SGLForConditionalGeneration.__mro__
        if each.__module__.startswith("transformers_sgl.")
        for name in vars(each)
    }
    assert {*OF_LARGE, *OWN, *REFUSED} <= own
    assert not own & {*BOTH, *WHOLE, *STEPS}


def test_the_large_models_parts_are_the_pairs(pair: SGLForConditionalGeneration) -> None:
    large = pair.large
    for name in OF_LARGE:
        found, expected = getattr(pair, name), getattr(large, name)
        assert getattr(found, "__self__", large) is getattr(expected, "__self__", large), name
        assert found == expected, name
    assert pair.get_encoder(modality="image") is large.model.vision_tower
    assert pair.config.text_config is large.config.text_config
    assert pair.config.vision_config is large.config.vision_config
    pixels = prompts([[1]], [3])["pixel_values"]
    assert torch.equal(pair.get_image_features(pixels).pooler_output, large.get_image_features(pixels).pooler_output)
    embeddings = nn.Embedding(64, 32)
    pair.set_input_embeddings(embeddings)
    assert large.get_input_embeddings() is embeddings
    pair.loss_function = max
    assert large.loss_function is max


def test_what_there_is_not_is_missing_in_the_usual_way(pair: SGLForConditionalGeneration) -> None:
    assert not hasattr(pair, "get_video_features")
    assert not hasattr(SGLConfig(), "text_config")
    with pytest.raises(AttributeError, match="no attribute 'vocab_size'"):
        _ = pair.vocab_size


@pytest.mark.parametrize("name", REFUSED)
def test_continuous_batching_is_refused(name: str, pair: SGLForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="cannot run with continuous batching.*: call `generate` with a batch"):
        getattr(pair, name)()


def test_the_attention_of_parts_can_be_changed(pair: SGLForConditionalGeneration) -> None:
    def names() -> list[str]:
        configs = [model.config for model in (pair.large, pair.small)]
        return [part._attn_implementation for config in configs for part in (config.text_config, config.vision_config)]

    pair.set_attn_implementation({"text_config": "eager"})
    assert names() == ["eager", "sdpa", "eager", "sdpa"]
    pair.set_attn_implementation({"small_config": "sdpa", "large_config": {"vision_config": "eager"}})
    assert names() == ["eager", "eager", "sdpa", "sdpa"]
    pair.set_attn_implementation("eager")
    assert names() == ["eager"] * 4


def test_gradient_checkpointing_is_of_both_models(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts([[1]], [3])
    pair.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    expected = {name: parameter.grad for name, parameter in pair.large.named_parameters()}
    pair.zero_grad()
    pair.gradient_checkpointing_enable()
    assert all(model.is_gradient_checkpointing for model in (pair, pair.large, pair.small))
    pair(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in pair.large.named_parameters())
    pair.gradient_checkpointing_disable()
    assert not any(model.is_gradient_checkpointing for model in (pair, pair.large, pair.small))


def test_what_is_not_quantized_is_not_dequantized(pair: SGLForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="Neither model of the pair is quantized"):
        pair.dequantize()


# --- forward ---


def test_forward_has_the_large_models_signature(pair: SGLForConditionalGeneration) -> None:
    assert inspect.signature(pair.forward) == inspect.signature(pair.large.forward)
    inputs = prompts()
    expected = pair.large(**inputs).logits
    by_position = pair(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    assert torch.equal(by_position.logits, expected)
    with pytest.raises(TypeError, match="multiple values|twice"):
        pair(inputs["input_ids"], **inputs)
    with pytest.raises(TypeError, match="too many positional arguments"):
        pair(*range(99))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), lambda pair: torch_loaded(pair)]
)
def test_a_copy_runs_its_own_models(copied: Callable[[Any], Any], pair: SGLForConditionalGeneration) -> None:
    inputs = prompts()
    other = copied(pair)
    assert inspect.signature(other.forward) == inspect.signature(pair.large.forward)
    assert torch.equal(other(**inputs).logits, pair(**inputs).logits)
    with torch.no_grad():
        other.large.get_input_embeddings().weight += 1
    assert not torch.equal(other(**inputs).logits, pair(**inputs).logits)


def torch_loaded(pair: SGLForConditionalGeneration) -> SGLForConditionalGeneration:
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class Questions(Dataset):
    """Eight prompts with an image, whose answer is the prompt, and a column that no model knows."""

    column_names = ("input_ids", "attention_mask", "pixel_values", "labels", "number")

    def __init__(self) -> None:
        rows = [{name: value[0] for name, value in prompts([[1]], [5], seed=seed).items()} for seed in range(8)]
        self.rows = [{**row, "labels": row["input_ids"].clone()} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trainer(model: Any, folder: Path, dataset: Any) -> Trainer:
    arguments = TrainingArguments(folder, num_train_epochs=3, logging_steps=1, report_to=[], use_cpu=True, seed=0)
    arguments.learning_rate = 1e-2
    return Trainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=dataset)


def test_trainer_trains_the_large_model_as_it_would_alone(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{name: value.tolist() for name, value in row.items()} for row in Questions().rows]
    dataset = datasets.Dataset.from_list([{**row, "number": index} for index, row in enumerate(rows)])
    alone, small = copy.deepcopy(pair.large), copy.deepcopy(pair.small.state_dict())
    found = trainer(pair, tmp_path / "pair", dataset.with_format("torch"))
    expected = trainer(alone, tmp_path / "alone", dataset.with_format("torch"))
    for each in (found, expected):
        each.train()
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (found, expected)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(value, pair.large.state_dict()[name]) for name, value in alone.state_dict().items())
    assert all(torch.equal(value, pair.small.state_dict()[name]) for name, value in small.items())
    (checkpoint,) = (tmp_path / "pair").glob("checkpoint-*")
    saved = SGLForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in pair.state_dict().items())


def test_trainer_predicts_with_defaults(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    dataset = Questions()
    predicting = trainer(pair, tmp_path, dataset)
    assert predicting.label_names == ["labels"]
    predicted = predicting.predict(dataset)
    inputs = {name: torch.stack([row[name] for row in dataset.rows]) for name in dataset.rows[0]}
    assert torch.allclose(torch.tensor(predicted.predictions), pair.large(**inputs).logits, atol=1e-5)
    assert predicted.label_ids.shape == (8, inputs["labels"].shape[1])
    assert predicted.metrics["test_loss"] == pytest.approx(pair.large(**inputs).loss.item(), abs=1e-5)


# --- tokens that are added later ---


def test_added_tokens_are_the_large_models_and_the_small_one_reads_them_as_text(embedded_pair_path: Path) -> None:
    pair = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    processor = AutoProcessor.from_pretrained(embedded_pair_path)
    settings = {"max_new_tokens": 16, "retention_ratio": 0.3, "do_sample": False, "return_dict_in_generate": True}

    def inputs(reader: Any, question: str = "describe the <sparkle> red triangle.") -> dict[str, Any]:
        image = {"type": "image", "path": str(embedded_pair_path / "example.png")}
        chat = [{"role": "user", "content": [image, {"type": "text", "text": question}]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return reader.apply_chat_template(chat, **options)

    plain = inputs(processor, "describe the red triangle.")
    before = pair.generate(**plain, **settings)
    assert processor.reads_the_same
    processor.tokenizer.add_tokens(["<sparkle>"])
    pair.resize_token_embeddings(len(processor.tokenizer))
    assert not processor.reads_the_same
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (pair, pair.large, pair.small)]
    assert sizes == [len(processor.tokenizer), len(processor.tokenizer), len(processor.tokenizer) - 1]
    after = pair.generate(**plain, **settings)  # drafts are still taken token by token
    assert torch.equal(before.sequences, after.sequences)
    assert torch.equal(before.num_draft_tokens_accepted, after.num_draft_tokens_accepted)

    mixed = inputs(processor)
    assert mixed["small_input_ids"].shape[1] > mixed["input_ids"].shape[1]
    output = pair.generate(**mixed, **settings)
    answer = processor.decode(output.sequences[0, mixed["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "a red triangle labelled B in the bottom left"
    before = state(pair)
    with pytest.raises(ValueError, match=r"the token 461, but it knows 461: .* the pair's own `SGLProcessor`, or add"):
        pair.generate(**inputs(processor.large_processor), **settings)
    assert state(pair) == before

    processor.small_processor.tokenizer.add_tokens(["<sparkle>"])
    pair.small.resize_token_embeddings(len(processor.tokenizer))
    assert processor.reads_the_same
    both = inputs(processor)
    assert "small_input_ids" not in both
    assert pair.generate(**both, **settings).sequences.shape[1] > both["input_ids"].shape[1]


def test_resized_embeddings_are_noticed_after_a_call(pair: SGLForConditionalGeneration) -> None:
    inputs, settings = prompts(), {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    assert pair.generate(**inputs, **settings, verify_draft=True).num_draft_tokens_accepted is not None
    pair.resize_token_embeddings(70)
    # Without tokenizers, models of different sizes may not mean the same by a token.
    assert pair.generate(**inputs, **settings).num_draft_tokens_accepted is None
