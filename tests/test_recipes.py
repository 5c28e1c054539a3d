"""A recipe names two checkpoints and holds no weights: it loads like a bundle, and refuses what it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import state, tiny_internvl
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

from transformers_sgl import SGLConfig, SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.storage.saving import AUTO_MAP, PROCESSOR_AUTO_MAP, REMOTE_CODE

pytestmark = pytest.mark.mechanics  # what loads where is also a matter of transformers' version

QUESTION, ANSWER = "describe the red triangle.", "a red triangle labelled B in the bottom left"
Write = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def write(tmp_path: Path, embedded_pair_path: Path) -> Write:
    """Writes a recipe by hand, as somebody without the package would."""

    def write(name: str = "recipe", large: Any = None, small: Any = None, **config: Any) -> Path:
        parts = {"large": large, "small": small}
        for part, said in parts.items():
            if said is None or "name_or_path" not in said:
                parts[part] = {"name_or_path": str(embedded_pair_path / part), **(said or {})}
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = {"model_type": "sgl", "architectures": ["SGLForConditionalGeneration"], **parts, "auto_map": AUTO_MAP}
        (folder / "config.json").write_text(json.dumps({**text, **config}))
        (folder / "generation_config.json").write_text(json.dumps({"retention_ratio": 0.4, "prune_layer": 3}))
        processor = {"processor_class": "SGLProcessor", "auto_map": PROCESSOR_AUTO_MAP}
        (folder / "processor_config.json").write_text(json.dumps(processor))
        (folder / "modeling_sgl.py").write_text(REMOTE_CODE)
        return folder

    return write


def answer(model: Any, processor: Any, embedded_pair_path: Path) -> str:
    content = [{"type": "image", "path": str(embedded_pair_path / "example.png")}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(dtype=model.dtype)
    sequences = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --- loading ---


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_every_auto_class_loads_a_recipe_and_it_answers(auto_class, write: Write, embedded_pair_path: Path) -> None:
    recipe = write()
    model = auto_class.from_pretrained(recipe)
    assert type(model) is SGLForConditionalGeneration
    assert not model.training
    assert (model.generation_config.retention_ratio, model.generation_config.prune_layer) == (0.4, 3)
    assert model.config.large_config.model_type == "internvl"
    processor = AutoProcessor.from_pretrained(recipe)
    assert type(processor) is SGLProcessor
    assert answer(model, processor, embedded_pair_path) == ANSWER


def test_the_pipeline_takes_a_recipe(write: Write, embedded_pair_path: Path) -> None:
    pipe = pipeline("image-text-to-text", model=str(write(large={"dtype": "float64"})))
    assert pipe.model.large.dtype == torch.float64  # though the pipeline passes dtype="auto"
    pipe.model.to(torch.float32)
    image = Image.open(embedded_pair_path / "example.png")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
    assert pipe(text=chat, max_new_tokens=16, return_full_text=False)[0]["generated_text"].strip() == ANSWER


@pytest.mark.parametrize("name", ["./large", "../models/large", "../models/../models/large"])
def test_a_name_that_begins_with_a_dot_is_meant_from_the_recipe_on(
    name: str, write: Write, tmp_path: Path, embedded_pair_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(large={"name_or_path": name})
    shutil.copytree(embedded_pair_path / "large", recipe / "large")
    shutil.copytree(embedded_pair_path / "large", tmp_path / "models" / "large")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = AutoModelForImageTextToText.from_pretrained(recipe)
    assert model.large.name_or_path.startswith(str(tmp_path))
    assert SGLProcessor.from_pretrained(recipe).reads_the_same
    assert AutoModelForImageTextToText.from_pretrained(tmp_path, subfolder="recipe").large.num_parameters() > 1e6


def test_a_part_may_lie_in_a_subfolder(write: Write, embedded_pair_path: Path) -> None:
    recipe = write(small={"name_or_path": str(embedded_pair_path), "subfolder": "small"})
    assert len(AutoModel.from_pretrained(recipe).small.get_decoder().layers) == 4
    assert SGLProcessor.from_pretrained(recipe).reads_the_same


def test_a_recipe_says_how_its_models_are_loaded_and_the_user_has_the_last_word(write: Write) -> None:
    recipe = write(large={"dtype": "bfloat16", "attn_implementation": "eager"}, small={"dtype": "float64"})

    def loaded(**kwargs: Any) -> tuple:
        model = AutoModelForImageTextToText.from_pretrained(recipe, **kwargs)
        return model.large.dtype, model.small.dtype, model.large.get_decoder().config._attn_implementation

    assert loaded() == (torch.bfloat16, torch.float64, "eager")
    assert loaded(dtype="auto") == (torch.bfloat16, torch.float64, "eager")
    assert loaded(dtype=torch.float16) == (torch.float16, torch.float16, "eager")
    assert loaded(large_dtype="float32") == (torch.float32, torch.float64, "eager")
    assert loaded(attn_implementation="sdpa")[2] == "sdpa"
    assert loaded(large_attn_implementation="sdpa")[2] == "sdpa"


def test_a_recipe_can_ask_for_four_bits(write: Write, embedded_pair_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    recipe = write(large={"quantization_config": quantization, "device_map": "cpu"})
    model = AutoModelForImageTextToText.from_pretrained(recipe)
    assert model.large.is_loaded_in_4bit
    assert not getattr(model.small, "is_loaded_in_4bit", False)
    model.save_recipe(recipe.parent / "again")
    again = json.loads((recipe.parent / "again" / "config.json").read_text())["large"]
    assert again["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert AutoModel.from_pretrained(recipe.parent / "again").large.is_loaded_in_4bit


# --- the configuration ---


def test_a_recipe_round_trips_through_auto_config(write: Write, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(large={"dtype": "bfloat16", "revision": None}))
    assert type(config) is SGLConfig
    assert config.recipe["large"]["dtype"] == "bfloat16"
    config.save_pretrained(tmp_path / "once")
    AutoConfig.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    once, twice = ((tmp_path / name / "config.json").read_text() for name in ("once", "twice"))
    assert once == twice
    assert set(json.loads(once)) >= {"large", "small", "model_type"}
    assert not {"large_config", "small_config"} & set(json.loads(once))


def test_a_bundles_configuration_speaks_of_no_recipe(embedded_pair_path: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(embedded_pair_path)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert config.recipe is None
    assert {"large_config", "small_config"} <= set(saved)
    assert not {"large", "small"} & set(saved)


# --- writing one ---


def test_a_pair_of_named_checkpoints_is_saved_as_a_recipe(embedded_pair_path: Path, tmp_path: Path) -> None:
    large, small = embedded_pair_path / "large", embedded_pair_path / "small"
    model = SGLForConditionalGeneration.from_large_small_pretrained(large, small, large_dtype=torch.bfloat16)
    model.generation_config.retention_ratio = 0.3
    model.save_recipe(tmp_path / "recipe")
    assert set(contents(tmp_path / "recipe")) == {
        *("config.json", "generation_config.json", "modeling_sgl.py", "processor_config.json"),
    }
    config = json.loads((tmp_path / "recipe" / "config.json").read_text())
    assert config["large"] == {"name_or_path": str(large), "dtype": "bfloat16"}
    assert config["small"] == {"name_or_path": str(small)}
    assert (config["auto_map"], config["architectures"]) == (AUTO_MAP, ["SGLForConditionalGeneration"])

    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "recipe")
    assert (again.large.dtype, again.small.dtype) == (torch.bfloat16, torch.float32)
    assert again.generation_config.retention_ratio == 0.3
    assert type(AutoProcessor.from_pretrained(tmp_path / "recipe")) is SGLProcessor
    again.save_recipe(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "recipe")


def test_a_bundle_can_be_named_by_a_recipe_and_a_recipe_become_a_bundle(
    embedded_pair_path: Path, write: Write, tmp_path: Path
) -> None:
    AutoModel.from_pretrained(embedded_pair_path).save_recipe(tmp_path / "named")
    from_recipe = AutoModel.from_pretrained(tmp_path / "named")
    from_recipe.save_pretrained(tmp_path / "bundle")
    from_bundle = AutoModel.from_pretrained(tmp_path / "bundle")
    assert from_bundle.config.recipe is None
    weights = from_recipe.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in from_bundle.state_dict().items())
    assert contents(tmp_path / "bundle")["modeling_sgl.py"].decode() == REMOTE_CODE


def test_models_that_came_as_objects_have_no_name(embedded_pair_path: Path, tmp_path: Path) -> None:
    model = SGLForConditionalGeneration.from_large_small_pretrained(tiny_internvl(), tiny_internvl(2))
    before = state(model)
    with pytest.raises(ValueError, match=r"the large model was passed as an object: load it by name, or save"):
        model.save_recipe(tmp_path / "recipe")
    assert not (tmp_path / "recipe").exists()
    assert state(model) == before


def test_a_recipe_that_cannot_be_saved_leaves_the_folder_as_it_was(
    embedded_pair_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model = write(), AutoModel.from_pretrained(embedded_pair_path)
    before = contents(recipe)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(SGLConfig, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_recipe(recipe)
    assert contents(recipe) == before


# --- what is refused ---


@pytest.mark.parametrize(
    ("large", "message"),
    [
        ({"name_or_path": " "}, "The recipe's `large` names no checkpoint: give it a `name_or_path`"),
        ({"name_or_path": "/no/such"}, r"names '/no/such' as its large model, but there is no folder '/no/such'"),
        ({"name_or_path": "./nowhere"}, r"names './nowhere' as its large model, but there is no folder"),
        ({"name_or_path": "no/such/name"}, r"The large model 'no/such/name' cannot be loaded: "),
        ({"subfolder": "deep"}, "There is no folder 'deep' in"),
        ({"revision": 7}, "The recipe's `large` has the revision 7: write a string, or null"),
        ({"trust_remote_code": True}, r"says 'trust_remote_code', which is not for a recipe .*`large_trust_remote_co"),
        ({"use_safetensors": False}, "says 'use_safetensors', which is not for a recipe to say"),
        ({"token": "hf_x"}, "says 'token', which is not for a recipe to say"),
        ({"attn_implementation": "kernels-community/any"}, "asks for an attention kernel from the Hub"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_part_that_cannot_be_followed(large: dict[str, Any], message: str, write: Write) -> None:
    recipe = write(large=large)
    with pytest.raises((OSError, ValueError), match=message):
        AutoModelForImageTextToText.from_pretrained(recipe)
    with pytest.raises((OSError, ValueError), match=message):
        AutoProcessor.from_pretrained(recipe)


@pytest.mark.parametrize("missing", ["large", "small"])
def test_half_a_recipe(missing: str, write: Write) -> None:
    recipe = write(**{missing: {"name_or_path": "x"}})
    config = json.loads((recipe / "config.json").read_text())
    del config[missing]
    (recipe / "config.json").write_text(json.dumps(config))
    for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(ValueError, match=f"A recipe names two models, but `{missing}` is missing: name it beside"):
            load(recipe)


def test_models_both_named_and_described(embedded_pair_path: Path) -> None:
    described = AutoConfig.from_pretrained(embedded_pair_path / "large")
    named = {"name_or_path": "org/name"}
    with pytest.raises(ValueError, match="A pair is either named or described"):
        SGLConfig(large_config=described, small_config=described, large=named, small=named)


def test_a_recipe_that_names_itself(write: Write) -> None:
    recipe = write(large={"name_or_path": "."})
    for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"The recipe .* names itself as its large model: name a single model"):
            load(recipe)


def test_a_recipe_that_names_itself_through_another(write: Write) -> None:
    recipe = write(small={"name_or_path": "../other"})
    write("other", large={"name_or_path": "../recipe"})
    for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained):
        with pytest.raises(ValueError, match=r"The small model .*other' is itself a pair, and pairs do not nest"):
            load(recipe)


def test_a_part_that_is_a_pair(write: Write, embedded_pair_path: Path) -> None:
    message = r"is itself a pair, and pairs do not nest: name a single model"
    with pytest.raises(ValueError, match=f"The large model .*{message}"):
        AutoModel.from_pretrained(write(large={"name_or_path": str(embedded_pair_path)}))
    with pytest.raises(ValueError, match=f"The small model .*{message}"):
        SGLForConditionalGeneration.from_large_small_pretrained(embedded_pair_path / "large", embedded_pair_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "idefics"}, "Models of type 'idefics' are not supported"),
        ({"model_type": "only_on_the_hub"}, "type 'only_on_the_hub', for which transformers has no code of its own"),
        ({"transformers_weights": "weights.bin"}, "has no weights in safetensors format, and pickled ones"),
    ],
    ids=["unsupported", "foreign code", "pickle by name"],
)
def test_a_part_is_looked_at_before_any_weights_are_read(
    change: dict[str, str],
    message: str,
    write: Write,
    tmp_path: Path,
    embedded_pair_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((embedded_pair_path / "small" / "config.json").read_text())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, **change}))
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        SGLForConditionalGeneration.from_pretrained(write(small={"name_or_path": "../odd"}))


def test_pickled_weights_are_never_loaded(write: Write, tmp_path: Path, embedded_pair_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(embedded_pair_path / "small", pickled)
    (pickled / "model.safetensors").unlink()
    weights = AutoModelForImageTextToText.from_pretrained(embedded_pair_path / "small").state_dict()
    torch.save(weights, pickled / "pytorch_model.bin")
    message = r"The small model '.*pickled' has no weights in safetensors format, and pickled ones .* are never loaded"
    with pytest.raises(OSError, match=message):
        AutoModel.from_pretrained(write(small={"name_or_path": "../pickled"}))
    with pytest.raises(OSError, match=message):
        SGLForConditionalGeneration.from_large_small_pretrained(embedded_pair_path / "large", pickled)
    with pytest.raises(ValueError, match="are never loaded"):
        SGLForConditionalGeneration.from_large_small_pretrained(
            embedded_pair_path / "large", pickled, use_safetensors=False
        )
    bundle = tmp_path / "bundle"
    shutil.copytree(embedded_pair_path, bundle)
    shutil.rmtree(bundle / "small")
    shutil.copytree(pickled, bundle / "small")
    with pytest.raises(OSError, match="are never loaded"):
        AutoModel.from_pretrained(bundle)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_processors_that_cut_images_differently_are_paired_where_it_is_known_how(
    write: Write, tmp_path: Path, embedded_pair_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(embedded_pair_path / "small", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "processor_config.json").read_text())
    config["image_processor"]["max_patches"] = 2
    edit(tmp_path / "other" / "processor_config.json", **config)
    recipe = write(small={"name_or_path": "../other"})
    ways: list[Callable[[], Any]] = [
        lambda: AutoProcessor.from_pretrained(recipe),
        lambda: SGLProcessor.from_large_small_pretrained(embedded_pair_path / "large", tmp_path / "other"),
    ]
    for load in ways:
        assert load().importance_transfer == "resampling"
    monkeypatch.setattr("transformers_sgl.tokens.boxes.LAYOUTS", {})
    for load in ways:
        with pytest.raises(ValueError, match=r"The large model's processor does not fit the other one, .* InternVL"):
            load()


@pytest.mark.parametrize("kind", ["bundle", "recipe"])
def test_a_processor_with_another_image_token_than_its_model_is_refused(
    kind: str, write: Write, tmp_path: Path, embedded_pair_path: Path
) -> None:
    pair = tmp_path / "pair"
    shutil.copytree(embedded_pair_path, pair)
    config = json.loads((pair / "config.json").read_text())
    config["small_config"]["image_token_id"] = 7
    edit(pair / "config.json", **config)
    edit(pair / "small" / "config.json", image_token_id=7)
    source = pair if kind == "bundle" else write(small={"name_or_path": "../pair/small"})
    with pytest.raises(ValueError, match=r"small model and its processor .* as 456, and the model reads them as 7"):
        AutoProcessor.from_pretrained(source)


# --- trust ---


@pytest.mark.parametrize("trust", [None, True])
@pytest.mark.parametrize("kind", ["bundle", "recipe"])
def test_with_the_package_imported_no_remote_code_is_asked_for_or_run(
    kind: str, trust: bool | None, embedded_pair_path: Path, write: Write, tmp_path: Path
) -> None:
    folder = write()
    if kind == "bundle":
        shutil.rmtree(folder)
        AutoModel.from_pretrained(embedded_pair_path).save_pretrained(folder)
        SGLProcessor.from_pretrained(embedded_pair_path).save_pretrained(folder)
    (folder / "modeling_sgl.py").write_text("raise AssertionError('this file was run')")
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is SGLConfig
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        assert type(auto_class.from_pretrained(folder, trust_remote_code=trust)) is SGLForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=trust)) is SGLProcessor


def test_trust_in_a_recipe_is_not_trust_in_what_it_names(
    write: Write, tmp_path: Path, embedded_pair_path: Path
) -> None:
    shutil.copytree(embedded_pair_path / "small", tmp_path / "foreign")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        classes = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
        auto_map = dict.fromkeys(classes, "foreign.Foreign")
        edit(tmp_path / "foreign" / name, auto_map={**auto_map, "AutoTokenizer": [None, "foreign.Foreign"]})
    (tmp_path / "foreign" / "foreign.py").write_text("raise AssertionError('this file was run')")
    recipe = write(small={"name_or_path": "../foreign"})
    AutoModelForImageTextToText.from_pretrained(recipe, trust_remote_code=True)
    AutoProcessor.from_pretrained(recipe, trust_remote_code=True)


def test_the_embedded_pair_carries_the_remote_code_that_a_save_writes(embedded_pair_path: Path) -> None:
    assert (embedded_pair_path / "modeling_sgl.py").read_text() == REMOTE_CODE
    for name, auto_map in (("config.json", AUTO_MAP), ("processor_config.json", PROCESSOR_AUTO_MAP)):
        assert json.loads((embedded_pair_path / name).read_text())["auto_map"] == auto_map


# Every case in a process of its own, because the first one to succeed imports the package: forked, as importing
# transformers takes seconds.
WITHOUT_IMPORT = """
import json, os, sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import pipeline
# What every case would import, imported once.
from transformers.models.internvl import modeling_internvl, processing_internvl
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.got_ocr2 import image_processing_got_ocr2
from transformers.models.auto import video_processing_auto

def case(source, auto_class, trust, missing):
    if missing:
        sys.modules["transformers_sgl"] = None  # as if it were not installed
    assert missing or "transformers_sgl" not in sys.modules
    try:
        if auto_class == "pipeline":
            loaded = pipeline("image-text-to-text", model=source, trust_remote_code=trust).model
        else:
            loaded = globals()[auto_class].from_pretrained(source, trust_remote_code=trust)
        if hasattr(loaded, "save_pretrained"):
            folder = os.path.join("saved", source.replace("/", "-") + "-" + auto_class)
            loaded.save_pretrained(folder)
            assert sorted(name for name in os.listdir(folder) if name.endswith(".py")) in ([], ["modeling_sgl.py"])
        return type(loaded).__module__ + "." + type(loaded).__name__
    except Exception as error:
        return type(error).__name__ + ": " + str(error)

for arguments in json.loads(sys.argv[1]):
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            print(json.dumps(case(*arguments)), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""

MODEL = "transformers_sgl.modeling_sgl.SGLForConditionalGeneration"
CLASSES = {
    "AutoConfig": "transformers_sgl.configuration_sgl.SGLConfig",
    "AutoModel": MODEL,
    "AutoModelForImageTextToText": MODEL,
    "AutoModelForMultimodalLM": MODEL,
    "AutoProcessor": "transformers_sgl.processing_sgl.SGLProcessor",
    "pipeline": MODEL,
}


def without_import(cases: list[tuple[str, str, bool | None, bool]], cwd: Path, **environment: str) -> list[str]:
    """What each case says, in a process that has not imported the package."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_IMPORT, json.dumps(cases)],
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONPATH": root, "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    assert len(said) == len(cases), done.stderr
    return said


@pytest.mark.slow
def test_with_the_package_only_installed_remote_code_finds_it(
    write: Write, embedded_pair_path: Path, tmp_path: Path
) -> None:
    recipe, bundle = str(write()), str(tmp_path / "bundle")
    AutoModel.from_pretrained(embedded_pair_path).save_pretrained(bundle)
    SGLProcessor.from_pretrained(embedded_pair_path).save_pretrained(bundle)
    cases = [(recipe, auto_class, True, False) for auto_class in CLASSES]
    cases += [(bundle, auto_class, True, False) for auto_class in ("AutoModelForImageTextToText", "AutoProcessor")]
    missing = [(bundle, auto_class, True, True) for auto_class in ("AutoModel", "AutoProcessor")]
    untrusted = (bundle, "AutoModel", False, False)
    said = without_import([*cases, *missing, untrusted], tmp_path, HF_HOME=str(tmp_path / "home"))
    assert said[: len(cases)] == [CLASSES[auto_class] for _, auto_class, _, _ in cases]
    assert set(said[-3:-1]) == {"ImportError: This model needs a package: pip install transformers_sgl"}
    assert said[-1].startswith("ValueError")
    assert "trust_remote_code=True" in said[-1]
