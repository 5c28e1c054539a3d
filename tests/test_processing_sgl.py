"""One call prepares both models' inputs: nothing is doubled that is the same, nothing is lost that differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from transformers_sgl import SGLProcessor

QUESTION = "what color is the circle?"
# Other words for the roles, so that the same conversation becomes other token ids of another number.
OTHER_TEMPLATE_START = "here is a conversation \n"


@pytest.fixture(scope="module")
def large(embedded_pair_path) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(embedded_pair_path / "large")


@pytest.fixture
def pair(large) -> SGLProcessor:
    """Two processors that read the same."""
    return SGLProcessor(large, copy.deepcopy(large))


@pytest.fixture(params=["token", "template"])
def other(request, large) -> ProcessorMixin:
    """A processor with the same images but another tokenizer, or another chat template."""
    other = copy.deepcopy(large)
    if request.param == "token":
        other.tokenizer.add_tokens(["circle"])
    else:
        other.chat_template = OTHER_TEMPLATE_START + other.chat_template
    return other


def image(width: int = 96, height: int = 64) -> Image.Image:
    """A picture that is cut into several tiles."""
    picture = Image.new("RGB", (width, height), "white")
    picture.paste((200, 30, 40), (8, 8, 40, 40))
    return picture


def chat(*images: Image.Image, text: str = QUESTION) -> list[dict]:
    content = [{"type": "image", "image": one} for one in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def prepare(processor: ProcessorMixin, conversation: list, **kwargs):
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def assert_same(one, other) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def small_inputs(inputs) -> dict[str, torch.Tensor]:
    """What the small model is given: plain keys, and its own in their place."""
    own = {name.removeprefix("small_"): value for name, value in inputs.items() if name.startswith("small_")}
    return {**{name: value for name, value in inputs.items() if not name.startswith("small_")}, **own}


def large_inputs(inputs) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("small_")}


CONVERSATIONS = {
    "one image": lambda: chat(image()),
    "two images": lambda: chat(image(), image(64, 128)),
    "text only": lambda: chat(),
    "a batch with padding": lambda: [chat(image()), chat(image(64, 64), text="how many?")],
    "a batch with a text beside an image": lambda: [chat(image()), chat(text="hello")],
}


@pytest.fixture(params=CONVERSATIONS, ids=[name.replace(" ", "-") for name in CONVERSATIONS])
def conversation(request) -> list:
    return CONVERSATIONS[request.param]()


# --- both read the same ---


def test_nothing_is_doubled_and_the_large_processor_would_do(pair, large, conversation):
    assert_same(prepare(pair, conversation, padding=True), prepare(large, conversation, padding=True))


def test_a_prompt_in_the_models_own_form_gives_what_the_large_processor_gives(pair, large):
    prompt = large.apply_chat_template(chat(image()), add_generation_prompt=True)

    inputs = pair(images=[image()], text=prompt, return_tensors="pt")

    assert_same(inputs, large(images=[image()], text=prompt, return_tensors="pt"))


def test_model_input_names_are_the_large_models(pair, large):
    assert pair.model_input_names == large.model_input_names


# --- they read differently ---


def test_each_model_gets_what_its_own_processor_gives(large, other, conversation):
    inputs = prepare(SGLProcessor(large, other), conversation, padding=True)

    assert_same(large_inputs(inputs), prepare(large, conversation, padding=True))
    assert_same(small_inputs(inputs), prepare(other, conversation, padding=True))


def test_other_token_ids_stand_beside_and_pixels_are_not_doubled(large, other):
    inputs = prepare(SGLProcessor(large, other), chat(image()))

    assert "small_input_ids" in inputs
    assert "pixel_values" in inputs
    assert "small_pixel_values" not in inputs
    assert inputs["small_input_ids"].shape != inputs["input_ids"].shape


def test_other_pixels_stand_beside_and_token_ids_are_not_doubled(large):
    other = copy.deepcopy(large)
    other.image_processor.image_mean = [0.1, 0.2, 0.3]

    inputs = prepare(SGLProcessor(large, other), chat(image()))

    assert "small_pixel_values" in inputs
    assert "small_input_ids" not in inputs
    assert_same(small_inputs(inputs), prepare(other, chat(image())))


def test_prompts_with_another_tokenizer_are_prepared_for_both(large):
    other = copy.deepcopy(large)
    other.tokenizer.add_tokens(["circle"])
    prompt = large.apply_chat_template(chat(image()), add_generation_prompt=True)

    inputs = SGLProcessor(large, other)(images=[image()], text=[prompt], return_tensors="pt")

    assert_same(small_inputs(inputs), other(images=[image()], text=[prompt], return_tensors="pt"))


@pytest.mark.parametrize("as_list", [True, False])
def test_the_small_models_own_image_token_takes_the_place_of_the_large_models(large, as_list):
    other, prompt = with_image_token(large, "<picture>"), f"{large.image_token} what shape?"

    inputs = SGLProcessor(large, other)(images=[image()], text=[prompt] if as_list else prompt, return_tensors="pt")

    visual = inputs["input_ids"] == large.image_token_id
    own_visual = inputs["small_input_ids"] == other.image_token_id
    assert other.image_token_id != large.image_token_id
    assert own_visual.sum() == visual.sum() > 0


def with_image_token(processor: ProcessorMixin, token: str) -> ProcessorMixin:
    """A copy whose visual tokens have another name."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.add_tokens([token], special_tokens=True)
    tokenizer.context_image_token = token
    tokenizer.context_image_token_id = tokenizer.convert_tokens_to_ids(token)
    template = processor.chat_template.replace(processor.image_token, token)
    return type(processor)(
        processor.image_processor,
        tokenizer,
        processor.video_processor,
        image_seq_length=processor.image_seq_length,
        chat_template=template,
    )


def test_model_input_names_name_the_small_models_too(large, other):
    names = SGLProcessor(large, other).model_input_names

    assert names == [*large.model_input_names, *(f"small_{name}" for name in other.model_input_names)]


@pytest.mark.parametrize("return_tensors", [None, "np"])
def test_lists_and_arrays_are_prepared_like_tensors(large, other, return_tensors):
    text = large.apply_chat_template(chat(image()), add_generation_prompt=True)
    tensors = SGLProcessor(large, other)(images=[image()], text=[text], return_tensors="pt")

    inputs = SGLProcessor(large, other)(images=[image()], text=[text], return_tensors=return_tensors)

    assert set(inputs) == set(tensors)
    assert torch.as_tensor(inputs["input_ids"]).equal(tensors["input_ids"])


def test_a_prompt_that_is_not_tokenized_is_the_large_models(large, other):
    prompt = SGLProcessor(large, other).apply_chat_template(chat(image()), add_generation_prompt=True)

    assert prompt == large.apply_chat_template(chat(image()), add_generation_prompt=True)


# --- saving ---


def test_save_and_load(large, other, tmp_path):
    SGLProcessor(large, other).save_pretrained(tmp_path)

    loaded = AutoProcessor.from_pretrained(tmp_path)

    assert type(loaded) is SGLProcessor
    assert_same(prepare(loaded, chat(image())), prepare(SGLProcessor(large, other), chat(image())))
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "SGLProcessor"


def test_the_saved_parts_are_ordinary_processors(pair, large, tmp_path):
    pair.save_pretrained(tmp_path)

    for part in ("large", "small"):
        assert_same(
            prepare(AutoProcessor.from_pretrained(tmp_path / part), chat(image())), prepare(large, chat(image()))
        )


def test_a_pair_that_reads_the_same_still_does_after_loading(pair, tmp_path):
    pair.save_pretrained(tmp_path)

    assert not [name for name in prepare(SGLProcessor.from_pretrained(tmp_path), chat(image())) if "small" in name]


def test_a_pair_is_made_of_two_folders(large, other, tmp_path):
    large.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "two")

    made = SGLProcessor.from_large_small_pretrained(tmp_path / "one", tmp_path / "two")

    assert_same(prepare(made, chat(image())), prepare(SGLProcessor(large, other), chat(image())))


def test_the_pair_may_lie_in_a_subfolder(pair, tmp_path):
    pair.save_pretrained(tmp_path / "deep" / "pair")

    loaded = SGLProcessor.from_pretrained(tmp_path, subfolder="deep/pair")

    assert_same(prepare(loaded, chat(image())), prepare(pair, chat(image())))


def test_half_a_bundle_is_refused(large, tmp_path):
    large.save_pretrained(tmp_path / "large")

    with pytest.raises(OSError, match="small"):
        SGLProcessor.from_pretrained(tmp_path)


def test_auto_processor_reads_the_embedded_pair(embedded_pair_path: Path):
    assert type(AutoProcessor.from_pretrained(embedded_pair_path)) is SGLProcessor


# --- everything else is the large model's ---


@pytest.fixture
def different(large) -> SGLProcessor:
    """A pair whose small half would decode differently."""
    other = copy.deepcopy(large)
    other.tokenizer.add_tokens(["circle"])
    return SGLProcessor(large, other)


def test_decoding_is_the_large_models(different, large):
    ids = large.tokenizer("the circle is red")["input_ids"]

    assert different.decode(ids) == large.decode(ids) == "the circle is red"
    assert different.batch_decode([ids, ids]) == ["the circle is red"] * 2
    assert different.post_process_image_text_to_text([ids]) == ["the circle is red"]


def test_parts_and_attributes_are_the_large_models(different, large):
    assert different.tokenizer is large.tokenizer
    assert different.image_processor is large.image_processor
    assert different.image_token_id == large.image_token_id


def test_a_missing_attribute_is_missing(pair):
    with pytest.raises(AttributeError, match="no_such_thing"):
        pair.no_such_thing  # noqa: B018


def test_a_copy_is_a_pair_of_its_own(pair):
    twin = copy.deepcopy(pair)

    assert twin.tokenizer is not pair.tokenizer
    assert_same(prepare(twin, chat(image())), prepare(pair, chat(image())))


def test_repr_names_both_parts(pair):
    assert repr(pair).startswith("SGLProcessor(large_processor=")
    assert "small_processor=" in repr(pair)


# --- two families ---


@pytest.mark.parametrize("as_tensor", [False, True], ids=["numpy", "torch"])
@pytest.mark.parametrize("shape", [(64, 96), (64, 96, 1), (64, 96, 3), (64, 96, 4), (1, 64, 96), (4, 64, 96)], ids=str)
@pytest.mark.parametrize("is_batch", [False, True], ids=["one", "batch"])
def test_an_array_is_read_as_the_stock_processors_read_it(
    regridded_pair_path: Path, shape: tuple[int, ...], as_tensor: bool, is_batch: bool
):
    pair = AutoProcessor.from_pretrained(regridded_pair_path)
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture = torch.from_numpy(array) if as_tensor else array
    conversation = chat(picture)
    if is_batch:
        conversation = [conversation, chat(image(64, 96))]

    inputs = prepare(pair, conversation, padding=True)

    places = {name: inputs.pop(name) for name in ("visual_token_boxes", "small_visual_token_boxes")}
    assert_same(large_inputs(inputs), prepare(pair.large_processor, conversation, padding=True))
    assert_same(small_inputs(inputs), prepare(pair.small_processor, conversation, padding=True))
    other = [chat(image()), chat(image(64, 96))] if is_batch else chat(image())  # of the same sizes
    for name, boxes in places.items():
        torch.testing.assert_close(boxes, prepare(pair, other, padding=True)[name], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64,), (64, 96, 2), (5, 64, 96)], ids=str)
def test_what_is_no_image_is_refused_as_by_the_stock_processors(regridded_pair_path: Path, shape: tuple[int, ...]):
    pair = AutoProcessor.from_pretrained(regridded_pair_path)
    conversation = chat(np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError) as of_stock:  # noqa: PT011
        prepare(pair.large_processor, conversation)
    with pytest.raises(ValueError) as of_pair:  # noqa: PT011
        prepare(pair, conversation)
    assert str(of_pair.value) == str(of_stock.value)
