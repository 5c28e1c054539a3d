from __future__ import annotations

import torch

from benchmarks.memory import available_memory, measure_memory_within, measure_working_memory


def test_working_memory_is_the_most_that_tensors_take_at_a_time() -> None:
    held = torch.zeros(2**20)  # which was there before

    def work() -> None:
        first = held + 1  # 4 MiB
        del first
        second = held[: 2**19] + 1  # 2 MiB
        third = second * 2  # 4 MiB together
        del second
        torch.cat([third, third, held])  # 2 and 8 MiB

    assert [measure_working_memory(work) for _ in range(2)] == [10 * 2**20] * 2


class Doubled(torch.nn.Module):
    def forward(self, held: torch.Tensor) -> torch.Tensor:
        return held + held


def test_only_what_a_module_takes_counts() -> None:
    module = Doubled()

    def work() -> None:
        held = torch.zeros(2**20)
        module(held[: 2**18])  # 1 MiB
        module(held[: 2**19])  # 2 MiB
        held.clone()  # 4 MiB

    assert measure_memory_within(module, work) == 2 * 2**20
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_what_is_left() -> None:
    left = available_memory()
    assert left > 2**20
