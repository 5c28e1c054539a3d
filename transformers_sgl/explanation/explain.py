"""Lets a pair answer one question and listens: to the small model's layers, and to the large model unguided."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from transformers_sgl.architectures import decoder_layers, visual_tokens_of
from transformers_sgl.arguments import split_inputs
from transformers_sgl.explanation.panels import TokenBoxes
from transformers_sgl.explanation.result import Array, Explanation, GuidedAnswer, Model, Picture
from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig, resolve_prune_layer
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.opening import chat_inputs, open_pair, user_turn
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.small_answer import guiding_layers, guiding_queries
from transformers_sgl.tokens.boxes import video_token_boxes, visual_token_boxes
from transformers_sgl.tokens.importance_transfer import split_boxes
from transformers_sgl.tokens.selection import decoder_processors
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["explain"]

_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "early_exit_threshold": None}

_Pair: TypeAlias = tuple[SGLForConditionalGeneration, SGLProcessor]


def explain(
    pair: str | Path | _Pair,
    images: Image.Image | Sequence[Image.Image],
    question: str,
    *,
    is_video: bool = False,
    max_new_tokens: int = 64,
    dtype: str = "auto",
    device: str = "auto",
) -> Explanation:
    """Lets both models answer one question, the large one at each of the paper's settings too, and watches them.

    The pair's own settings hold (whose attention counts, how many tokens of every image stay), except for the
    retention, greedy search, and that nothing exits early.

    Args:
        pair (`str`, `Path` or `tuple`): A saved pair, opened once the other arguments are checked; or a model and its
            processor.
        images (`PIL.Image.Image` or sequence of such): The image; several images; or the frames of a video.
        question (`str`): What to ask.
        is_video (`bool`, defaults to `False`): Whether `images` are the frames of one video.
        max_new_tokens (`int`, defaults to 64): The longest answer, in tokens.
        dtype (`str`, defaults to `"auto"`): The type of the weights of a pair that is opened here.
        device (`str`, defaults to `"auto"`): The device of a pair that is opened here.

    Raises:
        OSError: If the pair cannot be opened.
        ValueError: If there is no image or no question, it is not known where the models' visual tokens lie, or one of
            the models cannot be watched.

    Example:
        ```python
        >>> from PIL import Image
        >>> from transformers_sgl.explanation import explain
        >>> from transformers_sgl.hub import embedded_pair

        >>> image = Image.open(embedded_pair() / "example.png")
        >>> explanation = explain(embedded_pair(), image, "describe the red triangle.", max_new_tokens=16)
        >>> explanation.guided[-1].answer, explanation.guided[-1].num_kept, explanation.num_visual_tokens
        ('a red triangle labelled B in the bottom left', 16, 320)
        >>> explanation.to_html()[:15]
        '<!DOCTYPE html>'

        ```
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    settings = _settings(images, question, is_video, max_new_tokens)
    opened = pair if isinstance(pair, tuple) else open_pair(pair, dtype=dtype, device=device)
    return _explain(opened, images, question, is_video, settings)


def _explain(
    pair: _Pair, images: list[Image.Image], question: str, is_video: bool, settings: dict[str, Any]
) -> Explanation:
    model, processor = pair
    # 1. Where the tokens lie is looked up first: what cannot be shown need not be computed.
    pictures = _pictures(processor.large_processor, images, is_video)
    small_pictures = _pictures(processor.small_processor, images, is_video)
    options = {"do_sample_frames": False} if is_video else {}
    inputs = dict(chat_inputs(model, processor, [user_turn(question, images, is_video=is_video)], **options))
    large_inputs, small_inputs = split_inputs(split_boxes(inputs)[0], shares_tensors=True)
    tokens = visual_tokens_of(model.large.config, large_inputs)
    small_tokens = visual_tokens_of(model.small.config, small_inputs)
    _check_count(tokens, pictures)
    _check_count(small_tokens, small_pictures)
    start = inputs["input_ids"].shape[1]  # of an answer
    own = SGLGenerationConfig().resolved(model.generation_config)
    settings |= {"guidance": "answer", "guidance_queries": guiding_queries(own), "unsure_threshold": None}

    # 2. The large model answers unguided, the small model guides, and the large model answers at every preset.
    unguided, oracle, tokens = _answer_unguided(model, inputs, tokens, settings)
    layers, layer_importance = _listen_to_layers(model, inputs, small_tokens, settings, own)
    output: Any = None
    guided, num_layers = [], len(decoder_layers(model.large))
    for name, preset in PRESETS.items():
        output = model.generate(**inputs, **{**settings, **preset}, return_dict_in_generate=True)
        keep = decoder_processors(preset["retention_ratio"], own.min_tokens_per_image, preset["selection"])
        guided.append(
            GuidedAnswer(
                preset=name,
                retention_ratio=preset["retention_ratio"],
                prune_layer=output.prune_layer,
                average_retention=float(output.average_retention(num_layers)[0]),
                keep_mask=output.keep_mask[0].cpu().numpy(),
                oracle_keep_mask=keep.keep_mask(tokens, oracle)[0].cpu().numpy(),
                answer=_text(processor, output.sequences[0, start:]),
                num_large_forward_passes=output.num_large_forward_passes,
            )
        )

    # 3. What that says.
    return Explanation(
        question=question,
        is_video=is_video,
        pictures=pictures,
        small_pictures=small_pictures,
        importance=output.importance[0].cpu().numpy(),
        oracle=oracle[0].cpu().numpy(),
        importance_transfer=output.importance_transfer,
        layers=layers,
        layer_importance=layer_importance,
        large_answer=_text(processor, unguided.sequences[0, start:]),
        small_answer=_text(processor.small_processor, output.draft_sequences[0]),
        guided=tuple(guided),
        preset=_own_preset(own, num_layers),
        confidence=float(output.confidence[0]),
        consistency=float(output.consistency[0]),
        decision_score=float(output.decision_score[0]),
        early_exit_threshold=getattr(model.generation_config, "early_exit_threshold", None),
        large=_model(model.large),
        small=_model(model.small),
        # Unguided, the large model runs once for every token that it writes.
        num_large_forward_passes=unguided.sequences.shape[1] - start,
    )


def _settings(images: list[Image.Image], question: str, is_video: bool, max_new_tokens: int) -> dict[str, Any]:
    """The settings of every `generate` call, if all arguments are sound."""
    if not images:
        raise ValueError("There is no image to ask about: pass one or more.")
    if not question.strip():
        raise ValueError("The question is empty: ask something about the image.")
    if is_video and len({image.size for image in images}) > 1:
        raise ValueError("The frames of a video are of several sizes: give frames of one size.")
    settings = {**_GREEDY, "max_new_tokens": max_new_tokens}
    SGLGenerationConfig(**settings)  # refuses what no model can do
    return settings


def _pictures(processor: Any, images: list[Image.Image], is_video: bool) -> tuple[Picture, ...]:
    """The images or frames, each with the places of one model's tokens."""
    if not is_video:
        names = [f"image {index}" for index in range(1, len(images) + 1)] if len(images) > 1 else ["image"]
        boxes = visual_token_boxes(processor, images)
    else:
        views = video_token_boxes(processor, len(images), images[0].size)
        firsts, boxes = [first for first, _ in views], [view for _, view in views]
        ends = [*firsts[1:], len(images)]
        spans = zip(firsts, ends, strict=True)
        names = [f"frame {end}" if end == first + 1 else f"frames {first + 1}-{end}" for first, end in spans]
        images = [images[first] for first in firsts]
    return tuple(
        Picture(image, TokenBoxes.from_fractions(each.numpy(), image.size), name)
        for image, each, name in zip(images, boxes, names, strict=True)
    )


def _check_count(tokens: VisualTokens, pictures: Sequence[Picture]) -> None:
    num_boxes = sum(len(picture.boxes) for picture in pictures)
    if num_boxes != tokens.num_visual_tokens:
        raise ValueError(
            f"The prompt has {tokens.num_visual_tokens} visual tokens, but the places of {num_boxes} are known: "
            "load the processor from its model's checkpoint."
        )


def _answer_unguided(
    model: SGLForConditionalGeneration, inputs: dict[str, Any], tokens: VisualTokens, settings: dict[str, Any]
) -> tuple[Any, Tensor, VisualTokens]:
    """What the large model does when it sees everything.

    Returns its output, its own map, `(1, num_visual_tokens)`, and the visual tokens with its own features.
    """
    with AttentionRecorder(model.large, tokens, records_features=True) as recorder:
        output = model.generate(
            **inputs, **settings, retention_ratio=1.0, verify_draft=False, return_dict_in_generate=True
        )
    return output, recorder.importance, replace(tokens, features=recorder.features)


def _listen_to_layers(
    model: Any, inputs: dict[str, Any], tokens: VisualTokens, settings: dict[str, Any], own: SGLGenerationConfig
) -> tuple[tuple[int, ...], Array]:
    """The small model's guiding layers, and what each contributes to its map, `(num_layers, num_small_tokens)`."""
    layers = guiding_layers(model.small, own)
    queries: Literal["last", "both"] = "last" if guiding_queries(own) == "last" else "both"
    with ExitStack() as stack:
        recorders = [stack.enter_context(AttentionRecorder(model.small, tokens, queries, [layer])) for layer in layers]
        # The recorders would hear the consistency pass too: it runs for `return_dict_in_generate` only.
        model.generate(**inputs, **settings, retention_ratio=0.5, return_dict_in_generate=False)
    prompt = torch.cat([recorder.prompt_importance for recorder in recorders]).cpu().numpy()
    generated = torch.cat([recorder.generated_importance for recorder in recorders]).cpu().numpy()
    wanted = {"prompt": prompt, "last": prompt, "generated": generated}.get(guiding_queries(own))
    # As in guidance: without queries of the wanted kind, the others rank.
    return tuple(layers), prompt + generated if wanted is None or not wanted.any() else wanted


def _own_preset(own: SGLGenerationConfig, num_layers: int) -> str:
    """The preset that the pair's own settings are; "balanced" if they are none's."""
    for name, preset in PRESETS.items():
        layers = [resolve_prune_layer(layer, num_layers) for layer in (own.prune_layer, preset["prune_layer"])]
        if own.retention_ratio == preset["retention_ratio"] and layers[0] == layers[1]:
            return name
    return "balanced"


def _model(model: Any) -> Model:
    name = str(model.name_or_path) or model.config.model_type
    if Path(name).is_absolute():
        name = "/".join(Path(name).parts[-2:])
    return Model(name, model.config.model_type, len(decoder_layers(model)))


def _text(processor: Any, ids: Tensor) -> str:
    text: str = processor.decode(ids, skip_special_tokens=True)
    return text.strip()
