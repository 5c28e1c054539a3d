"""What the tests of the commands share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def example(embedded_pair_path) -> str:
    return str(embedded_pair_path / "example.png")
