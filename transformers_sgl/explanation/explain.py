"""Why a pair answered as it did: everything that a page about one image and one question shows.

[`explain`] lets the models answer and listens: to every layer of the small model while it guides, and to the large
model while it answers without any guidance, which is the map that guidance tries to foresee (the oracle). Then the
large model answers once more at each of the paper's settings. What comes of it is an [`Explanation`]: plain arrays and
texts, to be drawn (`explanation_page.py`) or looked into.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from transformers_sgl.architectures import decoder_layers, visual_tokens_of
from transformers_sgl.explanation.panels import TokenBoxes
from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig, average_retention
from transformers_sgl.guidance import guiding_layers
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.modeling_sgl import SGLForConditionalGeneration
from transformers_sgl.processing_sgl import SGLProcessor
from transformers_sgl.tokens.boxes import video_token_boxes, visual_token_boxes
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.tokens.importance_process import (
    ImportanceProcessorList,
)
from transformers_sgl.tokens.importance_transfer import split_boxes
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["Explanation", "GuidedAnswer", "Picture", "explain", "rank_correlation"]

_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """An image, or a frame of a video, and where its visual tokens lie on it.

    Attributes:
        image (`PIL.Image.Image`): The picture as it was given.
        boxes ([`TokenBoxes`]): The places of its tokens, in the order of the prompt.
        name (`str`): What to call it: "image", "image 2", "frame 3", "frames 1-2".
    """

    image: Image.Image
    boxes: TokenBoxes
    name: str


@dataclass(frozen=True)
class GuidedAnswer:
    """The large model's answer at one setting.

    Attributes:
        preset (`str`): The name of the setting.
        retention_ratio (`float`): The fraction of visual tokens that was asked for.
        prune_layer (`int`): The first layer of the large model that saw only the kept tokens.
        average_retention (`float`): The visual tokens processed, averaged over the large model's layers; a fraction.
        keep_mask (`np.ndarray` of shape `(num_visual_tokens,)`): Which tokens were kept.
        oracle_keep_mask (`np.ndarray` of shape `(num_visual_tokens,)`): Which tokens the oracle map would have kept.
        answer (`str`): What the large model wrote.
    """

    preset: str
    retention_ratio: float
    prune_layer: int
    average_retention: float
    keep_mask: npt.NDArray[np.bool_]
    oracle_keep_mask: npt.NDArray[np.bool_]
    answer: str

    @property
    def num_kept(self) -> int:
        """How many visual tokens were kept."""
        return int(self.keep_mask.sum())

    @property
    def oracle_overlap(self) -> float:
        """The fraction of the kept tokens that the oracle map would have kept too."""
        return float((self.keep_mask & self.oracle_keep_mask).sum() / self.num_kept)


@dataclass(frozen=True)
class Explanation:
    """What both models did with one question.

    Importance is attention received, summed over layers, heads and queries (paper, section 3.2).

    Attributes:
        question (`str`): The question.
        is_video (`bool`): Whether the pictures are the frames of one video.
        pictures (`tuple` of [`Picture`]): The pictures with the large model's visual tokens, which together are
            `num_visual_tokens`.
        small_pictures (`tuple` of [`Picture`]): The same pictures with the small model's visual tokens.
        importance (`np.ndarray` of shape `(num_visual_tokens,)`): The small model's map, as the large model is given
            it.
        oracle (`np.ndarray` of shape `(num_visual_tokens,)`): The large model's own map of all its layers, recorded
            while it wrote `large_answer`.
        importance_transfer (`str`): How the small model's map was handed over: `"identity"` or `"resampling"`.
        layers (`tuple` of `int`): The small model's layers that guide.
        layer_importance (`np.ndarray` of shape `(num_guiding_layers, num_small_tokens)`): What each of them
            contributes to the small model's map, on the small model's own tokens.
        large_answer (`str`): The answer of the large model that sees everything.
        small_answer (`str`): The answer of the small model.
        guided (`tuple` of [`GuidedAnswer`]): The large model's answers at the paper's settings.
        confidence (`float`): How sure the small model was of its answer.
        consistency (`float`): How probable its answer stays when it sees only the most important tokens.
        decision_score (`float`): The mean of both.
        early_exit_threshold (`float`, *optional*): The score from which on the pair, as it is set, would have returned
            the small model's answer.
        large_name (`str`): The large model's type.
        small_name (`str`): The small model's type.
        num_large_layers (`int`): How many decoder layers the large model has.
        num_small_layers (`int`): How many decoder layers the small model has.
    """

    question: str
    is_video: bool
    pictures: tuple[Picture, ...]
    small_pictures: tuple[Picture, ...]
    importance: Array
    oracle: Array
    importance_transfer: str
    layers: tuple[int, ...]
    layer_importance: Array
    large_answer: str
    small_answer: str
    guided: tuple[GuidedAnswer, ...]
    confidence: float
    consistency: float
    decision_score: float
    early_exit_threshold: float | None
    large_name: str
    small_name: str
    num_large_layers: int
    num_small_layers: int

    @property
    def num_visual_tokens(self) -> int:
        """How many visual tokens the large model sees."""
        return len(self.importance)

    @property
    def small_importance(self) -> Array:
        """The small model's map on its own tokens, `(num_small_tokens,)`: the sum of what its layers contribute."""
        return self.layer_importance.sum(axis=0)

    @property
    def layer_shares(self) -> Array:
        """Each guiding layer's share in the small model's map, `(num_guiding_layers,)`; together they are 1."""
        return self.layer_importance.sum(axis=1) / self.layer_importance.sum()

    @property
    def layer_correlations(self) -> list[float]:
        """Each guiding layer's rank correlation with the small model's map."""
        return [rank_correlation(layer, self.small_importance) for layer in self.layer_importance]

    @property
    def oracle_correlation(self) -> float:
        """The rank correlation of the small model's map, as it was handed over, with the oracle map."""
        return rank_correlation(self.importance, self.oracle)

    def to_dict(self) -> dict[str, Any]:
        """Texts and figures without pictures and maps, for a program."""
        return {
            "question": self.question,
            "large_answer": self.large_answer,
            "small_answer": self.small_answer,
            "confidence": self.confidence,
            "consistency": self.consistency,
            "decision_score": self.decision_score,
            "early_exit_threshold": self.early_exit_threshold,
            "num_visual_tokens": self.num_visual_tokens,
            "importance_transfer": self.importance_transfer,
            "oracle_correlation": self.oracle_correlation,
            "layers": list(self.layers),
            "layer_shares": self.layer_shares.tolist(),
            "layer_correlations": self.layer_correlations,
            "guided": [
                {
                    "preset": guided.preset,
                    "answer": guided.answer,
                    "retention_ratio": guided.retention_ratio,
                    "prune_layer": guided.prune_layer,
                    "average_retention": guided.average_retention,
                    "num_visual_tokens_kept": guided.num_kept,
                    "oracle_overlap": guided.oracle_overlap,
                }
                for guided in self.guided
            ],
        }


def explain(
    model: SGLForConditionalGeneration,
    processor: SGLProcessor,
    images: Image.Image | Sequence[Image.Image],
    question: str,
    is_video: bool = False,
    **settings: Any,
) -> Explanation:
    """Lets both models answer one question, and the large one at each of the paper's settings, and watches them.

    The pair's own settings hold (whose attention counts, how many tokens of every image stay), but for the paper's
    retention, greedy search, and that nothing exits early.

    Args:
        model ([`SGLForConditionalGeneration`]): The pair.
        processor ([`SGLProcessor`]): Its processor.
        images (`PIL.Image.Image` or sequence of such): The image; several images; or the frames of a video.
        question (`str`): What to ask.
        is_video (`bool`, *optional*, defaults to `False`): Whether `images` are the frames of one video.
        **settings: Further settings of `generate`, such as `max_new_tokens`.

    Returns:
        [`Explanation`]: What they saw and wrote.

    Raises:
        ValueError: If it is not known where the models' visual tokens lie, or one of the models cannot be watched.

    Example:
        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> import transformers_sgl
        >>> from transformers_sgl.explanation.explain import explain
        >>> from transformers_sgl.hub import embedded_pair

        >>> model = AutoModelForImageTextToText.from_pretrained(embedded_pair())
        >>> processor = AutoProcessor.from_pretrained(embedded_pair())
        >>> image = Image.open(embedded_pair() / "example.png")
        >>> explanation = explain(model, processor, image, "describe the red triangle.", max_new_tokens=16)
        >>> explanation.guided[-1].answer, explanation.guided[-1].num_kept, explanation.num_visual_tokens
        ('a red triangle labelled B in the bottom left', 16, 320)

        ```
    """
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images:
        raise ValueError("There is no image to ask about: pass one or more.")
    # 1. Where the tokens lie is looked up first: what cannot be shown need not be computed.
    pictures, small_pictures = (
        _pictures(part, images, is_video) for part in (processor.large_processor, processor.small_processor)
    )
    inputs = _inputs(model, processor, images, question, is_video)
    tokens, small_tokens = _visual_tokens(model, inputs)
    for found, shown in ((tokens, pictures), (small_tokens, small_pictures)):
        _check_count(found, shown)
    settings = {**settings, **_GREEDY, "early_exit_threshold": NEVER_EXIT}
    resolved = SGLGenerationConfig(**settings).resolved(model.generation_config)

    # 2. The large model answers unguided, and is listened to as a whole.
    with AttentionRecorder(model.large, tokens) as oracle:
        unpruned = model.generate(**inputs, **settings, retention_ratio=1.0, verify_draft=False)

    # 3. The small model guides, and every layer is listened to. The consistency pass would be heard as well, so there
    # is none: it runs for `return_dict_in_generate` only.
    layers = guiding_layers(model.small, resolved)
    queries: Literal["last", "both"] = "last" if resolved.guidance_queries == "last" else "both"
    with ExitStack() as stack:
        recorders = [
            stack.enter_context(AttentionRecorder(model.small, small_tokens, queries, [layer])) for layer in layers
        ]
        model.generate(**inputs, **settings, retention_ratio=0.5, return_dict_in_generate=False)

    # 4. The large model answers at every setting.
    output: Any = None
    guided = []
    for preset in PRESETS:
        output = model.generate(**inputs, **{**settings, **PRESETS[preset]}, return_dict_in_generate=True)
        guided.append(_guided_answer(preset, model, processor, output, inputs, tokens, oracle.importance, resolved))

    return Explanation(
        question=question,
        is_video=is_video,
        pictures=pictures,
        small_pictures=small_pictures,
        importance=output.importance[0].cpu().numpy(),
        oracle=oracle.importance[0].cpu().numpy(),
        importance_transfer=output.importance_transfer,
        layers=tuple(layers),
        layer_importance=_layer_importance(recorders, resolved.guidance_queries),
        large_answer=_answer(processor, unpruned, inputs),
        small_answer=_text(processor.small_processor, output.draft_sequences[0]),
        guided=tuple(guided),
        confidence=float(output.confidence[0]),
        consistency=float(output.consistency[0]),
        decision_score=float(output.decision_score[0]),
        early_exit_threshold=getattr(model.generation_config, "early_exit_threshold", None),
        large_name=model.large.config.model_type,
        small_name=model.small.config.model_type,
        num_large_layers=len(decoder_layers(model.large)),
        num_small_layers=len(decoder_layers(model.small)),
    )


def rank_correlation(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    """Spearman's rank correlation: that of the ranks, where equal values share the mean of theirs.

    Args:
        one (array of shape `(n,)`): Some values.
        other (array of shape `(n,)`): As many others.

    Returns:
        `float`: From -1 to 1; NaN where all values of one are equal.

    Example:
        ```python
        >>> from transformers_sgl.explanation.explain import rank_correlation

        >>> round(rank_correlation([1, 2, 3, 4], [10, 20, 20, 40]), 4)
        0.9487

        ```
    """
    ranks = [_ranks(np.asarray(values)) for values in (one, other)]
    deviations = [each - each.mean() for each in ranks]
    scale = math.sqrt(float((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / scale if scale else math.nan


def _ranks(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The rank of every value from 0 on, `(n,)`; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts + 1) / 2
    ranks: npt.NDArray[np.float64] = mean_rank[inverse.reshape(-1)]
    return ranks


def _pictures(processor: Any, images: list[Image.Image], is_video: bool) -> tuple[Picture, ...]:
    """The images or frames, each with the places of one model's tokens."""
    if not is_video:
        names = [f"image {index}" for index in range(1, len(images) + 1)] if len(images) > 1 else ["image"]
        return tuple(
            Picture(image, TokenBoxes.from_fractions(boxes.numpy(), image.size), name)
            for image, boxes, name in zip(images, visual_token_boxes(processor, images), names, strict=True)
        )
    if len({image.size for image in images}) > 1:
        raise ValueError("The frames of a video are of several sizes: give frames of one size.")
    views = video_token_boxes(processor, len(images), images[0].size)
    firsts = [first for first, _ in views]
    pictures = []
    for (first, view), end in zip(views, [*firsts[1:], len(images)], strict=True):
        name = f"frame {first + 1}" if end == first + 1 else f"frames {first + 1}-{end}"
        image = images[first]
        pictures.append(Picture(image, TokenBoxes.from_fractions(view.numpy(), image.size), name))
    return tuple(pictures)


def _inputs(
    model: SGLForConditionalGeneration,
    processor: SGLProcessor,
    images: list[Image.Image],
    question: str,
    is_video: bool,
) -> dict[str, Any]:
    """The inputs of both models."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    options: dict[str, Any] = {}
    if is_video:
        content = [{"type": "video", "video": images}]
        options["processor_kwargs"] = {"do_sample_frames": False}
    inputs: Any = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    return dict(inputs.to(model.device, dtype=model.dtype))


def _visual_tokens(model: SGLForConditionalGeneration, inputs: dict[str, Any]) -> tuple[VisualTokens, VisualTokens]:
    """The visual tokens of the large model's prompt and of the small model's."""
    plain, _ = split_boxes(inputs)
    prompt: dict[str, Any] = {name: plain[name] for name in ("input_ids", "attention_mask") if name in plain}
    small = {name: plain.get(f"small_{name}", value) for name, value in prompt.items()}
    return visual_tokens_of(model.large.config, prompt), visual_tokens_of(model.small.config, small)


def _check_count(tokens: VisualTokens, pictures: Sequence[Picture]) -> None:
    num_boxes = sum(len(picture.boxes) for picture in pictures)
    if num_boxes != tokens.num_visual_tokens:
        raise ValueError(
            f"A prompt has {tokens.num_visual_tokens} visual tokens, but it is known of {num_boxes} where they lie: "
            "load the processor from its model's checkpoint."
        )


def _guided_answer(
    preset: str,
    model: SGLForConditionalGeneration,
    processor: SGLProcessor,
    output: Any,
    inputs: dict[str, Any],
    tokens: VisualTokens,
    oracle: Tensor,
    settings: SGLGenerationConfig,
) -> GuidedAnswer:
    ratio = PRESETS[preset]["retention_ratio"]
    processors = ImportanceProcessorList.of_settings(ratio, settings.min_tokens_per_image)
    keep_mask = output.keep_mask[0].cpu().numpy()
    kept = float(keep_mask.sum()) / len(keep_mask)
    return GuidedAnswer(
        preset=preset,
        retention_ratio=ratio,
        prune_layer=output.prune_layer,
        average_retention=average_retention(kept, output.prune_layer, len(decoder_layers(model.large))),
        keep_mask=keep_mask,
        oracle_keep_mask=processors.keep_mask(tokens, oracle)[0].cpu().numpy(),
        answer=_answer(processor, output.sequences, inputs),
    )


def _layer_importance(recorders: Sequence[AttentionRecorder], queries: str) -> Array:
    """What each layer contributes to the map of the wanted queries, `(num_layers, num_small_tokens)`."""
    prompt = torch.cat([recorder.prompt_importance for recorder in recorders]).cpu().numpy()
    generated = torch.cat([recorder.generated_importance for recorder in recorders]).cpu().numpy()
    wanted = {"prompt": prompt, "last": prompt, "generated": generated}.get(queries)
    # As in guidance: without queries of the wanted kind, the others rank.
    return prompt + generated if wanted is None or not wanted.any() else wanted


def _answer(processor: SGLProcessor, output: Any, inputs: dict[str, Any]) -> str:
    sequences = output if isinstance(output, Tensor) else output.sequences
    return _text(processor.large_processor, sequences[0, inputs["input_ids"].shape[1] :])


def _text(processor: Any, ids: Tensor) -> str:
    text: str = processor.decode(ids, skip_special_tokens=True)
    return text.strip()
