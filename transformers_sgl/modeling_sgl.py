"""The pair as one transformers model; `generation_sgl` tells how it generates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.utils import ModelOutput, logging

from transformers_sgl.architectures import check_supported
from transformers_sgl.arguments import read_answer_arguments, read_arguments
from transformers_sgl.call import Call, OwnProcessors
from transformers_sgl.configuration_sgl import SGLConfig
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.generation_sgl import answer, generate, guide
from transformers_sgl.guidance import Guidance, json_settings, prompt_digests
from transformers_sgl.pair_of_models import PairOfModels, device_map, with_signature_of_large
from transformers_sgl.pretrained_pair import PretrainedPair
from transformers_sgl.storage.adapters import unwrapped
from transformers_sgl.storage.checkpoints import PARTS, Checkpoint
from transformers_sgl.storage.identity import identity
from transformers_sgl.storage.models import NO_WEIGHTS, has_weights
from transformers_sgl.tokens.importance_process import ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.tokens.importance_transfer import BOX_INPUTS, importance_transfer
from transformers_sgl.tokens.vocabulary import Vocabularies, load_tokenizers, vocabulary_sizes
from transformers_sgl.transformers_interface import AnyAttention, with_installed_cache_name

__all__ = ["SGLForConditionalGeneration"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")


class SGLForConditionalGeneration(PretrainedPair, PairOfModels, AnyAttention, PreTrainedModel, GenerationMixin):
    """A large vision-language model (VLM) whose visual tokens are pruned under the guidance of a small one.

    `generate` lets the small VLM answer first. The attention that visual tokens receive meanwhile ranks them, and the
    large VLM drops the low-ranked ones in the middle of its prefill (SGL, arXiv 2412.03324). Everything else, a plain
    `forward` included, is the large VLM.

    A pair is saved as a bundle, with an ordinary checkpoint in `large/` and in `small/`, or as a recipe of two names.

    Args:
        config ([`SGLConfig`], *optional*): The pair's configuration; needed only to build the models from it.
        large (`PreTrainedModel`, *optional*): The large VLM; built from `config`, with random weights, if not given.
        small (`PreTrainedModel`, *optional*): The small VLM; likewise.

    Raises:
        ValueError: If models and configuration are incomplete, or an architecture is not supported.

    Example:
        ```python
        >>> import transformers_sgl
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from transformers_sgl.hub import embedded_pair

        >>> model = AutoModelForImageTextToText.from_pretrained(embedded_pair())
        >>> processor = AutoProcessor.from_pretrained(embedded_pair())
        >>> chat = [{"role": "user", "content": [
        ...     {"type": "image", "path": str(embedded_pair() / "example.png")},
        ...     {"type": "text", "text": "describe the red triangle."},
        ... ]}]
        >>> inputs = processor.apply_chat_template(
        ...     chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> output = model.generate(**inputs, max_new_tokens=8, retention_ratio=0.25, return_dict_in_generate=True)
        >>> int(output.keep_mask.sum()), int(output.num_visual_tokens)
        (80, 320)

        ```
    """

    config_class = SGLConfig
    generation_config_class = SGLGenerationConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")

    def __init__(
        self,
        config: SGLConfig | None = None,
        large: PreTrainedModel | None = None,
        small: PreTrainedModel | None = None,
    ) -> None:
        if (large is None) != (small is None):
            raise ValueError("A pair needs two models: pass both `large` and `small`, or a configuration alone.")
        large, small = unwrapped("large", large), unwrapped("small", small)
        if large is None or small is None:
            if config is None or config.large_config is None:
                raise ValueError("Pass an `SGLConfig` with two models' configurations, or two models.")
            large, small = (
                AutoModelForImageTextToText.from_config(sub_config)
                for sub_config in (config.large_config, config.small_config)
            )
        for model in (large, small):
            check_supported(model.config)
        if small.num_parameters() > large.num_parameters():
            logger.warning(
                f"The small model has {small.num_parameters():,} parameters, the large one only "
                f"{large.num_parameters():,}: guidance then costs more than it saves, so swap them if they are "
                "swapped."
            )
        config = SGLConfig() if config is None else config
        config.large_config, config.small_config = large.config, small.config
        super().__init__(config)
        self.large = large
        self.small = small
        self.generation_config = SGLGenerationConfig.from_generation_config(large.generation_config)
        self._checkpoints: dict[str, Checkpoint] = {}
        self._known_vocabularies: Vocabularies | None = None
        self._known_identity: dict[str, dict[str, str | None]] = {}
        self.training = large.training or small.training
        self.post_init()
        placed = device_map(large=large, small=small)
        if placed:  # tells pipelines that the model has been placed
            self.hf_device_map = placed

    def init_weights(self) -> None:
        """Does nothing: both models come with their weights."""

    @property
    def importance_transfer(self) -> str:
        """How importance passes from the small model to the large one, as far as their types tell.

        `"identity"`, token by token, in one family; `"resampling"`, through image coordinates, for others and for
        inputs with boxes. The output of `generate` tells what was done.
        """
        return importance_transfer(self.large.config, self.small.config)

    @with_signature_of_large
    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> ModelOutput:
        """Runs the large model, unpruned; arguments and result are its own. `small_*` inputs and boxes are ignored."""
        # These two are named because `Trainer` and others look for them in the class.
        named = {"input_ids": input_ids, "labels": labels}
        kwargs |= {name: value for name, value in named.items() if value is not None}
        own = {name: kwargs[name] for name in kwargs if not name.startswith("small_") and name not in BOX_INPUTS}
        return self.large(**with_installed_cache_name(own))

    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        return_dict_in_generate: Literal[True],
        **kwargs: Any,
    ) -> SGLGenerateOutput: ...

    @overload
    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs: Any
    ) -> SGLGenerateOutput | Tensor: ...

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        importance_processor: ImportanceProcessor | ImportanceProcessorList | list[ImportanceProcessor] | None = None,
        vision_processor: ImportanceProcessor | ImportanceProcessorList | list[ImportanceProcessor] | None = None,
        small_tokenizer: Any = None,
        **kwargs: Any,
    ) -> SGLGenerateOutput | Tensor:
        """Writes answers: the small model's where it can be trusted, else the large one's, guided by the small one.

        Args:
            inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts, if not passed as `input_ids`.
            generation_config (`GenerationConfig`, *optional*): Settings; [`SGLGenerationConfig`] has those of the
                method too. As in transformers, fields that are `None` come from `model.generation_config`; a stock
                setting that is `None` in `kwargs` is unset.
            importance_processor ([`ImportanceProcessor`] or several, *optional*): Your own steps between the small
                model's attention and the choice of tokens; they run before those of the settings.
            vision_processor ([`ImportanceProcessor`] or several, *optional*): The same for what the large model's
                vision tower encodes; `visual_tokens.tile_index` tells them the tiles.
            small_tokenizer (`PreTrainedTokenizerBase`, *optional*): The small model's tokenizer, as `tokenizer` is the
                large model's; both are read from the checkpoints if not given.
            **kwargs: Model inputs (`input_ids`, `attention_mask`, `pixel_values`, ..., `small_*` for the small model's
                own, and `visual_token_boxes` and `small_visual_token_boxes` where the processor makes them), settings
                (`preset="fast"`, `retention_ratio=0.2`, `max_new_tokens=64`, ...) and arguments of stock `generate`
                (`streamer`, `logits_processor`, ...). `early_exit_threshold=None` means never to exit early, whatever
                the pair's own threshold. With `cache`, that of the conversation's earlier turns, pass all turns.

        Returns:
            `Tensor` of shape `(batch, prompt_length + answer_length)`: Prompts and answers; with
            `return_dict_in_generate=True` an [`SGLGenerateOutput`].

        Raises:
            ValueError: If a setting or an input cannot be used, with cause and cure.
        """
        self._check_weights(*PARTS)
        read = read_arguments(inputs, generation_config, kwargs, self.generation_config)
        return generate(self._call(read, small_tokenizer, importance_processor, vision_processor))

    @torch.no_grad()
    def guide(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        importance_processor: ImportanceProcessor | ImportanceProcessorList | list[ImportanceProcessor] | None = None,
        vision_processor: ImportanceProcessor | ImportanceProcessorList | list[ImportanceProcessor] | None = None,
        small_tokenizer: Any = None,
        **kwargs: Any,
    ) -> Guidance:
        """The first half of `generate`: the small model answers, and chooses what the large one is to see.

        Only the small model needs weights: with `large_device_map="meta"` those of the large one are not loaded.
        `generate(...)` is `answer(..., guidance=guide(...))`.

        Args:
            inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): As in `generate`.
            generation_config (`GenerationConfig`, *optional*): As in `generate`.
            importance_processor ([`ImportanceProcessor`] or several, *optional*): As in `generate`.
            vision_processor ([`ImportanceProcessor`] or several, *optional*): As in `generate`.
            small_tokenizer (`PreTrainedTokenizerBase`, *optional*): As in `generate`.
            **kwargs: As in `generate`. Settings go with the guidance; objects, such as a `logits_processor`, do not.
                Drafts are scored, unless `score_draft=False`.

        Returns:
            [`Guidance`]: All that `answer` needs, for `to_bytes` and another process.

        Raises:
            ValueError: If a setting or an input cannot be used, with cause and cure.
        """
        self._check_weights("small")
        read = read_arguments(inputs, generation_config, kwargs, self.generation_config)
        if read[0].score_draft is None and read[0].guidance != "prompt":
            read[0].score_draft = True
        call = self._call(read, small_tokenizer, importance_processor, vision_processor)
        if call.prompt is None or call.earlier is not None:
            raise ValueError(
                "Guidance is made for whole prompts, found by their `input_ids`: pass them, without a cache."
            )
        digests = prompt_digests(call.inputs["input_ids"], call.prompt.visual_tokens)
        found = replace(guide(call), drafter=None)  # whose cache would live as long as the guidance
        return replace(found, settings=json_settings(read[0]), prompts=digests, source=self.identity)

    @torch.no_grad()
    def answer(
        self, inputs: Tensor | None = None, *, guidance: Guidance, small_tokenizer: Any = None, **kwargs: Any
    ) -> SGLGenerateOutput | Tensor:
        """The second half of `generate`: the large model writes, guided by what the first one has decided.

        Only the large model needs weights: with `small_device_map="meta"` those of the small one are not loaded.

        Args:
            inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts of the guidance.
            guidance ([`Guidance`]): What `guide` has returned for them.
            small_tokenizer (`PreTrainedTokenizerBase`, *optional*): As in `generate`.
            **kwargs: Model inputs, the objects of stock `generate` (`streamer`, `logits_processor`, ...) and
                `return_dict_in_generate` or `output_*`. All other settings are those of the guidance.

        Returns:
            `Tensor` or [`SGLGenerateOutput`]: As from `generate`; `timings` has no `guidance_ms`.

        Raises:
            ValueError: If the guidance is that of another pair or of other prompts, or an argument cannot be used.
        """
        self._check_weights("large")
        guidance.check_source(self.identity)
        read = read_answer_arguments(inputs, guidance.generation_config(), kwargs)
        call = self._call(read, small_tokenizer)
        if call.prompt is None or call.earlier is not None:
            raise ValueError("Guidance was made for whole prompts: pass their `input_ids`, without a cache.")
        guidance.check_prompts(prompt_digests(call.inputs["input_ids"], call.prompt.visual_tokens))
        guidance.check_fits(call.prompt.visual_tokens.counts, call.prune_layer, vocabulary_sizes(self.large)[0])
        if not guidance.is_nothing:
            call.check()
        return answer(call, guidance.to(call.inputs["input_ids"].device))

    def _call(
        self,
        read: tuple[SGLGenerationConfig, dict[str, Any], dict[str, Any]],
        small_tokenizer: Any,
        importance_processor: OwnProcessors = None,
        vision_processor: OwnProcessors = None,
    ) -> Call:
        """What is asked of the two models."""
        settings, model_inputs, generate_kwargs = read
        return Call.read(
            self.large,
            self.small,
            model_inputs,
            settings,
            self._vocabularies.given(generate_kwargs.get("tokenizer"), small_tokenizer),
            importance_processor,
            vision_processor,
            **generate_kwargs,
        )

    def _check_weights(self, *parts: str) -> None:
        """Raises `ValueError` if one of these models was described only."""
        for name in parts:
            if not has_weights(getattr(self, name)):
                raise ValueError(
                    f"The {name} model of this pair has no weights here (`{name}_device_map={NO_WEIGHTS!r}`): call "
                    f"`{'answer' if name == 'small' else 'guide'}`, or load the pair without that."
                )

    @property
    def identity(self) -> dict[str, dict[str, str | None]]:
        """What tells this pair from others: type and revision of both models."""
        if not self._known_identity:
            self._known_identity = {name: identity(getattr(self, name), self._checkpoints.get(name)) for name in PARTS}
        return self._known_identity

    @property
    def _vocabularies(self) -> Vocabularies:
        """Those of the models as they are now: embeddings may have been resized since the last call."""
        sizes = vocabulary_sizes(self.large, self.small)
        if self._known_vocabularies is None or self._known_vocabularies.sizes != sizes:
            self._known_vocabularies = Vocabularies(self._load_tokenizers, sizes)
        return self._known_vocabularies

    def _load_tokenizers(self) -> list[Any]:
        places = [self._checkpoints.get(name) or Checkpoint(getattr(self, name).name_or_path) for name in PARTS]
        return load_tokenizers(*((place.path, place.where) for place in places))

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ValueError`: a paged cache cannot hold layers of different lengths; so do all that serve it."""
        raise ValueError(
            "A pair cannot run with continuous batching, whose paged cache holds equally many tokens of every layer: "
            "call `generate` with a batch, or `large.generate_batch` for the large model alone."
        )

    generate_batch = init_continuous_batching
    continuous_batching_context_manager = init_continuous_batching
    destroy_cached_continuous_batching_manager = init_continuous_batching


for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(SGLConfig, SGLForConditionalGeneration, exist_ok=True)
