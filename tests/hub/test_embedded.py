from __future__ import annotations

import pytest

from transformers_sgl.hub import embedded, embedded_pair


def test_embedded_pair_is_a_bundle_of_two_models(embedded_pair_path):
    assert (embedded_pair_path / "config.json").is_file()
    for part in ("large", "small"):
        assert (embedded_pair_path / part / "config.json").is_file()
        assert (embedded_pair_path / part / "model.safetensors").is_file()


def test_a_missing_bundle_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "files", lambda package: tmp_path / package)
    with pytest.raises(OSError, match="Reinstall transformers_sgl"):
        embedded_pair()
