"""From a model in memory to a repository on a hub and back, on a hub that listens on loopback."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import Commit, HubStub
from huggingface_hub.errors import HfHubHTTPError
from test_recipes import CLASSES, answer, contents, without_import
from tiny_models import state
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.storage.saving import REMOTE_CODE

pytestmark = pytest.mark.mechanics  # what loads where is also a matter of transformers' version

ANSWER = "a red triangle labelled B in the bottom left"


@pytest.fixture
def hub() -> Iterator[HubStub]:
    with HubStub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushes(
    pair: SGLForConditionalGeneration, processor: SGLProcessor, tmp_path_factory: pytest.TempPathFactory
) -> list[Commit]:
    """The commits that `push_to_hub` of the model and of its processor make."""
    with HubStub() as hub, hub.connected(tmp_path_factory.mktemp("pusher"), token=hub.token):
        pair.push_to_hub("me/pair", max_shard_size="3MB")
        processor.push_to_hub("me/pair")
        return hub.commits


@pytest.fixture
def pushed(hub: HubStub, pushes: list[Commit]) -> HubStub:
    """A hub with the pair in `me/pair`, as `push_to_hub` put it there."""
    hub.add_repo("me/pair", pushes[-1].files)
    return hub


def recipe_files(large: dict[str, Any], small: dict[str, Any]) -> dict[str, bytes]:
    return {
        "config.json": json.dumps({"model_type": "sgl", "large": large, "small": small}).encode(),
        "generation_config.json": b'{"retention_ratio": 0.4}',
        "processor_config.json": b'{"processor_class": "SGLProcessor"}',
        "modeling_sgl.py": REMOTE_CODE.encode(),
    }


# --- pushing ---


def test_a_push_is_one_commit_with_everything_in_it(pushes: list[Commit]) -> None:
    model_push, processor_push = pushes
    files = processor_push.files
    assert {"config.json", "generation_config.json", "modeling_sgl.py", "README.md"} <= set(model_push.changed)
    assert "large/model.safetensors.index.json" in model_push.changed  # in shards
    assert "small/model.safetensors" in model_push.changed
    assert {"processor_config.json", "large/tokenizer.json", "small/processor_config.json"} <= set(
        processor_push.changed
    )
    assert not [name for name in processor_push.changed if name.endswith(".safetensors")]
    assert not [name for name in files if ".saving" in name or name.endswith((".bin", ".pkl"))]


def test_what_comes_back_is_what_was_pushed(
    pushed: HubStub, pair: SGLForConditionalGeneration, embedded_pair_path: Path, tmp_path: Path
) -> None:
    with pushed.connected(tmp_path / "reader"):
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto_class.from_pretrained("me/pair")
            assert type(model) is SGLForConditionalGeneration
            assert model.generation_config == pair.generation_config
            weights = pair.state_dict()
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        processor = AutoProcessor.from_pretrained("me/pair")
        assert type(processor) is SGLProcessor
        assert answer(model, processor, embedded_pair_path) == ANSWER
        pipe = pipeline("image-text-to-text", model="me/pair")
        assert answer(pipe.model, pipe.processor, embedded_pair_path) == ANSWER
        assert model._vocabularies.shared  # the tokenizers are found there too


def test_a_second_load_needs_no_hub(pushed: HubStub, tmp_path: Path, embedded_pair_path: Path) -> None:
    def load(**kwargs: Any) -> str:
        model = AutoModelForImageTextToText.from_pretrained("me/pair", **kwargs)
        processor = AutoProcessor.from_pretrained("me/pair", **kwargs)
        return answer(model, processor, embedded_pair_path)

    with pushed.connected(tmp_path / "reader"):
        load()
    pushed.requests.clear()
    with pushed.connected(tmp_path / "reader", offline=True):
        assert load() == ANSWER
        assert load(local_files_only=True) == ANSWER
    with pushed.connected(tmp_path / "reader"):
        assert load(local_files_only=True) == ANSWER
    assert pushed.requests == []
    with pushed.connected(tmp_path / "nobody", offline=True), pytest.raises(OSError, match="couldn't connect"):
        load()


def downloaded(folder: Path) -> list[Path]:
    """What is in the default cache.

    Where peft is installed, the Auto classes also note there, whatever the cache, that a repository has no adapter.
    """
    return [path for path in folder.glob("hub/models--*/snapshots/**/*") if path.is_file()]


def test_the_caller_says_which_cache(pushed: HubStub, tmp_path: Path) -> None:
    with pushed.connected(tmp_path / "default"):
        AutoModel.from_pretrained("me/pair", cache_dir=tmp_path / "own")
        AutoProcessor.from_pretrained("me/pair", cache_dir=tmp_path / "own")
    assert list((tmp_path / "own").glob("models--me--pair/snapshots/*/large/*.safetensors"))
    assert downloaded(tmp_path / "default") == []


def test_a_branch_is_pushed_to_and_read_from(
    pushed: HubStub, pair: SGLForConditionalGeneration, processor: SGLProcessor, tmp_path: Path
) -> None:
    changed = SGLForConditionalGeneration(large=pair.large, small=pair.small)
    changed.generation_config.retention_ratio = 0.77
    with pushed.connected(tmp_path / "pusher", token=pushed.token):
        changed.push_to_hub("me/pair", revision="next")
        processor.push_to_hub("me/pair", revision="next")
    assert [commit.branch for commit in pushed.commits] == ["main", "next", "next"]
    with pushed.connected(tmp_path / "reader"):
        commit = pushed.repos["me/pair"].branches["next"]
        for revision in ("next", commit):
            model = AutoModel.from_pretrained("me/pair", revision=revision)
            assert model.generation_config.retention_ratio == 0.77
            assert type(AutoProcessor.from_pretrained("me/pair", revision=revision)) is SGLProcessor
        assert AutoModel.from_pretrained("me/pair").generation_config.retention_ratio != 0.77


def test_a_pair_may_lie_in_a_subfolder_of_a_repository(hub: HubStub, embedded_pair_path: Path, tmp_path: Path) -> None:
    hub.add_repo("org/all", {f"pairs/tiny/{name}": data for name, data in contents(embedded_pair_path).items()})
    with hub.connected(tmp_path):
        model = AutoModelForImageTextToText.from_pretrained("org/all", subfolder="pairs/tiny")
        processor = AutoProcessor.from_pretrained("org/all", subfolder="pairs/tiny")
        assert answer(model, processor, embedded_pair_path) == ANSWER


def test_all_parts_come_from_one_commit_though_the_branch_moves(
    pushed: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody pushes a broken large model while the pair is being loaded."""
    first = pushed.repos["me/pair"].branches["main"]
    files = {**pushed.repos["me/pair"].files, "small/model.safetensors": b"broken"}
    load = AutoModelForImageTextToText.from_pretrained

    def push_meanwhile(*args: Any, **kwargs: Any) -> Any:
        if len(pushed.commits) == 1:
            pushed.add_repo("me/pair", files)
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", push_meanwhile)
    with pushed.connected(tmp_path / "reader"):
        model = SGLForConditionalGeneration.from_pretrained("me/pair")
    assert len(pushed.commits) == 2
    assert {checkpoint.where["revision"] for checkpoint in model._checkpoints.values()} == {first}


# --- what goes wrong ---


def test_a_private_pair_takes_a_token_which_ends_up_nowhere(
    hub: HubStub, embedded_pair_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_repo("org/secret", embedded_pair_path, private=True)
    with hub.connected(tmp_path / "reader"), caplog.at_level(logging.DEBUG):
        for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained):
            with pytest.raises((OSError, ValueError)):
                load("org/secret")
        model = AutoModel.from_pretrained("org/secret", token=hub.token)
        processor = AutoProcessor.from_pretrained("org/secret", token=hub.token)
        assert answer(model, processor, embedded_pair_path) == ANSWER
        assert model._vocabularies.shared
        model.save_recipe(tmp_path / "recipe")
        model.save_pretrained(tmp_path / "bundle")
    assert hub.token not in caplog.text + repr(model._checkpoints) + repr(model.config)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("repo", "revision", "cause"),
    [
        ("org/nobody", None, "is not a local folder and is not a valid model identifier"),
        ("me/pair", "v9", "v9 is not"),
    ],
)
def test_a_repository_or_a_revision_that_is_not_there(
    repo: str, revision: str | None, cause: str, pushed: HubStub, tmp_path: Path
) -> None:
    with pushed.connected(tmp_path / "reader"):
        for load in (SGLForConditionalGeneration.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises(OSError, match=cause):
                load(repo, revision=revision)
        with pytest.raises(OSError, match=cause):
            SGLProcessor.from_pretrained(repo, revision=revision)


@pytest.mark.parametrize("step", ["preupload", "lfs", "/commit/"])
def test_a_push_that_fails_leaves_repository_and_model_as_they_were(
    step: str, pushed: HubStub, pair: SGLForConditionalGeneration, tmp_path: Path
) -> None:
    model = SGLForConditionalGeneration(large=pair.large, small=pair.small)
    model.generation_config.retention_ratio = 0.1234
    before, files = state(model), dict(pushed.repos["me/pair"].files)
    pushed.refuse = lambda method, path: 403 if method != "GET" and step in path else None
    with pushed.connected(tmp_path / "pusher", token=pushed.token), pytest.raises((HfHubHTTPError, RuntimeError)):
        model.push_to_hub("me/pair")
    assert len(pushed.commits) == 1
    assert pushed.repos["me/pair"].files == files
    assert state(model) == before


def test_a_push_without_a_token_is_refused(hub: HubStub, pair: SGLForConditionalGeneration, tmp_path: Path) -> None:
    with hub.connected(tmp_path), pytest.raises(HfHubHTTPError):
        pair.push_to_hub("me/pair")
    assert hub.commits == []


# --- recipes ---


@pytest.fixture
def checkpoints(hub: HubStub, embedded_pair_path: Path) -> HubStub:
    """A hub with a large and a small model, each in a repository of its own whose main branch has moved on."""
    for name in ("large", "small"):
        hub.add_repo(f"org/{name}", embedded_pair_path / name, branch="v1")
        hub.add_repo(f"org/{name}", {"config.json": b'{"model_type": "bert"}'})
    return hub


def named(name: str, **options: Any) -> dict[str, Any]:
    return {"name_or_path": f"org/{name}", "revision": "v1", **options}


def test_a_recipe_finds_its_checkpoints_at_their_revisions(
    checkpoints: HubStub, embedded_pair_path: Path, tmp_path: Path
) -> None:
    checkpoints.add_repo("me/recipe", recipe_files(named("large", dtype="float64"), named("small")), branch="v7")
    with checkpoints.connected(tmp_path / "reader"):
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            # The recipe's own revision is not asked of what it names.
            model = auto_class.from_pretrained("me/recipe", revision="v7", cache_dir=tmp_path / "own")
            assert (model.large.dtype, model.small.dtype) == (torch.float64, torch.float32)
            assert model.generation_config.retention_ratio == 0.4
        processor = AutoProcessor.from_pretrained("me/recipe", revision="v7", cache_dir=tmp_path / "own")
        assert downloaded(tmp_path / "reader") == []
        assert not list((tmp_path / "reader").glob("hub/models--org--*"))
        assert answer(model.to(torch.float32), processor, embedded_pair_path) == ANSWER
        assert type(AutoConfig.from_pretrained("me/recipe", revision="v7").recipe["large"]) is dict
    checkpoints.requests.clear()
    with checkpoints.connected(tmp_path / "reader", offline=True):
        AutoModel.from_pretrained("me/recipe", revision="v7", cache_dir=tmp_path / "own")
        AutoProcessor.from_pretrained("me/recipe", revision="v7", cache_dir=tmp_path / "own")
    assert checkpoints.requests == []


def test_the_pipeline_takes_a_recipe_from_a_hub(
    checkpoints: HubStub, embedded_pair_path: Path, tmp_path: Path
) -> None:
    checkpoints.add_repo("me/recipe", recipe_files(named("large"), named("small")))
    with checkpoints.connected(tmp_path / "reader"):
        pipe = pipeline("image-text-to-text", model="me/recipe")
        assert answer(pipe.model, pipe.processor, embedded_pair_path) == ANSWER


def test_a_saved_recipe_is_pinned_to_the_commits_that_were_loaded(checkpoints: HubStub, tmp_path: Path) -> None:
    with checkpoints.connected(tmp_path / "reader"):
        model = SGLForConditionalGeneration.from_large_small_pretrained(
            "org/large", "org/small", revision="v1", token=checkpoints.token
        )
        model.save_recipe(tmp_path / "recipe")
        config = json.loads((tmp_path / "recipe" / "config.json").read_text())
        for name in ("large", "small"):
            commit = checkpoints.repos[f"org/{name}"].branches["v1"]
            assert config[name] == {"name_or_path": f"org/{name}", "revision": commit}
            checkpoints.add_repo(f"org/{name}", {}, branch="v1")  # the branch moves on, the recipe does not
        AutoModel.from_pretrained(tmp_path / "recipe")
        AutoProcessor.from_pretrained(tmp_path / "recipe")


def test_the_user_can_name_other_revisions_than_the_recipe(checkpoints: HubStub, tmp_path: Path) -> None:
    files = recipe_files({"name_or_path": "org/large", "revision": "v0"}, named("small"))
    checkpoints.add_repo("me/recipe", files)
    with checkpoints.connected(tmp_path / "reader"):
        message = r"The large model 'org/large' \(revision 'v0'\) cannot be loaded: v0 is not a valid git identifier"
        for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained):
            with pytest.raises(OSError, match=message):
                load("me/recipe")
            load("me/recipe", large_revision="v1")


def test_a_recipe_can_mean_folders_of_its_own_repository(
    hub: HubStub, embedded_pair_path: Path, tmp_path: Path
) -> None:
    parts = {
        f"models/{name}": data for name, data in contents(embedded_pair_path).items() if name[:5] in ("large", "small")
    }
    files = recipe_files({"name_or_path": "./models/large"}, {"name_or_path": "./models", "subfolder": "small"})
    hub.add_repo("me/recipe", {**parts, **files}, branch="v1")
    hub.add_repo("me/outside", recipe_files({"name_or_path": "../large"}, {"name_or_path": "./small"}))
    with hub.connected(tmp_path / "reader"):
        model = AutoModel.from_pretrained("me/recipe", revision="v1")
        processor = AutoProcessor.from_pretrained("me/recipe", revision="v1")
        assert answer(model, processor, embedded_pair_path) == ANSWER
        with pytest.raises(ValueError, match=r"lies outside its repository: name the repository instead"):
            AutoModel.from_pretrained("me/outside")


@pytest.mark.parametrize(
    ("large", "error", "message"),
    [
        ({"name_or_path": "org/nobody"}, OSError, r"The large model 'org/nobody' cannot be loaded: org/nobody is not"),
        ({"name_or_path": "org/empty"}, OSError, r"The large model cannot be loaded: there is no `config\.json` in"),
        ({"name_or_path": "me/recipe"}, ValueError, r"The recipe 'me/recipe' names itself as its large model"),
        ({"name_or_path": "me/pair"}, ValueError, r"The large model 'me/pair' .*is itself a pair, and pairs do not"),
    ],
    ids=["missing", "empty", "itself", "pair"],
)
def test_a_recipe_whose_part_cannot_be_followed(
    large: dict[str, Any], error: type[Exception], message: str, pushed: HubStub, tmp_path: Path
) -> None:
    pushed.add_repo("org/empty", {"README.md": b""})
    pushed.add_repo("me/recipe", recipe_files(large, {"name_or_path": "me/pair", "subfolder": "small"}))
    with pushed.connected(tmp_path / "reader"):
        for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained):
            with pytest.raises(error, match=message):
                load("me/recipe")


def test_pickled_weights_are_not_even_downloaded(
    hub: HubStub, embedded_pair_path: Path, pair: SGLForConditionalGeneration, tmp_path: Path
) -> None:
    torch.save(pair.small.state_dict(), tmp_path / "pytorch_model.bin")
    files = contents(embedded_pair_path / "small")
    del files["model.safetensors"]
    hub.add_repo("org/pickled", {**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    message = r"The small model 'org/pickled' .* pickled ones .* are never loaded"
    with hub.connected(tmp_path / "reader"), pytest.raises(OSError, match=message):
        SGLForConditionalGeneration.from_large_small_pretrained(embedded_pair_path / "large", "org/pickled")
    assert not [request for request in hub.requests if "pytorch_model.bin" in request]


# --- remote code ---


@pytest.mark.slow
def test_with_the_package_only_installed_a_repository_loads(
    pushed: HubStub, embedded_pair_path: Path, tmp_path: Path
) -> None:
    for name in ("large", "small"):
        pushed.add_repo(f"org/{name}", embedded_pair_path / name)
    files = recipe_files({"name_or_path": "org/large"}, {"name_or_path": "org/small"})
    config = json.loads(files["config.json"])
    auto_map = {"AutoConfig": "modeling_sgl.SGLConfig", "AutoModel": "modeling_sgl.SGLForConditionalGeneration"}
    pushed.add_repo("me/recipe", {**files, "config.json": json.dumps({**config, "auto_map": auto_map}).encode()})
    environment = pushed.environment(tmp_path / "home")
    cases = [("me/pair", auto_class, True, False) for auto_class in ("AutoModel", "AutoProcessor", "pipeline")]
    cases.append(("me/recipe", "AutoModel", True, False))
    untrusted = ("me/pair", "AutoModel", False, False)
    said = without_import([*cases, untrusted], cwd=tmp_path, **environment)
    assert said[:-1] == [CLASSES[auto_class] for _, auto_class, _, _ in cases]
    assert "trust_remote_code=True" in said[-1]
    offline = pushed.environment(tmp_path / "home", offline=True)
    pushed.requests.clear()
    assert without_import(cases, cwd=tmp_path, **offline) == said[:-1]
    assert pushed.requests == []
