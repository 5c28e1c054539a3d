"""Fetches transformers' own tests of the installed version, for `tests/test_model_tester_mixin.py`.

    python scripts/fetch_transformers_tests.py [FOLDER]

Puts them into FOLDER, or else where that test looks for them: in the user's cache. They are in transformers' source
distribution, which pip finds as it is configured to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def folder_of_tests(base: str | None = None) -> Path:
    """Where the tests of the installed version are, or would be: below `base`, or else in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(base) if base else Path(cache) / "transformers_sgl"
    return root / f"transformers-{version('transformers')}" / "tests"


def fetch(base: str | None = None) -> Path:
    """Downloads and unpacks them, unless they are there."""
    folder = folder_of_tests(base)
    if folder.is_dir():
        return folder
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as work:
        release = f"transformers=={version('transformers')}"
        options = ["--no-deps", "--no-binary", "transformers", "--dest", work, "--quiet"]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, release], check=True)
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            # Every member begins with the name of the release, as the folder here does.
            wanted = [each for each in source.getmembers() if each.name.split("/")[1:2] == ["tests"]]
            # Python 3.11.3 and older have no filters; the index that pip trusts is trusted here, too.
            filters = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            source.extractall(work, members=wanted, **filters)
        folder.parent.mkdir(exist_ok=True)
        shutil.move(Path(work) / folder.parent.name / "tests", folder)
    return folder


if __name__ == "__main__":
    print(fetch(*sys.argv[1:2]))
