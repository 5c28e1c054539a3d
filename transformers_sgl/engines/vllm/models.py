"""vLLM's own models, which also read pruned prompts.

A pruned request holds its kept visual tokens instead of images: for each image the features that the decoder is to
read, and what has to be told about positions ([`positions`]). Three stages of vLLM learn about it, each in a mixin:

    info        takes such data apart and checks it, in the process that takes requests
    processor   finds each image's tokens in the prompt, which are there already, and changes nothing
    model       hands the features on instead of encoding pixels, and tells vLLM the positions

Any other request, with text alone, pixels, or stock embeddings, goes the way that it goes in the stock model.

vLLM asks for a prompt's positions through its interface for M-RoPE, and gives the model three rows of them. A decoder
that counts in one dimension is handed the first of three equal rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from transformers_sgl.engines.vllm.families import feature_width
from transformers_sgl.engines.vllm.positions import NUM_ROWS, joined_positions
from transformers_sgl.engines.vllm.prompts import image_starts

__all__ = ["PrunedInternVL", "PrunedLlava", "PrunedQwen2_5_VL", "PrunedQwen3VL"]

EMBEDS, POSITIONS = "kept_embeds", "kept_positions"


def _fields(data: object = None) -> dict[str, Any]:
    """How vLLM divides the data of a request among its images."""
    # What stays on the CPU also stays with a request whose images are in the prefix cache.
    return {
        EMBEDS: MultiModalFieldConfig.batched("image"),
        POSITIONS: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }


class PrunedInfo:
    """Mixin for a processing info that also takes pruned requests."""

    def parse_mm_data(self, mm_data: Mapping[str, Any], *, validate: bool = True) -> Any:
        """The request's images; raises `ValueError` if they cannot be those of a pruned prompt."""
        images = mm_data.get("image")
        if not isinstance(images, Mapping) or not ({EMBEDS, POSITIONS} & images.keys()):
            return super().parse_mm_data(mm_data, validate=validate)  # type: ignore[misc]
        if len(mm_data) > 1:
            raise ValueError("A pruned request holds kept visual tokens of images alone: leave out other data.")
        embeds, positions = images.get(EMBEDS), images.get(POSITIONS)
        self._check(embeds, positions)
        context: Any = self.ctx  # type: ignore[attr-defined]
        if validate and not context.get_mm_config().enable_mm_embeds:
            raise ValueError("Pruned requests bring embeddings: start vLLM with `enable_mm_embeds`.")
        if validate and context.get_mm_config().get_limit_per_prompt("image"):  # 0: no tower, and no limit
            self.validate_num_items("image", len(embeds))  # type: ignore[attr-defined, arg-type]
        data = {EMBEDS: list(embeds), POSITIONS: list(positions)}  # type: ignore[arg-type]
        return MultiModalDataItems({"image": DictEmbeddingItems(data, "image", {EMBEDS, POSITIONS}, _fields)})

    def _check(self, embeds: Any, positions: Any) -> None:
        config: Any = self.get_hf_config()  # type: ignore[attr-defined]
        width = feature_width(config)
        limit = max(
            config.get_text_config().max_position_embeddings,
            self.ctx.model_config.max_model_len,  # type: ignore[attr-defined]
        )
        fits = isinstance(embeds, Sequence) and isinstance(positions, Sequence) and len(embeds) == len(positions) > 0
        for each, told in zip(embeds, positions, strict=True) if fits else ():
            fits = fits and isinstance(each, Tensor) and isinstance(told, Tensor)
            fits = fits and each.dim() == 2 and each.shape[1] == width and each.is_floating_point() and len(each) > 0
            fits = fits and told.dtype == torch.int64 and told.dim() == 2 and told.shape[0] == 1 + NUM_ROWS
            fits = fits and told.shape[1] > 0 and bool((told[1:] >= 0).all() & (told[1:] < limit).all())
        if not fits:
            raise ValueError(
                f"The images of a pruned request must be lists `{EMBEDS}` and `{POSITIONS}` of equal length, with "
                f"floating point tensors (num_kept, {width}) and integer tensors ({1 + NUM_ROWS}, num_told) of "
                f"positions below {limit}: make requests with `pruned_request`."
            )


class PrunedProcessor:
    """Mixin for a multi-modal processor that also takes pruned requests."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        if EMBEDS in hf_inputs:
            return _fields()
        return super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        if self._pruned(mm_items) is not None:
            return []  # the prompt holds the kept tokens already
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        """Where the images are in the prompt; raises `ValueError` if they do not fit it."""
        images = self._pruned(mm_items)
        if images is None:
            return super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        prompt, items = list(mm_res.prompt_ids), images.get_all()
        starts, sizes = image_starts(self.info.get_hf_config(), prompt)  # type: ignore[attr-defined]
        given = [len(each[EMBEDS]) for each in items]
        if sizes != given:
            raise ValueError(
                f"The images of the pruned prompt have {sizes} tokens, but features of {given} were passed: pass the "
                "prompt and the images of one request together."
            )
        joined_positions([each[POSITIONS] for each in items], starts, len(prompt))  # raises in this process already
        places = [
            PlaceholderFeaturesInfo("image", index, start, prompt[start : start + size], None)
            for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
        ]
        return prompt, {"image": places}

    @staticmethod
    def _pruned(mm_items: Any) -> Any:
        """The images of a pruned request; `None` for any other."""
        images = mm_items.get("image")
        is_pruned = isinstance(images, DictEmbeddingItems) and EMBEDS in images.required_fields
        return images if is_pruned else None


class PrunedModel:
    """Mixin for a model that also takes pruned requests."""

    # vLLM's protocol `SupportsMRoPE`, which as a base class of a mixin would hide the model's own `__init__`.
    supports_mrope = True
    # Whether the stock model knows nothing of positions in three dimensions.
    counts_in_one_dimension = False

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """What the decoder reads in the places of visual tokens."""
        kept = kwargs.get(EMBEDS)
        return super().embed_multimodal(**kwargs) if kept is None else tuple(kept)  # type: ignore[misc]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """The prompt's positions, `(3, prompt_length)`, and how far the answer's are ahead of its tokens' number."""
        told = [each.data[POSITIONS].data for each in mm_features if POSITIONS in (each.data or {})]
        if not told and not self.counts_in_one_dimension:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        starts = [each.mm_position.offset for each in mm_features] if told else []
        # After a preemption, the prompt may include a part of the answer, which counts on.
        positions = joined_positions(told, starts, len(input_tokens))
        return positions, int(positions.max()) + 1 - len(input_tokens)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the stock model; a decoder of one dimension is given the first of three equal rows of positions."""
        if self.counts_in_one_dimension and positions.dim() == 2:
            positions = positions[0]
        # vLLM limits a request by the number of its tokens, but its last positions are further: an answer that runs
        # out of the rotary table stays at its end, instead of reading what lies behind it. In place, because a
        # captured graph reads from where the positions lie.
        positions.clamp_(max=self._last_position)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)  # type: ignore[misc]

    @cached_property
    def _last_position(self) -> int:
        language_model: Any = self.language_model  # type: ignore[attr-defined]
        tables = (getattr(each, "cos_sin_cache", None) for each in language_model.modules())
        return min((len(each) for each in tables if each is not None), default=2**31) - 1


class _InternVLInfo(PrunedInfo, InternS1ProcessingInfo):
    pass


class _InternVLProcessor(PrunedProcessor, InternS1MultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _InternVLProcessor, info=_InternVLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class PrunedInternVL(PrunedModel, InternS1ForConditionalGeneration):
    """InternVL in transformers' own format."""

    counts_in_one_dimension = True


class _LlavaInfo(PrunedInfo, LlavaProcessingInfo):
    pass


class _LlavaProcessor(PrunedProcessor, LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_LlavaProcessor, info=_LlavaInfo, dummy_inputs=LlavaDummyInputsBuilder)
class PrunedLlava(PrunedModel, LlavaForConditionalGeneration):
    """LLaVA with a CLIP or SigLIP tower."""

    counts_in_one_dimension = True
    # Newer versions of transformers save the tower without this part of its weights' names.
    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_regex={re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)"): r"\1vision_model."}
    )


class _Qwen2_5_VLInfo(PrunedInfo, Qwen2_5_VLProcessingInfo):  # noqa: N801
    pass


class _Qwen2_5_VLProcessor(PrunedProcessor, Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _Qwen2_5_VLProcessor, info=_Qwen2_5_VLInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen2_5_VL(PrunedModel, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL."""


class _Qwen3VLInfo(PrunedInfo, Qwen3VLProcessingInfo):
    pass


class _Qwen3VLProcessor(PrunedProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_Qwen3VLProcessor, info=_Qwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder)
class PrunedQwen3VL(PrunedModel, Qwen3VLForConditionalGeneration):
    """Qwen3-VL, whose features hold those of its deepstack layers."""
