from __future__ import annotations

import re
from pathlib import Path

import pytest

from transformers_sgl.evaluation import methods
from transformers_sgl.evaluation.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\S+)(.*?)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_python_examples_run_in_reading_order(embedded_pair_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))  # one of the examples adds to it
    namespace: dict = {}
    examples = [code for language, info, code in BLOCKS if language == "python" and "no-run" not in info]
    assert len(examples) >= 4
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    assert "visual tokens from layer" in capsys.readouterr().out


@pytest.mark.parametrize("code", [code for language, _, code in BLOCKS if language == "python"])
def test_names_that_examples_import_exist(code):
    for line in re.findall(r"^(?:from|import) .*$", code, re.MULTILINE):
        exec(line, {})


def test_file_tree_names_every_module():
    (tree,) = (code for language, _, code in BLOCKS if language == "text")
    named = set(re.findall(r"^    (\w+\.py|\w+/) ", tree, re.MULTILINE))
    package = ROOT / "transformers_sgl"
    present = {path.name for path in package.glob("*.py")} | {
        f"{path.parent.name}/" for path in package.glob("*/*.py")
    }
    assert named == present - {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("name", ["run", "test"])
def test_quick_start_commands_are_one_line(name):
    (command,) = (code for language, info, code in BLOCKS if language == "bash" and info.strip() == name)
    assert command.count("\n") == 1
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
