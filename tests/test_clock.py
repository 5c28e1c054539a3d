from __future__ import annotations

import torch

from transformers_sgl.clock import now_ms


def test_the_clock_counts_milliseconds_and_waits_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert now_ms(torch.device("cpu")) <= now_ms(torch.device("cuda", 0))
    assert waited == [torch.device("cuda", 0)]


def test_several_devices_are_waited_for_once_each(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    now_ms(torch.device("cuda", 0), torch.device("cpu"), torch.device("cuda", 1), torch.device("cuda", 0))
    assert sorted(waited, key=str) == [torch.device("cuda", 0), torch.device("cuda", 1)]
