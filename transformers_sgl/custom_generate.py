"""Guided generation for a stock large model: `large.generate(..., custom_generate=sgl_generate, small_model=small)`.

Floor 4, beside the model class, which it does without: whoever has two loaded models need not make a pair of them.
transformers hands a call of `generate` over in two ways:

- to the function of a repository, as it was made: [`generate_with_small_model`];
- to a callable, prepared for a decoding loop: [`sgl_generate`] takes that preparation back, because each of the two
  models prepares a call of its own.
"""

from __future__ import annotations

import inspect
from inspect import Parameter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from transformers_sgl.architectures import ARCHITECTURES
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.generation_sgl import SGLGenerateOutput, generate, read_arguments
from transformers_sgl.importance_process import ImportanceProcessor
from transformers_sgl.importance_transfer import BOX_INPUTS
from transformers_sgl.vocabulary import Vocabularies, load_tokenizers

__all__ = ["generate_with_small_model", "sgl_generate"]

# Inputs that stock `generate` changes on the way to a callable, by encoding or repeating the images. A callable that
# names them itself is handed them untouched.
_IMAGE_INPUTS = sorted({name for architecture in ARCHITECTURES.values() for name in architecture.inputs})
# What the small model may read otherwise than the large one, and where both models' visual tokens lie.
_TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
_SMALL_INPUTS = [*(f"small_{name}" for name in (*_TOKEN_INPUTS, *_IMAGE_INPUTS)), *BOX_INPUTS]
# What stock `generate` adds to the inputs; the call that follows adds its own.
_PREPARED_INPUTS = (
    "logits_to_keep",
    "mm_encoder_outputs",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "use_cache",
)


def generate_with_small_model(
    model: PreTrainedModel,
    small_model: PreTrainedModel | None = None,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    importance_processor: ImportanceProcessor | list[ImportanceProcessor] | None = None,
    small_tokenizer: Any = None,
    **kwargs: Any,
) -> SGLGenerateOutput | Tensor:
    """What [`SGLForConditionalGeneration.generate`] does, for two models that are not a pair.

    Args:
        model (`PreTrainedModel`): The large model.
        small_model (`PreTrainedModel`): The small model.
        inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts, if not passed as `input_ids`.
        generation_config (`GenerationConfig`, *optional*): Settings; what is not set comes from the large model's.
        importance_processor ([`ImportanceProcessor`] or several, *optional*): Your own steps between the small
            model's attention and the choice of tokens.
        small_tokenizer (`PreTrainedTokenizerBase`, *optional*): The small model's tokenizer, as `tokenizer` is the
            large model's; both are read from the checkpoints if not given.
        **kwargs: Model inputs, settings and arguments of stock `generate`.

    Returns:
        `Tensor` of shape `(batch, prompt_length + answer_length)`: Prompts and answers; with
        `return_dict_in_generate=True` an [`SGLGenerateOutput`].

    Raises:
        ValueError: If there is no small model, or a setting or an input cannot be used.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl.custom_generate import generate_with_small_model
        >>> from transformers_sgl.hub import embedded_pair

        >>> large, small = (
        ...     AutoModelForImageTextToText.from_pretrained(embedded_pair() / name) for name in ("large", "small")
        ... )
        >>> prompt = torch.arange(20, 32)[None]  # any twelve tokens
        >>> guided = generate_with_small_model(large, small, prompt, max_new_tokens=4, verify_draft=True)
        >>> torch.equal(guided, large.generate(prompt, max_new_tokens=4))
        True

        ```
    """
    if not isinstance(small_model, PreTrainedModel):
        raise ValueError(
            f"Guidance needs a small model, but `small_model` is {small_model!r}: load one with `from_pretrained` and "
            "pass it, or call the `generate` of a pair without `custom_generate`."
        )
    settings, model_inputs, generate_kwargs = read_arguments(inputs, generation_config, kwargs)
    tokenizers = generate_kwargs.get("tokenizer"), small_tokenizer
    return generate(
        model,
        small_model,
        model_inputs,
        settings.resolved(model.generation_config),
        _vocabularies(model, small_model, *tokenizers),
        importance_processor,
        **generate_kwargs,
    )


def sgl_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    small_model: PreTrainedModel | None = None,
    importance_processor: ImportanceProcessor | list[ImportanceProcessor] | None = None,
    small_tokenizer: Any = None,
    **kwargs: Any,
) -> SGLGenerateOutput | Tensor:
    """Guided generation as a callable for stock `generate`: pass it as `custom_generate`, not its arguments to it.

    `large.generate(**inputs, custom_generate=sgl_generate, small_model=small, retention_ratio=0.2)` takes every
    setting of [`SGLGenerationConfig`] and `small_*` inputs, and returns what a pair's `generate` returns. What stock
    `generate` does not pass on to a callable (`streamer`, `tokenizer` and with it `stop_strings`, `assistant_model`)
    is bound to it instead: `custom_generate=functools.partial(sgl_generate, streamer=streamer)`.

    Args:
        model (`PreTrainedModel`): The large model; from here to `generation_config`: as stock `generate` passes them.
        input_ids (`Tensor` of shape `(batch, prompt_length)`): The prompts, repeated for several answers or beams.
        logits_processor (`LogitsProcessorList`): Those that the settings ask for, and the user's own.
        stopping_criteria (`StoppingCriteriaList`): Likewise.
        generation_config (`GenerationConfig`): The prepared settings.
        small_model (`PreTrainedModel`): The small model.
        importance_processor ([`ImportanceProcessor`] or several, *optional*): Your own steps between the small
            model's attention and the choice of tokens.
        small_tokenizer (`PreTrainedTokenizerBase`, *optional*): The small model's tokenizer; `tokenizer` is bound.
        **kwargs: Model inputs, `small_*` inputs and settings.

    Returns:
        `Tensor` of shape `(batch, prompt_length + answer_length)`: Prompts and answers; with
        `return_dict_in_generate=True` an [`SGLGenerateOutput`].

    Raises:
        ValueError: If there is no small model, or a setting or an input cannot be used.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl import sgl_generate
        >>> from transformers_sgl.hub import embedded_pair

        >>> large, small = (
        ...     AutoModelForImageTextToText.from_pretrained(embedded_pair() / name) for name in ("large", "small")
        ... )
        >>> prompt = torch.arange(20, 32)[None]  # any twelve tokens
        >>> output = large.generate(
        ...     prompt,
        ...     custom_generate=sgl_generate,
        ...     small_model=small,
        ...     verify_draft=True,
        ...     max_new_tokens=4,
        ...     return_dict_in_generate=True,
        ... )
        >>> torch.equal(output.sequences, large.generate(prompt, max_new_tokens=4))
        True

        ```
    """
    own_processors, own_criteria = _own(
        model, logits_processor, stopping_criteria, generation_config, input_ids, kwargs
    )
    inputs = {name: value for name, value in kwargs.items() if name not in _PREPARED_INPUTS}
    cache = inputs.pop("past_key_values", None)
    if getattr(cache, "_is_user_defined", False):
        inputs["past_key_values"] = cache

    # Several answers and beams: each prompt was repeated, one copy after the other.
    copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    untouched = {*_IMAGE_INPUTS, *_SMALL_INPUTS}
    if copies > 1:
        input_ids = input_ids[::copies]
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name not in untouched:
                inputs[name] = value[::copies]
    if input_ids.shape[1]:  # else there are embeddings only
        inputs["input_ids"] = input_ids
    return generate_with_small_model(
        model,
        small_model,
        generation_config=_unprepared(generation_config, input_ids.shape[1]),
        importance_processor=importance_processor,
        small_tokenizer=small_tokenizer,
        **{"logits_processor": own_processors, "stopping_criteria": own_criteria, **inputs},
    )


def _with_announced_names(signature: inspect.Signature) -> inspect.Signature:
    """Stock `generate` hands a callable those keyword arguments that its signature names, and refuses the others."""
    *named, rest = signature.parameters.values()
    names = (*SGLGenerationConfig._sgl_defaults(), *_IMAGE_INPUTS, *_SMALL_INPUTS)
    return signature.replace(
        parameters=[*named, *(Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in names), rest]
    )


sgl_generate.__signature__ = _with_announced_names(inspect.signature(sgl_generate))  # type: ignore[attr-defined]


def _unprepared(prepared: GenerationConfig, prompt_length: int) -> SGLGenerationConfig:
    """Settings as before stock `generate` prepared them for these prompts."""
    fields = {name: value for name, value in prepared.to_dict().items() if not name.startswith("_")}
    # Lengths were made to count the prompt; the small model's prompts may be of another length.
    if fields["max_new_tokens"] is None:
        fields["max_new_tokens"] = fields["max_length"] - prompt_length
    fields["max_length"] = None
    if fields["min_new_tokens"] is not None:
        fields["min_length"] = None
    return SGLGenerationConfig(**{name: value for name, value in fields.items() if value is not None})


def _own(
    model: PreTrainedModel,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    input_ids: Tensor,
    inputs: dict[str, Any],
) -> tuple[LogitsProcessorList | None, StoppingCriteriaList | None]:
    """Those processors and criteria that the user passed; `None` without any.

    The others follow from the settings and are made again for either model, which may have prompts of another length.
    """
    defaults = model._get_logits_processor(
        generation_config=generation_config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids,
        logits_processor=LogitsProcessorList(),
        device=input_ids.device,
        model_kwargs=inputs,
    )
    processors = [one for one in logits_processor if not any(_are_equal(one, default) for default in defaults)]
    defaults = model._get_stopping_criteria(
        generation_config=generation_config, stopping_criteria=StoppingCriteriaList()
    )
    criteria = [one for one in stopping_criteria if not any(_are_equal(one, default) for default in defaults)]
    return (
        LogitsProcessorList(processors) if processors else None,
        StoppingCriteriaList(criteria) if criteria else None,
    )


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two processors or criteria are of one class and in the same state."""
    if type(one) is not type(other):
        return False
    # A time limit starts when it is made, so it is told by its length alone.
    mine, others = ({k: v for k, v in vars(each).items() if k != "initial_timestamp"} for each in (one, other))
    return mine.keys() == others.keys() and all(
        isinstance(others[name], Tensor) and torch.equal(value, others[name])
        if isinstance(value, Tensor)
        else value == others[name]
        for name, value in mine.items()
    )


# Reading tokenizers takes long, so it is done once for any two models; who forgets the models, forgets these.
_VOCABULARIES: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, Vocabularies]] = (
    WeakKeyDictionary()
)


def _vocabularies(
    large: PreTrainedModel, small: PreTrainedModel, tokenizer: Any = None, small_tokenizer: Any = None
) -> Vocabularies:
    """What is known about the models' tokenizers: those given, or those beside the checkpoints."""
    large_size, small_size = (each.config.get_text_config(decoder=True).vocab_size for each in (large, small))
    if tokenizer is not None and small_tokenizer is not None:
        return Vocabularies(lambda: (tokenizer, small_tokenizer), (large_size, small_size))
    paths = large.name_or_path, small.name_or_path  # and not the models, which the cache must not keep alive
    known = _VOCABULARIES.setdefault(large, WeakKeyDictionary())
    return known.setdefault(
        small, Vocabularies(lambda: load_tokenizers(*((path, {}) for path in paths)), (large_size, small_size))
    )
