"""Methods: the ways to answer that an evaluation compares, ours and those it has to beat.

All of them start from the same images and questions and end with text. Most are a guide, something that tells how
important each of the large model's visual tokens is; what follows is the same for every guide. A new method is one
dataclass in this file and one line in [`METHODS`].

Read top to bottom: what a method is given and gives back; the models alone; the pair itself; the guides that do
without a small model; the smaller image.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transformers_sgl.architectures import decoder, decoder_layers, visual_tokens_of
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.generation_config_sgl import (
    PRESETS,
    SGLGenerationConfig,
    average_retention,
    resolve_prune_layer,
)
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.tokens.importance_process import (
    ImportanceProcessorList,
)
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import count_image_tokens, tells_image_tokens

__all__ = [
    "METHODS",
    "SGL",
    "SGP",
    "Answer",
    "Batch",
    "DivPrune",
    "Downsample",
    "FastV",
    "Guide",
    "Large",
    "Method",
    "Oracle",
    "Pair",
    "Random",
    "Setting",
    "Small",
    "find_method",
]


# ----------------------------------------------------------------------------------- what a method is given and gives


@dataclass(frozen=True)
class Setting:
    """How much of the visual tokens the large model shall process.

    Attributes:
        average_retention: The target: visual tokens averaged over the large model's layers, as a fraction.
        prune_layer: The first layer that sees fewer tokens.
        num_layers: The large model's layers.
    """

    average_retention: float
    prune_layer: int
    num_layers: int

    @classmethod
    def of(cls, average: float, num_layers: int) -> Setting:
        """The setting for an average retention, on the line through the paper's three operating points.

        Args:
            average (`float`): The target, in `(0, 1)`.
            num_layers (`int`): The large model's decoder layers.

        Returns:
            `Setting`: The setting; its layer is the nearest that leaves tokens to keep.

        Raises:
            ValueError: If the target is no fraction.

        Example:
            ```python
            >>> from transformers_sgl.evaluation.methods import Setting

            >>> setting = Setting.of(0.35, num_layers=48)
            >>> setting.prune_layer, round(setting.retention_ratio, 3)
            (9, 0.2)

            ```
        """
        if not 0 < average < 1:
            raise ValueError(f"The average retention is {average}: pass a fraction above 0 and below 1.")
        points = sorted(
            (
                average_retention(preset["retention_ratio"], round(48 * preset["prune_layer"]), 48),
                preset["prune_layer"],
            )
            for preset in PRESETS.values()
        )
        averages, depths = zip((0.0, 0.0), *points, (1.0, 1.0), strict=True)
        depth = float(np.interp(average, averages, depths))
        layer = resolve_prune_layer(depth, num_layers)
        return cls(average, min(layer, math.ceil(average * num_layers) - 1), num_layers)

    @property
    def retention_ratio(self) -> float:
        """The fraction of tokens that upper layers keep, which gives exactly the average."""
        upper = self.num_layers - self.prune_layer
        # Rounded, so that a tenth of 320 tokens is 32 of them whatever layers it was worked out for.
        return round((self.average_retention * self.num_layers - self.prune_layer) / upper, 12)

    def reached(self, num_kept: int, num_visual_tokens: int) -> float:
        """The average retention where so many tokens of a sample were kept."""
        return average_retention(num_kept / max(1, num_visual_tokens), self.prune_layer, self.num_layers)

    def from_layer(self, prune_layer: int) -> Setting:
        """The same average from another layer on."""
        return replace(self, prune_layer=prune_layer)


@dataclass(frozen=True)
class Answer:
    """What a method says to one sample.

    Attributes:
        text: The answer.
        num_tokens: Its tokens, the end of sequence included.
        retention: The visual tokens that the large model processed, averaged over its layers, as a fraction of those
            of the image at its full size; `None` where it was not called.
        exited_early: Whether the small model's answer was returned.
        draft: The small model's answer, where one was read.
        num_draft_tokens_accepted: How many of its tokens the large model confirmed.
        decision_score: How far the draft could be trusted.
        draft_complete: Whether the draft came to its end.
    """

    text: str
    num_tokens: int
    retention: float | None = None
    exited_early: bool | None = None
    draft: str | None = None
    num_draft_tokens_accepted: int | None = None
    decision_score: float | None = None
    draft_complete: bool | None = None


@dataclass(frozen=True)
class Pair:
    """A pair, its processor and how it answers.

    Attributes:
        model: The pair ([`SGLForConditionalGeneration`]).
        processor: Its [`SGLProcessor`].
        max_new_tokens: The length limit of an answer.
        seed: What random methods draw from.
    """

    model: Any
    processor: Any
    max_new_tokens: int = 64
    seed: int = 0

    @property
    def num_layers(self) -> int:
        """The large model's decoder layers."""
        return len(decoder_layers(self.model.large))

    def inputs(self, processor: Any, samples: Sequence[Sample], images: Sequence[Image.Image], **options: Any) -> Any:
        """Inputs for a batch of questions.

        Args:
            processor (`ProcessorMixin`): The pair's, or that of one of its models.
            samples (`Sequence[Sample]`): The questions.
            images (`Sequence[PIL.Image.Image]`): An image for each.
            **options: Further arguments of the processor.

        Returns:
            `BatchFeature`: `input_ids` of shape `(batch, prompt_length)` and whatever else the model reads.
        """
        chats = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": sample.prompt}]}]
            for sample, image in zip(samples, images, strict=True)
        ]
        return processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **options},
        ).to(self.model.device, dtype=self.model.dtype)

    def write(self, model: Any, inputs: Any) -> Tensor:
        """A model's greedy answers with its own stock `generate`; `(batch, answer_length)`."""
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]

    def texts(self, processor: Any, answers: Tensor) -> list[str]:
        """Answers of shape `(batch, answer_length)` as text."""
        return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


@dataclass(frozen=True)
class Batch:
    """Samples that are answered together.

    Attributes:
        samples: The samples.
        indices: Their places in the data, from which random methods draw, so that a sample's draw does not depend on
            what shares its batch.
        images: Their images.
    """

    samples: Sequence[Sample]
    indices: Sequence[int]
    images: Sequence[Image.Image]


class Method(ABC):
    """A way to answer.

    Attributes:
        prunes: Whether it has a retention to be set; if not, there is but one way to run it.
    """

    prunes: ClassVar[bool] = True

    @abstractmethod
    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """Answers a batch.

        Args:
            pair ([`Pair`]): The models.
            batch ([`Batch`]): The samples.
            setting ([`Setting`]): How much the large model shall process.

        Returns:
            `list[Answer]`: An answer for each sample.
        """


# --------------------------------------------------------------------------------------------------- the models alone


@dataclass(frozen=True)
class Large(Method):
    """The large model alone, unpruned, as it is in transformers."""

    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """See [`Method.answer`]."""
        return _alone(pair, "large", batch)


@dataclass(frozen=True)
class Small(Method):
    """The small model alone."""

    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """See [`Method.answer`]."""
        return [replace(answer, retention=None) for answer in _alone(pair, "small", batch)]


def _alone(pair: Pair, name: str, batch: Batch) -> list[Answer]:
    model, processor = getattr(pair.model, name), getattr(pair.processor, f"{name}_processor")
    written = pair.write(model, pair.inputs(processor, batch.samples, batch.images))
    texts = pair.texts(processor, written)
    return [Answer(text, length, 1.0) for text, length in zip(texts, _answer_lengths(written, model), strict=True)]


# --------------------------------------------------------------------------------------------------------- the pair


@dataclass(frozen=True)
class SGP(Method):
    """Small-model-guided pruning (paper, section 3.2): `generate` of the pair, drafts verified, without early exit.

    Attributes:
        queries: Whose attention ranks the visual tokens: `"prompt"`, `"last"`, `"generated"` or `"both"`.
        layers: The fraction of the small model's layers that count, from the first one on.
        scores_draft: Whether the draft is scored although nothing exits, as a calibration needs it.
    """

    queries: str = "both"
    layers: float = 1.0
    scores_draft: bool = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """See [`Method.answer`]."""
        return self._generate(pair, batch, setting, NEVER_EXIT)

    def _generate(self, pair: Pair, batch: Batch, setting: Setting, threshold: float) -> list[Answer]:
        inputs = pair.inputs(pair.processor, batch.samples, batch.images)
        output = pair.model.generate(
            **inputs,
            max_new_tokens=pair.max_new_tokens,
            do_sample=False,
            num_beams=1,
            retention_ratio=setting.retention_ratio,
            prune_layer=setting.prune_layer,
            guidance_queries=self.queries,
            guidance_layers=self.layers,
            early_exit_threshold=threshold,
            score_draft=self.scores_draft,
            return_dict_in_generate=True,
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        counts, exited = output.num_visual_tokens.tolist(), output.exited_early.tolist()
        kept = counts if output.keep_mask is None else output.keep_mask.sum(dim=1).tolist()
        nothing = [None] * len(counts)
        scores, accepted = (
            nothing if values is None else values.tolist()
            for values in (output.decision_score, output.num_draft_tokens_accepted)
        )
        return [
            Answer(
                text,
                length,
                None if exited[index] else setting.reached(kept[index], counts[index]),
                exited_early=exited[index],
                draft=draft,
                num_draft_tokens_accepted=accepted[index],
                decision_score=scores[index],
                draft_complete=bool(output.draft_complete[index]),
            )
            for index, (text, length, draft) in enumerate(
                zip(
                    pair.texts(pair.processor, written),
                    _answer_lengths(written, pair.model.large),
                    pair.texts(pair.processor.small_processor, output.draft_sequences),
                    strict=True,
                )
            )
        ]


@dataclass(frozen=True)
class SGL(SGP):
    """The whole method: guided pruning with early exit (paper, section 3.3).

    Attributes:
        thresholds: The decision score from which on the small model's answer is returned, by average retention;
            chosen on questions that are not evaluated.
    """

    thresholds: dict[float, float] = field(default_factory=dict)

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """See [`Method.answer`]."""
        return self._generate(pair, batch, setting, self.thresholds[setting.average_retention])


# ------------------------------------------------------------------------------------- guides without a small model


class Guide(Method):
    """A method that ranks the large model's visual tokens; the large model then keeps the first ones."""

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        """Watches the large model while it runs, if that is what the ranking takes.

        Args:
            pair ([`Pair`]): The models.
            batch ([`Batch`]): The samples.
            inputs (`BatchFeature`): The large model's inputs.
            tokens (`VisualTokens`): Their visual tokens.
            setting ([`Setting`]): What will be kept.

        Yields:
            `Callable`: Gives the importance, of shape `(batch, num_visual_tokens)`; called when the large model's
            prefill has come to the prune layer.
        """
        importance = self.importance(pair, batch, inputs, tokens)
        yield lambda: importance

    def importance(self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens) -> Tensor:
        """The importance of every visual token, known before the large model runs.

        Args:
            pair ([`Pair`]): The models.
            batch ([`Batch`]): The samples.
            inputs (`BatchFeature`): The large model's inputs.
            tokens (`VisualTokens`): Their visual tokens.

        Returns:
            `Tensor` of shape `(batch, num_visual_tokens)`: The importance.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no importance.")

    def setting(self, setting: Setting) -> Setting:
        """Where this guide prunes; by default where all do."""
        return setting

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """See [`Method.answer`]."""
        large, processor = pair.model.large, pair.processor.large_processor
        setting = self.setting(setting)
        inputs = pair.inputs(processor, batch.samples, batch.images)
        tokens = visual_tokens_of(large.config, inputs)
        # As in the pair's own `generate`.
        settings = SGLGenerationConfig().resolved(pair.model.generation_config)
        choose = ImportanceProcessorList.of_settings(setting.retention_ratio, settings.min_tokens_per_image)
        kept: list[Tensor] = []
        with ExitStack() as stack:
            importance = stack.enter_context(self.rank(pair, batch, inputs, tokens, setting))

            def keep_mask() -> Tensor:
                kept.append(choose.keep_mask(tokens, importance().float()))
                return tokens.prompt_keep_mask(kept[0])

            stack.enter_context(VisualTokenPruner(large, keep_mask, setting.prune_layer))
            written = pair.write(large, inputs)
        texts, lengths = pair.texts(processor, written), _answer_lengths(written, large)
        counts = zip(kept[0].sum(dim=1).tolist(), tokens.counts.tolist(), strict=True)
        return [
            Answer(text, length, setting.reached(num_kept, number))
            for text, length, (num_kept, number) in zip(texts, lengths, counts, strict=True)
        ]


@dataclass(frozen=True)
class Random(Guide):
    """Keeps visual tokens at random; what every guide has to beat."""

    def importance(self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens) -> Tensor:
        """Drawn sample by sample; see [`Guide.importance`]."""
        draws = [np.random.default_rng([pair.seed, index]).random(tokens.num_visual_tokens) for index in batch.indices]
        drawn = torch.tensor(np.stack(draws), dtype=torch.float32, device=tokens.valid.device)
        return drawn * tokens.valid


@dataclass(frozen=True)
class FastV(Guide):
    """The large model ranks its own tokens early: by what the prompt's last token attends to (arXiv 2403.06764).

    The attention is that of the layer before the prune layer, summed over its heads; it is read in the prefill itself,
    so it costs nothing. There must be such a layer: where the others prune from the first layer on, FastV prunes
    from the second, with the same number of tokens, and so processes more.
    """

    def setting(self, setting: Setting) -> Setting:
        """See [`Guide.setting`]."""
        if setting.prune_layer > 0:
            return setting
        average = average_retention(setting.retention_ratio, 1, setting.num_layers)
        return Setting(average, 1, setting.num_layers)

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        """See [`Guide.rank`]."""
        before = [setting.prune_layer - 1]
        with AttentionRecorder(pair.model.large, tokens, queries="last", layers=before) as recorder:
            yield lambda: recorder.importance


@dataclass(frozen=True)
class Oracle(Guide):
    """The large model's own attention over all layers, prompt and answer, from an unpruned run before.

    It saves nothing; it shows what the best imaginable guide of this kind would reach.
    """

    def importance(self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens) -> Tensor:
        """See [`Guide.importance`]."""
        with AttentionRecorder(pair.model.large, tokens) as recorder:
            pair.write(pair.model.large, inputs)
        return recorder.importance


@dataclass(frozen=True)
class DivPrune(Guide):
    """Keeps the tokens that differ most from each other: max-min diversity (arXiv 2503.02175).

    The distance of two visual tokens is one minus the cosine of their features, as the decoder is handed them. The
    first token is the one farthest from its nearest neighbour; then always the one farthest from all that are chosen.

    Attributes:
        from_first_layer: Whether to prune before the first layer, as published; else where the other methods prune.
            The average retention is the same.
    """

    from_first_layer: bool = True

    def setting(self, setting: Setting) -> Setting:
        """See [`Guide.setting`]."""
        return setting.from_layer(0) if self.from_first_layer else setting

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        """See [`Guide.rank`]."""
        ranked: list[Tensor] = []

        def read(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            embeddings = kwargs.get("inputs_embeds")
            if embeddings is not None and not ranked:  # the prefill: answers are read later, token by token
                places = tokens.positions[..., None].to(embeddings.device)
                features = embeddings.take_along_dim(places.expand(-1, -1, embeddings.shape[-1]), dim=1)
                ranked.append(max_min_diversity(features, tokens.valid, setting.retention_ratio))

        hook = decoder(pair.model.large).register_forward_pre_hook(read, with_kwargs=True)
        try:
            yield lambda: ranked[0]
        finally:
            hook.remove()


def max_min_diversity(features: Tensor, valid: Tensor, retention_ratio: float = 1.0) -> Tensor:
    """Ranks visual tokens by the order in which max-min diversity chooses them.

    Args:
        features (`Tensor` of shape `(batch, num_visual_tokens, width)`): What each token says.
        valid (`Tensor` of shape `(batch, num_visual_tokens)`): `False` where a sample has fewer tokens.
        retention_ratio (`float`, defaults to 1.0): The fraction that will be kept; the others are not ranked.

    Returns:
        `Tensor` of shape `(batch, num_visual_tokens)`: `num_visual_tokens` for the token chosen first, one less for
        the next, and 0 for those not ranked.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl.evaluation.methods import max_min_diversity

        >>> angles = torch.tensor([[0.0, 0.1, 3.1, 1.5]])
        >>> features = torch.stack([angles.cos(), angles.sin()], dim=-1)
        >>> max_min_diversity(features, torch.ones(1, 4, dtype=torch.bool), retention_ratio=0.5).tolist()
        [[3.0, 0.0, 4.0, 0.0]]

        ```
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    valid = valid.to(unit.device)
    distance = 1 - unit @ unit.transpose(1, 2)  # (batch, num_visual_tokens, num_visual_tokens)
    number, rows = valid.shape[1], torch.arange(valid.shape[0], device=unit.device)
    not_itself = distance.masked_fill(torch.eye(number, dtype=torch.bool, device=unit.device), torch.inf)
    nearest = not_itself.masked_fill(~valid[:, None, :], torch.inf).amin(dim=2)  # to any other token
    left, rank = valid.clone(), torch.zeros_like(nearest)
    for step in range(max(1, math.ceil(retention_ratio * number))):
        chosen = nearest.masked_fill(~left, -torch.inf).argmax(dim=1)
        rank[rows, chosen] = torch.where(left[rows, chosen], float(number - step), rank[rows, chosen])
        left[rows, chosen] = False
        to_chosen = distance[rows, chosen]
        nearest = to_chosen if step == 0 else torch.minimum(nearest, to_chosen)
    return rank


# --------------------------------------------------------------------------------------------------- a smaller image


@dataclass(frozen=True)
class Downsample(Method):
    """The large model alone on a smaller image, whose visual tokens are no more than the average retention allows.

    Of all sizes that fit, the finest picture is taken. Models that cut images into tiles get fewer tiles, and smaller
    ones where that is not enough (their vision encoder interpolates its positions); others get a smaller image.
    """

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """See [`Method.answer`]."""
        large, processor = pair.model.large, pair.processor.large_processor
        answers: dict[int, Answer] = {}
        groups: dict[_Size, list[int]] = {}
        for place, image in enumerate(batch.images):
            groups.setdefault(_fitting_size(processor, image.size, setting.average_retention), []).append(place)
        for size, places in groups.items():
            smaller, options = size.apply(processor)
            images = [size.resize(batch.images[place]) for place in places]
            inputs = pair.inputs(smaller, [batch.samples[place] for place in places], images, **options)
            written = pair.write(large, inputs)
            counts = visual_tokens_of(large.config, inputs).counts.tolist()
            texts, lengths = pair.texts(processor, written), _answer_lengths(written, large)
            for place, text, length, number in zip(places, texts, lengths, counts, strict=True):
                answers[place] = Answer(text, length, number / size.num_tokens_before)
        return [answers[place] for place in range(len(batch.images))]


@dataclass(frozen=True)
class _Size:
    """A smaller size of an image, and how to get there.

    Attributes:
        scale: The factor of the image's sides.
        num_tokens_before: The visual tokens at full size.
        tile_px: The side of a tile, for models that cut images into tiles.
        max_tiles: The most tiles.
    """

    scale: float
    num_tokens_before: int
    tile_px: int | None = None
    max_tiles: int | None = None

    def resize(self, image: Image.Image) -> Image.Image:
        """The image at this size."""
        if self.scale == 1:
            return image
        width, height = (max(1, round(side * self.scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def apply(self, processor: Any) -> tuple[Any, dict[str, Any]]:
        """A processor for this size, and its arguments."""
        if self.tile_px is None:
            return processor, {}
        smaller = copy.copy(processor)
        tokens = math.isqrt(processor.image_seq_length) * self.tile_px // processor.image_processor.size["height"]
        smaller.image_seq_length = tokens**2
        size = {"height": self.tile_px, "width": self.tile_px}
        return smaller, {"size": size, "min_patches": 1, "max_patches": self.max_tiles}


def _fitting_size(processor: Any, image_size: tuple[int, int], retention: float) -> _Size:
    """The finest size of an image, `(width, height)`, with at most this fraction of its visual tokens."""
    width, height = image_size
    image_processor = processor.image_processor
    if getattr(processor, "image_seq_length", None) and hasattr(image_processor, "get_number_of_image_patches"):
        per_side, native_px = math.isqrt(processor.image_seq_length), image_processor.size["height"]

        def num_tiles(tile_px: int, **options: int) -> int:
            tile = {"height": tile_px, "width": tile_px}  # the counter's name for what is otherwise called `size`
            return int(image_processor.get_number_of_image_patches(height, width, {"patch_size": tile, **options}))

        before = num_tiles(native_px) * processor.image_seq_length
        fitting = []
        for tokens in range(1, per_side + 1):
            tile_px = tokens * native_px // per_side
            for max_tiles in range(1, image_processor.max_patches + 1):
                tiles = num_tiles(tile_px, min_patches=1, max_patches=max_tiles)
                shown = max(1, tiles - 1)  # one of several is a thumbnail
                if tiles * tokens**2 <= max(1, retention * before):
                    fitting.append((shown * tile_px**2, -tiles, -max_tiles, tile_px))
        _, _, max_tiles, tile_px = max(fitting)
        return _Size(1.0, before, tile_px, -max_tiles)

    def num_tokens(scale: float) -> int:
        sizes = [(max(1, round(height * scale)), max(1, round(width * scale)))]
        return count_image_tokens(processor, sizes)[0]

    if not tells_image_tokens(processor):
        raise ValueError(
            f"{type(processor).__name__} does not tell how many tokens images have: leave downsample out of --methods."
        )
    before = num_tokens(1.0)
    scales = [0.98**step for step in range(230)]
    scale = next((scale for scale in scales if num_tokens(scale) <= retention * before), None)
    # Some processors enlarge small pictures, or know but one number of tokens: then as near to it as can be.
    return _Size(min(scales, key=num_tokens) if scale is None else scale, before)


# ------------------------------------------------------------------------------------------------------------ registry


METHODS: dict[str, Method] = {
    "large": Large(),
    "small": Small(),
    "sgp": SGP(),
    "sgl": SGL(),
    "random": Random(),
    "fastv": FastV(),
    "oracle": Oracle(),
    "divprune": DivPrune(),
    "divprune-late": DivPrune(from_first_layer=False),
    "downsample": Downsample(),
    "sgp-last": SGP(queries="last"),
    "sgp-prompt": SGP(queries="prompt"),
    "sgp-generated": SGP(queries="generated"),
    "sgp-10%": SGP(layers=0.1),
    "sgp-30%": SGP(layers=0.3),
    "sgp-50%": SGP(layers=0.5),
    "sgp-70%": SGP(layers=0.7),
}


def find_method(name: str) -> Method:
    """Looks a method up.

    Args:
        name (`str`): A key of [`METHODS`].

    Returns:
        `Method`: The method.

    Raises:
        ValueError: If there is no method of that name.
    """
    if name not in METHODS:
        raise ValueError(f"There is no method {name!r}: take some of {', '.join(METHODS)}.")
    return METHODS[name]


def _answer_lengths(written: Tensor, model: Any) -> list[int]:
    """The tokens of each answer of shape `(batch, answer_length)`, up to and with its end."""
    eos = model.generation_config.eos_token_id
    ends = torch.isin(written, torch.tensor([] if eos is None else eos, device=written.device).reshape(-1))
    length = written.shape[1]
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, length).tolist()
