from __future__ import annotations

import json
import shutil
from pathlib import Path

import build_model_cards
import pytest
import torch
from build_model_cards import MODELS, PAIRS, Pair, num_parameters, on_meta, weight_bytes
from hub_stub import HubStub
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLConfig, SGLForConditionalGeneration
from transformers_sgl.architectures import attention_modules, check_supported, decoder_layers
from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig, resolve_prune_layer
from transformers_sgl.hub import publish
from transformers_sgl.validation import validate

CARDS = Path(__file__).parents[1] / "model_cards"
FOLDERS = sorted(path for path in CARDS.iterdir() if path.is_dir() and path.name != "__pycache__")
LOADABLE = [pair for pair in PAIRS if MODELS[pair.large].original is None]
TO_CONVERT = [pair for pair in PAIRS if MODELS[pair.large].original is not None]


def name_of(value: Path | Pair) -> str:
    return value.folder if isinstance(value, Pair) else value.name


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
    def test_they_are_what_the_tables_say(self, capsys):
        assert build_model_cards.main(["--check"]) == 0, capsys.readouterr().out
        assert {path.name for path in FOLDERS} == {pair.folder for pair in PAIRS} | {"sgl-tiny", "sgl-generate"}

    @pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
    def test_nothing_keeps_them_from_being_published(self, folder):
        assert [str(finding) for finding in validate(folder) if finding.stops] == []

    @pytest.mark.parametrize("pair", LOADABLE, ids=name_of)
    def test_every_recipe_is_published_pinned(self, hub, pair):
        publication = publish(CARDS / pair.folder, f"org/{pair.folder}", kind="recipe")
        config = json.loads(hub.repos[f"org/{pair.folder}"].files["config.json"])
        for part, key in (("large", pair.large), ("small", pair.small)):
            commit = hub.repos[MODELS[key].name].branches["main"]
            assert (config[part]["revision"], publication.pinned[part]) == (commit, commit)

    @pytest.mark.parametrize("pair", TO_CONVERT, ids=name_of)
    def test_what_has_to_be_converted_is_not_published(self, hub, pair):
        with pytest.raises(ValueError, match="where nobody else can load it"):
            publish(CARDS / pair.folder, f"org/{pair.folder}")
        assert hub.commits == []

    def test_check_names_what_differs_and_writes_nothing(self, tmp_path, capsys):
        copy = Path(shutil.copytree(CARDS, tmp_path / "model_cards", ignore=shutil.ignore_patterns("sgl-tiny")))
        pair = PAIRS[0]
        (copy / pair.folder / "README.md").write_text("edited by hand")
        (copy / pair.folder / "config.json").unlink()
        assert build_model_cards.main(["--check", "--output", str(copy)]) == 1
        assert capsys.readouterr().out.splitlines() == [
            f"model_cards/{pair.folder}/{name} differs from the tables: run scripts/build_model_cards.py"
            for name in ("README.md", "config.json")
        ]
        assert (copy / pair.folder / "README.md").read_text() == "edited by hand"
        assert build_model_cards.main(["--output", str(copy)]) == 0
        assert build_model_cards.main(["--check", "--output", str(copy)]) == 0


class TestModels:
    """Every model of the table, with all its layers and no weights."""

    @pytest.mark.parametrize("key", MODELS)
    def test_it_has_as_many_parameters_as_its_makers_say(self, key):
        assert num_parameters(key) == pytest.approx(MODELS[key].published_parameters, rel=0.01)
        assert MODELS[key].sources

    @pytest.mark.parametrize("key", MODELS)
    def test_it_is_of_a_supported_architecture(self, key):
        model, text = on_meta(key), MODELS[key].config["text_config"]
        check_supported(model.config)
        assert len(decoder_layers(model)) == len(attention_modules(model)) == text["num_hidden_layers"]
        assert model.get_input_embeddings().weight.shape == (text["vocab_size"], text["hidden_size"])
        assert model.get_output_embeddings().weight.shape == (text["vocab_size"], text["hidden_size"])
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        assert model.config.image_token_id < text["vocab_size"]
        assert MODELS[key].eos_token_id < text["vocab_size"]

    @pytest.mark.parametrize("key", MODELS)
    def test_a_tile_becomes_as_many_visual_tokens_as_the_processor_writes(self, key):
        model, config = on_meta(key), MODELS[key].config
        tiles = torch.empty(2, 3, *config["vision_config"]["image_size"], device="meta")
        features = model.get_image_features(pixel_values=tiles).pooler_output
        assert features.shape == (2, config["image_seq_length"], config["text_config"]["hidden_size"])

    @pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.four_bit], ids=name_of)
    def test_two_of_them_are_a_pair(self, pair):
        with torch.device("meta"):
            model = SGLForConditionalGeneration(large=on_meta(pair.large), small=on_meta(pair.small))
        assert isinstance(model.config, SGLConfig)
        large, small = MODELS[pair.large], MODELS[pair.small]
        assert num_parameters(pair.large) > 5 * num_parameters(pair.small)
        for fact in ("image_token_id", "image_seq_length", "downsample_ratio"):
            assert large.config[fact] == small.config[fact]
        assert large.config["text_config"]["vocab_size"] == small.config["text_config"]["vocab_size"]

    def test_four_bits_are_a_quarter_of_what_is_quantised_and_no_more(self):
        plain, quantised = (weight_bytes(Pair("internvl3-1b", "internvl3-8b", four_bit)) for four_bit in (False, True))
        # 28 layers, by hand: query and output 3584 x 3584, key and value 3584 x 512, and three of 3584 x 18944
        matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
        assert plain == 2 * (7_944_373_760 + 938_193_024)
        assert plain - quantised == pytest.approx(matrices * (16 - 4.127) / 8, rel=1e-4)


class TestRecipes:
    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_the_settings_are_the_balanced_preset_and_say_what_ends_an_answer(self, pair):
        settings = SGLGenerationConfig.from_pretrained(CARDS / pair.folder)
        assert settings.retention_ratio == PRESETS["balanced"]["retention_ratio"]
        assert settings.prune_layer == PRESETS["balanced"]["prune_layer"]
        assert settings.eos_token_id == MODELS[pair.large].eos_token_id == MODELS[pair.small].eos_token_id
        num_layers = len(decoder_layers(on_meta(pair.large)))
        assert 0 < resolve_prune_layer(settings.prune_layer, num_layers) < num_layers

    @pytest.mark.parametrize("pair", PAIRS, ids=name_of)
    def test_the_card_says_what_is_not_known(self, pair):
        card = (CARDS / pair.folder / "README.md").read_text()
        assert "On this pair nothing: neither accuracy nor time nor memory." in card
        assert "computed from the models' dimensions, not measured" in card
        assert ("## First convert the large model" in card) == (pair in TO_CONVERT)

    def test_it_loads_what_it_names(self, hub, embedded_pair_path):
        """The real recipe, from a hub that has tiny models under the real names."""
        pair = LOADABLE[0]
        publish(CARDS / pair.folder, "org/pair")
        model = AutoModelForImageTextToText.from_pretrained("org/pair")
        assert {model.large.dtype, model.small.dtype} == {torch.bfloat16}
        assert (model.generation_config.retention_ratio, model.generation_config.eos_token_id) == (0.2, 151645)
        assert AutoProcessor.from_pretrained("org/pair").reads_the_same

    def test_it_loads_the_large_decoder_in_four_bits_and_nothing_else(self, hub):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        pair = next(pair for pair in LOADABLE if pair.four_bit)
        model = AutoModelForImageTextToText.from_pretrained(CARDS / pair.folder, device_map="cpu")
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
