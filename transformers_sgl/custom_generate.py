"""Guided generation for a stock large model: `large.generate(custom_generate="me/sgl-generate", small_model=small)`.

A repository's `custom_generate/generate.py` calls [`generate_with_small_model`] with the call's own arguments.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from transformers_sgl.arguments import read_arguments
from transformers_sgl.call import Call
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.generation_sgl import generate
from transformers_sgl.storage.adapters import unwrapped
from transformers_sgl.tokens.importance_process import ImportanceProcessor
from transformers_sgl.tokens.vocabulary import Vocabularies, load_tokenizers, vocabulary_sizes

__all__ = ["generate_with_small_model"]


@torch.no_grad()
def generate_with_small_model(
    model: PreTrainedModel,
    small_model: PreTrainedModel | None = None,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    importance_processor: ImportanceProcessor | list[ImportanceProcessor] | None = None,
    vision_processor: ImportanceProcessor | list[ImportanceProcessor] | None = None,
    small_tokenizer: Any = None,
    **kwargs: Any,
) -> SGLGenerateOutput | Tensor:
    """What [`SGLForConditionalGeneration.generate`] does, for two models that are not a pair.

    Args:
        model (`PreTrainedModel`): The large model.
        small_model (`PreTrainedModel`): The small model.
        inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts, if not passed as `input_ids`.
        generation_config (`GenerationConfig`, *optional*): Settings; unset ones come from the large model's.
        importance_processor ([`ImportanceProcessor`] or several, *optional*): As in a pair's `generate`.
        vision_processor ([`ImportanceProcessor`] or several, *optional*): As in a pair's `generate`.
        small_tokenizer (`PreTrainedTokenizerBase`, *optional*): As in a pair's `generate`.
        **kwargs: Model inputs, settings and arguments of stock `generate`.

    Returns:
        `Tensor` or [`SGLGenerateOutput`]: As from [`SGLForConditionalGeneration.generate`].

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
    small_model = unwrapped("small", small_model)
    if not isinstance(small_model, PreTrainedModel):
        raise ValueError(
            f"Guidance needs a small model, but `small_model` is {small_model!r}: load one with `from_pretrained` and "
            "pass it, or call the `generate` of a pair without `custom_generate`."
        )
    settings, model_inputs, generate_kwargs = read_arguments(
        inputs, generation_config, kwargs, model.generation_config
    )
    call = Call.read(
        model,
        small_model,
        model_inputs,
        settings,
        _vocabularies(model, small_model).given(generate_kwargs.get("tokenizer"), small_tokenizer),
        importance_processor,
        vision_processor,
        **generate_kwargs,
    )
    return generate(call)


_VOCABULARIES: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, Vocabularies]] = (
    WeakKeyDictionary()
)


def _vocabularies(large: PreTrainedModel, small: PreTrainedModel) -> Vocabularies:
    """The models' vocabularies; tokenizers are read from the checkpoints, once for any two models."""
    paths = large.name_or_path, small.name_or_path  # not the models, which the cache must not keep alive
    known, sizes = _VOCABULARIES.setdefault(large, WeakKeyDictionary()), vocabulary_sizes(large, small)
    if small not in known or known[small].sizes != sizes:  # embeddings may have been resized
        known[small] = Vocabularies(lambda: load_tokenizers(*((path, {}) for path in paths)), sizes)
    return known[small]
