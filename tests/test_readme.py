"""The code blocks of README.md and docs/ do what they say."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from transformers_sgl.cli import app
from transformers_sgl.evaluation import methods
from transformers_sgl.evaluation.methods import METHODS

ROOT = Path(__file__).parents[1]
QUICK_START = "docs/quick-start.md"  # what it defines, the other pages of docs/ use
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


class Block(NamedTuple):
    language: str
    info: str
    code: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\S+)(.*?)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


PYTHON = [(page, block) for page in PAGES for block in blocks(page) if block.language == "python"]
COMMANDS = [
    (page, line)
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash"
    for line in block.code.splitlines()
]


def run(page: str, namespace: dict[str, Any]) -> dict[str, Any]:
    for where, block in PYTHON:
        if where == page and "no-run" not in block.info:
            exec(compile(block.code, page, "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def quick_start() -> dict[str, Any]:
    return run(QUICK_START, {})


@pytest.mark.parametrize("page", sorted({page for page, block in PYTHON if "no-run" not in block.info}))
def test_python_examples_run_in_reading_order(page, quick_start, monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))  # one of the examples adds to it
    monkeypatch.chdir(tmp_path)  # some write files
    run(page, dict(quick_start) if page.startswith("docs/") else {})


def test_quick_start_prints_what_was_kept(capsys):
    run(QUICK_START, {})
    assert "visual tokens from layer" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_names_that_examples_import_exist(page, block):
    for line in re.findall(r"^(?:from|import) .*$", block.code, re.MULTILINE):
        exec(line, {})


@pytest.mark.parametrize("page", PAGES)
def test_json_examples_are_json(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.code)


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in COMMANDS if "transformers-sgl " in line])
def test_commands_parse(page, line):
    """Every command exists and takes these options; nothing is carried out."""
    words = shlex.split(line.partition("transformers-sgl ")[2], comments=True)
    commands = typer.main.get_command(app)
    context = commands.make_context("transformers-sgl", words)
    name, command, rest = commands.resolve_command(context, words)
    with suppress(typer.Exit):  # --help
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_scripts_that_commands_call_exist(page, line):
    for path in re.findall(r"(?:scripts|tests|model_cards)/[\w./-]+", line):
        assert (ROOT / path).exists()


@pytest.mark.parametrize("name", ["run", "test"])
def test_quick_start_commands_are_one_line(name):
    (block,) = (block for block in blocks("README.md") if block.language == "bash" and block.info.strip() == name)
    assert block.code.count("\n") == 1
    assert block.code.startswith("python3 -m venv .venv && .venv/bin/pip install ")


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 190


def test_links_of_the_readme_point_at_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (ROOT / target).exists(), target
