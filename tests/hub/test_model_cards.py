from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import build_model_cards
import pytest
import torch
from build_model_cards import num_parameters, on_meta, weight_bytes
from hub_stub import HubStub
from model_card_tables import MODELS, PAIRS, Pair
from tiny_models import prompts, tiny_internvl
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from transformers_sgl import SGLConfig, SGLForConditionalGeneration
from transformers_sgl.architectures import (
    attention_modules,
    attention_pattern,
    check_prunable,
    check_supported,
    decoder_layers,
    visual_token_ids,
)
from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig, resolve_prune_layer
from transformers_sgl.hub import publish
from transformers_sgl.hub.validation import validate

CARDS = Path(__file__).parents[2] / "model_cards"
COMMITTED = {path.name for path in CARDS.iterdir() if path.is_dir() and path.name != "__pycache__"}
LOADABLE = [pair for pair in PAIRS if MODELS[pair.large].original is None]
TO_CONVERT = [pair for pair in PAIRS if MODELS[pair.large].original is not None]
WRITTEN = ("sgl-tiny", "sgl-tiny-reading", "sgl-tiny-describing", "sgl-generate")
FOUR_BIT = [pair for pair in PAIRS if pair.four_bit]

# What decides into which visual tokens an image is cut, wherever a configuration names it.
GRID = {
    *("image_seq_length", "downsample_ratio", "mm_tokens_per_image", "image_grid_pinpoints", "vision_aspect_ratio"),
    *("vision_feature_select_strategy", "image_size", "patch_size", "temporal_patch_size", "spatial_merge_size"),
}


def grid(key: str) -> dict[str, Any]:
    config = on_meta(key).config.to_dict()
    facts = {**config["vision_config"], **config}
    return {name: facts[name] for name in GRID & set(facts)}


def name_of(pair: Pair) -> str:
    return pair.folder


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every recipe of the tables."""
    folder = tmp_path_factory.mktemp("recipes")
    assert build_model_cards.main(["--out", str(folder)]) == 0
    return folder


@pytest.fixture
def hub(tmp_path, embedded_pair_path):
    """A hub that has the tables' checkpoints by name; those of the first pair are the tiny ones and can be loaded."""
    with HubStub() as stub, stub.connected(tmp_path / "cache", token=stub.token):
        for key, model in MODELS.items():
            part = {LOADABLE[0].large: "large", LOADABLE[0].small: "small"}.get(key)
            if model.original is None:
                stub.add_repo(model.name, embedded_pair_path / part if part else {"model.safetensors": b""})
        stub.commits.clear()
        yield stub


class TestFolders:
    def test_the_committed_ones_are_what_the_tables_say(self, capsys):
        assert build_model_cards.main(["--check"]) == 0, capsys.readouterr().out
        assert {*build_model_cards.EXAMPLES, *WRITTEN} == COMMITTED

    def test_all_of_them_are_built(self, recipes):
        assert {path.name for path in recipes.iterdir()} == {pair.folder for pair in PAIRS}

    @pytest.mark.parametrize("name", WRITTEN)
    def test_nothing_keeps_the_written_ones_from_being_published(self, name):
        assert [str(finding) for finding in validate(CARDS / name) if finding.stops] == []

    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_nothing_keeps_them_from_being_published(self, recipes, pair):
        assert [str(finding) for finding in validate(recipes / pair.folder) if finding.stops] == []

    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_they_are_read_back_as_what_the_tables_say(self, recipes, pair):
        config = SGLConfig.from_pretrained(recipes / pair.folder)
        assert config.large["name_or_path"] == MODELS[pair.large].name
        assert config.small["name_or_path"] == MODELS[pair.small].name
        assert ("quantization_config" in config.large) == pair.four_bit

    @pytest.mark.parametrize("pair", LOADABLE, ids=name_of)
    def test_every_recipe_is_published_pinned(self, recipes, hub, pair):
        publication = publish(recipes / pair.folder, f"org/{pair.folder}", kind="recipe")
        config = json.loads(hub.repos[f"org/{pair.folder}"].files["config.json"])
        for part, key in (("large", pair.large), ("small", pair.small)):
            commit = hub.repos[MODELS[key].name].branches["main"]
            assert (config[part]["revision"], publication.pinned[part]) == (commit, commit)

    @pytest.mark.parametrize("pair", TO_CONVERT, ids=name_of)
    def test_what_has_to_be_converted_is_not_published(self, recipes, hub, pair):
        with pytest.raises(ValueError, match="which nobody else can load"):
            publish(recipes / pair.folder, f"org/{pair.folder}")
        assert hub.commits == []

    def test_check_names_what_differs_and_writes_nothing(self, tmp_path, capsys):
        name = build_model_cards.EXAMPLES[0]
        where = ["--out", str(tmp_path), name]
        assert build_model_cards.main(where) == 0
        (tmp_path / name / "README.md").write_text("edited by hand")
        (tmp_path / name / "config.json").unlink()
        capsys.readouterr()
        assert build_model_cards.main(["--check", *where]) == 1
        assert capsys.readouterr().out.splitlines() == [
            f"{name}/{file} differs from the tables: run scripts/build_model_cards.py"
            for file in ("README.md", "config.json")
        ]
        assert (tmp_path / name / "README.md").read_text() == "edited by hand"
        assert build_model_cards.main(where) == 0
        assert build_model_cards.main(["--check", *where]) == 0

    def test_those_that_are_named_are_built_and_no_others(self, tmp_path, capsys):
        names = {PAIRS[0].folder, PAIRS[-1].folder}
        assert build_model_cards.main(["--out", str(tmp_path), *names]) == 0
        assert {path.name for path in tmp_path.iterdir()} == names
        with pytest.raises(SystemExit):
            build_model_cards.main(["--out", str(tmp_path), "sgl-nothing"])
        assert "there is no recipe sgl-nothing: choose from sgl-" in capsys.readouterr().err


class TestModels:
    """Every model of the table, with all its layers and no weights."""

    @pytest.mark.parametrize("key", MODELS)
    def test_it_has_as_many_parameters_as_its_makers_say(self, key):
        published = MODELS[key].published_parameters
        # Gemma 3's exact numbers leave out the 64 tokens that are added for images.
        assert num_parameters(key) == pytest.approx(published, rel=5e-5 if isinstance(published, int) else 0.01)
        assert MODELS[key].sources

    @pytest.mark.parametrize("key", MODELS)
    def test_it_is_of_a_supported_architecture(self, key):
        model, text = on_meta(key), MODELS[key].config["text_config"]
        check_supported(model.config)
        assert len(decoder_layers(model)) == len(attention_modules(model)) == text["num_hidden_layers"]
        assert model.get_input_embeddings().weight.shape == (text["vocab_size"], text["hidden_size"])
        assert model.get_output_embeddings().weight.shape == (text["vocab_size"], text["hidden_size"])
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert is_tied == MODELS[key].config["tie_word_embeddings"]
        family = MODELS[key].family
        assert visual_token_ids(model.config)
        for token in (*visual_token_ids(model.config), *torch.tensor(family.eos_token_id).reshape(-1)):
            assert token < text["vocab_size"]

    @pytest.mark.parametrize("key", MODELS)
    def test_its_layers_see_as_far_as_the_checkpoints_do(self, key):
        model, is_gemma = on_meta(key), MODELS[key].config["model_type"] == "gemma3"
        for index in attention_modules(model):
            is_local = is_gemma and (index + 1) % 6 != 0
            assert attention_pattern(model, index).window == (1024 if is_local else None)

    @pytest.mark.parametrize("key", MODELS)
    def test_an_image_becomes_as_many_visual_tokens_as_the_card_says(self, key):
        model, config = on_meta(key), MODELS[key].config
        if MODELS[key].family.not_quantised == ("model.visual",):
            # Its tower reads numbers off the grid of the image, which a model without weights cannot do.
            patch, merge = (config["vision_config"][name] for name in ("patch_size", "spatial_merge_size"))
            assert f"each {patch * merge} x {patch * merge} of them" in MODELS[key].family.image
            patches = torch.empty(20 * merge**2, config["vision_config"]["hidden_size"], device="meta")
            assert model.model.visual.merger(patches).shape == (20, config["text_config"]["hidden_size"])
            return
        # Two tiles; the second architecture puts a thumbnail before them and an end of line behind each row.
        tiles, sizes, expected = {
            "internvl": ((2, 3, 448, 448), {}, 2 * 256),
            "llava_onevision": (
                (1, 3, 3, 384, 384),
                {"image_sizes": torch.tensor([[384, 768]])},
                27 * (27 + 2 * 27 + 1),
            ),
            "gemma3": ((2, 3, 896, 896), {}, 2 * 256),
        }[config["model_type"]]
        features = model.get_image_features(pixel_values=torch.empty(tiles, device="meta"), **sizes).pooler_output
        assert sum(each.shape[0] for each in features) == expected
        assert {each.shape[1] for each in features} == {config["text_config"]["hidden_size"]}

    @pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.four_bit], ids=name_of)
    def test_two_of_them_are_a_pair(self, pair):
        with torch.device("meta"):
            model = SGLForConditionalGeneration(large=on_meta(pair.large), small=on_meta(pair.small))
        assert isinstance(model.config, SGLConfig)
        large, small = MODELS[pair.large], MODELS[pair.small]
        assert large.family is small.family
        assert grid(pair.large) == grid(pair.small) != {}
        assert visual_token_ids(on_meta(pair.large).config) == visual_token_ids(on_meta(pair.small).config)
        # One tokenizer; a family may fill up its models' vocabularies differently.
        vocabularies = [model.config["text_config"]["vocab_size"] for model in (large, small)]
        assert 0 <= vocabularies[0] - vocabularies[1] <= 128
        for preset in PRESETS.values():
            prune_layer = resolve_prune_layer(preset["prune_layer"], large.config["text_config"]["num_hidden_layers"])
            check_prunable(on_meta(pair.large).config, prune_layer)

    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_the_large_one_is_the_larger_by_far(self, pair):
        # What the small one costs is on its card: below a fifth, but for the smaller models of three families.
        close = {"qwen2.5-vl-7b": 2, "qwen3-vl-8b": 4, "gemma3-12b": 2.8}
        assert num_parameters(pair.large) > close.get(pair.large, 5) * num_parameters(pair.small)

    @pytest.mark.parametrize("pair", FOUR_BIT, ids=name_of)
    def test_four_bits_are_for_the_decoders_matrices_and_nothing_else(self, pair):
        model = on_meta(pair.large)
        skipped = build_model_cards.quantization_config(MODELS[pair.large])["llm_int8_skip_modules"]
        inside = {module for module in decoder_layers(model).modules() if isinstance(module, torch.nn.Linear)}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert any(name == each or name.startswith(f"{each}.") for each in skipped) == (module not in inside)

    def test_four_bits_are_a_quarter_of_what_is_quantised_and_no_more(self):
        plain, quantised = (weight_bytes(Pair("internvl3-1b", "internvl3-8b", four_bit)) for four_bit in (False, True))
        # 28 layers, by hand: query and output 3584 x 3584, key and value 3584 x 512, and three of 3584 x 18944
        matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
        assert plain == 2 * (7_944_373_760 + 938_193_024)
        assert plain - quantised == pytest.approx(matrices * (16 - 4.127) / 8, rel=1e-4)


class TestRecipes:
    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_the_settings_are_the_balanced_preset_and_say_what_ends_an_answer(self, recipes, pair):
        settings = SGLGenerationConfig.from_pretrained(recipes / pair.folder)
        assert {name: getattr(settings, name) for name in PRESETS["balanced"]} == PRESETS["balanced"]
        assert settings.eos_token_id == MODELS[pair.large].family.eos_token_id

    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_the_card_says_what_is_not_known(self, recipes, pair):
        card = (recipes / pair.folder / "README.md").read_text()
        assert "Nothing has been measured on this pair: no accuracy, no time, no memory." in card
        assert "computed from the models' dimensions, not measured" in card
        assert ("## First convert the large model" in card) == (pair in TO_CONVERT)

    @pytest.mark.parametrize("pair", [pair for pair in PAIRS if MODELS[pair.large].family.settings], ids=name_of)
    def test_its_settings_hold_against_the_checkpoints_own(self, recipes, pair):
        """Tiny models in the place of the real ones, with what the real ones' own settings ask for."""
        model = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16))
        cache = "hybrid" if MODELS[pair.large].config["model_type"] == "gemma3" else None
        for part in (model.large, model.small):
            part.generation_config = GenerationConfig(do_sample=True, cache_implementation=cache)
        model.generation_config = SGLGenerationConfig.from_pretrained(recipes / pair.folder)
        calls = {"max_new_tokens": 4, "return_dict_in_generate": True}
        output = model.eval().generate(**prompts(), **calls)
        assert 0 < int(output.keep_mask.sum()) < output.keep_mask.numel()
        assert model.generate(**prompts(), **calls, early_exit_threshold=0.0).exited_early.all()

    def test_it_loads_what_it_names(self, recipes, hub, embedded_pair_path):
        """The real recipe, from a hub that has tiny models under the real names."""
        pair = LOADABLE[0]
        publish(recipes / pair.folder, "org/pair")
        model = AutoModelForImageTextToText.from_pretrained("org/pair")
        assert {model.large.dtype, model.small.dtype} == {torch.bfloat16}
        assert (model.generation_config.retention_ratio, model.generation_config.eos_token_id) == (0.35, 151645)
        assert AutoProcessor.from_pretrained("org/pair").reads_the_same

    def test_it_loads_the_large_decoder_in_four_bits_and_nothing_else(self, recipes, hub):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        pair = next(pair for pair in LOADABLE if pair.four_bit)
        model = AutoModelForImageTextToText.from_pretrained(recipes / pair.folder, device_map="cpu")
        quantised = {
            f"{part}.{name}"
            for part in ("large", "small")
            for name, module in getattr(model, part).named_modules()
            if isinstance(module, bitsandbytes.nn.Linear4bit)
        }
        expected = {
            f"large.model.language_model.layers.{name}"
            for name, module in decoder_layers(model.large).named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        assert quantised == expected
        assert len(quantised) == 7 * len(decoder_layers(model.large))
