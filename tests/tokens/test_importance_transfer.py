"""A guide from another family: importance passes from one model's visual tokens to another's through the image."""

from __future__ import annotations

import base64
import copy
import functools
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import test_serving
import tiny_processors
import torch
from asgi import InProcess
from PIL import Image
from tiny_families import PROCESSORS, internvl_processor, llava_processor, picture, tiny_family_model, tiny_family_pair
from tiny_pair_data import patch_objects
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import logging as transformers_logging

from transformers_sgl import (
    AttentionRecorder,
    ImportanceProcessor,
    MinimumPerImageProcessor,
    SGLForConditionalGeneration,
    SGLProcessor,
    VisualTokens,
    processing_sgl,
)
from transformers_sgl.architectures import visual_token_ids
from transformers_sgl.custom_generate import generate_with_small_model
from transformers_sgl.evaluation import Scenes
from transformers_sgl.serving import PairApp
from transformers_sgl.tokens import comparison, prompt_images
from transformers_sgl.tokens.boxes import visual_token_boxes
from transformers_sgl.tokens.importance_resampling import resample_features, resample_importance
from transformers_sgl.tokens.layouts import LAYOUTS
from transformers_sgl.tokens.views import placeholder_of

mechanics = pytest.mark.mechanics
FAMILIES = list(itertools.permutations(PROCESSORS, 2))
GREEDY = {"do_sample": False, "max_new_tokens": 6}
PRUNED = {**GREEDY, "retention_ratio": 0.3, "prune_layer": 1}
BOXES = ("visual_token_boxes", "small_visual_token_boxes")
SIZES = [[(40, 24)], [(16, 16), (30, 50)], []]  # of each sample's images: one, two, and none


@pytest.fixture(scope="module", params=FAMILIES, ids=["-".join(pair) for pair in FAMILIES])
def any_pair(request: Any) -> tuple[SGLForConditionalGeneration, SGLProcessor]:
    """Every family guided by every other."""
    return tiny_family_pair(*request.param)


@pytest.fixture(scope="module")
def pair() -> tuple[SGLForConditionalGeneration, SGLProcessor]:
    """Tiles and a thumbnail, guided by a model that sees the square middle."""
    return tiny_family_pair("internvl", "llava")


def pictures(sizes: list[list[tuple[int, int]]] = SIZES) -> list[list[Image.Image]]:
    return [[picture(*size, seed=10 * i + j) for j, size in enumerate(few)] for i, few in enumerate(sizes)]


def chats(images: list[list[Any]]) -> list[list[dict[str, Any]]]:
    questions = itertools.cycle(["what?", "where is it? left or right?", "hello."])
    return [
        [{"role": "user", "content": [*({"type": "image", "image": one} for one in few), {"type": "text", "text": t}]}]
        for few, t in zip(images, questions, strict=False)
    ]


def prepare(processor: Any, conversation: list[Any], **kwargs: Any) -> Any:
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, **kwargs},
    )


def tokenizers(processor: SGLProcessor) -> dict[str, Any]:
    return {"tokenizer": processor.tokenizer, "small_tokenizer": processor.small_processor.tokenizer}


def texts(processor: SGLProcessor, inputs: dict[str, Tensor], sequences: Tensor) -> list[str]:
    return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def large_only(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("small_") and name not in BOXES}


def small_only(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {name: value for name, value in inputs.items() if name.startswith("small_") and name not in BOXES}
    return {name.removeprefix("small_"): value for name, value in own.items()}


def assert_same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


# --- which way importance goes ---------------------------------------------------------------------------------------


@mechanics
@pytest.mark.parametrize(
    ("large", "small", "expected"),
    [
        (internvl_processor(), internvl_processor(), "identity"),
        (internvl_processor(), internvl_processor(image_mean=[0.1, 0.2, 0.3]), "identity"),
        (internvl_processor(), internvl_processor(max_patches=1), "resampling"),
        (internvl_processor(), internvl_processor(min_patches=2), "resampling"),
        (llava_processor(), llava_processor(image_std=[0.1, 0.2, 0.3]), "identity"),
        # As many tokens, but one crops the image, the other stretches it.
        (llava_processor(), llava_processor(size={"height": 20, "width": 20}), "resampling"),
        *((PROCESSORS[large](), PROCESSORS[small](), "resampling") for large, small in FAMILIES),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pair_decides_by_how_its_processors_cut(large: Any, small: Any, expected: str) -> None:
    processor = SGLProcessor(large, small)
    inputs = prepare(processor, chats(pictures()))

    assert processor.importance_transfer == expected
    assert [name for name in BOXES if name in inputs] == ([] if expected == "identity" else list(BOXES))
    assert [name for name in BOXES if name in processor.model_input_names] == [
        name for name in BOXES if name in inputs
    ]


@mechanics
def test_nothing_is_measured_where_both_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("boxes were computed")

    for module in (processing_sgl, comparison):
        monkeypatch.setattr(module, "visual_token_boxes", measure)
    prepare(SGLProcessor(internvl_processor(), internvl_processor()), chats(pictures()))


@mechanics
def test_from_large_small_pretrained_says_which_way(tmp_path: Path) -> None:
    class Lines(logging.Handler):
        """Of its own, because whether records also reach the root logger depends on the environment."""

        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelname, record.getMessage()))

    lines: list[tuple[str, str]] = []
    handler = Lines()
    for family in ("internvl", "llava"):
        tiny_family_model(family).save_pretrained(tmp_path / family)
        PROCESSORS[family]().save_pretrained(tmp_path / family)
    said: dict[tuple[str, str], Any] = {}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    transformers_logging.add_handler(handler)
    try:
        for small in ("llava", "internvl"):
            lines.clear()
            for loader in (SGLForConditionalGeneration, SGLProcessor):
                made = loader.from_large_small_pretrained(tmp_path / "internvl", tmp_path / small)
                said[loader.__name__, small] = made.importance_transfer
            said["log", small] = list(lines)
    finally:
        transformers_logging.remove_handler(handler)
        transformers_logging.set_verbosity(verbosity)

    for small, word, level in (("llava", "resampling", "WARNING"), ("internvl", "identity", "INFO")):
        assert said["SGLForConditionalGeneration", small] == said["SGLProcessor", small] == word
        assert [line[0] for line in said["log", small] if word in line[1]] == [level, level]


# --- inputs ----------------------------------------------------------------------------------------------------------


@mechanics
def test_each_model_gets_what_its_own_processor_makes_of_the_conversation(any_pair: Any) -> None:
    _, processor = any_pair
    conversation = chats(pictures())
    before = copy.deepcopy([[{**message} for message in one] for one in conversation])

    inputs = prepare(processor, conversation)

    assert_same(large_only(inputs), prepare(processor.large_processor, chats(pictures())))
    assert_same(small_only(inputs), prepare(processor.small_processor, chats(pictures())))
    assert [[{**message} for message in one] for one in conversation] == before


@mechanics
def test_boxes_are_those_of_each_samples_own_images(any_pair: Any) -> None:
    model, processor = any_pair
    images = pictures()
    inputs = prepare(processor, chats(images))

    for name, part, each, ids in (
        ("visual_token_boxes", processor.large_processor, model.large, inputs["input_ids"]),
        ("small_visual_token_boxes", processor.small_processor, model.small, inputs["small_input_ids"]),
    ):
        tokens = VisualTokens.from_input_ids(ids, visual_token_ids(each.config))
        boxes = inputs[name]
        assert boxes.shape == (3, tokens.num_visual_tokens, 5)
        assert boxes.dtype == torch.float32
        assert (boxes[..., 0] >= 0).equal(tokens.valid)
        assert (boxes[..., 0][~tokens.valid] == -1).all()
        for sample, few in enumerate(images):
            for number, expected in enumerate(visual_token_boxes(part, few)):
                torch.testing.assert_close(boxes[sample][boxes[sample, :, 0] == number, 1:], expected)


@mechanics
def test_images_may_be_nested_or_flat(pair: Any) -> None:
    _, processor = pair
    images = pictures()
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats(images)]
    options = {"text": prompts, "padding": True, "return_tensors": "pt"}

    nested = processor(images=images, **options)
    flat = processor(images=[one for few in images for one in few], **options)
    [single] = (processor(images=images[0][0], text=prompts[0], return_tensors="pt"),)

    assert_same(nested, flat)
    assert nested["visual_token_boxes"][..., 0].amax(dim=1).tolist() == [0, 1, -1]
    torch.testing.assert_close(single["visual_token_boxes"], nested["visual_token_boxes"][:1, :48])


@mechanics
def test_prompts_in_the_large_models_form_get_the_small_models_image_token(any_pair: Any) -> None:
    model, processor = any_pair
    prompt = processor.apply_chat_template(chats(pictures())[1], add_generation_prompt=True)

    inputs = processor(images=pictures()[1], text=prompt, return_tensors="pt")

    for ids, each, name in (("input_ids", model.large, BOXES[0]), ("small_input_ids", model.small, BOXES[1])):
        tokens = VisualTokens.from_input_ids(inputs[ids], visual_token_ids(each.config))
        assert tokens.counts.tolist() == [inputs[name].shape[1]]
    assert model.generate(**inputs, **PRUNED, **tokenizers(processor)).shape[0] == 1


@mechanics
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("name", tiny_processors.PROCESSORS)
def test_every_known_processor_pairs_with_one_of_another_family(name: str, nested: bool) -> None:
    built = tiny_processors.PROCESSORS[name]()
    other = llava_processor() if name == "internvl" else internvl_processor()
    built.tokenizer.padding_side = "left"
    if name == "ernie4_5_vl_moe":
        built.video_processor.draw_on_frames = False  # for which there is no font here
    images = pictures([[(80, 48)], [(40, 90), (64, 64)]])
    if name in ("got_ocr2", "perception_lm"):  # know one image in a prompt, or images of one shape
        images = pictures([[(80, 48)], [(80, 48)]])
    for large, small in ((built, other), (other, built)):
        processor = SGLProcessor(large, small)
        place = prompt_images.image_placeholder(large)
        texts = [place * len(few) for few in images]

        inputs = processor(
            images=images if nested else [one for few in images for one in few],
            text=texts,
            padding=True,
            return_tensors="pt",
        )

        for part, ids, key in ((large, "input_ids", BOXES[0]), (small, "small_input_ids", BOXES[1])):
            token = placeholder_of(part, LAYOUTS[type(part).__name__])
            number = (inputs[ids] == part.tokenizer.convert_tokens_to_ids(token)).sum(dim=1)
            assert (inputs[key][..., 0] >= 0).sum(dim=1).equal(number)
            assert (inputs[key][..., 0].amax(dim=1) + 1).tolist() == [len(few) for few in images]


@mechanics
@pytest.mark.parametrize("kind", ["url", "path", "base64", "image_url", "array"])
def test_an_image_may_come_from_anywhere_and_is_read_once(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, processor = pair
    [image] = pictures([[(40, 24)]])[0]
    image.save(tmp_path / "image.png")
    encoded = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    part = {
        "url": {"type": "image", "url": str(tmp_path / "image.png")},
        "path": {"type": "image", "path": str(tmp_path / "image.png")},
        "base64": {"type": "image", "base64": encoded},
        "image_url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        "array": {"type": "image", "image": torch.tensor(list(image.tobytes())).reshape(24, 40, 3).byte().numpy()},
    }[kind]
    opened: list[Any] = []
    open_image = Image.open

    def counting(*args: Any, **kwargs: Any) -> Image.Image:
        opened.append(args)
        return open_image(*args, **kwargs)

    monkeypatch.setattr(Image, "open", counting)

    inputs = prepare(processor, [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}])

    assert len(opened) == (0 if kind == "array" else 1)
    assert_same(inputs, prepare(processor, chats([[image]])[0]))


@mechanics
@pytest.mark.parametrize("return_tensors", ["np", None])
def test_boxes_are_tensors_arrays_or_lists_like_the_rest(pair: Any, return_tensors: str | None) -> None:
    _, processor = pair
    prompt = processor.apply_chat_template(chats(pictures())[0])
    options = {"images": pictures()[0], "text": [prompt]}

    inputs = processor(**options, return_tensors=return_tensors)

    expected = processor(**options, return_tensors="pt")
    for name in BOXES:
        assert type(inputs[name]) is type(inputs["input_ids"])
        torch.testing.assert_close(torch.as_tensor(inputs[name]), expected[name])


@mechanics
def test_arguments_for_images_hold_for_boxes_too(pair: Any) -> None:
    _, processor = pair
    inputs = prepare(processor, chats(pictures()), large_images_kwargs={"max_patches": 1})

    assert inputs["visual_token_boxes"].shape == (3, 32, 5)
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [16, 32, 0]


@mechanics
def test_another_template_is_the_large_models_alone(pair: Any) -> None:
    _, processor = pair
    conversation = chats(pictures())[0]
    template = "once upon a time. " + processor.chat_template

    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}

    for inputs in (
        processor.apply_chat_template(conversation, template, **options),
        processor.apply_chat_template(conversation, chat_template=template, **options),
    ):
        starts = [
            part.decode(ids[0]).startswith("once upon a time.")
            for part, ids in ((processor, inputs["input_ids"]), (processor.small_processor, inputs["small_input_ids"]))
        ]
        assert starts == [True, False]


@mechanics
def test_prompts_without_images_have_no_boxes(pair: Any) -> None:
    model, processor = pair
    inputs = prepare(processor, chats([[], []]))

    assert not [name for name in BOXES if name in inputs]
    output = model.generate(**inputs, **PRUNED, return_dict_in_generate=True)
    assert output.importance_transfer is None
    assert torch.equal(output.sequences, model.large.generate(**large_only(inputs), **GREEDY))


@mechanics
def test_prompts_are_rendered_by_the_large_model(pair: Any) -> None:
    _, processor = pair
    conversation = chats(pictures())[0]
    assert processor.apply_chat_template(conversation) == processor.large_processor.apply_chat_template(conversation)


# --- generation ------------------------------------------------------------------------------------------------------


@mechanics
def test_importance_is_the_small_models_on_the_large_models_tokens(any_pair: Any) -> None:
    model, processor = any_pair
    inputs = prepare(processor, chats(pictures()))

    output = model.generate(**inputs, **PRUNED, return_dict_in_generate=True, **tokenizers(processor))

    own = small_only(inputs)
    tokens = VisualTokens.from_input_ids(own["input_ids"], visual_token_ids(model.small.config), own["attention_mask"])
    with AttentionRecorder(model.small, tokens) as recorder:
        model.small.generate(**own, **GREEDY)
    expected = resample_importance(recorder.importance, inputs[BOXES[1]], inputs[BOXES[0]])
    torch.testing.assert_close(output.importance, expected, rtol=1e-4, atol=1e-4)
    assert output.importance.shape == inputs[BOXES[0]].shape[:2]
    assert output.importance_transfer == "resampling"
    kept = (output.num_visual_tokens * 0.3).floor().clamp(min=1) * (output.num_visual_tokens > 0)
    assert output.keep_mask.sum(dim=1).tolist() == kept.tolist()


@mechanics
def test_features_are_carried_over_like_importance(any_pair: Any) -> None:
    model, processor = any_pair
    conversation = chats(pictures())
    inputs = prepare(processor, conversation)
    seen: list[Tensor | None] = []

    class Watch(ImportanceProcessor):
        def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
            seen.append(visual_tokens.features)
            return importance

    options = {**PRUNED, **tokenizers(processor), "return_dict_in_generate": True, "selection": "facility_location"}
    output = model.generate(**inputs, **options, importance_processor=Watch())

    own = small_only(inputs)
    tokens = VisualTokens.from_input_ids(own["input_ids"], visual_token_ids(model.small.config), own["attention_mask"])
    with AttentionRecorder(model.small, tokens, records_features=True) as recorder:
        model.small.generate(**own, **GREEDY)
    assert recorder.features is not None
    expected = resample_features(recorder.features, inputs[BOXES[1]], inputs[BOXES[0]])
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    kept = (output.num_visual_tokens * 0.3).floor().clamp(min=1) * (output.num_visual_tokens > 0)
    assert output.keep_mask.sum(dim=1).tolist() == kept.tolist()
    for row, one in enumerate(conversation):
        alone = model.generate(**prepare(processor, [one]), **options)
        if alone.keep_mask is not None:
            assert output.keep_mask[row, : alone.keep_mask.shape[1]].equal(alone.keep_mask[0])


@mechanics
@pytest.mark.parametrize("decoding", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_with_everything_kept_it_is_the_stock_large_model(any_pair: Any, decoding: dict[str, Any]) -> None:
    model, processor = any_pair
    inputs = prepare(processor, chats(pictures()))
    sequences = []
    for generate, own, settings in (
        (model.large.generate, large_only(inputs), {}),
        (model.generate, inputs, {"retention_ratio": 1.0, "importance_processor": MinimumPerImageProcessor(1)}),
    ):
        torch.manual_seed(0)
        sequences.append(generate(**own, **decoding, **settings, max_new_tokens=6))
    assert torch.equal(*sequences)


@mechanics
@pytest.mark.parametrize("verify_draft", [False, None])
def test_a_batch_gives_what_its_samples_give(any_pair: Any, verify_draft: bool | None) -> None:
    model, processor = any_pair
    conversation = chats(pictures())
    options = {**PRUNED, **tokenizers(processor), "verify_draft": verify_draft, "return_dict_in_generate": True}
    inputs = prepare(processor, conversation)

    together = model.generate(**inputs, **options)

    for row, one in enumerate(conversation):
        alone_inputs = prepare(processor, [one])
        alone = model.generate(**alone_inputs, **options)
        assert texts(processor, alone_inputs, alone.sequences) == [texts(processor, inputs, together.sequences)[row]]
        if alone.importance is not None:
            width = alone.importance.shape[1]
            torch.testing.assert_close(together.importance[row, :width], alone.importance[0], rtol=1e-4, atol=1e-4)
            assert together.keep_mask[row, :width].equal(alone.keep_mask[0])


@mechanics
def test_a_draft_in_another_vocabulary_changes_nothing(any_pair: Any) -> None:
    model, processor = any_pair
    inputs = prepare(processor, chats(pictures()[:2]))
    options = {**PRUNED, **tokenizers(processor), "return_dict_in_generate": True}

    drafted = model.generate(**inputs, **options, verify_draft=True)
    plain = model.generate(**inputs, **options, verify_draft=False)

    assert torch.equal(drafted.sequences, plain.sequences)
    assert drafted.num_draft_tokens_accepted is not None


@mechanics
def test_some_of_a_batch_exit_early(any_pair: Any) -> None:
    model, processor = any_pair
    conversation = chats(pictures([[(40, 24)], [(16, 16), (30, 50)], [(20, 64)], [(33, 33)]]))
    inputs = prepare(processor, conversation)
    options = {**PRUNED, **tokenizers(processor), "return_dict_in_generate": True}
    scores = model.generate(**inputs, **options).decision_score
    threshold = float(scores.sort(descending=True).values[1])

    output = model.generate(**inputs, **options, early_exit_threshold=threshold)

    exited = scores >= threshold
    assert 0 < exited.sum() < len(exited)
    assert output.exited_early.equal(exited)
    assert not output.keep_mask[exited].any()
    answers = texts(processor, inputs, output.sequences)
    for row, one in enumerate(conversation):
        alone_inputs = prepare(processor, [one])
        alone = model.generate(**alone_inputs, **options, early_exit_threshold=0 if exited[row] else None)
        assert texts(processor, alone_inputs, alone.sequences) == [answers[row]]
        if not exited[row]:
            assert output.keep_mask[row, : alone.keep_mask.shape[1]].equal(alone.keep_mask[0])


@mechanics
@pytest.mark.parametrize("num_beams", [1, 2])
def test_custom_generate_takes_boxes_along(any_pair: Any, num_beams: int) -> None:
    model, processor = any_pair
    inputs = prepare(processor, chats(pictures()))
    options = {**PRUNED, "num_beams": num_beams, "return_dict_in_generate": True, "verify_draft": False}

    output = generate_with_small_model(model.large, model.small, **inputs, **options)

    expected = model.generate(**inputs, **options)
    assert torch.equal(output.sequences, expected.sequences)
    assert output.keep_mask.equal(expected.keep_mask)
    assert output.importance_transfer == "resampling"


@mechanics
def test_forward_takes_the_pairs_inputs(pair: Any) -> None:
    model, processor = pair
    inputs = prepare(processor, chats(pictures()))
    torch.testing.assert_close(model(**inputs).logits, model.large(**large_only(inputs)).logits)


@mechanics
def test_within_a_family_importance_passes_token_by_token() -> None:
    large, small = tiny_family_model("internvl", 4), tiny_family_model("internvl", 2, seed=1)
    model = SGLForConditionalGeneration(large=large, small=small)
    processor = SGLProcessor(internvl_processor(), internvl_processor(image_mean=[0.1, 0.2, 0.3]))
    inputs = prepare(processor, chats(pictures()))
    output = model.generate(**inputs, **PRUNED, return_dict_in_generate=True)
    assert (model.importance_transfer, output.importance_transfer) == ("identity", "identity")
    unpruned = model.generate(**inputs, **GREEDY, retention_ratio=1.0, return_dict_in_generate=True)
    assert unpruned.importance_transfer is None


@mechanics
def test_within_a_family_another_grid_is_resampled() -> None:
    large, small = tiny_family_model("internvl", 4), tiny_family_model("internvl", 2, seed=1)
    model = SGLForConditionalGeneration(large=large, small=small)
    processor = SGLProcessor(internvl_processor(), internvl_processor(max_patches=1))
    inputs = prepare(processor, chats(pictures()))
    output = model.generate(**inputs, **PRUNED, return_dict_in_generate=True)
    assert output.importance_transfer == "resampling"
    assert output.importance.shape == (3, 64)
    own = {name: value for name, value in inputs.items() if name not in BOXES}
    with pytest.raises(ValueError, match=r"\[48, 64, 0\].*\[16, 32, 0\].*`SGLProcessor`"):
        model.generate(**own, **PRUNED)


# --- refusals --------------------------------------------------------------------------------------------------------


@mechanics
def test_models_of_different_families_need_boxes_even_for_equal_numbers_of_tokens() -> None:
    model, _ = tiny_family_pair("internvl", "llava")
    inputs = {}
    for prefix, each in (("", model.large), ("small_", model.small)):
        [image] = visual_token_ids(each.config, "image")
        inputs[f"{prefix}input_ids"] = torch.tensor([[20, *[image] * 5, 21, 22]])
        inputs[f"{prefix}attention_mask"] = torch.ones(1, 8, dtype=torch.long)
    with pytest.raises(
        ValueError, match="from a 'llava' model to a 'internvl' model.*prepare them with.*SGLProcessor"
    ):
        model.generate(**inputs, **PRUNED)


@mechanics
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("visual_token_boxes"), "`visual_token_boxes` is missing: pass both"),
        (lambda inputs: inputs.pop("small_visual_token_boxes"), "`small_visual_token_boxes` is missing: pass both"),
        (lambda inputs: inputs.update(visual_token_boxes=inputs["visual_token_boxes"][:, :-1]), r"\[48, 64, 0\]"),
        (lambda inputs: inputs.update(visual_token_boxes=inputs["small_visual_token_boxes"]), "other visual tokens"),
        (lambda inputs: inputs.update(visual_token_boxes=inputs["visual_token_boxes"][..., 1:]), "has the shape"),
        (lambda inputs: inputs.update(visual_token_boxes=inputs["visual_token_boxes"][:2]), "there are 3 prompts"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(pair: Any, change: Any, message: str) -> None:
    model, processor = pair
    inputs = dict(prepare(processor, chats(pictures())))
    change(inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, **PRUNED)


@mechanics
def test_video_is_refused(pair: Any) -> None:
    _, processor = pair
    content = [{"type": "video", "path": "film.mp4"}, {"type": "text", "text": "what happens?"}]
    with pytest.raises(ValueError, match="not videos: leave the video out"):
        prepare(processor, [{"role": "user", "content": content}])
    with pytest.raises(ValueError, match="not videos: leave the video out"):
        processor(text="<video> what happens?", videos=[torch.zeros(2, 3, 16, 16)])


@mechanics
@pytest.mark.parametrize("side", ["large", "small"])
def test_an_unknown_layout_is_refused_when_it_is_paired(side: str) -> None:
    class UnknownProcessor:
        """Cuts images in a way of its own."""

        tokenizer = llava_processor().tokenizer
        chat_template = None

        def to_dict(self) -> dict[str, Any]:
            return {}

    parts = {"large": internvl_processor(), "small": internvl_processor(), side: UnknownProcessor()}
    message = f"The {side} model's processor does not fit the other one, .* of UnknownProcessor stand: use one of"
    with pytest.raises(ValueError, match=message):
        SGLProcessor(parts["large"], parts["small"])


@mechanics
def test_more_images_than_places_are_refused() -> None:
    by_hand = functools.partial(prompt_images.images_by_prompt, placeholder="<image>")
    assert by_hand([1, 2, 3], ["<image>", "", "<image><image>"]) == [[1], [], [2, 3]]
    with pytest.raises(ValueError, match=r"3 images, but the prompts have places for \[1, 1\]"):
        by_hand([1, 2, 3], ["<image>", "<image>"])


# --- saving, and the doors -------------------------------------------------------------------------------------------


@mechanics
def test_a_bundle_and_a_recipe_keep_both_processors(tmp_path: Path) -> None:
    model, processor = tiny_family_pair("qwen2_vl", "internvl")
    model.save_pretrained(tmp_path / "bundle")
    processor.save_pretrained(tmp_path / "bundle")
    parts = [tmp_path / "bundle" / name for name in ("large", "small")]
    SGLForConditionalGeneration.from_large_small_pretrained(*parts).save_recipe(tmp_path / "recipe")
    inputs = prepare(processor, chats(pictures()))
    expected = model.generate(**inputs, **PRUNED)

    for name in ("bundle", "recipe"):
        loaded, loaded_processor = (
            each.from_pretrained(tmp_path / name) for each in (AutoModelForImageTextToText, AutoProcessor)
        )
        assert loaded_processor.importance_transfer == loaded.importance_transfer == "resampling"
        assert_same(prepare(loaded_processor, chats(pictures())), inputs)
        assert torch.equal(loaded.generate(**inputs, **PRUNED), expected)


@mechanics
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pipeline_answers(tmp_path: Path, dtype: str) -> None:
    model, processor = tiny_family_pair("internvl", "llava")
    for each in (model, processor):
        each.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path), dtype=dtype)
    conversation = chats(pictures([[(40, 24)], [(16, 16)], [(24, 40)]]))
    options = {"max_new_tokens": 6, "return_full_text": False}

    one_by_one = [pipe(text=one, **options)[0]["generated_text"] for one in conversation]

    expected = []
    for one in conversation:
        inputs = prepare(processor, one).to(dtype=getattr(torch, dtype))
        output = pipe.model.generate(**inputs, max_new_tokens=6, return_dict_in_generate=True)
        assert output.importance_transfer == "resampling"
        expected += texts(processor, inputs, output.sequences)
    assert one_by_one == expected
    if dtype == "float32":  # a pipeline fills up boxes with zeros
        batched = pipe(text=conversation, **options, batch_size=3)
        assert [answer["generated_text"] for [answer] in batched] == expected


@mechanics
def test_the_server_answers(regridded_pair_path: Path) -> None:
    image = Image.open(regridded_pair_path / "example.png").convert("RGB")
    processor = AutoProcessor.from_pretrained(regridded_pair_path)
    model = AutoModelForImageTextToText.from_pretrained(regridded_pair_path)
    server = InProcess(PairApp("pair", model, processor))
    answer = server.ask(body={"model": "pair", "messages": test_serving.chat(image)}).text
    assert answer == test_serving.generated(model, processor, image, test_serving.QUESTION)[0]
    assert answer == test_serving.ANSWER


def test_kept_tokens_show_the_object_that_is_asked_for(regridded_pair_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(regridded_pair_path)
    regridded = AutoProcessor.from_pretrained(regridded_pair_path)
    asked, on_object = [], []
    for scene in Scenes("test", seed=4, questions_per_scene=1, kinds=("label",), length=24):
        [question] = scene.questions
        content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.question}]
        asked.append([{"role": "user", "content": content}])
        shown = torch.tensor(patch_objects(128, scene.objects) == question.objects[0])  # (16, 16) patches of 8 pixels
        tiles = [shown[y : y + 8, x : x + 8].flatten() for y in (0, 8) for x in (0, 8)]
        thumbnail = shown.reshape(8, 2, 8, 2).any(dim=3).any(dim=1).flatten()
        on_object.append(torch.cat([*tiles, thumbnail]))
    shown = torch.stack(on_object)

    output = model.generate(
        **prepare(regridded, asked),
        max_new_tokens=16,
        retention_ratio=0.1,
        prune_layer=1,
        return_dict_in_generate=True,
    )

    assert output.importance_transfer == "resampling"
    assert output.importance.shape == shown.shape == (24, 320)
    share = (output.keep_mask & shown).sum(dim=1) / output.keep_mask.sum(dim=1)
    by_chance = shown.float().mean(dim=1)
    assert share.mean() > 3 * by_chance.mean()
