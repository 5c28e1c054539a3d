"""One `generate` call, read once: its inputs, its settings, and what they ask for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.answer_rules import AnswerRules
from transformers_sgl.architectures import check_prunable, check_supported, decoder_layers
from transformers_sgl.arguments import split_inputs
from transformers_sgl.clock import Clock
from transformers_sgl.generation_config_sgl import (
    SGLGenerationConfig,
    resolve_prune_layer,
    resolve_vision_prune_layer,
)
from transformers_sgl.hooks.conversation import ConversationCache
from transformers_sgl.prompt import Prompt
from transformers_sgl.token_choice import choosing_processors
from transformers_sgl.tokens.importance_process import ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.tokens.importance_transfer import split_boxes
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import CACHE_NAMES, cache_of
from transformers_sgl.versions import names_versions
from transformers_sgl.vision_towers import vision_layers

__all__ = ["Call", "OwnProcessors"]

OwnProcessors = ImportanceProcessor | Iterable[ImportanceProcessor] | None
"""The user's own rules for the choice of visual tokens, one or several."""


@dataclass
class Call:
    """One `generate` call, read once: what both halves of it know.

    Attributes:
        large (`PreTrainedModel`): The large model.
        small (`PreTrainedModel`): The small model.
        settings ([`SGLGenerationConfig`]): The resolved settings.
        rules ([`AnswerRules`]): What they and the other arguments make of an answer.
        inputs (`dict`): The large model's inputs.
        small_inputs (`dict`): The small model's inputs.
        boxes (`tuple` of two `Tensor`, *optional*): Where the visual tokens of both lie.
        prompt ([`Prompt`], *optional*): What the large model reads; `None` where visual tokens cannot be found.
        earlier ([`ConversationCache`], *optional*): The earlier turns of the conversation.
        keeps_cache (`bool`): Whether the cache is wanted.
        of_tower ([`ImportanceProcessorList`]): What chooses visual tokens for the large model's tower, ...
        of_decoder ([`ImportanceProcessorList`]): ... and for its decoder.
        own_processors (`tuple`): The user's own, of the decoder and of the tower.
        kwargs (`dict`): The other arguments of the large model's `generate`.
        clock ([`Clock`]): Running since the call.
    """

    large: PreTrainedModel
    small: PreTrainedModel
    settings: SGLGenerationConfig
    rules: AnswerRules
    inputs: dict[str, Any]
    small_inputs: dict[str, Any]
    boxes: tuple[Tensor, Tensor] | None
    prompt: Prompt | None
    earlier: ConversationCache | None
    keeps_cache: bool
    of_tower: ImportanceProcessorList
    of_decoder: ImportanceProcessorList
    own_processors: tuple[OwnProcessors, OwnProcessors]
    kwargs: dict[str, Any]
    clock: Clock

    @classmethod
    @names_versions()
    def read(
        cls,
        large: PreTrainedModel,
        small: PreTrainedModel,
        inputs: dict[str, Any],
        settings: SGLGenerationConfig,
        vocabularies: Vocabularies,
        importance_processor: OwnProcessors = None,
        vision_processor: OwnProcessors = None,
        **generate_kwargs: Any,
    ) -> Call:
        """Finds the visual tokens and what is asked for.

        `inputs` are the large model's, with `input_ids` of shape `(batch, prompt_length)`; `small_*` keys replace or
        extend them for the small model. Where the models cut images differently, they also hold `visual_token_boxes`
        and `small_visual_token_boxes` of shape `(batch, num_visual_tokens, 5)`: for each visual token the number of
        the image within its sample, and left, top, right and bottom as fractions of that image; -1 in padding. With
        these, plain tensors are the large model's alone. `importance_processor` and `vision_processor` are the user's
        own, one or several, which run before those of the `settings`; `generate_kwargs` go to the large model's
        `generate`. Raises `ValueError` if an input or a setting cannot be read.
        """
        clock = Clock(large.device, small.device)
        inputs, boxes = split_boxes(inputs)
        large_inputs, small_inputs = split_inputs(inputs, shares_tensors=boxes is None)
        keeps_cache = bool(settings.return_dict_in_generate) or cache_of(large_inputs) is not None
        earlier = cache if isinstance(cache := cache_of(large_inputs), ConversationCache) else None
        if earlier is not None:
            large_inputs = {name: value for name, value in large_inputs.items() if name not in CACHE_NAMES}
        own = importance_processor, vision_processor
        of_tower, of_decoder = choosing_processors(settings, *own)
        if earlier is not None:  # the images were encoded in its first turn
            of_tower = ImportanceProcessorList()
        rules = AnswerRules.of(settings, generate_kwargs, vocabularies, large_inputs)
        kwargs = {**generate_kwargs, "generation_config": rules.large_settings()}
        prompt = Prompt.find(large.config, large_inputs)
        found = (settings, rules, large_inputs, small_inputs, boxes, prompt, earlier, keeps_cache)
        call = cls(large, small, *found, of_tower, of_decoder, own, kwargs, clock)
        if earlier is not None:
            layer = call.prune_layer if call.prunes else None
            earlier.check(prompt, layer, settings.use_cache is not False)
        return call

    @property
    def prune_layer(self) -> int:
        """The first decoder layer of the large model that sees fewer visual tokens."""
        return resolve_prune_layer(self.settings.prune_layer, len(decoder_layers(self.large)))

    @property
    def prunes(self) -> bool:
        """Whether visual tokens are left out."""
        return bool(self.of_decoder or self.of_tower)

    @property
    def confirms(self) -> bool:
        """Whether the pruned large model only confirms drafts."""
        return self.prunes and self.settings.confirmation_threshold is not None

    @property
    def is_guided(self) -> bool:
        """Whether anything asks for the small model; without visual tokens the large one runs alone."""
        wanted = self.prunes or self.earlier is not None or self.rules.may_exit
        wanted = wanted or self.rules.can_use_draft(self.inputs)
        return wanted and (self.prompt is None or self.prompt.visual_tokens.num_visual_tokens > 0)

    def check(self) -> None:
        """Raises `ValueError` for what cannot be done, before anything has run."""
        check_supported(self.small.config)
        self.rules.check_guidable(self.inputs)
        if self.of_tower:
            resolve_vision_prune_layer(self.settings.vision_prune_layer, len(vision_layers(self.large)))
        if self.prunes:
            check_prunable(self.large.config, self.prune_layer)
        if self.prunes or self.earlier is not None:
            self.rules.check_prunable(self.inputs)
        if self.rules.may_exit:
            self.rules.check_exits(self.inputs)
        if self.confirms:
            self.rules.check_confirmations(self.inputs, self.earlier)

    def read_prompt(self) -> Prompt:
        """The prompts as the large model reads them: what is pruned is padded on the left."""
        return Prompt.of(self.large.config, self.inputs, as_passed=not self.prunes and self.earlier is None)
