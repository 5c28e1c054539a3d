"""What every test shares: no network, the embedded pair, and the markers' rules."""

from __future__ import annotations

import os

# Before transformers is imported anywhere: no test may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and lose much where several runs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from transformers_sgl.hub import embedded_pair

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device."""
    import torch

    if torch.cuda.is_available():
        # What a GPU writes is compared with what the CPU does: convolutions in TF32 would be too far off.
        torch.backends.cudnn.allow_tf32 = False
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def embedded_pair_path() -> Path:
    """The folder of the embedded pair: `config.json`, `large/`, `small/` and the processors."""
    return embedded_pair()


@pytest.fixture(scope="module")
def pair(embedded_pair_path: Path) -> Any:
    """The embedded pair, loaded for one file of tests."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(embedded_pair_path)


@pytest.fixture(scope="module")
def processor(embedded_pair_path: Path) -> Any:
    """Its processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(embedded_pair_path)


@pytest.fixture(scope="session")
def example(embedded_pair_path: Path) -> str:
    """The picture that the embedded pair brings along, as a command takes it."""
    return str(embedded_pair_path / "example.png")


@pytest.fixture(scope="session")
def regridded_pair_path(embedded_pair_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pair with another small processor, which cuts images into tiles of 9x9 tokens instead of 8x8."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("regridded")
    shutil.copytree(embedded_pair_path, folder, dirs_exist_ok=True)
    small = AutoProcessor.from_pretrained(folder / "small")
    small.image_processor.size = {"height": 72, "width": 72}
    small.image_seq_length = 81
    small.save_pretrained(folder / "small")
    return folder
