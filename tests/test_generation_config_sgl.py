"""What can be set, what it defaults to, what is refused and with which sentence."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_internvl
from transformers import GenerationConfig

from transformers_sgl import PRESETS, SGLGenerationConfig
from transformers_sgl.generation_config_sgl import average_retention, resolve_prune_layer

pytestmark = pytest.mark.mechanics

# No deadline: how long an example takes says more about the machine than about the code.
RANDOMLY = settings(max_examples=40, deadline=None)

SGL_FIELDS = (
    "retention_ratio",
    "prune_layer",
    "vision_retention_ratio",
    "vision_prune_layer",
    "min_tokens_per_image",
    "selection",
    "guidance",
    "guidance_queries",
    "guidance_layers",
    "guidance_max_new_tokens",
    "early_exit_threshold",
    "consistency_retention_ratio",
    "consistency_reduction",
    "score_draft",
    "verify_draft",
    "confirmation_threshold",
    "unsure_threshold",
    "unsure_retention_ratio",
    "num_draft_tokens",
    "draft_retention_ratio",
)


# --- presets and average retention ---


@pytest.mark.parametrize(
    ("preset", "retention_ratio", "layer_of_48", "selection"),
    [
        ("quality", 0.40, 19, "facility_location"),
        ("balanced", 0.35, 0, "facility_location"),
        ("fast", 0.05, 2, "facility_location"),
        ("paper-64", 0.40, 19, "top_k"),
        ("paper-35", 0.20, 9, "top_k"),
        ("paper-9", 0.05, 2, "top_k"),
    ],
)
def test_presets(preset, retention_ratio, layer_of_48, selection):
    settings = SGLGenerationConfig.from_preset(preset)
    assert settings.retention_ratio == retention_ratio
    assert resolve_prune_layer(settings.prune_layer, num_layers=48) == layer_of_48
    assert settings.selection == selection


@pytest.mark.parametrize("percent", [64, 35, 9])
def test_presets_keep_as_much_as_the_papers_three_settings(percent):
    ours = dict(zip((64, 35, 9), PRESETS, strict=True))[percent]
    for name in (ours, f"paper-{percent}"):
        assert round(100 * SGLGenerationConfig.from_preset(name).average_retention(num_layers=48)) == percent


def test_fields_given_beside_a_preset_win():
    settings = SGLGenerationConfig.from_preset("fast", retention_ratio=0.1, max_new_tokens=7)

    assert (settings.retention_ratio, settings.prune_layer, settings.max_new_tokens) == (0.1, 2 / 48, 7)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="There is no preset 'best': choose one of 'quality', 'balanced', 'fast'"):
        SGLGenerationConfig.from_preset("best")


def test_average_retention_of_unset_fields_is_that_of_the_default_preset():
    assert SGLGenerationConfig().average_retention(48) == SGLGenerationConfig.from_preset(
        "balanced"
    ).average_retention(48)


@RANDOMLY
@given(st.floats(0.01, 1.0), st.integers(1, 80), st.data())
def test_average_retention_is_the_mean_over_layers(ratio, num_layers, data):
    prune_layer = data.draw(st.integers(0, num_layers - 1))

    seen_by_layer = [1.0 if layer < prune_layer else ratio for layer in range(num_layers)]
    assert math.isclose(average_retention(ratio, prune_layer, num_layers), sum(seen_by_layer) / num_layers)


# --- the prune layer ---


@pytest.mark.parametrize(
    ("prune_layer", "num_layers", "index"),
    [
        (0, 1, 0),
        (0, 48, 0),
        (47, 48, 47),
        (0.0, 48, 0),
        (0.5, 48, 24),
        (0.5, 1, 0),
        (0.5, 3, 2),  # 1.5 is rounded up
        (0.49, 3, 1),
        (9 / 48, 24, 5),  # 4.5 is rounded up
        (0.999, 48, 47),  # never past the last layer
        (0.01, 6, 0),
    ],
)
def test_a_prune_layer_is_an_index_or_the_nearest_layer_of_a_fraction(prune_layer, num_layers, index):
    assert resolve_prune_layer(prune_layer, num_layers) == index


@RANDOMLY
@given(st.floats(0, 1, exclude_max=True), st.integers(1, 100))
def test_every_fraction_is_a_layer_that_exists_at_most_half_a_layer_away(fraction, num_layers):
    index = resolve_prune_layer(fraction, num_layers)

    assert 0 <= index < num_layers
    assert index == num_layers - 1 or abs(index - fraction * num_layers) <= 0.5


@pytest.mark.parametrize("prune_layer", [4, 100])
def test_an_index_past_the_last_layer_is_refused(prune_layer):
    with pytest.raises(ValueError, match=f"`prune_layer` is {prune_layer}, but the large model has 4 decoder layers"):
        resolve_prune_layer(prune_layer, num_layers=4)


# --- unset fields and their defaults ---


def test_nothing_is_set_until_someone_sets_it():
    settings = SGLGenerationConfig()

    assert set(SGL_FIELDS) == SGLGenerationConfig.extra_defaults().keys()  # none is forgotten here
    assert [getattr(settings, field) for field in SGL_FIELDS] == [None] * len(SGL_FIELDS)


def test_resolved_prefers_the_users_value_then_the_models_then_the_default():
    users = SGLGenerationConfig(retention_ratio=0.7)
    models = SGLGenerationConfig(retention_ratio=0.3, guidance_queries="prompt")

    resolved = users.resolved(models)

    assert resolved.retention_ratio == 0.7
    assert resolved.guidance_queries == "prompt"
    assert (resolved.prune_layer, resolved.selection) == (0, "facility_location")
    assert resolved.guidance_max_new_tokens is None
    assert (resolved.consistency_retention_ratio, resolved.consistency_reduction) == (0.05, "product")


@pytest.mark.parametrize(("field", "models"), [("early_exit_threshold", 0.8), ("verify_draft", True)])
def test_zero_and_false_are_set_values(field: str, models: float):
    users = type(models)(0)
    assert (
        getattr(SGLGenerationConfig(**{field: users}).resolved(SGLGenerationConfig(**{field: models})), field) == users
    )
    assert getattr(SGLGenerationConfig().resolved(SGLGenerationConfig(**{field: users})), field) == users


def test_resolved_inherits_stock_fields_but_invents_none():
    resolved = SGLGenerationConfig(max_new_tokens=5).resolved(GenerationConfig(max_new_tokens=9, eos_token_id=61))

    assert (resolved.max_new_tokens, resolved.eos_token_id) == (5, 61)
    assert resolved.num_beams == SGLGenerationConfig().num_beams


def test_resolved_keeps_an_explicit_false_and_zero():
    resolved = SGLGenerationConfig(do_sample=False, prune_layer=0).resolved(
        SGLGenerationConfig(do_sample=True, prune_layer=3)
    )

    assert (resolved.do_sample, resolved.prune_layer) == (False, 0)


def test_resolved_changes_neither_side():
    users, models = SGLGenerationConfig(retention_ratio=0.7), SGLGenerationConfig(prune_layer=3)

    users.resolved(models)

    assert users == SGLGenerationConfig(retention_ratio=0.7)
    assert models == SGLGenerationConfig(prune_layer=3)


# --- beside the stock fields ---


def test_stock_fields_survive():
    settings = SGLGenerationConfig(retention_ratio=0.5, do_sample=True, temperature=0.5, eos_token_id=[1, 2])

    assert isinstance(settings, GenerationConfig)
    assert (settings.do_sample, settings.temperature, settings.eos_token_id) == (True, 0.5, [1, 2])


def test_from_generation_config_copies_stock_fields_and_leaves_the_rest_unset():
    stock = GenerationConfig(do_sample=True, top_k=3, eos_token_id=61)

    settings = SGLGenerationConfig.from_generation_config(stock)

    assert (settings.do_sample, settings.top_k, settings.eos_token_id) == (True, 3, 61)
    assert [getattr(settings, field) for field in SGL_FIELDS] == [None] * len(SGL_FIELDS)
    assert not hasattr(stock, "retention_ratio")


def test_from_generation_config_keeps_the_fields_of_its_own_kind_in_a_copy():
    original = SGLGenerationConfig(retention_ratio=0.5, prune_layer=2)

    copy = SGLGenerationConfig.from_generation_config(original)
    copy.retention_ratio = 0.9

    assert copy.prune_layer == 2
    assert original.retention_ratio == 0.5


def test_from_generation_config_of_nothing_is_empty():
    assert SGLGenerationConfig.from_generation_config(None) == SGLGenerationConfig()


def test_from_model_config_gives_the_extension():
    settings = SGLGenerationConfig.from_model_config(tiny_internvl(num_layers=1).config)

    assert isinstance(settings, SGLGenerationConfig)
    assert settings.retention_ratio is None


def test_update_takes_what_it_knows_and_returns_the_rest():
    settings = SGLGenerationConfig()

    rest = settings.update(retention_ratio=0.4, max_new_tokens=3, pixel_values="image")

    assert rest == {"pixel_values": "image"}
    assert (settings.retention_ratio, settings.max_new_tokens) == (0.4, 3)


# --- saving ---


def test_save_and_load_round_trip(tmp_path):
    settings = SGLGenerationConfig.from_preset(
        "fast",
        guidance_queries="generated",
        guidance_layers=0.5,
        early_exit_threshold=0,
        verify_draft=False,
        max_new_tokens=12,
        do_sample=True,
    )

    settings.save_pretrained(tmp_path)

    assert SGLGenerationConfig.from_pretrained(tmp_path) == settings
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["retention_ratio"] == 0.05
    assert saved["early_exit_threshold"] == 0
    assert saved["verify_draft"] is False
    assert "guidance_max_new_tokens" not in saved  # what is unset is not written


def test_a_stock_file_loads_with_the_extensions_fields_unset(tmp_path):
    GenerationConfig(max_new_tokens=12).save_pretrained(tmp_path)

    settings = SGLGenerationConfig.from_pretrained(tmp_path)

    assert (settings.max_new_tokens, settings.retention_ratio) == (12, None)


def test_a_layer_index_and_a_fraction_are_still_told_apart_after_loading(tmp_path):
    for number, prune_layer in enumerate((0, 0.0)):
        SGLGenerationConfig(prune_layer=prune_layer).save_pretrained(tmp_path / str(number))

    loaded = [SGLGenerationConfig.from_pretrained(tmp_path / str(number)).prune_layer for number in range(2)]

    assert [type(layer) for layer in loaded] == [int, float]


def test_plain_transformers_reads_the_file_and_passes_the_fields_on(tmp_path):
    SGLGenerationConfig(retention_ratio=0.4, max_new_tokens=3).save_pretrained(tmp_path)

    stock = GenerationConfig.from_pretrained(tmp_path)

    assert SGLGenerationConfig.from_generation_config(stock).retention_ratio == 0.4


# --- what is refused ---

RATIO = "but it is the fraction of visual tokens that are kept: pass a number above 0 and up to 1"
LAYER = "pass a layer index .* or a fraction of the depth"
QUERIES = "choose one of 'prompt', 'last', 'generated', 'both'"
COUNT = "pass a whole number of 1 or more, or None"
THRESHOLD = "but it is compared with scores between 0 and 1: pass a number of 0 or more, or None"
REDUCTION = "choose one of 'product', 'geometric_mean'"
SWITCH = "pass True, False or None"

BAD_VALUES = [
    *(("retention_ratio", value, RATIO) for value in (0, -0.1, 1.5, 35, True, "0.2", math.nan, torch.tensor(0.5))),
    *(("prune_layer", value, LAYER) for value in (-1, -0.5, 1.0, 2.5, True, "9", math.nan)),
    *(("guidance_queries", value, QUERIES) for value in ("answer", "", True, 1, ["both"])),
    *(
        ("guidance_layers", value, "pass a number above 0 and up to 1")
        for value in (0, -0.5, 1.5, True, "1", math.nan)
    ),
    *(("guidance_max_new_tokens", value, COUNT) for value in (0, -1, 1.5, True, "8")),
    *(("min_tokens_per_image", value, "pass a whole number of 1 or more, or 0") for value in (-1, 0.5, True, "1")),
    *(("early_exit_threshold", value, THRESHOLD) for value in (-0.1, True, "0.5", math.nan, [0.5])),
    *(("unsure_threshold", value, THRESHOLD) for value in (-0.1, True, "0.5", math.nan, [0.5])),
    *(("unsure_retention_ratio", value, "above 0 and up to 1") for value in (0, -0.5, 1.5, True, "1", math.nan)),
    *(("consistency_retention_ratio", value, RATIO) for value in (0, 1.5, True, "0.05")),
    *(("consistency_reduction", value, REDUCTION) for value in ("mean", "", 1)),
    *(("score_draft", value, SWITCH) for value in (0, 1, "yes")),
    *(("verify_draft", value, "pass 'rounds', 'once', True, False or None") for value in (0, 1, "yes", ["once"])),
    *(("num_draft_tokens", value, COUNT) for value in (0, -1, 1.5, True, "8")),
    *(("draft_retention_ratio", value, "above 0 and up to 1") for value in (0, -0.1, 1.5, True, "0.2", math.nan)),
]


@pytest.mark.parametrize(("field", "value", "sentence"), BAD_VALUES)
def test_a_bad_value_is_refused_with_what_is_allowed(field, value, sentence):
    with pytest.raises(ValueError, match=f"`{field}` is .*{sentence}"):
        SGLGenerationConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("retention_ratio", 1.5, RATIO),
        ("prune_layer", 1.0, LAYER),
        ("guidance_queries", "answer", QUERIES),
        ("guidance_max_new_tokens", 0, COUNT),
    ],
)
def test_a_bad_value_in_an_update_is_refused_too(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        SGLGenerationConfig().update(**{field: value})


@pytest.mark.parametrize("value", [4, -1, 1.0, True, "9"])
def test_resolving_checks_the_layer_itself(value):
    with pytest.raises(ValueError, match="`prune_layer` is"):
        resolve_prune_layer(value, num_layers=4)


def test_stock_validation_still_works():
    with pytest.raises(ValueError, match="max_new_tokens"):
        SGLGenerationConfig(max_new_tokens=-1)


def test_a_setting_that_is_misspelt_is_refused() -> None:
    with pytest.raises(ValueError, match="There is no setting `retentoin_ratio`: did you mean `retention_ratio`?"):
        SGLGenerationConfig(retentoin_ratio=0.2)
    # Others may have settings of their own.
    assert SGLGenerationConfig(my_own_setting=3).my_own_setting == 3
