from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_stub import HubStub
from huggingface_hub import HfApi

from transformers_sgl import SGLProcessor
from transformers_sgl.cli import main
from transformers_sgl.hub import contents, publish
from transformers_sgl.hub.validation import validate

REPO = "me/pair"
# Put together here, so that no scanner takes this file for what the tests look for.
TOKEN = "hf_" + "a1B2" * 9


@pytest.fixture
def bundle(tmp_path, embedded_pair_path) -> Path:
    return Path(shutil.copytree(embedded_pair_path, tmp_path / "bundle"))


@pytest.fixture
def recipe(tmp_path, embedded_pair_path) -> Path:
    """A recipe of two named checkpoints, which no machine has."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    parts = {name: {"name_or_path": f"org/{name}", "revision": None} for name in ("large", "small")}
    write(folder / "config.json", {"model_type": "sgl", "architectures": ["SGLForConditionalGeneration"], **parts})
    write(folder / "generation_config.json", {"retention_ratio": 0.2, "prune_layer": 0.25})
    write(folder / "processor_config.json", {"processor_class": "SGLProcessor"})
    card = (embedded_pair_path / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nbase_model: [org/large, org/small]\n", 1))
    return folder


@pytest.fixture
def hub(tmp_path, embedded_pair_path):
    """A hub that has the recipe's two checkpoints, and this process logged in."""
    with HubStub() as stub, stub.connected(tmp_path / "cache", token=stub.token):
        for name in ("large", "small"):
            stub.add_repo(f"org/{name}", embedded_pair_path / name)
        stub.commits.clear()
        yield stub


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, **changes: object) -> None:
    """Sets entries of a JSON file; `None` removes one."""
    content = {**json.loads(path.read_text()), **changes}
    write(path, {name: value for name, value in content.items() if value is not None})


def state(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def stops(folder: Path) -> list[str]:
    return [str(finding) for finding in validate(folder) if finding.stops]


def notes(folder: Path) -> list[str]:
    return [str(finding) for finding in validate(folder) if not finding.stops]


def in_card(old: str, new: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "README.md").read_text()
        assert old in text
        (folder / "README.md").write_text(text.replace(old, new, 1))

    return change


def add(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def entries(name: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **changes)


def other_tiles(folder: Path) -> None:
    processor = json.loads((folder / "small" / "processor_config.json").read_text())
    processor["image_processor"]["max_patches"] = 2
    write(folder / "small" / "processor_config.json", processor)


def half_of_the_shards(folder: Path) -> None:
    (folder / "large" / "model.safetensors").rename(folder / "large" / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(folder / "large" / "model.safetensors.index.json", {"metadata": {}, "weight_map": shards})


def other_image_token(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["small_config"]
    config["image_token_id"] = 3
    edit(folder / "config.json", small_config=config)
    edit(folder / "small" / "config.json", image_token_id=3)


def small_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["small_config"]
    config["text_config"]["vocab_size"] = 100
    edit(folder / "config.json", small_config=config)
    edit(folder / "small" / "config.json", text_config=config["text_config"])


EMPTY_SAFETENSORS = struct.pack("<Q", 2) + b"{}"
METADATA = b'{"__metadata__":{"note":"%s"}}' % TOKEN.encode()
BUNDLE_PROBLEMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "not a pair": (entries("config.json", model_type="internvl"), "a model of type 'internvl', not of a pair"),
    "config that is not JSON": (add("config.json", b"{"), "config.json: is not JSON"),
    "config that is no object": (add("config.json", b"[]"), "config.json: is not a JSON object"),
    "half a pair": (entries("config.json", small_config=None), "config.json: cannot be loaded: A pair needs two"),
    "no large config": (remove("large/config.json"), "large/config.json: is missing"),
    "unsupported model": (entries("large/config.json", model_type="idefics"), "no pair can have: Models of"),
    "unknown model": (
        entries("large/config.json", model_type="nothing"),
        "large/config.json: names a large model that no pair",
    ),
    "models mixed up": (entries("small/config.json", image_token_id=3), "small/config.json: is that of another model"),
    "no weights": (remove("small/model.safetensors"), "small/model.safetensors: is missing"),
    "missing shard": (half_of_the_shards, "large/model-00002-of-00002.safetensors: is missing"),
    "cut-off weights": (add("small/model.safetensors", b"\x08\0\0\0"), "cannot be read as safetensors"),
    "weights elsewhere": (
        add("model.safetensors", EMPTY_SAFETENSORS),
        "model.safetensors: is not one of a pair's weight files",
    ),
    "other weights": (add("small/adapter.safetensors", EMPTY_SAFETENSORS), "is not one of a pair's weight files"),
    "pickle": (add("small/pytorch_model.bin", b""), "small/pytorch_model.bin: is a pickle"),
    "pickle in disguise": (add("data.json", b"\x80\x04\x95"), "data.json: is a pickle or an archive"),
    "archive": (add("more.zip", b"PK\x03\x04"), "more.zip: is a pickle or an archive"),
    "token": (add("notes.txt", f"one\ntwo {TOKEN}\n".encode()), "notes.txt: has a Hugging Face token in line 2"),
    "token in the weights": (
        add("small/model.safetensors", struct.pack("<Q", len(METADATA)) + METADATA),
        "small/model.safetensors: has a Hugging Face token",
    ),
    "private key": (add("a.txt", b"-----BEGIN " + b"RSA PRIVATE KEY-----"), "a.txt: has a private key"),
    "password": (add("a.json", b'{"pass' + b'word": "correct-horse"}'), "a.json: has a password"),
    "address": (add("a.md", b"https://me:" + b"secret@example.org"), "a.md: has an address with a password"),
    ".env": (add(".env", b"A=1"), ".env: is hidden, or named like a file of secrets"),
    "hidden folder": (add(".aws/config", b""), ".aws/config: is hidden, or named like a file of secrets"),
    "key file": (add("server.pem", b""), "server.pem: is hidden, or named like a file of secrets"),
    "no card": (remove("README.md"), "README.md: is missing"),
    "no license": (in_card("license: apache-2.0\n"), "README.md: has no `license`"),
    "other license": (in_card("license: apache-2.0", "license: other"), "name the license in `license_name`"),
    "no language": (in_card("language: en\n"), "README.md: has no `language`"),
    "no library": (in_card("library_name: transformers\n"), "README.md: has no `library_name: transformers`"),
    "no task": (in_card("image-text-to-text", "text-generation"), "has no `pipeline_tag: image-text-to-text`"),
    "no tag": (in_card("- sgl\n"), "README.md: has no tag `sgl`"),
    "unknown relation": (in_card("license:", "base_model_relation: twin\nlicense:"), "`base_model_relation: twin`"),
    "broken metadata": (in_card("license: apache-2.0", "license: ["), "README.md: has metadata that cannot be read"),
    "no settings": (remove("generation_config.json"), "generation_config.json: is missing"),
    "bad settings": (entries("generation_config.json", retention_ratio=2), "generation_config.json: cannot be used"),
    "no processor": (remove("processor_config.json"), "processor_config.json: is missing"),
    "other processor": (entries("processor_config.json", processor_class="X"), "does not say `SGLProcessor`"),
    "no processor of a part": (remove("small/processor_config.json"), "processor_config.json: "),
    "no tokenizer": (remove("small/tokenizer.json"), "processor_config.json: cannot be used: The small"),
    "tokenizer of another model": (other_image_token, "processor_config.json: cannot be used: The small model"),
    "tokenizer too large": (small_vocabulary, "small: has a tokenizer of 461 tokens, but the model knows 100"),
    "code that is missing": (entries("config.json", auto_map={"AutoModel": "x.X"}), "takes code from 'x.py'"),
    "code of others": (entries("config.json", auto_map={"AutoModel": "o/r--x.X"}), "code from another repository"),
}


@pytest.mark.parametrize("problem", BUNDLE_PROBLEMS)
def test_each_thing_wrong_with_a_bundle_is_found(bundle, problem):
    break_it, sentence = BUNDLE_PROBLEMS[problem]
    break_it(bundle)
    before = state(bundle)
    found = stops(bundle)
    assert any(sentence in finding for finding in found), found
    assert TOKEN not in str(found)  # where a secret is, is said; what it is, is not
    assert state(bundle) == before


def test_code_that_is_not_python_is_found(bundle):
    edit(bundle / "config.json", auto_map={"AutoConfig": "x.Config", "AutoTokenizer": [None, "x.Fast"]})
    (bundle / "x.py").write_text("class Config:\n    pass\n")
    assert stops(bundle) == []
    (bundle / "x.py").write_text("class Config\n")
    assert stops(bundle)[0].startswith("x.py: is not Python")


def test_a_folder_that_is_no_pair_is_not_looked_through(tmp_path):
    (tmp_path / "private.txt").write_text(TOKEN)
    (finding,) = validate(tmp_path)
    assert (finding.path, finding.stops) == ("config.json", True)
    assert "is missing" in finding.message
    with pytest.raises(OSError, match="There is no folder"):
        validate(tmp_path / "nowhere")


def test_a_big_file_that_is_not_weights_is_found(bundle, monkeypatch):
    monkeypatch.setattr(contents, "_MAX_OTHER_BYTES", 1_000_000)
    add("video.mp4", bytes(1_000_001))(bundle)
    assert stops(bundle) == ["video.mp4: has 1,000,001 bytes and is not weights: remove it from the folder."]


def test_links_are_followed_to_files_and_refused_to_folders(bundle):
    (bundle / "README.md").rename(bundle.parent / "card.md")
    (bundle / "README.md").symlink_to(bundle.parent / "card.md")
    assert stops(bundle) == []
    (bundle / "dangling").symlink_to(bundle / "nowhere")
    (bundle / "small").rename(bundle.parent / "small")
    (bundle / "small").symlink_to(bundle.parent / "small")
    found = stops(bundle)
    assert any(finding.startswith("dangling: is a broken link") for finding in found)
    assert any(finding.startswith("small: is a link") for finding in found)


def test_sharded_weights_are_fine(bundle, tmp_path):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(bundle / "large")
    (bundle / "large" / "model.safetensors").unlink()
    model.save_pretrained(bundle / "large", max_shard_size="4MB")
    assert (bundle / "large" / "model.safetensors.index.json").is_file()
    assert stops(bundle) == []


def test_two_tokenizers_are_worth_a_note(bundle):
    tokenizer = json.loads((bundle / "small" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary.get("blue", 454), vocabulary.get("red", 453)
    write(bundle / "small" / "tokenizer.json", tokenizer)
    assert stops(bundle) == []
    assert notes(bundle) == [
        "small: has a different tokenizer from `large`: drafts are re-encoded, and fewer tokens are accepted."
    ]


def test_two_ways_to_cut_images_are_worth_a_note(bundle):
    other_tiles(bundle)
    assert stops(bundle) == []
    assert notes(bundle) == [
        "small: cuts images differently from `large`: importance is transferred through image coordinates."
    ]


class TestRecipe:
    def test_checkpoints_that_are_not_here_are_said_to_be_unchecked(self, recipe):
        assert stops(recipe) == []
        found = notes(recipe)
        assert sum("which is not on this machine, so it was not checked" in note for note in found) == 2
        assert sum("its commit is filled in when published" in note for note in found) == 2

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"small": None}, "`small` is missing"),
            ({"small": {"name_or_path": ""}}, "`small` names no checkpoint"),
            ({"large": {"revision": "main"}}, "`large` names no checkpoint"),
            ({"large": {"name_or_path": REPO}}, "names itself as the large model"),
            ({"large": {"name_or_path": "."}}, "names itself as the large model"),
            ({"large": {"name_or_path": "no name"}}, "which is no repository's name"),
            ({"large": {"name_or_path": "org/large", "trust_remote_code": True}}, "not for a recipe to say"),
            ({"large": {"name_or_path": "org/large", "token": "x"}}, "says 'token', which is not for a recipe"),
            (
                {"large": {"name_or_path": "./large"}},
                "has the folder './large' as the large model, which is not there",
            ),
            ({"large": {"name_or_path": "org/other"}}, "README.md: does not list 'org/other' as `base_model`"),
        ],
    )
    def test_each_thing_wrong_with_a_recipe_is_found(self, recipe, change, sentence):
        edit(recipe / "config.json", **change)
        found = [str(finding) for finding in validate(recipe, REPO) if finding.stops]
        assert any(sentence in finding for finding in found), found

    def test_weights_in_a_recipe_are_found(self, recipe):
        add("large/model.safetensors", EMPTY_SAFETENSORS)(recipe)
        assert any("belongs to no model that the recipe names" in finding for finding in stops(recipe))

    def test_folders_are_looked_into(self, recipe, bundle):
        parts = {name: {"name_or_path": f"../bundle/{name}"} for name in ("large", "small")}
        edit(recipe / "config.json", **parts)
        assert validate(recipe) == []
        other_tiles(bundle)
        assert any("cuts images differently from `large`" in note for note in notes(recipe))
        edit(recipe / "config.json", large={"name_or_path": str(bundle)})
        assert any("as its large model: name one of that pair's models" in finding for finding in stops(recipe))
        edit(recipe / "config.json", large={"name_or_path": "../nowhere"})
        assert any("has the folder '../nowhere' as the large model" in note for note in notes(recipe))

    def test_checkpoints_in_the_cache_are_looked_into(self, recipe, hub):
        SGLProcessor.from_large_small_pretrained("org/large", "org/small")
        for name in ("large", "small"):
            HfApi().hf_hub_download(f"org/{name}", "config.json")
        assert all("filled in when published" in str(finding) for finding in validate(recipe))

    def test_a_model_inside_the_recipe_comes_along(self, recipe, bundle, hub):
        shutil.copytree(bundle / "small", recipe / "small")
        edit(recipe / "config.json", small={"name_or_path": "./small"})
        assert stops(recipe) == []
        publication = publish(recipe, REPO)
        assert set(publication.pinned) == {"large"}
        assert "small/model.safetensors" in hub.repos[REPO].files


class TestPublish:
    def test_a_bundle_is_one_commit_of_exactly_its_files(self, hub, bundle):
        before = state(bundle)
        (bundle / ".cache").mkdir()
        (bundle / ".cache" / "x").write_text("not for the Hub")
        publication = publish(bundle, REPO)
        shutil.rmtree(bundle / ".cache")
        (commit,) = hub.commits
        local = {
            path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()
        }
        assert dict(commit.files) == local
        assert (commit.repo_id, commit.branch, commit.id) == (REPO, "main", publication.commit)
        assert {file.path: file.size_bytes for file in publication.files} == {p: len(c) for p, c in local.items()}
        assert (publication.kind, publication.deleted, publication.pinned) == ("bundle", (), {})
        assert not hub.repos[REPO].private
        assert state(bundle) == before

    def test_a_recipe_is_pinned_where_it_is_uploaded_and_nowhere_else(self, hub, recipe):
        older = hub.repos["org/small"].branches["main"]
        hub.add_repo("org/small", {"model.safetensors": EMPTY_SAFETENSORS})
        edit(recipe / "config.json", small={"name_or_path": "org/small", "revision": older, "dtype": "bfloat16"})
        before = state(recipe)
        hub.commits.clear()
        publication = publish(recipe, REPO)
        newest = hub.repos["org/large"].branches["main"]
        config = json.loads(hub.repos[REPO].files["config.json"])
        assert config["large"] == {"name_or_path": "org/large", "revision": newest}
        assert config["small"] == {"name_or_path": "org/small", "revision": older, "dtype": "bfloat16"}
        assert publication.pinned == {"large": newest, "small": older}
        assert len(hub.commits) == 1
        assert state(recipe) == before

    def test_a_branch_is_pinned_to_its_commit(self, hub, recipe):
        commit = hub.add_repo("org/large", {"model.safetensors": EMPTY_SAFETENSORS}, branch="v2")
        edit(recipe / "config.json", large={"name_or_path": "org/large", "revision": "v2"})
        assert publish(recipe, REPO).pinned["large"] == commit

    @pytest.mark.parametrize("kind", ["bundle", "recipe"])
    def test_a_dry_run_writes_nothing(self, hub, request, kind):
        folder = request.getfixturevalue(kind)
        before, planned = state(folder), []
        publication = publish(folder, REPO, dry_run=True, announce=planned.append)
        assert planned == [publication]
        assert publication.files
        assert publication.commit is None
        assert (hub.commits, REPO in hub.repos) == ([], False)
        assert all(request.startswith(("GET ", "HEAD ")) for request in hub.requests)
        assert state(folder) == before

    def test_a_dry_run_does_without_the_hub(self, hub, recipe):
        hub.refuse = lambda method, path: 503
        publication = publish(recipe, REPO, dry_run=True)
        assert publication.pinned == {}
        assert any("The Hub could not be asked" in note for note in publication.notes)

    @pytest.mark.parametrize("problem", ["token", "no license", "no weights"])
    def test_with_anything_to_put_right_the_hub_is_not_even_asked(self, hub, bundle, problem):
        break_it, sentence = BUNDLE_PROBLEMS[problem]
        break_it(bundle)
        with pytest.raises(ValueError, match="cannot be published yet") as error:
            publish(bundle, REPO)
        assert sentence in str(error.value)
        assert hub.requests == []

    def test_the_second_publication_replaces_the_weights_of_the_first(self, hub, bundle):
        hub.add_repo(REPO, {"large/model-00001-of-00001.safetensors": b"old", "notes.txt": b"kept"})
        publication = publish(bundle, REPO)
        assert publication.deleted == ("large/model-00001-of-00001.safetensors",)
        assert "large/model-00001-of-00001.safetensors" not in hub.repos[REPO].files
        assert hub.repos[REPO].files["notes.txt"] == b"kept"

    def test_a_new_repository_is_private_on_request(self, hub, recipe):
        publish(recipe, REPO, private=True)
        assert hub.repos[REPO].private

    def test_what_must_be_private_is_not_put_into_a_public_repository(self, hub, recipe):
        hub.add_repo(REPO, {"notes.txt": b"public"})
        hub.commits.clear()
        for revision in (None, "draft"):
            with pytest.raises(ValueError, match="is a public repository"):
                publish(recipe, REPO, private=True, revision=revision)
        assert hub.commits == []

    def test_a_folder_that_another_process_writes_to_is_not_published(self, hub, bundle):
        def save_again(publication) -> None:
            config = json.loads((bundle / "generation_config.json").read_text())
            write(bundle / "generation_config.json", {**config, "retention_ratio": 0.5})

        with pytest.raises(OSError, match="was written to while it was read, and nothing was published: publish"):
            publish(bundle, REPO, announce=save_again)
        assert hub.commits == []
        assert REPO not in hub.repos
        publish(bundle, REPO)
        assert json.loads(hub.repos[REPO].files["generation_config.json"])["retention_ratio"] == 0.5

    def test_a_branch_is_made_and_the_main_one_left(self, hub, recipe):
        hub.add_repo(REPO, {"notes.txt": b"main"})
        publish(recipe, REPO, revision="draft")
        publish(recipe, REPO, revision="draft")  # now the branch exists, and nothing has changed
        assert set(hub.repos[REPO].files) == {"notes.txt"}
        assert "config.json" in hub.repos[REPO].at("draft").files
        publish(recipe, "me/new", revision="draft")
        assert "config.json" not in hub.repos["me/new"].files
        assert "config.json" in hub.repos["me/new"].at("draft").files

    def test_a_commit_in_between_is_not_overwritten(self, hub, recipe):
        hub.add_repo(REPO, {"notes.txt": b"first"})
        with pytest.raises(OSError, match="Nothing was published to 'me/pair'"):
            publish(recipe, REPO, announce=lambda _: hub.add_repo(REPO, {"notes.txt": b"second"}))
        assert dict(hub.repos[REPO].files) == {"notes.txt": b"second"}

    @pytest.mark.parametrize(
        ("large", "sentence"),
        [
            ({"name_or_path": "org/nothing"}, "The Hub has no 'org/nothing', which the recipe names as the large"),
            ({"name_or_path": "org/large", "revision": "nope"}, "The Hub has no 'org/large' at revision 'nope'"),
            ({"name_or_path": "org/pickled"}, "'org/pickled' has no safetensors weights"),
            ({"name_or_path": "../bundle/large"}, "which nobody else can load"),
        ],
    )
    def test_a_recipe_of_what_others_cannot_load_is_refused(self, hub, recipe, bundle, large, sentence):
        hub.add_repo("org/pickled", {"pytorch_model.bin": b""})
        hub.commits.clear()
        edit(recipe / "config.json", large=large)
        card = (recipe / "README.md").read_text().replace("base_model: [", "base_model: [org/nothing, org/pickled, ")
        (recipe / "README.md").write_text(card)
        with pytest.raises(ValueError, match=sentence):
            publish(recipe, REPO)
        assert (hub.commits, REPO in hub.repos) == ([], False)

    def test_a_recipe_of_a_pair_or_an_unknown_model_is_refused(self, hub, recipe, monkeypatch):
        stock = HfApi.model_info

        def with_config(api, repo_id, **kwargs):
            info = stock(api, repo_id, **kwargs)
            info.config = {"model_type": "sgl"}
            return info

        monkeypatch.setattr(HfApi, "model_info", with_config)
        with pytest.raises(ValueError, match="is of type 'sgl', which no pair supports"):
            publish(recipe, REPO)
        assert hub.commits == []

    def test_a_private_checkpoint_is_worth_a_note(self, hub, recipe):
        hub.repos["org/large"].private = True
        assert any("'org/large' is private: not everybody can load it" in note for note in publish(recipe, REPO).notes)

    @pytest.mark.parametrize("name", ["pair", "a/b/c", "me/..", "", "me/" + "x" * 99])
    def test_bad_names_are_refused(self, recipe, name):
        with pytest.raises(ValueError, match="repositor"):
            publish(recipe, name)

    def test_kinds_are_not_mixed_up(self, hub, bundle, recipe):
        with pytest.raises(ValueError, match="is a bundle, which does not name the checkpoints"):
            publish(bundle, REPO, kind="recipe")
        with pytest.raises(ValueError, match="is a recipe, which holds no weights"):
            publish(recipe, REPO, kind="bundle")
        with pytest.raises(ValueError, match="choose 'bundle' or 'recipe'"):
            publish(recipe, REPO, kind="pair")
        assert hub.requests == []

    @pytest.mark.parametrize("refused", ["create", "preupload", "commit"])
    def test_what_the_hub_refuses_is_one_sentence_and_leaves_everything(self, hub, bundle, refused):
        hub.refuse = lambda method, path: 403 if method == "POST" and f"/{refused}" in path else None
        before = state(bundle)
        with pytest.raises(OSError, match="Nothing was published to 'me/pair'") as error:
            publish(bundle, REPO)
        assert "\n" not in str(error.value)
        assert ("The repository was created, and is empty." in str(error.value)) == (REPO in hub.repos)
        assert hub.commits == []
        assert state(bundle) == before

    def test_a_hub_that_cannot_be_reached_is_one_sentence(self, tmp_path, recipe):
        with HubStub() as stub:
            pass  # its address, and nobody listens there any more
        with stub.connected(tmp_path / "cache"), pytest.raises(OSError, match="Nothing was published to 'me/pair'"):
            publish(recipe, REPO)

    def test_the_token_is_used_and_shown_nowhere(self, hub, recipe, capfd):
        hub.token = TOKEN
        with pytest.raises(OSError, match="Nothing was published") as error:
            publish(recipe, REPO)  # logged in with another
        publication = publish(recipe, REPO, token=TOKEN)
        with pytest.raises(ValueError, match="copy it again") as damaged:
            publish(recipe, REPO, token=TOKEN + "\n")
        assert len(hub.commits) == 1
        out, err = capfd.readouterr()
        uploaded = b"".join(hub.repos[REPO].files.values()).decode()
        assert not any(TOKEN in text for text in (out, err, uploaded, str(error.value), str(damaged.value)))
        assert TOKEN not in repr(publication)


class TestCommand:
    def run(self, capsys, *arguments: str) -> tuple[int, str, str]:
        code = main(["publish", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_says_what_it_uploads_and_where_it_is(self, hub, recipe, capsys):
        code, out, _ = self.run(capsys, str(recipe), "--repo", REPO, "--recipe")
        assert code == 0
        lines = out.splitlines()
        assert lines[0] == "recipe      me/pair"
        assert f"pinned      large at {hub.repos['org/large'].branches['main']}" in lines
        size = len(hub.repos[REPO].files["config.json"])
        assert any(line.split() == ["upload", str(size), "bytes", "config.json"] for line in lines)
        assert lines[-1] == f"published   {hub.url}/me/pair/commit/{hub.commits[0].id}"

    def test_dry_run(self, hub, bundle, capsys):
        code, out, _ = self.run(capsys, str(bundle), "--repo", REPO, "--dry-run", "--bundle", "--private")
        assert code == 0
        assert out.splitlines()[0] == "bundle      me/pair (private)"
        assert out.splitlines()[-1] == "dry run     nothing was uploaded"
        assert REPO not in hub.repos

    def test_json(self, hub, recipe, capsys):
        code, out, _ = self.run(capsys, str(recipe), "--repo", REPO, "--json")
        report = json.loads(out)
        assert code == 0
        assert report["commit"] == hub.commits[0].id
        assert [file["path"] for file in report["files"]] == sorted(hub.repos[REPO].files)
        assert set(report["pinned"]) == {"large", "small"}

    def test_what_is_to_be_put_right_is_one_line(self, hub, bundle, capsys):
        (bundle / "README.md").unlink()
        code, out, err = self.run(capsys, str(bundle), "--repo", REPO)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert "README.md: is missing" in err
        assert hub.requests == []


class TestFunction:
    @pytest.fixture
    def function(self, tmp_path) -> Path:
        source = Path(__file__).parents[2] / "model_cards" / "sgl-generate"
        return Path(shutil.copytree(source, tmp_path / "function", ignore=shutil.ignore_patterns("__pycache__")))

    def test_it_is_published_in_one_commit(self, hub, function):
        publication = publish(function, REPO)
        assert (publication.kind, len(hub.commits)) == ("function", 1)
        assert "custom_generate/generate.py" in hub.repos[REPO].files

    @pytest.mark.parametrize(
        ("code", "sentence"),
        [("def generate(:\n", "is not valid Python"), ("x = 1\n", "has no function `generate`")],
    )
    def test_code_that_transformers_could_not_call_is_found(self, function, code, sentence):
        (function / "custom_generate" / "generate.py").write_text(code)
        (finding,) = stops(function)
        assert finding.startswith(f"custom_generate/generate.py: {sentence}")

    def test_it_is_neither_a_bundle_nor_a_recipe(self, hub, function):
        with pytest.raises(
            ValueError, match="is a generation function, neither a bundle nor a recipe: leave the kind out"
        ):
            publish(function, REPO, kind="recipe")
        assert not hub.commits
