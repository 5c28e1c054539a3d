"""What happens under versions that nobody tested, and under a transformers that has changed."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import find_visual_tokens, prompts, state, tiny_internvl

from transformers_sgl import AttentionRecorder, SGLForConditionalGeneration, versions
from transformers_sgl.hub import embedded_pair

ROOT = Path(__file__).parents[1]
SENTENCE = "transformers_sgl was not tested with transformers 9.9 (tested: >=5.17,<5.25)"


def requirements() -> dict[str, str]:
    """The ranges in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    return {re.match(r"[\w-]+", line)[0]: re.sub(r"^[\w-]+", "", line) for line in lines}


@pytest.mark.mechanics
@pytest.mark.parametrize("package", versions.TESTED)
def test_the_range_is_closed_and_that_of_setup_cfg(package: str) -> None:
    assert re.fullmatch(r">=[\d.]+,<[\d.]+", requirements()[package])
    assert versions.TESTED[package] == requirements()[package]


@pytest.mark.mechanics
@pytest.mark.parametrize(
    ("version", "is_inside"),
    [
        ("5.17.0", True),
        ("5.17", True),
        ("5.24.99", True),
        ("5.24.1+local", True),
        ("5.16.4", False),
        ("5.25.0", False),
        ("5.25.0.dev0", False),
        ("5.100", False),
        ("6.0", False),
    ],
)
def test_inside_and_outside(version: str, is_inside: bool) -> None:
    assert versions.is_inside(version, ">=5.17,<5.25") is is_inside


@pytest.fixture
def installed_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if transformers 9.9 were installed."""
    versions.untested.cache_clear()
    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "transformers" else known(name))
    monkeypatch.setattr(versions, "TESTED", {"transformers": ">=5.17,<5.25"})
    yield
    versions.untested.cache_clear()


def fail(*_: Any, **__: Any) -> Any:
    """What a transformers that has changed may say."""
    raise TypeError("forward() got an unexpected keyword argument 'kv'")


@pytest.mark.mechanics
@pytest.mark.usefixtures("installed_outside")
class TestOutside:
    def test_the_warning(self) -> None:
        with pytest.warns(UserWarning, match=re.escape(SENTENCE)) as warned:
            versions.warn_if_untested()
        assert len(warned) == 1

    def test_an_error_of_a_part_names_the_version_once(self) -> None:
        model, inputs = tiny_internvl(), prompts()
        model(**inputs)
        before = state(model)
        with (
            pytest.raises(ValueError, match="may be read only once") as raised,
            AttentionRecorder(model, find_visual_tokens(inputs)),
        ):
            for _ in range(2):
                model(**inputs)
        assert str(raised.value).count(SENTENCE) == 1
        assert state(model) == before

    @pytest.mark.parametrize(
        ("half", "step"),
        [
            ("generate", "call.split_inputs"),
            ("guide", "call.split_inputs"),
            ("guide", "generation_sgl.ask"),
            ("answer", "generation_sgl.DraftVerifier"),
        ],
    )
    def test_an_error_of_a_call_names_the_version_once(
        self, half: str, step: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(seed=1))
        given = {"guidance": pair.guide(**prompts(), max_new_tokens=2)} if half == "answer" else {"max_new_tokens": 2}

        # Outside of every context that would name the version itself.
        monkeypatch.setattr(f"transformers_sgl.{step}", fail)
        with pytest.raises(TypeError, match="unexpected keyword argument 'kv'") as raised:
            getattr(pair, half)(**prompts(), **given)
        assert str(raised.value).count(SENTENCE) == 1

    def test_an_error_of_a_model_names_the_version_once(self) -> None:
        pair = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(seed=1))

        pair.small.register_forward_pre_hook(fail)
        with pytest.raises(TypeError, match="unexpected keyword argument 'kv'") as raised:
            pair.generate(**prompts(), max_new_tokens=2)
        assert str(raised.value).count(SENTENCE) == 1

    def test_other_errors_stay_what_they_are(self) -> None:
        for error in (KeyError(3), ValueError(), KeyboardInterrupt("stop")):
            before = error.args
            versions.name_versions(error)
            assert error.args == before


@pytest.mark.mechanics
def test_inside_nothing_is_said(recwarn: pytest.WarningsRecorder) -> None:
    if versions.untested():
        pytest.skip(versions.untested())
    versions.warn_if_untested()
    error = ValueError("a sentence.")
    versions.name_versions(error)
    assert not recwarn.list
    assert error.args == ("a sentence.",)


def in_process(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "2000"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run([sys.executable, *code.split("\0")], env=environment, capture_output=True, text=True)


@pytest.mark.mechanics
def test_importing_warns_once_and_goes_on(tmp_path: Path) -> None:
    """A version is what the metadata of an installed package say, so others are put before them."""
    for name, version in (("transformers", "9.9.1"), ("torch", "9.9")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    code = f"import transformers_sgl, transformers_sgl.cli; transformers_sgl.cli.main(['run', {str(FILE)!r}, 'what?'])"
    result = in_process(f"-c\0{code}", tmp_path)
    assert result.stdout.startswith("answer ")
    ranges = versions.TESTED
    assert [line for line in result.stderr.splitlines() if "Warning" in line] == [
        "<string>:1: UserWarning: transformers_sgl was not tested with transformers 9.9.1 (tested: "
        f"{ranges['transformers']}) and torch 9.9 (tested: {ranges['torch']}): if a call fails, install a tested "
        "version."
    ]


FILE = embedded_pair() / "example.png"


# --- An altered transformers: the installed one but for a file, in which something has another name. ---


def altered(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of transformers whose files are links to the installed ones, all but one."""
    source, target = Path(transformers.__file__).parent, folder / "transformers"
    target.mkdir(parents=True)
    parts = Path(file).parts
    for depth in range(len(parts)):
        here = Path(*parts[:depth])
        (target / here).mkdir(exist_ok=True)
        for entry in (source / here).iterdir():
            if entry.name not in (parts[depth], "__pycache__"):
                (target / here / entry.name).symlink_to(entry)
    text, count = re.subn(old, new, (source / file).read_text(encoding="utf-8"))
    assert count, f"{old} is not in {file}"
    (target / file).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("file", "old", "new", "reliances"),
    [
        # an argument has another name
        ("generation/utils.py", r"\bnum_new_tokens\b", "number_of_new_tokens", {"extended_inputs"}),
        # a private function is gone
        (
            "models/internvl/processing_internvl.py",
            r"\b_get_num_multimodal_tokens\b",
            "_num_tokens_of_images",
            {"count_image_tokens", "tells_image_tokens"},
        ),
        # the decoding loop has another name
        ("generation/utils.py", r"\b_sample\b", "_decode", {"view_of", "next_token_output"}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("_") else None,
)
def test_a_reliance_that_no_longer_holds_is_named(
    file: str, old: str, new: str, reliances: set[str], tmp_path: Path
) -> None:
    folder = altered(tmp_path, file, old, new)
    test = ROOT / "tests" / "test_transformers_interface.py"
    result = in_process(f"-m\0pytest\0-q\0-p\0no:cacheprovider\0-rf\0--tb=no\0-k\0test_reliance\0{test}", folder)
    named = re.findall(
        r"^FAILED \S+ - Failed: transformers [\d.]+ no longer has what `(\w+)` relies on\. Assumes .+\.",
        result.stdout,
        re.MULTILINE,
    )
    assert set(named) == reliances, result.stdout[-3000:]


def test_a_call_that_needs_what_is_gone_says_so(tmp_path: Path) -> None:
    folder = altered(tmp_path, "generation/utils.py", r"\b_update_model_kwargs_for_generation\b", "_update_inputs")
    shutil.copy(FILE, tmp_path / "picture.png")
    result = in_process(f"-m\0transformers_sgl\0run\0{tmp_path / 'picture.png'}\0what is it?", folder)
    assert result.returncode == 2
    assert re.fullmatch(
        r"transformers-sgl: transformers [\d.]+ has no `\w+\._update_model_kwargs_for_generation`, on which "
        r"transformers_sgl relies: install transformers>=[\d.]+,<[\d.]+\.",
        result.stderr.strip(),
    )
