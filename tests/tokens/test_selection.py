"""Every selection against plain loops over its definition, and by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_sgl import (
    ConditionalDPPProcessor,
    FacilityLocationProcessor,
    ImportanceProcessor,
    ImportanceProcessorList,
    MinimumPerImageProcessor,
    RetentionRatioProcessor,
    VisualTokens,
)
from transformers_sgl.tokens import selection
from transformers_sgl.tokens.selection import decoder_processors

pytestmark = pytest.mark.mechanics

IMAGE = 9
DROPPED, PROTECTED = -math.inf, math.inf
CLOSE = 1e-4  # two determinants that differ by less are a tie, which rounding may decide


def visual_tokens(features: Tensor, counts: list[int] | None = None) -> VisualTokens:
    """Prompts of one image each, with features of the shape (batch, num_visual_tokens, width)."""
    number = features.shape[1]
    rows = [[IMAGE] * count + [1] * (number + 1 - count) for count in counts or [number] * len(features)]
    return replace(VisualTokens.from_input_ids(torch.tensor(rows), IMAGE), features=features)


def kept_by(processor: ImportanceProcessor, tokens: VisualTokens, importance: Tensor) -> list[list[int]]:
    """The indices that are kept of each sample."""
    kept = ImportanceProcessorList([processor]).keep_mask(tokens, importance)
    return [row.nonzero()[:, 0].tolist() for row in kept]


def cosines(features: np.ndarray) -> np.ndarray:
    cosine = np.eye(len(features))
    for i, one in enumerate(features):
        for j, other in enumerate(features):
            norms = math.sqrt(one @ one) * math.sqrt(other @ other)
            if i != j:
                cosine[i, j] = one @ other / norms if norms else 0.0
    return cosine


def by_determinants(chosen: list[int], importance: list[float], cosine: np.ndarray, diversity: float) -> float:
    """The determinant of the kernel of these tokens."""
    kernel = np.zeros((len(chosen), len(chosen)))
    for row, i in enumerate(chosen):
        for column, j in enumerate(chosen):
            likeness = diversity * cosine[i, j] + (1 - diversity) * (i == j)
            kernel[row, column] = importance[i] * importance[j] * likeness
    return float(np.linalg.det(kernel))


def within_blocks(cosine: np.ndarray, left: list[int], most: int) -> np.ndarray:
    """The same, but 0 for tokens of different blocks, of at most so many of the tokens that are left."""
    num_blocks = math.ceil(len(left) / most)
    size = math.ceil(len(left) / max(1, num_blocks))
    block = {index: place // size for place, index in enumerate(left)}
    numbers = np.array([block.get(index, -1) for index in range(len(cosine))])
    return np.where(numbers[:, None] == numbers, cosine, 0.0)


def by_coverage(chosen: list[int], importance: list[float], cosine: np.ndarray, own_share: float) -> float:
    """How much of the importance these tokens stand for, and a share of their own."""
    finite = [weight if math.isfinite(weight) else 0.0 for weight in importance]
    covered = sum(weight * max(max(0.0, cosine[i, j]) for j in chosen) for i, weight in enumerate(finite))
    return covered + own_share * sum(finite[j] for j in chosen)


def one_by_one(
    value: Callable[..., float], importance: list[float], cosine: np.ndarray, budget: int, number: float
) -> tuple[list[int], float]:
    """The greedy choice by the value of whole sets, and how close the closest decision was, relatively."""
    left = [index for index, weight in enumerate(importance) if weight > DROPPED]
    chosen = [index for index in left if importance[index] == PROTECTED]
    # Determinants want a number for protected tokens; which one makes no difference.
    known = [1.0 if weight == PROTECTED and value is by_determinants else weight for weight in importance]
    closest, highest = math.inf, value(left, known, cosine, number)
    while len(chosen) < min(budget, len(left)):
        values = {index: value([*chosen, index], known, cosine, number) for index in left if index not in chosen}
        before = value(chosen, known, cosine, number) if chosen and value is by_coverage else 0.0
        best = max(values.values())
        first = next(index for index, each in values.items() if each - before >= (best - before) * (1 - CLOSE))
        others = [each - before for index, each in values.items() if index != first]
        if others:
            is_tie = best - before <= 1e-6 * abs(highest)
            closest = 0.0 if is_tie else min(closest, 1 - max(others) / (best - before))
        chosen.append(first)
    return sorted(chosen), closest


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_against_plain_loops_in_2000_random_cases(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    value = by_determinants if kind is ConditionalDPPProcessor else by_coverage
    compared = 0
    for batch in range(100):  # batches of 20
        number, width = int(random.integers(1, 9)), int(random.integers(2, 6))
        ratio, setting = float(random.uniform(0.05, 1)), float(random.choice([0.0, 0.3, 0.9]))
        features = random.normal(size=(20, number, width)) * random.uniform(0.1, 10)
        features[random.random((20, number)) < 0.05] = 0
        importance = random.random((20, number)) ** 2
        for special, share in ((0.0, 0.05), (DROPPED, 0.1), (PROTECTED, 0.05)):
            importance[random.random((20, number)) < share] = special
        importance[:, 0] = np.where(importance[:, 0] == DROPPED, 0.5, importance[:, 0])
        counts = random.integers(1, number + 1, size=20).tolist()
        counts[0] = number
        alive = np.arange(number) < np.array(counts)[:, None]
        tokens = visual_tokens(torch.tensor(features, dtype=torch.float32), counts)
        most = 8 if batch % 2 else int(random.integers(2, 5))
        monkeypatch.setattr(selection, "_BLOCK_SIZE", most)
        monkeypatch.setattr(selection, "_CHECK_EVERY", 1 + batch % 3)
        result = kind(ratio, setting)(tokens, torch.tensor(np.where(alive, importance, DROPPED), dtype=torch.float32))
        assert (result[~tokens.valid] == DROPPED).all()
        for sample, count in enumerate(counts):
            values = importance[sample, :count].tolist()
            budget = max(1, math.floor(ratio * count), values.count(PROTECTED))
            kept = (result[sample] > DROPPED).nonzero()[:, 0].tolist()
            assert len(kept) == min(budget, count - values.count(DROPPED))
            assert all(result[sample, index] == np.float32(values[index]) for index in kept)
            cosine = cosines(features[sample, :count])
            if kind is FacilityLocationProcessor:
                left = [index for index in range(count) if values[index] > DROPPED]
                cosine = within_blocks(cosine, left, most)
            expected, closest = one_by_one(value, values, cosine, budget, setting)
            if closest > CLOSE:
                compared += 1
                assert kept == expected, (values, features[sample, :count], ratio, setting)
    assert compared > 1500


@pytest.mark.parametrize(
    ("importance", "cosine", "kept"),
    [
        # After the first token, the second one's novelty is 1 - (0.9 * cosine)**2.
        ([0.5, 0.4, 0.1], 1.0, [0, 1]),  # 0.4**2 * 0.19 = 0.0304 > 0.1**2
        ([0.5, 0.4, 0.2], 1.0, [0, 2]),  # < 0.2**2
        ([0.5, 0.4, 0.3], 0.6, [0, 1]),  # 0.4**2 * 0.7084 = 0.1133 > 0.3**2
        ([0.5, 0.4, 0.35], 0.6, [0, 2]),  # < 0.35**2 = 0.1225
        ([0.5, 0.4, 0.35], -0.6, [0, 2]),  # an opposite token is no news either
        ([0.5, 0.4, 0.39], 0.0, [0, 1]),
    ],
)
def test_determinants_by_hand(importance: list[float], cosine: float, kept: list[int]) -> None:
    features = torch.tensor([[[1.0, 0, 0], [cosine, math.sqrt(1 - cosine**2), 0], [0, 0, 1.0]]])
    tokens = visual_tokens(features)
    assert kept_by(ConditionalDPPProcessor(0.7), tokens, torch.tensor([importance])) == [kept]


def test_protected_tokens_come_first_and_count() -> None:
    features = torch.tensor([[[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]]])
    tokens = visual_tokens(features)
    # The third is protected, so the fourth is no news: the first is taken, though it is less important.
    kept = kept_by(ConditionalDPPProcessor(0.5), tokens, torch.tensor([[0.5, 0.1, PROTECTED, 0.9]]))
    assert kept == [[0, 2]]
    everything = torch.tensor([[0.5, PROTECTED, PROTECTED, PROTECTED]])
    assert kept_by(ConditionalDPPProcessor(0.3), tokens, everything) == [[1, 2, 3]]


def test_coverage_by_hand() -> None:
    # Two of the first kind weigh 0.3 + 0.3, two of the second 0.4 + 0.1; the third stands for 0.8 of the first kind.
    features = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0.8, 0, 0.6]]])
    tokens = visual_tokens(features)
    importance = torch.tensor([[0.3, 0.3, 0.4, 0.1, 0.2]])
    gained = [0.3 + 0.3 + 0.8 * 0.2, 0.4 + 0.1, 0.8 * 0.6 + 0.2]  # 0.76, 0.5 and 0.68
    assert kept_by(FacilityLocationProcessor(0.2, 0.0), tokens, importance) == [
        [[0], [2], [4]][gained.index(max(gained))]
    ]
    assert kept_by(FacilityLocationProcessor(0.4, 0.0), tokens, importance) == [
        [0, 2]
    ]  # then 0.5, and 0.2 * 0.2 = 0.04
    assert kept_by(FacilityLocationProcessor(0.6, 0.0), tokens, importance) == [[0, 2, 4]]
    more = torch.tensor([[0.2, 0.2, 0.4, 0.1, 0.4]])  # 0.72, 0.5, and 0.8 * 0.4 + 0.4 = 0.72: the earlier
    assert kept_by(FacilityLocationProcessor(0.2, 0.0), tokens, more + torch.tensor([0.0, 0, 0, 0, 0.01])) == [[4]]
    opposite = visual_tokens(torch.tensor([[[1.0, 0], [-1.0, 0], [0, 1.0]]]))  # stands for nothing
    assert kept_by(FacilityLocationProcessor(0.7, 0.0), opposite, torch.tensor([[0.5, 0.4, 0.3]])) == [[0, 1]]
    # With a share of its own each token adds more: 0.76 + 0.3, 0.5 + 0.4 and 0.68 + 0.2; then 0.5 + 0.4 again, 0.3 for
    # the second of the first kind, and 0.04 + 0.2 for the last.
    assert kept_by(FacilityLocationProcessor(0.6, 1.0), tokens, importance) == [[0, 1, 2]]
    assert kept_by(FacilityLocationProcessor(0.6, 0.1), tokens, importance) == [[0, 2, 4]]  # 0.03, and 0.04 + 0.02


def test_two_images_and_blocks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two images. All tokens are alike, but for the last one.
    ids = torch.tensor([[9, 9, 9, 1, 9, 9, 9]])
    features = torch.tensor([[[1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0], [1.0, 0], [0, 1.0]]])
    importance = torch.tensor([[0.1, 0.5, 0.2, 0.3, 0.1, 0.35]])
    tokens = replace(VisualTokens.from_input_ids(ids, IMAGE), features=features)
    choose = FacilityLocationProcessor
    # Those of both images are compared: the first adds 1.2, the last 0.35, and others nothing more.
    assert kept_by(choose(0.34, 0.0), tokens, importance) == [[0, 5]]
    assert kept_by(choose(0.5, 0.1), tokens, importance) == [[1, 3, 5]]
    monkeypatch.setattr(selection, "_BLOCK_SIZE", 4)  # two blocks of three
    # The first adds 0.1 + 0.5 + 0.2; then one of the second block adds 0.3 + 0.1, and the last 0.35.
    assert kept_by(choose(0.17, 0.0), tokens, importance) == [[0]]
    assert kept_by(choose(0.34, 0.0), tokens, importance) == [[0, 3]]
    assert kept_by(choose(0.5, 0.0), tokens, importance) == [[0, 3, 5]]
    # With a share of its own the more important of equal ones: 0.8 + 0.05, 0.4 + 0.03, 0.35 + 0.035, then 0.02.
    assert kept_by(choose(0.5, 0.1), tokens, importance) == [[1, 3, 5]]
    assert kept_by(choose(0.67, 0.1), tokens, importance) == [[1, 2, 3, 5]]
    # A protected token stands for those of its own block only.
    importance[0, 4] = PROTECTED
    assert kept_by(choose(0.34, 0.0), tokens, importance) == [[0, 4]]
    # Tokens that have been dropped fill no block: the first four are one, then the last.
    importance = torch.tensor([[0.1, 0.1, DROPPED, 0.1, 0.3, 0.2]])
    monkeypatch.setattr(selection, "_BLOCK_SIZE", 3)
    assert kept_by(choose(0.5, 0.0), tokens, importance) == [[0, 4, 5]]


def test_up_to_512_tokens_are_all_compared() -> None:
    for number, second in ((512, 1), (513, 257)):
        tokens = visual_tokens(torch.ones(1, number, 2))
        importance = torch.ones(1, number)
        importance[0, 0] = 2.0
        assert kept_by(FacilityLocationProcessor(0.004, 0.0), tokens, importance) == [[0, second]]


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_ties_zeros_and_a_single_token(kind: Any) -> None:
    alike = visual_tokens(torch.ones(1, 6, 4))
    half, one = kind(0.5), kind(0.01)
    assert kept_by(half, alike, torch.ones(1, 6)) == [[0, 1, 2]]
    assert kept_by(half, alike, torch.zeros(1, 6)) == [[0, 1, 2]]
    if kind is ConditionalDPPProcessor:
        assert kept_by(half, alike, torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.2, 0.0]])) == [[0, 1, 4]]
        assert kept_by(one, alike, torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.2, 0.1]])) == [[2]]
    many = visual_tokens(torch.ones(2, 100, 4))  # more ties than are looked at together
    assert kept_by(kind(0.3), many, torch.zeros(2, 100)) == 2 * [list(range(30))]
    assert kept_by(kind(1.0), alike, torch.zeros(1, 6)) == [[0, 1, 2, 3, 4, 5]]
    assert kept_by(one, visual_tokens(torch.ones(1, 1, 4)), torch.zeros(1, 1)) == [[0]]
    tiny = torch.tensor([[1e-30, 3e-30, 2e-30, 0.0, 0.0, 0.0]])
    assert kept_by(half, visual_tokens(torch.eye(6)[None]), tiny) == [[0, 1, 2]]


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_dropped_tokens_are_neither_kept_nor_compared(kind: Any) -> None:
    tokens = visual_tokens(torch.tensor([[[1.0, 0], [1.0, 0], [0, 1.0], [1.0, 1.0]]]))
    importance = torch.tensor([[DROPPED, 0.2, DROPPED, DROPPED]])
    assert kept_by(kind(0.9), tokens, importance) == [[1]]


@pytest.mark.parametrize("unknown", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_a_token_of_which_nothing_is_known_is_unlike_any_other(kind: Any, unknown: float) -> None:
    features = torch.tensor([[[1.0, 0], [1.0, 0], [unknown, unknown], [unknown, unknown]]])
    importance = torch.tensor([[0.9, 0.7, 0.5, 0.4]])
    assert kept_by(kind(0.75), visual_tokens(features), importance) == [[0, 2, 3]]


def test_every_image_keeps_its_minimum() -> None:
    ids = torch.tensor([[9, 9, 9, 1, 9, 9, 9, 1], [9, 9, 9, 9, 9, 9, 1, 1]])
    features = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1, 2]])).float()
    tokens = replace(VisualTokens.from_input_ids(ids, IMAGE), features=features)
    importance = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0.2, 0.3], [0.9, 0.8, 0.7, 0.1, 0.2, 0.3]])
    processors = decoder_processors(0.5, 1, selection="dpp")
    assert [type(each) for each in processors] == [MinimumPerImageProcessor, ConditionalDPPProcessor]
    kept = [row.nonzero()[:, 0].tolist() for row in processors.keep_mask(tokens, importance)]
    # The best token of each image first: the last one of the second image looks like the first two.
    assert kept == [[0, 2, 5], [0, 1, 2]]


def test_without_diversity_the_most_important_are_kept() -> None:
    random = torch.Generator().manual_seed(0)
    importance = torch.randint(0, 5, (8, 40), generator=random) / 4
    tokens = visual_tokens(torch.randn(8, 40, 6, generator=random), [40, 1, 7, 39, 20, 33, 2, 40])
    for ratio in (0.05, 0.3, 0.64, 1.0):
        masks = [
            ImportanceProcessorList([each]).keep_mask(tokens, importance)
            for each in (ConditionalDPPProcessor(ratio, diversity=0.0), RetentionRatioProcessor(ratio))
        ]
        assert torch.equal(*masks)


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_the_choice_depends_on_directions_and_on_relative_importance_alone(kind: Any) -> None:
    random = torch.Generator().manual_seed(1)
    features, importance = torch.randn(3, 60, 8, generator=random), torch.rand(3, 60, generator=random)
    choose = kind(0.2, 0.3)
    expected = kept_by(choose, visual_tokens(features), importance)
    lengths = torch.rand(3, 60, 1, generator=random) + 0.1
    assert kept_by(choose, visual_tokens(features * lengths), importance * 1e-3) == expected
    assert kept_by(choose, visual_tokens(features.double()), importance * 1e4) == expected
    # In another order, the same tokens.
    order = torch.randperm(60, generator=random)
    mixed = kept_by(choose, visual_tokens(features[:, order]), importance[:, order])
    assert [sorted(order[row].tolist()) for row in mixed] == expected
    # Each sample by itself, and more tokens with a larger ratio.
    for sample in range(3):
        alone = visual_tokens(features[sample : sample + 1])
        assert kept_by(choose, alone, importance[sample : sample + 1]) == expected[sample : sample + 1]
        more = kept_by(kind(0.5, 0.3), alone, importance[sample : sample + 1])[0]
        assert set(expected[sample]) < set(more)


def test_wide_and_many_tokens_stay_exact() -> None:
    """Rounding does not add up over hundreds of steps, also beyond the rank of the features."""
    random = np.random.default_rng(2)
    features, importance = random.normal(size=(400, 24)), random.random(400)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = 0.9 * unit @ unit.T + 0.1 * np.eye(400)
    chosen: list[int] = []
    for _ in range(200):
        novelty = np.diag(kernel).copy()
        if chosen:
            rows = kernel[chosen]
            novelty -= np.einsum("ij,ij->j", rows, np.linalg.solve(kernel[np.ix_(chosen, chosen)], rows))
        score = importance**2 * novelty
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    tokens = visual_tokens(torch.tensor(features, dtype=torch.float32)[None])
    kept = kept_by(ConditionalDPPProcessor(0.5), tokens, torch.tensor(importance, dtype=torch.float32)[None])
    assert kept == [sorted(chosen)]


def test_coverage_of_many_tokens_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_BLOCK_SIZE", 150)
    random = np.random.default_rng(3)
    features, importance = random.normal(size=(3, 300, 12)).cumsum(axis=1), random.random((3, 300)) ** 3
    importance[0, 100:250:3] = DROPPED
    expected = []
    for rows, weights in zip(features, importance, strict=True):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        left, dropped = np.flatnonzero(weights > DROPPED).tolist(), np.flatnonzero(weights == DROPPED).tolist()
        likeness, covered, chosen = within_blocks((unit @ unit.T).clip(0), left, 150), np.zeros(300), []
        finite = weights.clip(0)
        for _ in range(90):
            gains = ((likeness - covered).clip(0) * finite).sum(axis=1) + finite
            gains[chosen + dropped] = -1
            chosen.append(int(gains.argmax()))
            covered = np.maximum(covered, likeness[chosen[-1]])
        expected.append(sorted(chosen))
    tokens = visual_tokens(torch.tensor(features, dtype=torch.float32))
    kept = kept_by(FacilityLocationProcessor(0.3), tokens, torch.tensor(importance, dtype=torch.float32))
    assert kept == expected


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_no_step_waits_for_the_device(kind: Any) -> None:
    class Watch(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.waits += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
            return func(*args, **(kwargs or {}))

    random = torch.Generator().manual_seed(0)
    tokens, importance = visual_tokens(torch.randn(2, 40, 4, generator=random)), torch.rand(2, 40, generator=random)
    found = []
    for ratio in (0.1, 0.9):
        with Watch() as watch:
            kind(ratio)(tokens, importance)
        found.append(watch.waits)
    assert found[0] == found[1] <= 6


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_what_cannot_be_done_is_refused(kind: Any) -> None:
    tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 1]]), IMAGE)
    with pytest.raises(ValueError, match="compares the features of visual tokens, but there are none"):
        kind(0.5)(tokens, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"features have the shape \(1, 2, 4\), but the importance \(1, 3\)"):
        kind(0.5)(replace(tokens, features=torch.ones(1, 2, 4)), torch.ones(1, 3))
    for ratio in (0, 1.5, True, "0.5"):
        with pytest.raises(ValueError, match="`retention_ratio` is"):
            kind(ratio)  # type: ignore[arg-type]
    for own_share in (-0.1, math.inf, math.nan, True, "much"):
        with pytest.raises(ValueError, match="`own_share` is"):
            FacilityLocationProcessor(0.5, own_share)  # type: ignore[arg-type]
    for diversity in (-0.1, 1.0, math.nan, True, "much"):
        with pytest.raises(ValueError, match="`diversity` is"):
            ConditionalDPPProcessor(0.5, diversity)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="returned NaN"):
        processors = ImportanceProcessorList([kind(0.7)])
        processors.keep_mask(visual_tokens(torch.ones(1, 3, 2)), torch.tensor([[math.nan, 1.0, 1.0]]))


def test_the_settings_choose_the_processor() -> None:
    assert decoder_processors(1.0, 1, selection="dpp") == []
    assert [type(each) for each in decoder_processors(0.5, 0, selection="facility_location")] == [
        FacilityLocationProcessor
    ]
    assert [type(each) for each in decoder_processors(0.5, 0)] == [RetentionRatioProcessor]
    assert not decoder_processors(0.5, 1).needs_features
    chosen = decoder_processors(0.5, 1, selection="dpp")
    assert [type(each) for each in chosen] == [MinimumPerImageProcessor, ConditionalDPPProcessor]
    assert chosen.needs_features
    assert not ImportanceProcessorList([lambda tokens, importance: importance]).needs_features  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [ConditionalDPPProcessor, FacilityLocationProcessor])
def test_no_visual_tokens(kind: Any) -> None:
    tokens = replace(VisualTokens.from_input_ids(torch.tensor([[1, 2]]), IMAGE), features=torch.zeros(1, 0, 4))
    assert kind(0.5)(tokens, torch.zeros(1, 0)).shape == (1, 0)
    beside = visual_tokens(torch.ones(3, 4, 2), [0, 4, 1])  # a prompt without, beside others
    importance = torch.ones(3, 4).masked_fill(~beside.valid, DROPPED)
    assert kept_by(kind(0.5), beside, importance) == [[], [0, 1], [0]]
