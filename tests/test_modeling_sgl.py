import itertools
import json
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import prompts, state, tiny_internvl
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    InternVLForConditionalGeneration,
    MllamaConfig,
)

import transformers_sgl
from transformers_sgl import SGLConfig, SGLForConditionalGeneration, SGLGenerationConfig, SGLProcessor
from transformers_sgl.storage.saving import staged

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 5}


@pytest.fixture
def pair() -> SGLForConditionalGeneration:
    return SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16)).eval()


@pytest.fixture
def bundle(pair: SGLForConditionalGeneration, tmp_path: Path) -> Path:
    pair.generation_config = SGLGenerationConfig.from_preset("quality", eos_token_id=61, pad_token_id=62)
    pair.save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_every_auto_class_loads_a_bundle(auto_class, pair: SGLForConditionalGeneration, bundle: Path) -> None:
    loaded = auto_class.from_pretrained(bundle)
    assert isinstance(loaded, SGLForConditionalGeneration)
    assert not loaded.training
    assert loaded.generation_config == pair.generation_config
    inputs = prompts()
    assert torch.equal(loaded.generate(**inputs, **GREEDY), pair.generate(**inputs, **GREEDY))


def test_both_halves_of_a_bundle_are_ordinary_checkpoints(pair: SGLForConditionalGeneration, bundle: Path) -> None:
    inputs = prompts()
    for name in ("large", "small"):
        model = AutoModelForImageTextToText.from_pretrained(bundle / name)
        assert type(model) is InternVLForConditionalGeneration
        assert torch.equal(model.generate(**inputs, **GREEDY), getattr(pair, name).generate(**inputs, **GREEDY))
        assert sorted(path.suffix for path in (bundle / name).iterdir()) == [".json", ".json", ".safetensors"]


def test_a_bundle_survives_being_loaded_and_saved_again(bundle: Path, tmp_path: Path) -> None:
    # At first transformers adds what it found out about the weights, their type, to the configuration.
    folders = [bundle, tmp_path / "once", tmp_path / "twice"]
    for source, target in itertools.pairwise(folders):
        SGLForConditionalGeneration.from_pretrained(source).save_pretrained(target)
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in folders]
    assert names[0] == names[1] == names[2]
    for name in names[0]:
        assert (folders[1] / name).read_bytes() == (folders[2] / name).read_bytes(), name


def test_pairing_takes_models_and_folders(bundle: Path) -> None:
    large = AutoModelForImageTextToText.from_pretrained(bundle / "large")
    paired = SGLForConditionalGeneration.from_large_small_pretrained(large, bundle / "small")
    assert paired.large is large
    assert paired.config.large_config is large.config
    assert not paired.training


def test_keyword_arguments_go_to_both_models_or_to_one(bundle: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(
        bundle, dtype=torch.bfloat16, small_dtype=torch.float32, large_attn_implementation="eager"
    )
    assert (model.large.dtype, model.small.dtype, model.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    assert model.large.get_decoder().config._attn_implementation == "eager"
    assert model.small.get_decoder().config._attn_implementation == "sdpa"


def test_a_changed_configuration_reaches_the_models(bundle: Path) -> None:
    eager = AutoModelForImageTextToText.from_pretrained(bundle, attn_implementation="eager")
    for model in (eager.large, eager.small):
        assert model.get_decoder().config._attn_implementation == "eager"
    config = AutoConfig.from_pretrained(bundle)
    config.large_config.text_config.rms_norm_eps = 0.5
    changed = AutoModelForImageTextToText.from_pretrained(bundle, config=config)
    assert changed.large.get_decoder().norm.variance_epsilon == 0.5


def test_without_settings_of_its_own_a_pair_has_its_large_models(bundle: Path) -> None:
    (bundle / "generation_config.json").unlink()
    settings = SGLForConditionalGeneration.from_pretrained(bundle).generation_config
    assert isinstance(settings, SGLGenerationConfig)
    assert settings.suppress_tokens == [60]


def test_loading_info_is_that_of_both_models(bundle: Path) -> None:
    _, info = SGLForConditionalGeneration.from_pretrained(bundle, output_loading_info=True)
    assert set(info) == {"large", "small"}
    assert not info["large"]["missing_keys"]


def test_a_subfolder_can_hold_the_bundle(bundle: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(bundle.parent, subfolder=bundle.name)
    assert model.generation_config.retention_ratio == 0.4


def test_forward_is_the_large_models(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts()
    expected = pair.large(**inputs).logits
    assert torch.equal(pair(**inputs, small_input_ids=inputs["input_ids"]).logits, expected)
    assert pair.get_decoder() is pair.large.get_decoder()
    assert pair.get_input_embeddings() is pair.large.get_input_embeddings()
    assert pair.get_output_embeddings() is pair.large.get_output_embeddings()


def test_pairing_leaves_the_weights_alone() -> None:
    large, small = tiny_internvl(), tiny_internvl(seed=1)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (large, small)]
    SGLForConditionalGeneration(large=large, small=small)
    for model, weights in zip((large, small), before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_configuration_alone_builds_random_models(pair: SGLForConditionalGeneration) -> None:
    built = AutoModelForImageTextToText.from_config(pair.config)
    assert isinstance(built, SGLForConditionalGeneration)
    assert sum(map(torch.numel, built.parameters())) == sum(map(torch.numel, pair.parameters()))


def test_importing_registers_the_type_and_changes_nothing_else() -> None:
    assert AutoConfig.for_model("sgl").model_type == "sgl"
    assert transformers_sgl.__all__ == sorted(transformers_sgl.__all__, key=lambda name: (not name.isupper(), name))


class TestRefusals:
    def test_half_a_pair(self) -> None:
        with pytest.raises(ValueError, match="pass both `large` and `small`"):
            SGLForConditionalGeneration(large=tiny_internvl())
        with pytest.raises(ValueError, match="Pass an `SGLConfig` with two models' configurations, or two models"):
            SGLForConditionalGeneration(SGLConfig())

    def test_an_architecture_that_is_not_supported(self, pair: SGLForConditionalGeneration) -> None:
        large = tiny_internvl()
        large.config = MllamaConfig()
        before = state(pair.small)
        with pytest.raises(ValueError, match=r"Models of type 'mllama' are not supported, .* use one of the types"):
            SGLForConditionalGeneration(large=large, small=pair.small)
        assert state(pair.small) == before

    def test_a_decoder_with_layers_of_another_kind(self) -> None:
        large = tiny_internvl()
        large.config.text_config.layer_types = ["full_attention", "indexed_attention"] * 2
        with pytest.raises(ValueError, match=r"has layers of the types \['indexed_attention'\].* use a model with"):
            SGLForConditionalGeneration(large=large, small=tiny_internvl())

    def test_a_bundle_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="nowhere"):
            SGLForConditionalGeneration.from_pretrained(tmp_path / "nowhere")

    def test_half_a_bundle(self, bundle: Path) -> None:
        shutil.rmtree(bundle / "small")
        with pytest.raises(OSError, match=r"There is no folder 'small' in .*: a pair is a folder with"):
            SGLForConditionalGeneration.from_pretrained(bundle)

    def test_a_save_that_fails_leaves_the_folder_as_it_was(
        self, pair: SGLForConditionalGeneration, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*args, **kwargs) -> None:
            raise OSError("No space left on device")

        before = contents(bundle)
        model_before = state(pair)
        monkeypatch.setattr(pair.small, "save_pretrained", full_disk)
        for folder in (bundle, tmp_path / "new" / "one"):
            with pytest.raises(OSError, match="No space left"):
                pair.save_pretrained(folder)
        assert contents(bundle) == before
        assert not (tmp_path / "new").exists()
        monkeypatch.undo()
        assert state(pair) == model_before

    def test_a_save_that_was_cut_off_is_not_taken_for_a_bundle(self, bundle: Path) -> None:
        (bundle / "config.json").unlink()  # it is taken away first and put in place last
        with pytest.raises(OSError, match=r"There is no finished pair in .* `config\.json` is missing"):
            SGLForConditionalGeneration.from_pretrained(bundle)

    def test_a_process_that_is_killed_leaves_an_earlier_save_or_none(self, bundle: Path, tmp_path: Path) -> None:
        earlier, nothing = bundle, tmp_path / "nothing"
        before = contents(earlier)
        for folder in (earlier, nothing):
            if os.fork() == 0:
                try:
                    with staged(folder, "config.json") as staging:
                        (staging / "large").mkdir()
                        (staging / "large" / "model.safetensors").write_bytes(b"half of the wei")
                        os.kill(os.getpid(), signal.SIGKILL)
                finally:
                    os._exit(1)  # never back into the tests
            assert os.waitpid(-1, 0)[1] == signal.SIGKILL
        assert {name: data for name, data in contents(earlier).items() if ".saving-" not in name} == before
        SGLForConditionalGeneration.from_pretrained(earlier)
        with pytest.raises(OSError, match="There is no finished pair"):
            SGLForConditionalGeneration.from_pretrained(nothing)


@pytest.mark.parametrize("shard_sizes", [("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "30KB")], ids=str)
def test_weights_of_an_earlier_save_are_not_loaded(
    pair: SGLForConditionalGeneration, tmp_path: Path, shard_sizes: tuple[str, str]
) -> None:
    pair.save_pretrained(tmp_path, max_shard_size=shard_sizes[0])
    (tmp_path / "large" / "chat_template.jinja").write_text("what does not belong to the weights stays")
    with torch.no_grad():
        pair.large.get_input_embeddings().weight += 1
    pair.save_pretrained(tmp_path, max_shard_size=shard_sizes[1])
    loaded = SGLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.large.get_input_embeddings().weight, pair.large.get_input_embeddings().weight)
    weights = {path.name for path in (tmp_path / "large").glob("*.safetensors")}
    index = tmp_path / "large" / "model.safetensors.index.json"
    listed = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert weights == listed
    assert (tmp_path / "large" / "chat_template.jinja").exists()


def test_config_json_tells_both_architectures_and_no_paths(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert (config["model_type"], config["large_config"]["model_type"]) == ("sgl", "internvl")
    assert str(bundle.parent) not in (bundle / "config.json").read_text()


def test_a_pair_of_two_checkpoints_is_saved_with_their_processors(embedded_pair_path: Path, tmp_path: Path) -> None:
    pair = SGLForConditionalGeneration.from_large_small_pretrained(
        embedded_pair_path / "large", embedded_pair_path / "small"
    )
    pair.save_pretrained(tmp_path)
    saved, wanted = AutoProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(embedded_pair_path)
    for name in ("large_processor", "small_processor"):
        assert getattr(saved, name).to_dict() == getattr(wanted, name).to_dict()
    # Who has saved other processors there keeps them.
    config = tmp_path / "large" / "processor_config.json"
    config.write_text(config.read_text().replace('"image_seq_length": 64', '"image_seq_length": 81'))
    pair.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).large_processor.image_seq_length == 81


def test_a_bundle_without_processors_names_the_cure(bundle: Path) -> None:
    assert not (bundle / "processor_config.json").exists()
    with pytest.raises(OSError, match=r"There is no processor in .*large'?: save both with `SGLProcessor\.from_large"):
        SGLProcessor.from_pretrained(bundle)


def test_a_small_model_that_is_the_larger_one_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    large, small = tiny_internvl(num_layers=3), tiny_internvl(num_layers=2)
    logger = logging.getLogger("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "propagate", True)
        SGLForConditionalGeneration(large=large, small=small)
        assert not caplog.messages
        SGLForConditionalGeneration(large=small, small=large)
    (message,) = set(caplog.messages)
    assert message.startswith("The small model has ")
    assert message.endswith("so swap them if they are swapped.")
