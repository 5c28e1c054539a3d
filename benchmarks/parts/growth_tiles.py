"""What a vision tower takes while an image grows: its share of the time, and its peak of memory, alone and guided."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks.memory import measure_memory, measure_memory_within
from benchmarks.parts.pairing import Pairing, sizes, while_in
from benchmarks.parts.profile import vision_tower
from benchmarks.timing import ratio, spread, take_turns
from transformers_sgl.clock import now_ms
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["measure_growth_tiles"]


def measure_growth_tiles(
    points: Iterable[tuple[int, Pairing]],
    settings: dict[str, dict[str, Any]],
    answer_tokens: int = 16,
    rounds: int = 5,
    memory: bool = True,
) -> dict[str, Any]:
    """Measures whole answers of the large model alone and of the pair, for images of more and more tiles.

    Args:
        points (iterable): The number of tiles, and the models with a question about such an image; each is made when
            it is its turn and forgotten after.
        settings (`dict`): By name, the settings with which the pair runs.
        answer_tokens (`int`, defaults to 16): How many tokens are written.
        rounds (`int`, defaults to 5): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: Under `points`, for each the number of tiles (`value`) and under `ways`, for `"large"` and each of the
        settings, `time`, `time_over_large`, `tower_share_of_time` (of the large model's vision tower in the way's own
        time), `memory` and `tower_memory` (the most bytes of tensors at a time while that tower runs, on top of those
        before).
    """
    measured = []
    for value, pairing in points:
        ways = _ways(pairing, settings, answer_tokens)
        measured.append(
            {"value": value, **sizes(pairing.large, pairing.inputs), "ways": _measure(pairing, ways, rounds, memory)}
        )
    return {"answer_tokens": answer_tokens, "points": measured}


def _ways(pairing: Pairing, settings: dict[str, dict[str, Any]], answer_tokens: int) -> dict[str, Callable[[], Any]]:
    ways: dict[str, Callable[[], Any]] = {
        "large": partial(pairing.large.generate, **pairing.inputs, max_new_tokens=answer_tokens)
    }
    never = {"early_exit_threshold": NEVER_EXIT, "score_draft": False, "verify_draft": False}
    for name, chosen in settings.items():
        ways[name] = partial(pairing.guided, max_new_tokens=answer_tokens, **never, **chosen)
    return ways


def _measure(
    pairing: Pairing, ways: dict[str, Callable[[], Any]], rounds: int, memory: bool
) -> dict[str, dict[str, Any]]:
    device, tower = pairing.large.device, vision_tower(pairing.large)
    in_tower: dict[str, list[float]] = {name: [] for name in ways}

    def run(name: str) -> None:
        with while_in(tower, lambda: now_ms(device)) as total:
            ways[name]()
        in_tower[name].append(total[0])

    timings = take_turns({name: partial(run, name) for name in ways}, rounds, device)
    found = {}
    for name, way in ways.items():
        models = [pairing.large] if name == "large" else [pairing.large, pairing.small]
        whole = timings[name].samples
        shares = [part / time for part, time in zip(in_tower[name][-rounds:], whole, strict=True)]
        found[name] = {
            "time": timings[name].to_dict(),
            "time_over_large": ratio(timings[name], timings["large"]),
            "tower_share_of_time": spread(shares),
            "memory": measure_memory(way, *models) if memory else None,
            "tower_memory": measure_memory_within(tower, way, device) if memory else None,
        }
    return found
