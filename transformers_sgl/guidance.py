"""What passes from the small model to the large one: guidance that can be written down and sent elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.tokens import early_exit
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["Guidance", "json_settings", "prompt_digests"]

_KEY = "transformers_sgl.guidance"
_FORMAT = 1
_HEADER_LENGTH = 8  # bytes that hold the length of a safetensors header

# The tensors, by what their second axis counts; the first is the batch.
_OF_BATCH, _OF_VISUAL_TOKENS, _OF_DRAFT, _OF_SMALL_DRAFT = "batch", "visual token", "draft token", "small draft token"
_TENSORS: dict[str, tuple[str, torch.dtype]] = {
    "exited_early": (_OF_BATCH, torch.bool),
    "num_visual_tokens": (_OF_BATCH, torch.long),
    "draft_complete": (_OF_BATCH, torch.bool),
    "confidence": (_OF_BATCH, torch.float32),
    "consistency": (_OF_BATCH, torch.float32),
    "draft": (_OF_DRAFT, torch.long),
    "draft_mask": (_OF_DRAFT, torch.bool),
    "draft_sequences": (_OF_SMALL_DRAFT, torch.long),
    "importance": (_OF_VISUAL_TOKENS, torch.float32),
    "keep_mask": (_OF_VISUAL_TOKENS, torch.bool),
    "vision_keep_mask": (_OF_VISUAL_TOKENS, torch.bool),
}
_ALWAYS = ("exited_early", "num_visual_tokens", "draft_complete", "draft", "draft_mask", "draft_sequences")
_VALUES: dict[str, type] = {
    "importance_transfer": str,
    "prune_layer": int,
    "vision_prune_layer": int,
    "settings": dict,
    "prompts": list,
    "source": dict,
    "guidance_ms": float,
}


@dataclass(frozen=True)
class Guidance:
    """All that the large model needs of the small one for a batch of prompts.

    [`SGLForConditionalGeneration.guide`] makes it, [`SGLForConditionalGeneration.answer`] takes it, here or in another
    process: `to_bytes` writes it down, in about six bytes for each visual token. It names the pair and the prompts
    that it was made for, and is refused with others.

    Attributes:
        exited_early (`Tensor` of shape `(batch,)`): `True` where the small model's answer is the answer.
        num_visual_tokens (`Tensor` of shape `(batch,)`): The number of visual tokens in each prompt.
        draft (`Tensor` of shape `(batch, draft_length)`): The small model's answers in the large model's vocabulary,
            padded on the right; of length 0 where it wrote none.
        draft_mask (`Tensor` of shape `(batch, draft_length)`): `True` for their tokens.
        draft_complete (`Tensor` of shape `(batch,)`): `True` where such an answer is whole.
        draft_sequences (`Tensor` of shape `(batch, small_draft_length)`): The same in its own vocabulary.
        importance (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): The attention that each of the large
            model's visual tokens received; `None` where nothing is pruned.
        importance_transfer (`str`, *optional*): How it was carried over, `"identity"` or `"resampling"`.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for the visual tokens that the
            large model's decoder keeps; none in a sample that exits.
        prune_layer (`int`, *optional*): The first decoder layer that sees only these.
        vision_keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for those that its vision
            tower encodes, where it leaves some out.
        vision_prune_layer (`int`, *optional*): The tower's first layer that sees only their patches; `None` where only
            whole tiles are left out.
        confidence (`Tensor` of shape `(batch,)`, *optional*): How sure the small model was.
        consistency (`Tensor` of shape `(batch,)`, *optional*): How probable its answer stays with few visual tokens.
        settings (`dict`, *optional*): The settings of the call, which hold for the answer too.
        prompts (`list[str]`, *optional*): A digest of each prompt.
        source (`dict`, *optional*): The two models, by type and revision.
        guidance_ms (`float`): How long it took, in milliseconds of wall-clock time.
        drafter (*optional*): The small model, ready to draft on. Only within `generate`: it is not written down.

    Example:
        ```python
        >>> from transformers_sgl import Guidance
        >>> from transformers_sgl.hub import embedded_pair
        >>> from transformers_sgl.opening import chat_inputs, open_pair, user_turn
        >>> from PIL import Image

        >>> pair, processor = open_pair(embedded_pair())
        >>> image = Image.open(embedded_pair() / "example.png")
        >>> inputs = chat_inputs(pair, processor, [user_turn("describe the red triangle.", [image])])
        >>> data = pair.guide(**inputs, max_new_tokens=16).to_bytes()
        >>> output = pair.answer(**inputs, guidance=Guidance.from_bytes(data))
        >>> bool((output == pair.generate(**inputs, max_new_tokens=16)).all())
        True

        ```
    """

    exited_early: Tensor
    num_visual_tokens: Tensor
    draft: Tensor
    draft_mask: Tensor
    draft_complete: Tensor
    draft_sequences: Tensor
    importance: Tensor | None = None
    importance_transfer: str | None = None
    keep_mask: Tensor | None = None
    prune_layer: int | None = None
    vision_keep_mask: Tensor | None = None
    vision_prune_layer: int | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None
    settings: dict[str, Any] | None = None
    prompts: list[str] | None = None
    source: dict[str, Any] | None = None
    guidance_ms: float = 0.0
    drafter: Any = None

    @classmethod
    def nothing(cls, num_visual_tokens: Tensor) -> Guidance:
        """That of prompts for which the small model need not run; their numbers have the shape `(batch,)`."""
        none = torch.zeros_like(num_visual_tokens, dtype=torch.bool)
        ids = num_visual_tokens.new_zeros(len(none), 0)
        return cls(none, num_visual_tokens, ids, ids.bool(), none, ids)

    @property
    def has_draft(self) -> bool:
        """Whether the small model has written."""
        return self.draft_sequences.shape[1] > 0

    @property
    def is_nothing(self) -> bool:
        """Whether the small model did not run."""
        return self.importance is None and not self.has_draft

    @property
    def decision_score(self) -> Tensor | None:
        """The mean of both scores, of shape `(batch,)`; `None` where they were not computed."""
        if self.confidence is None or self.consistency is None:
            return None
        return early_exit.decision_score(self.confidence, self.consistency)

    def fields(self) -> dict[str, Any]:
        """The fields of an output that the guidance alone decides."""
        names = ["importance", "importance_transfer", "exited_early", "num_visual_tokens"]
        names += ["confidence", "consistency", "decision_score"]
        names += ["draft_sequences", "draft_complete"] if self.has_draft else []
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> Guidance:
        """The same on another device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def select(self, chosen: Tensor) -> Guidance:
        """That of the samples that are `chosen`, of shape `(batch,)`, such as those that do not exit early."""
        rows = {name: value[chosen.to(value.device)] for name, value in self._tensors().items()}
        for name, (axis, _) in _TENSORS.items():
            if axis == _OF_VISUAL_TOKENS and name in rows:  # without the padding that only the others needed
                rows[name] = rows[name][:, : max(rows["num_visual_tokens"].tolist(), default=0)]
        prompts = self.prompts
        if prompts is not None:
            prompts = [each for each, wanted in zip(prompts, chosen.tolist(), strict=True) if wanted]
        return replace(self, **rows, prompts=prompts)

    def generation_config(self) -> SGLGenerationConfig:
        """The settings of the call."""
        return SGLGenerationConfig(**(self.settings or {}))

    def check_source(self, pair: Mapping[str, Mapping[str, str | None]]) -> None:
        """Raises `ValueError` if another pair than this one has made it."""
        for name, own in pair.items():
            made_by = (self.source or {}).get(name)
            if not isinstance(made_by, Mapping):
                raise ValueError("The guidance does not say which pair made it: make it anew with `guide`.")
            known = [key for key, value in own.items() if None not in (value, made_by.get(key))]
            if own.get("type") != made_by.get("type") or any(own[key] != made_by[key] for key in known):
                raise ValueError(
                    f"The guidance was made by another pair, whose {name} model is {_named(made_by)} and not "
                    f"{_named(own)}: make it anew with this pair's `guide`."
                )

    def check_prompts(self, digests: Sequence[str]) -> None:
        """Raises `ValueError` if it was made for other prompts than those of these digests."""
        if list(self.prompts or ()) != list(digests):
            raise ValueError(
                f"The guidance was made for {len(self.exited_early)} prompts other than these {len(digests)}: pass "
                "the inputs that it was made for, prepared in the same way, or `guidance.select(...)` for a part."
            )

    def check_fits(self, num_visual_tokens: Tensor, prune_layer: int, vocab_size: int) -> None:
        """Raises `ValueError` if what it says is nothing that the large model could do."""
        layers = {self.prune_layer, prune_layer} - {None}
        width = int(num_visual_tokens.max())
        masks = [each for each in (self.importance, self.keep_mask, self.vision_keep_mask) if each is not None]
        ids = self.draft[self.draft_mask]
        if (
            len(layers) > 1
            or self.num_visual_tokens.tolist() != num_visual_tokens.tolist()
            or any(each.shape[1] != width for each in masks)
            or (self.vision_keep_mask is not None and self.keep_mask is None)
            or (self.keep_mask is None) != (self.prune_layer is None)
            or (len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size)
        ):
            raise ValueError("The guidance does not fit its own prompts and settings: make it anew with `guide`.")

    def to_bytes(self) -> bytes:
        """The guidance in the safetensors format, whose metadata hold what is no tensor."""
        values = {name: getattr(self, name) for name in _VALUES if getattr(self, name) is not None}
        # Cloned, because tensors that share memory are refused.
        tensors = {
            name: value.cpu().to(_TENSORS[name][1]).contiguous().clone() for name, value in self._tensors().items()
        }
        return save(tensors, metadata={_KEY: json.dumps({"format": _FORMAT, **values})})

    @classmethod
    def from_bytes(cls, data: bytes) -> Guidance:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: If it is no guidance, or one whose parts do not fit together.
        """
        try:
            tensors: dict[str, Any] = load(bytes(data))
            header = json.loads(
                data[_HEADER_LENGTH : _HEADER_LENGTH + int.from_bytes(data[:_HEADER_LENGTH], "little")]
            )
            values = json.loads(header.get("__metadata__", {}).get(_KEY, "null"))
        except (SafetensorError, RecursionError, ValueError) as error:
            raise ValueError(f"These bytes are no guidance: {error}.") from error
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise ValueError("These bytes are no guidance, or that of another version: make it anew with `guide`.")
        _check_values(values)
        _check_tensors(tensors, values)
        guidance = cls(**tensors, **values)
        try:
            guidance.generation_config()
        except Exception as error:  # transformers' own checks fail in many ways
            raise ValueError(f"The guidance has settings that cannot be read: {error}.") from error
        return guidance

    def _tensors(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}


def json_settings(settings: SGLGenerationConfig) -> dict[str, Any]:
    """The settings that are set, as JSON can hold them."""
    values = {name: value for name, value in settings.to_dict().items() if value is not None}
    if isinstance(values.get("sequence_bias"), dict):  # whose keys are tuples
        values["sequence_bias"] = [[list(ids), bias] for ids, bias in values["sequence_bias"].items()]
    return values


def prompt_digests(prompt_ids: Tensor, visual_tokens: VisualTokens) -> list[str]:
    """What tells prompts apart, one for each row of `(batch, prompt_length)`; padding does not count."""
    rows = zip(prompt_ids.cpu(), visual_tokens.prompt_mask.cpu(), strict=True)
    return [hashlib.sha256(ids[mask].to(torch.long).numpy().tobytes()).hexdigest()[:32] for ids, mask in rows]


def _named(model: Mapping[str, str | None]) -> str:
    """One model of a pair in a sentence."""
    return f"{model.get('type')} ({str(model.get('revision'))[:12]})"


def _check_values(values: Mapping[str, Any]) -> None:
    """Raises if what is no tensor has another name or type than it should."""
    for name, value in values.items():
        kind = _VALUES.get(name)
        if kind is None or not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"The guidance has a field {name[:40]!r} that cannot be read: make it anew with `guide`.")
    if not all(isinstance(each, str) for each in values.get("prompts", ())):
        raise ValueError("The guidance has a field 'prompts' that cannot be read: make it anew with `guide`.")


def _check_tensors(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Raises if a tensor is missing, unknown, of another type, or of a shape that does not fit the others."""
    missing = [name for name in _ALWAYS if name not in tensors]
    strange = [name for name in tensors if name not in _TENSORS]
    if missing or strange:
        raise ValueError(f"The guidance lacks {missing} or has {strange}, unlike any that `guide` makes.")
    lengths: dict[str, int] = {_OF_BATCH: len(tensors["exited_early"])} if tensors["exited_early"].dim() else {}
    if len(values.get("prompts", tensors["exited_early"])) != lengths.get(_OF_BATCH):
        raise ValueError("The guidance is of another number of prompts than it names.")
    for name, tensor in tensors.items():
        axis, dtype = _TENSORS[name]
        wanted: tuple[int, ...] = (lengths[_OF_BATCH],)
        if axis != _OF_BATCH:
            length = tensor.shape[1] if tensor.dim() == 2 else -1
            wanted = (*wanted, lengths.setdefault(axis, length))
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype:
            raise ValueError(
                f"The guidance's `{name}` has the shape {tuple(tensor.shape)} and the type {tensor.dtype}, which do "
                "not fit the rest: make it anew with `guide`."
            )


assert {*_TENSORS, *_VALUES, "drafter"} == {field.name for field in fields(Guidance)}
