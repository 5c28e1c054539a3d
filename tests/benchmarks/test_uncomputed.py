"""Counting operations without computing: the same numbers as real models', and no memory."""

from __future__ import annotations

from contextlib import nullcontext

import psutil
import pytest
import torch
from tiny_models import prompts, tiny_internvl

from benchmarks.parts.pairing import Pairing
from benchmarks.random_models import random_inputs, random_model
from benchmarks.uncomputed import Uncomputed, weightless
from transformers_sgl.evaluation.cost import flop_counter
from transformers_sgl.tokens.early_exit import NEVER_EXIT

SETTINGS = {
    "decoder": {},
    "tiles": {"vision_retention_ratio": 0.7},
    "patches": {"vision_retention_ratio": 0.5, "vision_prune_layer": 0},
    "scored": {"score_draft": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_as_many_operations_as_computed_ones(settings):
    large, small = tiny_internvl(4), tiny_internvl(2, seed=1)
    for model in (large, small):
        model.generation_config.eos_token_id = None
    pairing = Pairing(large, small, prompts([[3]], [5]))
    counts = []
    for within in (nullcontext(), Uncomputed(at_least=256)):
        with within, flop_counter() as counter:
            pairing.guided(max_new_tokens=3, verify_draft=False, early_exit_threshold=NEVER_EXIT, **settings)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_shape_without_weights_counts_as_the_one_with_them():
    counts = []
    models = random_model("internvl-1b", 64), weightless("internvl-1b", 64)
    for model, within in zip(models, (nullcontext(), Uncomputed(at_least=256)), strict=True):
        with within, flop_counter() as counter:
            model.generate(**random_inputs(model, (448, 448), 4), max_new_tokens=2)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_100_gigabytes_of_weights_take_no_memory():
    before = psutil.Process().memory_info().rss
    model = weightless("internvl-26b")
    assert model.num_parameters() * 4 > 100e9
    assert psutil.Process().memory_info().rss - before < 1e9


def test_what_is_small_is_computed():
    with Uncomputed(at_least=100):
        small, large = torch.arange(10.0), torch.ones(10, 20)
        assert torch.equal(small * 2, torch.arange(0, 20, 2.0))
        assert (large @ torch.ones(20, 3)).shape == (10, 3)
        mask = torch.eye(10, dtype=torch.bool)
        assert large.view(10, 10, 2)[mask].shape == (10, 2)  # as many as the mask has ones
