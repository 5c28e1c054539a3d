import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOS, find_visual_tokens, prompts, samples, tiny_internvl
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from transformers_sgl import SGLForConditionalGeneration, SGLGenerationConfig
from transformers_sgl.tokens.early_exit import confidence, consistency, decision_score, exits_early, token_log_probs

pytestmark = pytest.mark.mechanics

MAX_NEW_TOKENS = 7


def pair(implementation: str = "sdpa", seed: int = 0) -> SGLForConditionalGeneration:
    large = tiny_internvl(num_layers=5, seed=seed, attn_implementation=implementation)
    small = tiny_internvl(num_layers=3, seed=seed + 10, attn_implementation=implementation, hidden_size=16)
    return SGLForConditionalGeneration(large=large, small=small).eval()


# --- the formulas, against plain loops -------------------------------------------------------------------------------


def written_by_loop(
    small: InternVLForConditionalGeneration, sample: dict[str, Tensor]
) -> tuple[list[int], list[float]]:
    """An answer and the probability of each of its tokens, by whole forward passes without a cache."""
    ids, tokens, probabilities = sample["input_ids"], [], []
    for _ in range(MAX_NEW_TOKENS):
        logits = small(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=sample["pixel_values"], use_cache=False
        ).logits[0, -1]
        allowed = logits.clone()
        allowed[small.generation_config.suppress_tokens] = -torch.inf
        tokens.append(int(allowed.argmax()))
        probabilities.append(float(logits.double().softmax(-1)[tokens[-1]]))
        if tokens[-1] == EOS:
            break
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens, probabilities


def importance_by_loop(
    small: InternVLForConditionalGeneration, sample: dict[str, Tensor], tokens: list[int]
) -> list[float]:
    """The attention that each visual token gets, from eager attention matrices."""
    positions = find_visual_tokens(sample).positions[0].tolist()
    ids = torch.cat([sample["input_ids"], torch.tensor([tokens[:-1]], dtype=torch.long)], dim=1)
    attentions = small(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=sample["pixel_values"], output_attentions=True
    ).attentions
    return [
        sum(
            float(layer[0, head, query, position])
            for layer in attentions
            for head in range(layer.shape[1])
            for query in range(positions[-1] + 1, ids.shape[1])
        )
        for position in positions
    ]


def consistency_by_loop(
    small: InternVLForConditionalGeneration, sample: dict[str, Tensor], tokens: list[int], ratio: float
) -> list[float]:
    """The probability of each token when only the most important visual tokens are there: dropped by hand."""
    positions = find_visual_tokens(sample).positions[0].tolist()
    importance = importance_by_loop(small, sample, tokens)
    ranked = sorted(range(len(positions)), key=lambda index: (-importance[index], index))
    kept = {positions[index] for index in ranked[: max(1, math.floor(ratio * len(positions)))]}

    features = small.get_image_features(sample["pixel_values"], return_dict=True).pooler_output
    embeddings = small.get_input_embeddings()(sample["input_ids"]).clone()
    embeddings[0, positions] = torch.as_tensor(features).reshape(-1, embeddings.shape[-1])
    length = sample["input_ids"].shape[1]
    rows = [index for index in range(length) if index in kept or index not in positions]
    probabilities = []
    for step, token in enumerate(tokens):
        answer = small.get_input_embeddings()(torch.tensor([tokens[:step]], dtype=torch.long))
        logits = small(
            inputs_embeds=torch.cat([embeddings[:, rows], answer], dim=1),
            position_ids=torch.tensor([rows + list(range(length, length + step))]),
            attention_mask=torch.ones(1, len(rows) + step, dtype=torch.long),
            use_cache=False,
        ).logits[0, -1]
        probabilities.append(float(logits.double().softmax(-1)[token]))
    return probabilities


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["product", "geometric_mean"])
def test_scores_of_a_mixed_batch_equal_plain_loops(implementation: str, padding_side: str, reduction: str) -> None:
    model, ratio = pair(implementation, seed=44), 0.2
    reference = tiny_internvl(num_layers=3, seed=54, attn_implementation="eager", hidden_size=16)
    batch = prompts(padding_side=padding_side)
    output = model.generate(
        **batch,
        max_new_tokens=MAX_NEW_TOKENS,
        consistency_retention_ratio=ratio,
        consistency_reduction=reduction,
        return_dict_in_generate=True,
    )
    lengths = []
    with torch.no_grad():
        for number, sample in enumerate(samples(batch)):
            tokens, probabilities = written_by_loop(reference, sample)
            assert output.draft_sequences[number, : len(tokens)].tolist() == tokens
            mean = math.exp(sum(map(math.log, probabilities)) / len(probabilities))
            pruned = consistency_by_loop(reference, sample, tokens, ratio)
            product = math.prod(pruned) if reduction == "product" else math.prod(pruned) ** (1 / len(pruned))
            assert float(output.confidence[number]) == pytest.approx(mean, abs=1e-4)
            assert float(output.consistency[number]) == pytest.approx(product, abs=1e-4)
            assert float(output.decision_score[number]) == pytest.approx((mean + product) / 2, abs=1e-4)
            lengths.append(len(tokens))
    assert len(set(lengths)) > 1  # the batch holds answers of different lengths


def test_the_consistency_pass_runs_once_and_without_the_vision_encoder() -> None:
    model, batch = pair(), prompts()
    calls = {"vision": 0, "decoder": 0}

    def count(name: str):
        def hook(*_args) -> None:
            calls[name] += 1

        return hook

    model.small.model.vision_tower.register_forward_pre_hook(count("vision"))
    model.small.get_decoder().register_forward_pre_hook(count("decoder"))
    given = {"max_new_tokens": 4, "min_new_tokens": 4, "verify_draft": "once"}
    model.generate(**batch, **given)
    assert calls == {"vision": 1, "decoder": 4}  # nobody reads a score: none is computed
    model.generate(**batch, **given, return_dict_in_generate=True)
    assert calls == {"vision": 2, "decoder": 4 + 4 + 1}


# --- the pure functions ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from(["product", "geometric_mean"]),
)
def test_padding_does_not_change_a_score(rows: list[list[float]], reduction: str) -> None:
    length = max(map(len, rows)) + 1
    log_probs = torch.full((len(rows), length), -torch.inf)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for number, row in enumerate(rows):
        log_probs[number, : len(row)] = torch.tensor(row).log()
        mask[number, : len(row)] = True
    sure, same = confidence(log_probs, mask), consistency(log_probs, mask, reduction)
    for number, row in enumerate(rows):
        mean = math.prod(row) ** (1 / len(row))
        assert float(sure[number]) == pytest.approx(mean, rel=1e-4)
        assert float(same[number]) == pytest.approx(math.prod(row) if reduction == "product" else mean, rel=1e-4)
    assert ((decision_score(sure, same) >= 0) & (decision_score(sure, same) <= 1 + 1e-6)).all()


def test_log_probs_are_those_of_float32_whatever_the_logits() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [5.0, -5.0, 0.0]])
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(2), torch.tensor([2, 1])]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.allclose(token_log_probs(logits.to(dtype), torch.tensor([2, 1])), expected)


def test_a_cut_off_draft_never_exits_and_nan_is_no_trust() -> None:
    score = torch.tensor([0.9, 0.9, 0.5, float("nan")])
    complete = torch.tensor([True, False, True, True])
    assert exits_early(score, 0.9 - 1e-6, complete).tolist() == [True, False, False, False]
    assert exits_early(score, 0.0, complete).tolist() == [True, False, True, False]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-0.1, "0.5", True, float("nan"), [0.5]])
def test_a_threshold_that_is_none_is_refused(threshold) -> None:
    with pytest.raises(ValueError, match=r"`early_exit_threshold` is .*pass a number of 0 or more, or None"):
        SGLGenerationConfig(early_exit_threshold=threshold)
    model, batch = pair(), prompts()
    with pytest.raises(ValueError, match="early_exit_threshold"):
        model.generate(**batch, early_exit_threshold=threshold)
