"""What an architecture must do before it may be called supported; one function for each promise.

`tests/test_architectures.py` runs them all, and `scripts/survey_architectures.py` makes the table of
`docs/architectures.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any

import pytest
import torch
from tiny_models import near_copy, state, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl import AttentionRecorder, SGLGenerationConfig, VisualTokenPruner, VisualTokens
from transformers_sgl.architectures import (
    attention_modules,
    attention_pattern,
    check_supported,
    decoder_layers,
    key_sources,
    visual_token_ids,
    visual_tokens_of,
)
from transformers_sgl.arguments import read_arguments
from transformers_sgl.call import Call
from transformers_sgl.generation_sgl import generate
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import cache_of

from . import TINY, VOCAB_SIZE, Inputs, tiny_batch, tiny_model, tiny_samples

NUM_LAYERS, NUM_NEW_TOKENS = 4, 5
PRUNE_LAYERS = (0, 1, 2)
_TOLERANCE = {"atol": 2e-4, "rtol": 2e-3}
_GREEDY = {"do_sample": False, "max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS}
_TOKENIZER = tiny_tokenizer()
_DETAILS = {"return_dict_in_generate": True, "output_logits": True}

# What images show is added inside the decoder; its first layer is given zeros for them.
_WITHOUT_FEATURES = ("granite4_vision",)


def check_guides(name: str) -> None:
    """Importance is the sum of eager attentions, per sample in a padded batch, whatever the kernel.

    And there are features of each visual token.
    """
    eager, fast = tiny_model(name, attn_implementation="eager"), tiny_model(name)
    assert len(decoder_layers(eager)) == NUM_LAYERS
    # Models whose layers share keys leave out queries, unless attentions are asked for.
    models = [eager] if key_sources(eager.config) else [eager, fast]
    for model, samples in product(models, _batches(name)):
        batch = tiny_batch(name, samples)
        wanted = [_eager_importance(eager, sample) for sample in samples]
        model.generate(**batch, **_GREEDY)  # transformers leaves attributes on a model at its first call
        before = state(model)
        tokens = visual_tokens_of(model.config, batch)
        assert tokens.counts.tolist() == [len(each) for each in wanted]
        more = {"output_attentions": True, "return_dict_in_generate": True} if model is eager else {}
        with AttentionRecorder(model, tokens, records_features=True) as recorder:
            model.generate(**batch, **_GREEDY, **more)
        assert recorder.features is not None
        present = tokens.valid & (name not in _WITHOUT_FEATURES)
        assert (recorder.features.abs().sum(dim=-1) > 0).tolist() == present.tolist()
        for row, valid, each in zip(recorder.importance, tokens.valid, wanted, strict=True):
            torch.testing.assert_close(row[valid], each, **_TOLERANCE)
        assert state(model) == before
    for samples in _batches(name):
        _check_scores(fast, tiny_batch(name, samples))


def check_identity(name: str, video: bool = False) -> None:
    """With everything kept, what is written is what the stock model writes, to the last bit of the logits."""
    model = tiny_model(name)
    batch = tiny_batch(name, tiny_samples(name, video=video))
    stock = model.generate(**batch, **_GREEDY, **_DETAILS)
    before = state(model)
    for prune_layer in _prune_layers(model):
        with VisualTokenPruner(model, batch["attention_mask"].bool(), prune_layer):
            output = model.generate(**batch, **_GREEDY, **_DETAILS)
        assert torch.equal(output.sequences, stock.sequences)
        for logits, wanted in zip(output.logits, stock.logits, strict=True):
            torch.testing.assert_close(logits, wanted, **_TOLERANCE)
    assert state(model) == before
    whole = _pair(model, model, batch, retention_ratio=1.0)
    assert torch.equal(whole.sequences, stock.sequences)
    for small in (model, near_copy(model, 0.05)):  # a draft that is right, and one that is not
        drafted = _pair(model, small, batch, retention_ratio=1.0, verify_draft=True, output_logits=True)
        assert torch.equal(drafted.sequences, stock.sequences)
        for logits, wanted in zip(drafted.logits, stock.logits, strict=True):
            torch.testing.assert_close(logits, wanted, **_TOLERANCE)
    assert state(model) == before


def check_is_guided(name: str, video: bool = False) -> None:
    """A pruned batch writes what each sample writes alone where its dropped tokens are masked in the upper layers."""
    model = tiny_model(name)
    model.generate(**tiny_samples(name, video=video)[0], **_GREEDY)
    before = state(model)
    for samples, prune_layer in product(_batches(name, video), _prune_layers(model)):
        batch = tiny_batch(name, samples)
        tokens = visual_tokens_of(model.config, batch)
        keep = _some(tokens)
        with VisualTokenPruner(model, tokens.prompt_keep_mask(keep), prune_layer):
            output = model.generate(**batch, **_GREEDY, **_DETAILS)
        assert state(model) == before
        num_kept = int(tokens.prompt_keep_mask(keep).sum(1).max())
        _check_cache(model, cache_of(output), batch["input_ids"].shape[1], num_kept, prune_layer)
        for number, sample in enumerate(samples):
            own = visual_tokens_of(model.config, sample)
            own_keep = own.prompt_keep_mask(keep[number : number + 1, : own.num_visual_tokens])
            if _mixes_otherwise(model):
                # A recurrence has no mask to hide a token from it: there the batch is compared with the sample alone.
                with VisualTokenPruner(model, own_keep, prune_layer):
                    wanted = model.generate(**sample, **_GREEDY, **_DETAILS)
            else:
                wanted = _masked(model, sample, {prune_layer: own_keep})
            _check_sample(output, number, wanted)


def check_prunes_in_two_steps(name: str) -> None:
    """The same where some tokens are gone before the first layer, and others in the middle."""
    model = tiny_model(name)
    if _prune_layers(model) == [0]:  # its layers share the keys of the first
        model = tiny_model(name, num_layers=7, num_kv_shared_layers=3)
    prune_layer = _prune_layers(model)[-1]
    assert prune_layer > 0
    for samples in _batches(name, number=2):
        batch = tiny_batch(name, samples)
        tokens = visual_tokens_of(model.config, batch)
        first, last = tokens.valid & (torch.arange(tokens.num_visual_tokens) % 4 != 1), _some(tokens)
        last &= first
        masks = [tokens.prompt_keep_mask(each) for each in (last, first)]
        with VisualTokenPruner(model, masks[0], prune_layer, masks[1]):
            output = model.generate(**batch, **_GREEDY, **_DETAILS)
        numbers = [int(each.sum(1).max()) for each in masks]
        _check_cache(model, cache_of(output), numbers[1], numbers[0], prune_layer)
        for number, sample in enumerate(samples):
            own = visual_tokens_of(model.config, sample)
            own_masks = [
                own.prompt_keep_mask(each[number : number + 1, : own.num_visual_tokens]) for each in (last, first)
            ]
            # A recurrence has no mask to hide a token from it.
            if _mixes_otherwise(model):
                with VisualTokenPruner(model, own_masks[0], prune_layer, own_masks[1]):
                    wanted = model.generate(**sample, **_GREEDY, **_DETAILS)
            else:
                wanted = _masked(model, sample, {0: own_masks[1], prune_layer: own_masks[0]})
            _check_sample(output, number, wanted)


def _check_sample(output: Any, number: int, wanted: Any) -> None:
    """A batch writes for one of its samples what was written for that sample alone."""
    assert output.sequences[number, -NUM_NEW_TOKENS:].tolist() == wanted.sequences[0, -NUM_NEW_TOKENS:].tolist()
    for logits, each in zip(output.logits, wanted.logits, strict=True):
        torch.testing.assert_close(logits[number], each[0], **_TOLERANCE)


def check_pair(name: str, video: bool = False) -> None:
    """Guided generation of a batch is that of its samples, with early exits and drafts, and keeps every image."""
    large, small = tiny_model(name), tiny_model(name, seed=1)
    for samples in _batches(name, video):
        _check_pair(large, small, tiny_batch(name, samples), samples)


def _check_pair(large: PreTrainedModel, small: PreTrainedModel, batch: Inputs, samples: list[Inputs]) -> None:
    settings = {"retention_ratio": 0.3, "prune_layer": min(1, _prune_layers(large)[-1])}
    together = _pair(large, small, batch, **settings)
    alone = [_pair(large, small, sample, **settings) for sample in samples]
    undrafted = _pair(large, small, batch, verify_draft=False, **settings)
    assert torch.equal(together.sequences, undrafted.sequences)
    for number, each in enumerate(alone):
        assert each.sequences[0, -NUM_NEW_TOKENS:].tolist() == together.sequences[number, -NUM_NEW_TOKENS:].tolist()
        width = each.keep_mask.shape[1]
        assert torch.equal(each.keep_mask[0], together.keep_mask[number, :width])
        tokens = visual_tokens_of(large.config, samples[number])
        images = tokens.image_index[0]
        kept = [int(each.keep_mask[0][images == image].sum()) for image in images.unique()]
        assert sum(kept) == max(len(kept), int(0.3 * len(images)))
        assert min(kept) >= 1
    if len(samples) == 1:
        return
    # The sample with the lowest score goes on to the large model, alone.
    scores = together.decision_score
    order = scores.sort().values
    settings["early_exit_threshold"] = float((order[0] + order[1]) / 2)
    if "batch" in {check_supported(large.config).inputs.get(name) for name in batch}:
        with pytest.raises(ValueError, match="nothing tells to which prompts the"):
            _pair(large, small, batch, **settings)
        return
    partial = _pair(large, small, batch, **settings)
    late = int(scores.argmin())
    assert partial.exited_early.tolist() == [number != late for number in range(len(samples))]
    assert torch.equal(partial.sequences[late], together.sequences[late])


def _batches(name: str, video: bool = False, number: int = 3) -> list[list[Inputs]]:
    """Some samples, as one batch or, where the stock model cannot do that faithfully, each as its own."""
    samples = tiny_samples(name, video=video)[:number]
    return [samples] if TINY[name].batches_alike else [[sample] for sample in samples]


def _pair(large: PreTrainedModel, small: PreTrainedModel, inputs: Inputs, **settings: Any) -> Any:
    config = SGLGenerationConfig(**_GREEDY, **settings, return_dict_in_generate=True)
    config, *_ = read_arguments(None, config, {}, large.generation_config)
    vocabularies = Vocabularies(lambda: (_TOKENIZER, _TOKENIZER), (VOCAB_SIZE, VOCAB_SIZE))
    return generate(Call.read(large, small, dict(inputs), config, vocabularies))


def _some(tokens: VisualTokens) -> Tensor:
    """A choice of visual tokens that differs from sample to sample."""
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(tokens.valid.shape, generator=generator) < 0.5
    keep[:, 0] = True
    keep[0] |= torch.arange(keep.shape[1]) % 3 == 0
    return keep & tokens.valid


def _mixes_otherwise(model: PreTrainedModel) -> bool:
    return len(attention_modules(model)) < NUM_LAYERS


def _prune_layers(model: PreTrainedModel) -> list[int]:
    """The layers at which to try: some, as far as the model allows."""
    return [layer for layer in PRUNE_LAYERS if layer <= min(key_sources(model.config).values(), default=NUM_LAYERS)]


def _eager_importance(model: PreTrainedModel, sample: Inputs) -> Tensor:
    """The sum of the attentions that eager attention returns, by plain loops."""
    output = model.generate(**sample, **_GREEDY, output_attentions=True, return_dict_in_generate=True)
    is_visual = torch.isin(sample["input_ids"][0], torch.tensor(visual_token_ids(model.config)))
    columns = is_visual.nonzero()[:, 0]
    importance = torch.zeros(len(columns))
    for step, attentions in enumerate(output.attentions):
        assert sum(each is not None for each in attentions) == len(attention_modules(model))
        end = sample["input_ids"].shape[1] + step
        for attention in attentions:
            if attention is None:
                continue
            rows = attention[0, :, int(columns[-1]) + 1 :] if step == 0 else attention[0]
            first = end - attention.shape[-1]  # a sliding window has lost the first keys
            received = rows.float().sum(dim=(0, 1))
            for index, column in enumerate(columns.tolist()):
                if column >= first:
                    importance[index] += received[column - first]
    return importance


def _check_scores(model: PreTrainedModel, batch: Inputs) -> None:
    """Where nothing is dropped, the consistency is the probability with which the draft was written."""
    settings = {"retention_ratio": 0.5, "prune_layer": 0, "early_exit_threshold": 1.0}
    output = _pair(model, model, batch, consistency_retention_ratio=1.0, **settings)
    length = output.draft_sequences.shape[1]
    torch.testing.assert_close(output.consistency, output.confidence**length, **_TOLERANCE)


def _check_cache(model: PreTrainedModel, cache: Any, num_below: int, num_kept: int, prune_layer: int) -> None:
    """Layers below `prune_layer` have read so many tokens of the prompt, upper ones the kept tokens."""
    for index in sorted({key_sources(model.config).get(each, each) for each in attention_modules(model)}):
        prompt_length = num_below if index < prune_layer else num_kept
        length = prompt_length + NUM_NEW_TOKENS - 1
        pattern = attention_pattern(model, index)
        window = pattern.window or pattern.chunk or length + 1
        assert cache.get_seq_length(index) == length
        assert cache.layers[index].keys.shape[-2] == min(length, window - 1)


def _masked(model: PreTrainedModel, sample: Inputs, keep_masks: dict[int, Tensor]) -> Any:
    """Stock generation in which all layers are shown every token, but may not look at the dropped ones.

    `keep_masks` has what is kept from a layer on.
    """

    def hide(index: int) -> Callable[..., Any]:
        dropped = ~keep_masks[max(layer for layer in keep_masks if layer <= index)][0]

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask, cache = kwargs["attention_mask"], cache_of(kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            num_queries = hidden.shape[-2]
            source = key_sources(model.config).get(index, index)
            shares = source != index  # then the lower layer's cache holds this pass's tokens already
            past = 0 if cache is None else cache.get_seq_length(source) - (num_queries if shares else 0)
            num_keys = num_queries if past == 0 else cache.get_mask_sizes(0 if shares else num_queries, source)[0]
            if mask is not None:
                num_keys = mask.shape[-1]
            first = past + num_queries - num_keys
            position = torch.arange(first, past + num_queries)
            if mask is None:
                mask = (position <= position[-num_queries:, None])[None, None]
            columns = torch.cat([dropped, torch.zeros(NUM_NEW_TOKENS, dtype=torch.bool)])[position]
            itself = position == position[-num_queries:, None]  # a dropped token may see itself, as nobody sees it
            return args, {**kwargs, "attention_mask": mask & (~columns | itself)}

        return hook

    with ExitStack() as stack:
        for index in attention_modules(model):
            if index >= min(keep_masks):
                layer = decoder_layers(model)[index]
                stack.callback(layer.register_forward_pre_hook(hide(index), with_kwargs=True).remove)
        return model.generate(**sample, **_GREEDY, **_DETAILS)
