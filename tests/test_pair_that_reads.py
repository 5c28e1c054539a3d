"""The embedded pair that reads, on held-out pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from transformers_sgl.evaluation import Sample, load_samples
from transformers_sgl.evaluation.metrics import exact_match
from transformers_sgl.opening import chat_inputs, open_pair, user_turn

CARD = Path(__file__).parents[1] / "model_cards" / "sgl-tiny-reading"
GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def reads() -> tuple[Any, Any]:
    return open_pair(CARD, device="cpu")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_samples("reading", limit=64)


def score(model: Any, pair: Any, processor: Any, samples: list[Sample], **settings: Any) -> float:
    right = []
    for start in range(0, len(samples), 32):
        some = samples[start : start + 32]
        chats = [user_turn(sample.question, [sample.open_image()]) for sample in some]
        inputs = chat_inputs(pair, processor, chats)
        sequences = model.generate(**inputs, **GREEDY, **settings)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(sequences, skip_special_tokens=True)
        right += [exact_match(answer, sample.answers) for answer, sample in zip(answers, some, strict=True)]
    return sum(right) / len(right)


def test_the_large_one_reads_better_and_loses_little_when_guided(
    reads: tuple[Any, Any], samples: list[Sample]
) -> None:
    pair, processor = reads
    large = score(pair.large, pair, processor, samples)
    small = score(pair.small, pair, processor, samples)
    assert large > small > 0.5
    assert large > 0.6
    half = score(pair, pair, processor, samples, retention_ratio=0.5, prune_layer=0, verify_draft=False)
    assert half > large - 0.06


def test_both_models_share_what_they_read_with(reads: tuple[Any, Any]) -> None:
    pair, processor = reads
    assert processor.large_processor.tokenizer.get_vocab() == processor.small_processor.tokenizer.get_vocab()
    assert pair.large.config.vision_config.to_dict() == pair.small.config.vision_config.to_dict()
    size = sum(path.stat().st_size for path in CARD.rglob("*") if path.is_file())
    assert size < 25 * 2**20
