"""The embedded pair that describes, on held-out scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from transformers_sgl.evaluation import Sample, evaluate, load_samples
from transformers_sgl.evaluation.metrics import described_facts
from transformers_sgl.opening import chat_inputs, open_pair, user_turn

CARDS = Path(__file__).parents[1] / "model_cards"
CARD = CARDS / "sgl-tiny-describing"


@pytest.fixture(scope="module")
def describes() -> tuple[Any, Any]:
    return open_pair(CARD, device="cpu")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return load_samples("descriptions", limit=24)


@pytest.fixture(scope="module")
def inputs(describes: tuple[Any, Any], samples: list[Sample]) -> Any:
    return chat_inputs(*describes, [user_turn(sample.question, [sample.open_image()]) for sample in samples])


def answers(processor: Any, inputs: Any, sequences: torch.Tensor) -> list[str]:
    return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def score(given: list[str], samples: list[Sample]) -> float:
    return sum(described_facts(answer, sample.answers) for answer, sample in zip(given, samples, strict=True)) / len(
        samples
    )


def test_the_large_one_describes_better_and_drafts_change_nothing(
    describes: tuple[Any, Any], samples: list[Sample], inputs: Any
) -> None:
    pair, processor = describes
    # Without a limit of the caller's: whole descriptions fit into the pair's own.
    large, small = (model.generate(**inputs) for model in (pair.large, pair.small))
    assert score(answers(processor, inputs, large), samples) > 0.9
    assert 0.97 > score(answers(processor, inputs, small), samples) > 0.7
    lengths = (large[:, inputs["input_ids"].shape[1] :] != pair.large.generation_config.pad_token_id).sum(dim=1)
    assert lengths.min() >= 30
    assert 90 < lengths.max() < pair.generation_config.max_new_tokens
    drafted = pair.generate(**inputs, retention_ratio=1.0, verify_draft=True, return_dict_in_generate=True)
    assert torch.equal(drafted.sequences, large)
    assert (drafted.num_draft_tokens_accepted > 0).any()


def test_a_guided_answer_is_a_description(describes: tuple[Any, Any], samples: list[Sample], inputs: Any) -> None:
    pair, processor = describes
    half = pair.generate(**inputs, retention_ratio=0.5, prune_layer=0, verify_draft=False)
    assert score(answers(processor, inputs, half), samples) > 0.7


def test_an_evaluation_counts_facts(describes: tuple[Any, Any], tmp_path: Path) -> None:
    options = {"methods": ["small"], "limit": 2, "batch_size": 2, "max_new_tokens": 160, "device": "cpu"}
    found = evaluate(describes, "descriptions", out=tmp_path, metric="described_facts", **options)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    asked = load_samples("descriptions", limit=2)
    assert [line["score"] for line in lines] == [
        described_facts(line["answer"], asked[line["sample"]].answers) for line in lines
    ]
    assert sum(line["score"] for line in lines) > 1
    assert {line["num_tokens"] > 30 for line in lines} == {True}
    assert [row["method"] for row in found.report["rows"]] == ["small"]


@pytest.mark.parametrize("part", ["large", "small"])
def test_it_shares_everything_but_the_weights_with_the_pair_it_comes_from(part: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (CARD / part / file).read_bytes() == (CARDS / "sgl-tiny" / part / file).read_bytes(), file
    own, before = (load_file(card / part / "model.safetensors") for card in (CARD, CARDS / "sgl-tiny"))
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in before.items()}
    assert not any(torch.equal(own[name], before[name]) for name in own if name.endswith("q_proj.weight"))


def test_it_is_no_larger_than_a_repository_can_bear() -> None:
    size = sum(path.stat().st_size for path in CARD.rglob("*") if path.is_file())
    assert size < 25 * 2**20
