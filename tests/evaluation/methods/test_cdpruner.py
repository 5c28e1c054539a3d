"""CDPruner against its definition: determinants in plain loops, and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import picture, tiny_family_pair
from torch import Tensor

from transformers_sgl import VisualTokenPruner
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import METHODS, Batch, CDPruner, Pair, Setting, guides
from transformers_sgl.evaluation.methods.cdpruner import conditional_diversity, instruction_relevance

pytestmark = pytest.mark.mechanics


def cosine(one: list[float], other: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(x * x for x in other))
    return sum(x * y for x, y in zip(one, other, strict=True)) / length if length else 0.0


def by_determinants(features: list[list[float]], relevance: list[float], number: int) -> list[int]:
    """The tokens in the order in which they make the determinant of the kernel greatest."""
    tokens = range(len(features))
    kernel = np.array(
        [[relevance[i] * cosine(features[i], features[j]) * relevance[j] for j in tokens] for i in tokens]
    )
    chosen: list[int] = []
    while len(chosen) < number:
        gains = {}
        for token in tokens:
            if token not in chosen:
                among = [*chosen, token]
                gains[token] = np.linalg.det(kernel[np.ix_(among, among)])
        chosen.append(max(gains, key=lambda token: gains[token]))
    return chosen


def plain_relevance(features: list[list[float]], text: list[list[float]], alpha: float | None = None) -> list[float]:
    means = [sum(cosine(token, word) for word in text) / len(text) for token in features]
    relevance = [(mean - min(means) + 1e-6) / (max(means) - min(means)) for mean in means]
    return relevance if alpha is None else [math.exp(alpha * each) for each in relevance]


def order_of(rank: Tensor) -> list[int]:
    order: list[int] = rank.argsort(descending=True, stable=True)[: int((rank > 0).sum())].tolist()
    return order


ALL = torch.ones(1, 4, dtype=torch.bool)


class TestConditionalDiversity:
    def test_by_hand(self) -> None:
        # Unit vectors at 0, 0, 90 and 60 degrees. Relevance 1, 0.9, 0.5, 0.8; squares 1, 0.81, 0.25, 0.64.
        # First the most relevant, 0. What is left beside it: 0 of token 1, 1 of token 2, sin(60)^2 = 0.75 of token 3.
        # Gains 0, 0.25, 0.48: token 3 comes next, although token 1 is more relevant.
        # The plane is full then: the rest by relevance, 1 before 2.
        half = math.sqrt(0.75)
        features = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.5, half]]])
        rank = conditional_diversity(features, ALL, torch.tensor([[1.0, 0.9, 0.5, 0.8]]))
        assert rank.tolist() == [[4, 2, 1, 3]]

    def test_without_relevance_it_is_diversity_alone(self) -> None:
        # Beside (1, 0): nothing is left of (1, 0), all of (0, 1), half of (1, 1).
        features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]])
        rank = conditional_diversity(features, ALL, torch.ones(1, 4))
        assert order_of(rank[0])[:2] == [0, 3]

    def test_only_what_is_kept_is_ranked(self) -> None:
        rank = conditional_diversity(
            torch.eye(4)[None], ALL, torch.tensor([[0.2, 1.0, 0.1, 0.5]]), retention_ratio=0.5
        )
        assert rank.tolist() == [[0, 4, 0, 3]]

    @given(
        seed=st.integers(0, 10_000),
        counts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
        width=st.integers(2, 12),
        ratio=st.floats(0.05, 1.0),
    )
    def test_it_is_the_greedy_choice(self, seed: int, counts: list[int], width: int, ratio: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        number = max(counts)
        features = torch.randn(len(counts), number, width, generator=generator)
        relevance = torch.rand(len(counts), number, generator=generator) * 0.9 + 0.1
        valid = torch.arange(number) < torch.tensor(counts)[:, None]
        features[~valid] = 1e3  # must not matter
        rank = conditional_diversity(features, valid, relevance.masked_fill(~valid, 0.0), ratio)
        for row, count in enumerate(counts):
            kept = min(count, max(1, math.ceil(ratio * number)))
            order = order_of(rank[row])
            assert len(order) == kept
            own = features[row, :count].double().tolist()
            independent = min(kept, width)
            assert order[:independent] == by_determinants(own, relevance[row].double().tolist(), independent)
            rest = [token for token in range(count) if token not in order[:independent]]
            by_relevance = sorted(rest, key=lambda token: -float(relevance[row, token]))
            assert order[independent:] == by_relevance[: kept - independent]
            assert not rank[row, count:].any()

    @pytest.mark.parametrize("number", [1, 5])
    def test_equal_tokens_and_tokens_of_zeros_are_ranked_all_the_same(self, number: int) -> None:
        valid = torch.ones(1, number, dtype=torch.bool)
        for features in (torch.ones(1, number, 3), torch.zeros(1, number, 3)):
            for relevance in (torch.ones(1, number), torch.zeros(1, number)):
                rank = conditional_diversity(features, valid, relevance)
                assert sorted(rank[0].tolist()) == list(range(1, number + 1))


class TestRelevance:
    def test_by_hand(self) -> None:
        # Cosines to the two words: (1, 0), (0, 1), (0.6, 0.8), (-1, 0); means 0.5, 0.5, 0.7, -0.5.
        features = torch.tensor([[[1.0, 0.0], [0.0, 9.0], [3.0, 4.0], [-2.0, 0.0]]])
        text = torch.tensor([[[5.0, 0.0], [0.0, 0.1], [7.0, 7.0]]])  # the third is padding
        relevance = instruction_relevance(features, ALL, text, torch.tensor([2]))
        assert relevance[0].tolist() == pytest.approx([1 / 1.2, 1 / 1.2, 1.0, 0.0], abs=2e-6)
        assert relevance[0, 3] > 0

    def test_of_alike_tokens_and_an_empty_instruction(self) -> None:
        text = torch.ones(1, 3, 2)
        for length in (3, 0):
            relevance = instruction_relevance(torch.ones(1, 4, 2), ALL, text, torch.tensor([length]))
            assert relevance.isfinite().all()
            assert len(set(relevance[0].tolist())) == 1
            assert relevance[0, 0] > 0


def batch() -> Batch:
    images = [picture(40, 40), picture(56, 24, seed=1)]
    samples = [Sample(image, question, ("a",)) for image, question in zip(images, ("what?", "who is it"), strict=True)]
    return Batch(samples, [0, 1], images)


@pytest.mark.parametrize(
    ("family", "name", "alpha"),
    [
        *(("internvl", "cdpruner", None), ("llava", "cdpruner", None), ("qwen2_vl", "cdpruner", None)),
        ("internvl", "cdpruner-weighted", 0.5),  # 0.5 / (2 * (1 - 0.5))
    ],
)
@torch.no_grad()
def test_it_compares_what_the_decoder_is_handed_with_the_question(
    family: str, name: str, alpha: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(*tiny_family_pair(family, "internvl"), max_new_tokens=4)
    seen: list[tuple[Tensor, int]] = []
    handed: list[Tensor] = []

    class Watched(VisualTokenPruner):
        def __init__(self, model: Any, keep_mask: Any, prune_layer: int) -> None:
            def choose() -> Tensor:
                seen.append((keep_mask(), prune_layer))
                return seen[-1][0]

            super().__init__(model, choose, prune_layer)

    large = pair.model.large
    hook = large.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: handed.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    monkeypatch.setattr(guides, "VisualTokenPruner", Watched)
    questions = batch()
    try:
        found = METHODS[name].answer(pair, questions, Setting.of(0.35, pair.num_layers))
    finally:
        hook.remove()

    ((mask, layer),) = seen
    assert layer == 0
    processor = pair.processor.large_processor
    inputs = pair.inputs(processor, questions.samples, questions.images)
    for row, sample in enumerate(questions.samples):
        ids = inputs["input_ids"][row].tolist()
        columns = [column for column, token in enumerate(ids) if token == large.config.image_token_id]
        words = processor.tokenizer.convert_tokens_to_ids(list(sample.question))  # every token is a letter
        text = [large.get_input_embeddings().weight[word].double().tolist() for word in words]
        features = [handed[0][row, column].double().tolist() for column in columns]
        number = max(1, math.floor(0.35 * len(columns)))
        kept = by_determinants(features, plain_relevance(features, text, alpha), number)
        expected = inputs["attention_mask"][row].bool().tolist()
        for place, column in enumerate(columns):
            expected[column] = place in kept
        assert mask[row].tolist() == expected
        assert found[row].retention == pytest.approx(number / len(columns))


def test_it_always_prunes_from_the_first_layer() -> None:
    assert CDPruner().setting(Setting(0.35, 2, 10)) == Setting(0.35, 0, 10)
