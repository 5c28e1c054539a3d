"""Two models and a question, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformers_sgl.architectures import decoder, visual_tokens_of
from transformers_sgl.custom_generate import generate_with_small_model
from transformers_sgl.generation_config_sgl import PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens.importance_process import ImportanceProcessorList, RetentionRatioProcessor
from transformers_sgl.transformers_interface import attention_name

__all__ = ["Pairing", "kept_by_preset", "presets_of", "random_keep_mask", "sizes", "while_in", "while_in_decoder"]

# Random models have no tokenizers; one object for both says that a token means the same to either.
_TOKENIZER = object()


@dataclass(frozen=True)
class Pairing:
    """Two models and the same question for both.

    Attributes:
        large: The large model.
        small: The small model.
        inputs: The large model's inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        small_inputs: The small model's inputs; `None` if it reads the large model's.
    """

    large: PreTrainedModel
    small: PreTrainedModel
    inputs: dict[str, Tensor]
    small_inputs: dict[str, Tensor] | None = None

    @property
    def for_small(self) -> dict[str, Tensor]:
        """What the small model reads."""
        return self.inputs if self.small_inputs is None else self.small_inputs

    def guided(self, **settings: Any) -> Any:
        """Stock `generate` of the large model, guided by the small one, with settings of [`SGLGenerationConfig`]."""
        vocabulary = {"tokenizer": _TOKENIZER, "small_tokenizer": _TOKENIZER}
        own = {f"small_{name}": value for name, value in (self.small_inputs or {}).items()}
        arguments: dict[str, Any] = {**self.inputs, **own, **vocabulary, **settings}
        return generate_with_small_model(self.large, self.small, **arguments)


def sizes(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What a caption says of the model and its prompt."""
    tokens = visual_tokens_of(model.config, inputs)
    return {
        "num_visual_tokens": tokens.num_visual_tokens,
        "batch_size": tokens.batch_size,
        "prompt_length": tokens.prompt_length,
        "num_layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "attention": attention_name(decoder(model).config),
    }


def kept_by_preset(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """A preset's settings in a model of this depth."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    layer, kept = resolve_prune_layer(PRESETS[name]["prune_layer"], num_layers), PRESETS[name]["retention_ratio"]
    return {
        "retention_ratio": kept,
        "prune_layer": layer,
        "average_retention": average_retention(kept, layer, num_layers),
    }


def presets_of(
    large: PreTrainedModel, inputs: dict[str, Tensor], seed: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """By name, the context in which the model is pruned, and what is kept; "unpruned" first."""
    tokens = visual_tokens_of(large.config, inputs)
    pruned: dict[str, Callable[[], Any]] = {"unpruned": nullcontext}
    kept: dict[str, dict[str, Any]] = {"unpruned": {"num_kept": tokens.num_visual_tokens, "average_retention": 1.0}}
    for name, preset in PRESETS.items():
        keep_mask = random_keep_mask(tokens, preset["retention_ratio"], seed)
        kept[name] = {"num_kept": int(keep_mask[0].sum()), **kept_by_preset(large, name)}
        layer = kept[name]["prune_layer"]
        pruned[name] = partial(VisualTokenPruner, large, tokens.prompt_keep_mask(keep_mask), layer)
    return pruned, kept


def random_keep_mask(tokens: Any, retention_ratio: float, seed: int) -> Tensor:
    """Which visual tokens to keep, `(batch, num_visual_tokens)`."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(tokens.valid.shape, generator=generator).to(tokens.valid.device)
    return ImportanceProcessorList([RetentionRatioProcessor(retention_ratio)]).keep_mask(tokens, importance)


@contextmanager
def while_in(module: nn.Module, read: Callable[[], float]) -> Iterator[list[float]]:
    """Adds up by how much a reading grows while a module runs: the clock, or a count of operations."""
    total = [0.0]

    def begin(*_: Any) -> None:
        total[0] -= read()

    def end(*_: Any) -> None:
        total[0] += read()

    handles = [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def while_in_decoder(model: PreTrainedModel, read: Callable[[], float]) -> AbstractContextManager[list[float]]:
    """The same while the decoder runs."""
    return while_in(decoder(model), read)
