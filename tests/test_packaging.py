"""What setup.cfg, MANIFEST.in and CITATION.cff say, against the tree. `.ci/run` builds and tries the distributions."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import yaml

import transformers_sgl

ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_every_package_is_installed():
    present = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "transformers_sgl").rglob("__init__.py")
    }
    assert set(SETUP["options"]["packages"].split()) == present | {"transformers_sgl.model_cards"}


def test_the_source_distribution_takes_every_folder_that_tests_read():
    grafted = set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert {"benchmarks", "model_cards", "scripts", "tests", "transformers_sgl"} <= grafted
    code = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    read = set(re.findall(r'(?:ROOT|parents\[\d\]) / "(\w+)"', code))
    assert {folder for folder in read if (ROOT / folder).is_dir()} <= grafted


def test_the_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == transformers_sgl.__version__
    assert citation["license"] == SETUP["metadata"]["license"]
    assert [author["name"] for author in citation["authors"]] == [SETUP["metadata"]["author"]]
    paper = citation["preferred-citation"]
    assert paper["url"] in SETUP["metadata"]["project_urls"]
    assert len(paper["authors"]) == 8


def test_pythons_that_are_claimed_are_those_that_are_required():
    (lowest,) = re.findall(r">=3\.(\d+)$", SETUP["options"]["python_requires"])
    claimed = re.findall(r"Programming Language :: Python :: 3\.(\d+)", SETUP["metadata"]["classifiers"])
    assert claimed[0] == lowest
