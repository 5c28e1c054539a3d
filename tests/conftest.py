"""What every test shares: no network, the embedded pair, and the markers' rules."""

from __future__ import annotations

import os

# Before transformers is imported anywhere: no test may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from threads, and lose much where several runs share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

from transformers_sgl.hub import embedded_pair


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where there is no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def embedded_pair_path() -> Path:
    """The folder of the embedded pair: `config.json`, `large/`, `small/` and the processors."""
    return embedded_pair()
