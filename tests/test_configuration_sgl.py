"""The pair's configuration round-trips through the Auto classes and tells nothing but what a pair is."""

from __future__ import annotations

import json

import pytest
from tiny_models import tiny_internvl
from transformers import AutoConfig, InternVLConfig, LlavaConfig

from transformers_sgl import SGLConfig

pytestmark = pytest.mark.mechanics


@pytest.fixture
def config() -> SGLConfig:
    """Two models of different depth, loaded "from somewhere"."""
    large, small = (tiny_internvl(num_layers=num_layers).config for num_layers in (4, 2))
    large.name_or_path, small.name_or_path = "/home/somebody/large", "/home/somebody/small"
    return SGLConfig(large_config=large, small_config=small)


def depths(config: SGLConfig) -> tuple[int, int]:
    return tuple(part.text_config.num_hidden_layers for part in (config.large_config, config.small_config))


def test_save_and_load_through_auto_config(config, tmp_path):
    config.save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is SGLConfig
    assert type(loaded.large_config) is type(loaded.small_config) is InternVLConfig
    assert depths(loaded) == (4, 2)
    assert loaded.large_config.image_token_id == config.large_config.image_token_id


def test_loading_and_saving_again_writes_the_same_file(config, tmp_path):
    config.save_pretrained(tmp_path / "once")

    AutoConfig.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")

    once, twice = ((tmp_path / name / "config.json").read_text() for name in ("once", "twice"))
    assert once == twice


def test_round_trip_through_a_dict(config):
    again = SGLConfig.from_dict(config.to_dict())

    assert depths(again) == (4, 2)
    assert again.to_dict() == config.to_dict()


def test_auto_config_builds_a_pair_from_dicts(config):
    built = AutoConfig.for_model(
        "sgl", large_config=config.large_config.to_dict(), small_config=config.small_config.to_dict()
    )

    assert type(built) is SGLConfig
    assert type(built.small_config) is InternVLConfig
    assert depths(built) == (4, 2)


def test_two_architectures_can_be_paired_in_a_configuration():
    config = SGLConfig(large_config=LlavaConfig(), small_config=InternVLConfig())

    assert (config.large_config.model_type, config.small_config.model_type) == ("llava", "internvl")


@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "object"])
@pytest.mark.parametrize("given", ["large_config", "small_config"])
def test_half_a_pair_is_refused_and_the_missing_half_named(given, as_dict):
    half = InternVLConfig().to_dict() if as_dict else InternVLConfig()
    missing = {"large_config", "small_config"} - {given}

    with pytest.raises(ValueError, match=f"`{missing.pop()}` is missing: pass it beside `{given}`"):
        SGLConfig(**{given: half})


def test_a_dict_without_model_type_is_refused():
    with pytest.raises(ValueError, match="`small_config` names no `model_type`"):
        SGLConfig(large_config=InternVLConfig(), small_config={"text_config": {}})


def test_an_unknown_model_type_is_refused_by_name():
    with pytest.raises(ValueError, match="no-such-model"):
        SGLConfig(large_config=InternVLConfig(), small_config={"model_type": "no-such-model"})


def test_the_callers_dicts_are_not_changed(config):
    large, small = config.large_config.to_dict(), config.small_config.to_dict()

    SGLConfig(large_config=large, small_config=small)

    assert large["model_type"] == small["model_type"] == "internvl"


def test_an_empty_pair_can_be_built_because_transformers_wants_the_defaults():
    empty = SGLConfig()

    assert (empty.large_config, empty.small_config) == (None, None)
    assert empty.get_text_config() is empty


def test_the_saved_file_says_what_a_pair_is_and_where_nothing_came_from(config, tmp_path):
    config.name_or_path = "/home/somebody/pair"

    config.save_pretrained(tmp_path)

    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["model_type"] == "sgl"
    assert "somebody" not in text


@pytest.mark.parametrize("options", [{}, {"decoder": True}])
def test_the_text_configuration_is_the_large_models(config, options):
    assert config.get_text_config(**options) is config.large_config.text_config


def test_both_parts_are_known_to_transformers_as_sub_configurations():
    assert set(SGLConfig.sub_configs) == {"large_config", "small_config"}
