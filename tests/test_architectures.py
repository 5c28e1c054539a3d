"""Every supported architecture keeps every promise; every other one says why not."""

from __future__ import annotations

import pytest
from architectures import TINY, conformance

from transformers_sgl.architectures import ARCHITECTURES

pytestmark = pytest.mark.mechanics

SUPPORTED = sorted(name for name, tiny in TINY.items() if tiny.config(4).model_type in ARCHITECTURES)
names = pytest.mark.parametrize("name", SUPPORTED)
videos = pytest.mark.parametrize("name", [name for name in SUPPORTED if TINY[name].videos])


@names
def test_importance_is_the_sum_of_eager_attentions(name: str) -> None:
    conformance.check_guides(name)


@names
def test_with_everything_kept_it_is_the_stock_model(name: str) -> None:
    conformance.check_identity(name)


@names
def test_a_pruned_batch_is_each_sample_with_its_dropped_tokens_masked(name: str) -> None:
    conformance.check_is_guided(name)


@names
def test_a_pair_guides_a_batch_like_its_samples(name: str) -> None:
    conformance.check_pair(name)


@videos
def test_videos(name: str) -> None:
    conformance.check_identity(name, video=True)
    conformance.check_is_guided(name, video=True)
    conformance.check_pair(name, video=True)
