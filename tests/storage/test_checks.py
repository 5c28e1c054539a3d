"""Broken and hostile files of a pair: one sentence each, before anything is run or built."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import TINY, tiny_model
from hub_stub import HubStub
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family_pair
from tiny_models import tiny_internvl
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.hub import validate
from transformers_sgl.storage.checks import Weights, check_claims, check_no_foreign_code, limited_to
from transformers_sgl.storage.processors import check_processor_claims

pytestmark = pytest.mark.mechanics

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with processors, and the same pair as a recipe."""
    folder = tmp_path_factory.mktemp("pair")
    for part in tiny_family_pair("internvl", "internvl"):
        part.save_pretrained(folder / "bundle")
    shutil.copytree(folder / "bundle", folder / "recipe")
    edit(folder / "recipe" / "config.json", as_recipe)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "bundle", tmp_path / "bundle"))


@pytest.fixture
def recipe(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "recipe", tmp_path / "recipe"))


def as_recipe(config: dict[str, Any]) -> None:
    for name in ("large", "small"):
        del config[f"{name}_config"]
        config[name] = {"name_or_path": f"./{name}"}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def refused(folder: Path, message: str, error: type[Exception] | tuple[type[Exception], ...] = ValueError) -> None:
    """Both ways to load say so in one sentence, soon."""
    for load in (SGLForConditionalGeneration.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        start = time.monotonic()
        with pytest.raises(error, match=message) as found:
            load(folder)
        assert "\n" not in str(found.value)
        assert time.monotonic() - start < 10


class Trace:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# ----------------------------------------------------------------------------------------------------------- indices


def with_index(folder: Path, entry: Any, name: str = INDEX) -> None:
    """Replaces weights by a pickle, and an index that names `entry` for each of them."""
    names = list(load_file(folder / "model.safetensors"))
    torch.save({"weight": Trace(folder / "ran")}, folder / "weights.bin")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, entry)}
    (folder / name).write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("entry", ["weights.bin", "../small/model.safetensors", "/a/model.safetensors", "", 5, None])
def test_an_index_names_safetensors_beside_it_only(entry: Any, bundle: Path, recipe: Path) -> None:
    for folder in (bundle, recipe):
        with_index(folder / "large", entry)
        refused(
            folder, f"The large model .* lists {entry!r} in its `{INDEX}`, and only .* can run code: save it again"
        )
        assert not (folder / "large" / "ran").exists()
    with pytest.raises(ValueError, match="can run code"):
        SGLForConditionalGeneration.from_large_small_pretrained(bundle / "large", bundle / "small")
    assert any(finding.path == f"large/{INDEX}" and finding.stops for finding in validate(bundle))


def test_indices_of_other_names_are_looked_at_too(bundle: Path) -> None:
    with_index(bundle / "large", "weights.bin", "model.safetensors.index.fp16.json")
    with pytest.raises(ValueError, match="pickled ones can run code"):
        SGLForConditionalGeneration.from_pretrained(bundle, large_variant="fp16")
    shutil.move(bundle / "large" / "model.safetensors.index.fp16.json", bundle / "large" / "a.safetensors.index.json")
    edit(bundle / "config.json", lambda c: c["large_config"].update(transformers_weights="a.safetensors.index.json"))
    refused(bundle, r"lists 'weights.bin' in its `a\.safetensors\.index\.json`")
    assert not (bundle / "large" / "ran").exists()


@pytest.mark.parametrize("name", ["weights.bin", "../small/model.safetensors", "/a/b.safetensors", ["a"]])
def test_weights_are_named_beside_the_configuration_only(name: Any, bundle: Path, recipe: Path) -> None:
    edit(bundle / "config.json", lambda config: config["large_config"].update(transformers_weights=name))
    edit(recipe / "large" / "config.json", lambda config: config.update(transformers_weights=name))
    for folder in (bundle, recipe):
        refused(folder, "has no weights in safetensors format, and pickled ones are never loaded")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {"a": "b.safetensors"}}])
def test_an_index_without_a_list(index: Any, bundle: Path) -> None:
    (bundle / "large" / "model.safetensors").unlink()
    (bundle / "large" / INDEX).write_text(json.dumps(index), encoding="utf-8")
    refused(bundle, f"`{INDEX}`", (OSError, ValueError))


def test_an_index_on_the_hub_is_read_before_what_it_names(bundle: Path, tmp_path: Path) -> None:
    with_index(bundle / "large", "weights.bin")
    with HubStub() as hub:
        hub.add_repo("org/pair", bundle)
        with hub.connected(tmp_path / "reader"), pytest.raises(ValueError, match="lists 'weights.bin'"):
            SGLForConditionalGeneration.from_pretrained("org/pair")
        assert not [request for request in hub.requests if "weights.bin" in request]


# ------------------------------------------------------------------------------------------------------ foreign code

KERNEL = "some/kernel"
KERNELS: dict[str, tuple[tuple[str, ...], Any]] = {
    "at the top": (("attn_implementation",), KERNEL),
    "under its private name": (("_attn_implementation",), KERNEL),
    "under its inmost name": (("_attn_implementation_internal",), KERNEL),
    "paged": (("attn_implementation",), f"paged|{KERNEL}"),
    "by part": (("attn_implementation",), {"large_config": {"text_config": KERNEL}}),
    "for experts": (("experts_implementation",), KERNEL),
    "for one model": (("large_config", "attn_implementation"), KERNEL),
    "for its text": (("small_config", "text_config", "_attn_implementation"), KERNEL),
    "for its images": (("large_config", "vision_config", "attn_implementation"), {"": KERNEL}),
}


def put(keys: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize(("keys", "value"), KERNELS.values(), ids=KERNELS)
def test_a_bundle_that_asks_for_a_kernel(keys: tuple[str, ...], value: Any, bundle: Path) -> None:
    edit(bundle / "config.json", put(keys, value))
    refused(bundle, "asks for an? (attention )?kernel from the Hub .* which is foreign code: pass it as")
    assert any("foreign code" in finding.message for finding in validate(bundle))


@pytest.mark.parametrize("keys", ["attn_implementation", "large.attn_implementation", "_attn_implementation"])
def test_a_recipe_that_asks_for_a_kernel(keys: str, recipe: Path) -> None:
    edit(recipe / "config.json", put(tuple(keys.split(".")), KERNEL))
    refused(recipe, "kernel from the Hub.* which is foreign code")


def test_a_model_of_a_recipe_that_asks_for_a_kernel(recipe: Path) -> None:
    edit(recipe / "small" / "config.json", put(("text_config", "attn_implementation"), KERNEL))
    refused(recipe, "The small model .* asks for an attention kernel from the Hub")


@pytest.mark.parametrize("model_class", [SGLForConditionalGeneration, AutoModelForImageTextToText])
def test_the_user_may_ask_for_a_kernel(model_class: Any, bundle: Path, recipe: Path) -> None:
    for folder in (bundle, recipe):
        said = ""
        try:
            model_class.from_pretrained(folder, attn_implementation=KERNEL)
        except Exception as error:  # transformers has no package `kernels` here; some versions then take another
            said = str(error)
        assert "foreign code" not in said


@pytest.mark.parametrize("value", [{"patch_embeddings": True}, {"use_kernels": True}])
def test_a_configuration_changes_no_classes(value: dict[str, Any], bundle: Path) -> None:
    edit(bundle / "config.json", put(("large_config", "fusion_config"), value))
    refused(bundle, "asks for other code than transformers' own")


def test_timm_is_sent_to_no_repository() -> None:
    with pytest.raises(ValueError, match="sends timm to another repository"):
        check_no_foreign_code("It", {"vision_config": {"architecture": "hf-hub:some/model"}})


def test_a_processor_names_no_model_for_sound(bundle: Path) -> None:
    named = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "some/model"}
    edit(bundle / "large" / "processor_config.json", put(("audio_tokenizer",), named))
    with pytest.raises(ValueError, match="names a model as its `audio_tokenizer`"):
        SGLProcessor.from_pretrained(bundle)


# ------------------------------------------------------------------------------------------------------ broken files

BROKEN = {"empty": "", "cut off": '{"a": ', "a list": "[]", "a number": "5", "deep": "[" * 100_000}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("file", ["generation_config.json", "large/generation_config.json", "small/config.json"])
def test_a_file_that_is_no_json_object(file: str, text: str, bundle: Path) -> None:
    (bundle / file).write_text(text, encoding="utf-8")
    refused(bundle, rf"its `{Path(file).name}` is (not|no) JSON.*: correct it, or save or download it again", OSError)


WRONG_TYPES: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "a setting": ("generation_config.json", ("temperature",), "hot"),
    "a setting of ours": ("generation_config.json", ("retention_ratio",), "half"),
    "a token": ("generation_config.json", ("eos_token_id",), {"a": []}),
    "a model's setting": ("small/generation_config.json", ("max_new_tokens",), []),
    "a size": ("config.json", ("large_config", "text_config", "hidden_size"), "wide"),
    "a list": ("config.json", ("large_config", "text_config", "layer_types"), [5]),
    "a part": ("config.json", ("large_config", "vision_config"), []),
    "a configuration": ("config.json", ("large_config",), 5),
    "a dtype": ("config.json", ("small_config", "dtype"), "load"),
}


@pytest.mark.parametrize(("file", "keys", "value"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_a_value_of_a_wrong_type(file: str, keys: tuple[str, ...], value: Any, bundle: Path) -> None:
    edit(bundle / file, put(keys, value))
    refused(bundle, "config|retention_ratio")


PROCESSOR_FILES: dict[str, tuple[str, tuple[Any, ...], Any]] = {
    "a class": ("large/processor_config.json", ("processor_class",), "evil.Evil"),
    "no object": ("small/processor_config.json", ("image_processor",), "evil.Evil"),
    "a model's labels": ("small/config.json", ("text_config", "num_labels"), 10**9),
    "a mean": ("small/processor_config.json", ("image_processor", "image_mean"), ["a", "b", "c"]),
    "a size": ("small/processor_config.json", ("image_processor", "size"), 1.5),
    "a token": ("large/tokenizer_config.json", ("unk_token",), 5),
    "a vocabulary": ("large/tokenizer.json", ("model", "vocab"), {"a": "b"}),
    "a large id": ("large/tokenizer.json", ("model", "vocab", "a"), 2**31),
    "many tiles": ("large/processor_config.json", ("image_processor", "max_patches"), 10**6),
    "many tokens": ("large/processor_config.json", ("image_seq_length",), 10**6),
    "large tiles": ("large/processor_config.json", ("image_processor", "size", "height"), 10**6),
}


@pytest.mark.parametrize(("file", "keys", "value"), PROCESSOR_FILES.values(), ids=PROCESSOR_FILES)
def test_a_processors_value(file: str, keys: tuple[Any, ...], value: Any, bundle: Path) -> None:
    edit(bundle / file, put(keys, value))
    for load in (SGLProcessor.from_pretrained, AutoProcessor.from_pretrained):
        start = time.monotonic()
        with pytest.raises((OSError, ValueError)) as error:
            load(bundle)
        assert "processor" in str(error.value)
        assert "\n" not in str(error.value)
        assert time.monotonic() - start < 5


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[:-1],
    "with a huge header": lambda content: (2**62).to_bytes(8, "little") + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_weights_that_are_not_whole(damage: Callable[[bytes], bytes], bundle: Path) -> None:
    path = bundle / "small" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(bundle, r"its `model\.safetensors` is no whole safetensors file .*: save or download it again", OSError)


def test_weights_that_lack_some(bundle: Path) -> None:
    path = bundle / "large" / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in sorted(tensors) if name.endswith("o_proj.weight"))]
    save_file(tensors, path, metadata={"format": "pt"})
    refused(bundle, "The large model .* lacks 1 of its weights, such as '.*o_proj.weight', and random numbers would")


def test_weights_of_other_shapes(bundle: Path) -> None:
    edit(bundle / "config.json", put(("large_config", "text_config", "intermediate_size"), 80))
    refused(bundle, r"of another shape than its `config\.json` claims, such as .*\(\d+, \d+\) and not \(\d+, \d+\)")


# ------------------------------------------------------------------------------------------------------------ sizes

CLAIMS: dict[str, tuple[tuple[str, ...], int]] = {
    "layers": (("text_config", "num_hidden_layers"), 5_000),
    "a million layers": (("text_config", "num_hidden_layers"), 10**6),
    "a billion layers": (("text_config", "num_hidden_layers"), 10**9),
    "vision layers": (("vision_config", "num_hidden_layers"), 10**6),
    "labels": (("num_labels",), 10**9),
    "a vocabulary": (("text_config", "vocab_size"), 10**9),
    "a width": (("text_config", "hidden_size"), 10**6),
    "an image": (("vision_config", "image_size"), 10**6),
}


@pytest.mark.parametrize(("keys", "value"), CLAIMS.values(), ids=CLAIMS)
def test_a_claim_beyond_the_weights(keys: tuple[str, ...], value: int, bundle: Path, recipe: Path) -> None:
    for folder, path, prefix in (
        (bundle, bundle / "config.json", ("large_config",)),
        (recipe, recipe / "large" / "config.json", ()),
    ):
        edit(path, lambda c, prefix=prefix: put((*prefix, *keys), value)(c))
        edit(path, lambda c, prefix=prefix: c[prefix[0]]["text_config"].pop("layer_types", None) if prefix else None)
        refused(folder, "config.json")


def test_a_model_whose_claims_are_true_is_built() -> None:
    with limited_to(Weights(num_tensors=100, num_bytes=100_000), "It"):
        tiny_internvl()


def test_the_limit_holds_for_its_own_thread_only() -> None:
    with limited_to(Weights(num_tensors=0, num_bytes=0), "It"):
        thread = threading.Thread(
            target=lambda: built.append(torch.nn.ModuleList(torch.nn.ReLU() for _ in range(3_000)))
        )
        built: list[Any] = []
        thread.start()
        thread.join()
        assert built
        with pytest.raises(ValueError, match="It claims far more layers or larger ones"):
            torch.nn.ModuleList(torch.nn.ReLU() for _ in range(3_000))
    torch.nn.ModuleList(torch.nn.ReLU() for _ in range(3_000))


@pytest.mark.parametrize("name", sorted(TINY))
def test_no_architectures_own_settings_are_refused(name: str) -> None:
    config = TINY[name].config(2)
    for each in (config.to_dict(), type(config)().to_dict()):
        check_claims("It", each)
        check_no_foreign_code("It", each)


@pytest.mark.parametrize("name", [name for name in ("dots3_note", "qwen3_vl_moe", "gemma3", "llama4") if name in TINY])
def test_real_models_keep_far_from_the_limits(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, 2)
    model.save_pretrained(tmp_path)
    config: PreTrainedConfig = model.config
    weights = Weights(len(model.state_dict()) // 2, (tmp_path / "model.safetensors").stat().st_size // 8)
    with limited_to(weights, "It"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("families", [("qwen2_vl", "llava"), ("internvl", "qwen2_vl")])
def test_processors_that_count_pixels_or_have_videos_are_loaded(families: tuple[str, str], tmp_path: Path) -> None:
    _, processor = tiny_family_pair(*families)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    SGLProcessor.from_pretrained(tmp_path)


def test_no_image_processors_own_settings_are_refused(tmp_path: Path) -> None:
    for name in (name for name in dir(transformers) if name.endswith("ImageProcessor")):
        with contextlib.suppress(Exception):  # some are abstract, or need a package that is not here
            getattr(transformers, name)().save_pretrained(tmp_path / name)
    written = sorted(path.parent for path in tmp_path.glob("*/preprocessor_config.json"))
    assert len(written) > 50
    for folder in written:
        check_processor_claims(folder.name, str(folder), {})
