"""The embedded pair on real data: easy-VQA's test images, held-out scenes and photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import skimage
import torch
from PIL import Image
from tiny_models import state
from tiny_pair_data import patch_objects
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    pipeline,
)

from transformers_sgl import RetentionRatioProcessor, SGLForConditionalGeneration, VisualTokenPruner, VisualTokens
from transformers_sgl.evaluation import Scenes, load_samples
from transformers_sgl.evaluation.cost import flop_counter

SETTINGS = {"do_sample": False, "max_new_tokens": 24}


def chat(image: Image.Image, question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]


def prepare(processor: Any, questions: Sequence[tuple[Image.Image, str]]) -> dict[str, Tensor]:
    return processor.apply_chat_template(
        [chat(*question) for question in questions],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def accuracy(processor: Any, sequences: Tensor, inputs: dict[str, Tensor], expected: Sequence[str]) -> float:
    texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text.strip() == answer for text, answer in zip(texts, expected, strict=True)) / len(expected)


def photographs() -> list[Image.Image]:
    return [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "coffee", "chelsea")]


@pytest.fixture(scope="module")
def easy(processor: Any) -> tuple[dict[str, Tensor], list[str]]:
    samples = load_samples("easy-vqa")[::32]  # 303 of 9,673
    questions = [(sample.open_image(), sample.question) for sample in samples]
    return prepare(processor, questions), [sample.answers[0] for sample in samples]


@pytest.fixture(scope="module")
def scenes(processor: Any) -> tuple[dict[str, Tensor], list[str], Tensor]:
    """Questions that are read off one object, and which visual tokens show that object in the tiles."""
    questions, answers, on_object = [], [], []
    for scene in Scenes("test", seed=1, questions_per_scene=1, kinds=("label",), length=120):
        for question in scene.questions:
            questions.append((scene.image, question.question))
            answers.append(question.answer)
            shown = torch.tensor(patch_objects(128, scene.objects) == question.objects[0])  # (16, 16) patches
            tiles = [shown[y : y + 8, x : x + 8].flatten() for y in (0, 8) for x in (0, 8)]
            on_object.append(torch.cat([*tiles, torch.zeros(64, dtype=torch.bool)]))  # the thumbnail comes last
    return prepare(processor, questions), answers, torch.stack(on_object)


# The thresholds lie below the measured accuracies (see the card) by about three standard errors of these subsets.


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_every_auto_class_loads_the_pair_and_it_answers(
    embedded_pair_path: Path, processor: Any, auto_class: Any
) -> None:
    inputs = prepare(processor, [(Image.open(embedded_pair_path / "example.png"), "describe the red triangle.")])
    sequences = auto_class.from_pretrained(embedded_pair_path).generate(**inputs, **SETTINGS)
    assert accuracy(processor, sequences, inputs, ["a red triangle labelled B in the bottom left"]) == 1


def test_both_models_read_easy_vqa(pair: SGLForConditionalGeneration, processor: Any, easy: tuple) -> None:
    inputs, answers = easy
    large = accuracy(processor, pair.large.generate(**inputs, **SETTINGS), inputs, answers)
    small = accuracy(processor, pair.small.generate(**inputs, **SETTINGS), inputs, answers)
    assert large >= 0.93
    assert 0.75 <= small < large


def test_the_small_model_looks_at_the_object_that_is_asked_for(
    pair: SGLForConditionalGeneration, scenes: tuple
) -> None:
    inputs, _, on_object = scenes
    output = pair.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
    in_tiles = output.importance.clone()
    in_tiles[:, 256:] = 0
    share = (in_tiles * on_object).sum(1) / in_tiles.sum(1)
    by_chance = on_object[:, :256].float().mean(1)
    assert share.mean() > 3 * by_chance.mean()


def test_guided_pruning_keeps_what_random_pruning_loses(
    pair: SGLForConditionalGeneration, processor: Any, scenes: tuple
) -> None:
    inputs, answers, _ = scenes
    ratio, layer = 0.2, 2
    guided = pair.generate(**inputs, **SETTINGS, retention_ratio=ratio, prune_layer=layer)

    tokens = VisualTokens.from_input_ids(inputs["input_ids"], pair.large.config.image_token_id)
    importance = torch.rand(tokens.valid.shape, generator=torch.Generator().manual_seed(0))
    keep = RetentionRatioProcessor(ratio)(tokens, importance).isfinite()
    with VisualTokenPruner(pair.large, tokens.prompt_keep_mask(keep), layer):
        random = pair.large.generate(**inputs, **SETTINGS)

    assert accuracy(processor, guided, inputs, answers) > accuracy(processor, random, inputs, answers) + 0.1


def test_a_batch_of_unlike_images_gives_the_answers_of_its_samples(
    pair: SGLForConditionalGeneration, processor: Any
) -> None:
    scene = Scenes("test", seed=2)[0]
    questions = [
        *((image, "what is in the image?") for image in photographs()),
        *((scene.image, question.question) for question in scene.questions),
        (load_samples("easy-vqa")[0].open_image(), "what shape is in the image?"),
    ]
    inputs = prepare(processor, questions)
    before = state(pair)
    together = pair.generate(**inputs, **SETTINGS)[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(together, skip_special_tokens=True)
    for text, question in zip(texts, questions, strict=True):
        one = prepare(processor, [question])
        alone = pair.generate(**one, **SETTINGS)[:, one["input_ids"].shape[1] :]
        assert processor.batch_decode(alone, skip_special_tokens=True) == [text]
    assert state(pair)["hooks"] == before["hooks"]
    assert state(pair)["attention"] == before["attention"]


@pytest.mark.parametrize("decoding", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_keeping_everything_is_the_stock_large_model(
    pair: SGLForConditionalGeneration, processor: Any, embedded_pair_path: Path, decoding: dict[str, Any]
) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(embedded_pair_path / "large")
    scene = Scenes("test", seed=3)[0]
    questions = [(scene.image, q.question) for q in scene.questions] + [(photographs()[0], "is there a red circle?")]
    inputs = prepare(processor, questions)
    sequences = []
    for model, settings in ((stock, {}), (pair, {"retention_ratio": 1.0})):
        torch.manual_seed(0)
        sequences.append(model.generate(**inputs, **decoding, **settings, max_new_tokens=16))
    assert torch.equal(*sequences)


def test_the_pipeline_takes_chats_and_plain_prompts(embedded_pair_path: Path, processor: Any) -> None:
    pipe = pipeline("image-text-to-text", model=str(embedded_pair_path))
    image = load_samples("easy-vqa")[0].open_image()
    question = "what shape is in the image?"
    shape = {"circle", "rectangle", "triangle"}

    def words(output: dict[str, Any]) -> str:
        return output["generated_text"].split()[-1]

    single = pipe(text=chat(image, question), max_new_tokens=8, return_full_text=False)
    assert words(single[0]) in shape
    batch = pipe(text=[chat(image, question)] * 3, max_new_tokens=8, return_full_text=False, batch_size=3)
    assert [words(one[0]) for one in batch] == [words(single[0])] * 3
    prompt = processor.apply_chat_template(chat(image, question), add_generation_prompt=True)
    plain = pipe(image, text=prompt, max_new_tokens=8, generate_kwargs={"retention_ratio": 0.5})
    assert words(plain[0]) in shape
    several = pipe([image] * 2, text=[prompt] * 2, max_new_tokens=8)
    assert [words(one) for one in several] == [words(single[0])] * 2


def test_the_pair_is_what_the_card_says(pair: SGLForConditionalGeneration, embedded_pair_path: Path) -> None:
    sizes = {name: sum(p.numel() for p in getattr(pair, name).parameters()) for name in ("large", "small")}
    assert len(pair.large.get_decoder().layers) >= 8
    assert sizes["large"] >= 4 * sizes["small"]
    assert sum(path.stat().st_size for path in embedded_pair_path.rglob("*") if path.is_file()) <= 20e6
    assert not [path for path in embedded_pair_path.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_a_chat_is_continued_from_its_cache(pair: SGLForConditionalGeneration, processor: Any, preset: str) -> None:
    for scene in Scenes("test", seed=2, questions_per_scene=3, length=2):
        messages, cache = chat(scene.image, scene.questions[0].question), None
        for question in (*scene.questions[1:], None):
            inputs = prepare_chat(processor, messages)
            options = {**SETTINGS, "preset": preset, "return_dict_in_generate": True}
            whole, found = (pair.generate(**inputs, **options, cache=each) for each in (None, cache))
            assert torch.equal(found.sequences, whole.sequences)
            assert torch.equal(found.keep_mask, whole.keep_mask)
            messages, cache = replied(processor, messages, inputs, found, question), found.cache


@pytest.mark.parametrize(("preset", "left"), [("balanced", 0.8), ("paper-35", 0.5)])
def test_a_continued_chat_saves_operations_of_the_large_model(
    pair: SGLForConditionalGeneration, processor: Any, preset: str, left: float
) -> None:
    scene = Scenes("test", seed=2, questions_per_scene=2, length=1)[0]
    messages = chat(scene.image, scene.questions[0].question)
    options = {"return_dict_in_generate": True, "preset": preset}
    inputs = prepare_chat(processor, messages)
    first = pair.generate(**inputs, **SETTINGS, **options)
    inputs = prepare_chat(processor, replied(processor, messages, inputs, first, scene.questions[1]))

    def flops(**more: Any) -> int:
        with flop_counter() as counter:
            pair.generate(**inputs, **SETTINGS, **options, **more)
        return counter.get_total_flops()

    small = flops(early_exit_threshold=0.0)  # the rest is the large model's
    assert flops(cache=first.cache) - small < left * (flops() - small)


def prepare_chat(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Tensor]:
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def replied(processor: Any, messages: list, inputs: dict[str, Tensor], output: Any, question: Any) -> list:
    """The messages after the answer and a further question, if there is one."""
    answer = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    turns = [("assistant", answer)] + ([] if question is None else [("user", question.question)])
    return messages + [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
