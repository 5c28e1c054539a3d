"""Saving and loading a pair as transformers, accelerate and the Auto classes do it with any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from tiny_models import state, tiny_internvl
from transformers import AutoModelForImageTextToText

from transformers_sgl import SGLForConditionalGeneration

pytestmark = pytest.mark.mechanics


@pytest.fixture
def pair() -> SGLForConditionalGeneration:
    return SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16)).eval()


def assert_same_weights(one: SGLForConditionalGeneration, other: SGLForConditionalGeneration) -> None:
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


# --- state dicts ---


def test_the_recipe_of_accelerate_saves_a_pair(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(pair)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )
    assert_same_weights(SGLForConditionalGeneration.from_pretrained(tmp_path), pair)


def test_a_state_dict_is_written_instead_of_the_weights(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    changed = {name: value + 1 for name, value in pair.state_dict().items()}
    before, given = {name: value.clone() for name, value in pair.state_dict().items()}, dict(changed)
    pair.save_pretrained(tmp_path, state_dict=given, max_shard_size="20KB")
    assert given.keys() == changed.keys()
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    loaded = SGLForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, changed[name]) for name, value in loaded.items())


def test_accelerates_own_files_fit_a_pair(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    Accelerator(cpu=True).save_model(pair, tmp_path)
    other = SGLForConditionalGeneration(large=tiny_internvl(seed=2), small=tiny_internvl(2, seed=3, hidden_size=16))
    load_checkpoint_in_model(other, tmp_path)
    assert_same_weights(other, pair)


def without_a_norm(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if name != "small.model.language_model.norm.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda pair: pair.large.state_dict(),
            r"has 'model\..*begin with `large\.` or `small\.`: pass",
        ),
        (lambda pair: {**pair.state_dict(), "large.more": torch.ones(1)}, "large model, where 'more' is unknown"),
        (lambda pair: without_a_norm(pair.state_dict()), r"small model, where 'model\..*\.norm\.weight' is missing"),
        (lambda pair: {}, "does not fit the large model, where .* is missing: pass that of this pair"),
        (
            lambda pair: {name: value.flatten() for name, value in pair.state_dict().items()},
            "does not fit the large model, where .* is of another shape",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(
    change: Callable[[Any], Any], message: str, pair: SGLForConditionalGeneration, tmp_path: Path
) -> None:
    before = state(pair)
    with pytest.raises(ValueError, match=message):
        pair.save_pretrained(tmp_path / "pair", state_dict=change(pair))
    assert not list(tmp_path.iterdir())
    assert state(pair) == before


def test_of_tied_weights_one_is_enough(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    weights = {name: value for name, value in pair.state_dict().items() if "lm_head" not in name}
    assert len(weights) == len(pair.state_dict()) - 2
    pair.save_pretrained(tmp_path, state_dict=weights)
    assert_same_weights(SGLForConditionalGeneration.from_pretrained(tmp_path), pair)


def test_processes_beside_the_main_one_write_nothing(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    # Beside the main process, accelerate may hand over an empty state dict.
    for arguments in ({}, {"state_dict": {}}, {"push_to_hub": True}):
        pair.save_pretrained(tmp_path / "pair", is_main_process=False, **arguments)
    assert not list(tmp_path.iterdir())


def test_what_a_pair_cannot_save_or_load_is_refused(pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not saved as a distributed checkpoint: leave `distributed_checkpoint` out"):
        pair.save_pretrained(tmp_path, distributed_checkpoint=True)
    with pytest.raises(ValueError, match="call `push_to_hub` without a `state_dict`, after saving"):
        pair.save_pretrained(tmp_path, state_dict=pair.state_dict(), push_to_hub=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"`SGLForConditionalGeneration\(config\)`, and call `load_state_dict`"):
        SGLForConditionalGeneration.from_pretrained(None, config=pair.config, state_dict=pair.state_dict())


# --- attention ---


def attention(pair: SGLForConditionalGeneration) -> list[tuple[str, str]]:
    """The attention functions of both models' text and vision."""
    configs = [model.config for model in (pair.large, pair.small)]
    return [(config.text_config._attn_implementation, config.vision_config._attn_implementation) for config in configs]


@pytest.mark.parametrize("auto", [True, False])
@pytest.mark.parametrize("kind", ["bundle", "recipe"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"attn_implementation": {"text_config": "eager"}}, [("eager", "sdpa"), ("eager", "sdpa")]),
        ({"attn_implementation": {"vision_config": "eager"}}, [("sdpa", "eager"), ("sdpa", "eager")]),
        ({"large_attn_implementation": {"text_config": "eager"}}, [("eager", "sdpa"), ("sdpa", "sdpa")]),
        (
            {"attn_implementation": {"text_config": "eager", "small_config": {"text_config": "sdpa"}}},
            [("eager", "sdpa"), ("sdpa", "sdpa")],
        ),
        ({"attn_implementation": {"large_config": "eager"}}, [("eager", "eager"), ("sdpa", "sdpa")]),
        (
            {
                "attn_implementation": "eager",
                "small_attn_implementation": {"text_config": "sdpa", "vision_config": "sdpa"},
            },
            [("eager", "eager"), ("sdpa", "sdpa")],
        ),
        ({"attn_implementation": "eager"}, [("eager", "eager"), ("eager", "eager")]),
    ],
    ids=str,
)
def test_parts_of_the_models_have_the_attention_that_was_asked_for(
    arguments: dict[str, Any], expected: list[tuple[str, str]], kind: str, auto: bool, saved: dict[str, Path]
) -> None:
    loader = AutoModelForImageTextToText if auto else SGLForConditionalGeneration
    loaded = loader.from_pretrained(saved[kind], **arguments)
    assert attention(loaded) == expected
    assert not isinstance(loaded.config._attn_implementation, dict)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair as a bundle and as a recipe."""
    folder = tmp_path_factory.mktemp("pairs")
    SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16)).save_pretrained(
        folder / "bundle"
    )
    SGLForConditionalGeneration.from_large_small_pretrained(
        folder / "bundle" / "large", folder / "bundle" / "small"
    ).save_recipe(folder / "recipe")
    return {kind: folder / kind for kind in ("bundle", "recipe")}
