"""Where the time of an answer goes: towers, first passes, decoding, and what lies between the models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from benchmarks.parts.pairing import Pairing
from benchmarks.timing import spread
from transformers_sgl.architectures import decoder
from transformers_sgl.clock import now_ms

__all__ = ["PHASES", "measure_profile", "vision_tower", "watched"]

PHASES = (
    "guide: tower",
    "guide: first pass",
    "guide: decoding",
    "between the models",
    "tower",
    "first pass",
    "decoding",
    "rest",
)


def measure_profile(pairing: Pairing, ways: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, Any]:
    """Measures how much of the large model's time alone each phase of each way takes.

    Args:
        pairing ([`Pairing`]): The models.
        ways (mapping to `Callable`): What to run, by name; `"large"` is the large model alone.
        rounds (`int`, defaults to 5): How often each has its turn.

    Returns:
        `dict`: By way, for each of [`PHASES`] and for the `"whole"`, `median`, `min` and `max` of the rounds' ratios
        to the whole time of the large model alone.
    """
    device = pairing.large.device
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            with watched(pairing, lambda: now_ms(device)) as laps:
                start = now_ms(device)
                way()
                whole = now_ms(device) - start
            samples[name].append({**laps, "rest": whole - sum(laps.values()), "whole": whole})
    alone = [sample["whole"] for sample in samples["large"]]
    return {
        name: {
            phase: spread([sample.get(phase, 0.0) / time for sample, time in zip(found, alone, strict=True)])
            for phase in (*PHASES, "whole")
        }
        for name, found in samples.items()
    }


@contextmanager
def watched(pairing: Pairing, read: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Adds up, by phase, how much a reading grows; all but the `"rest"`."""
    laps = dict.fromkeys(PHASES[:-1], 0.0)
    guide_ended: list[float] = []

    def begins(*_: Any) -> None:
        if guide_ended:
            laps["between the models"] += read() - guide_ended[-1]
            guide_ended.clear()

    def ends(*_: Any) -> None:
        guide_ended[:] = [read()]

    with ExitStack() as stack:
        for model, prefix in ((pairing.small, "guide: "), (pairing.large, "")):
            _watch(stack, vision_tower(model), read, laps, (f"{prefix}tower",))
            _watch(stack, decoder(model), read, laps, (f"{prefix}first pass", f"{prefix}decoding"))
        stack.callback(pairing.small.register_forward_hook(ends).remove)
        for module in (pairing.large, vision_tower(pairing.large)):  # newer versions encode images before the rest
            stack.callback(module.register_forward_pre_hook(begins, prepend=True).remove)
        yield laps


def _watch(
    stack: ExitStack, module: nn.Module, read: Callable[[], float], laps: dict[str, float], phases: tuple[str, ...]
) -> None:
    """Adds what a reading grows by during a module's calls to the first phase, or to the last for single tokens."""
    started: list[tuple[str, float]] = []

    def begins(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        is_step = embeddings is not None and embeddings.shape[1] == 1
        started.append((phases[-1 if is_step else 0], read()))

    def ends(*_: Any) -> None:
        name, start = started.pop()
        laps[name] += read() - start

    stack.callback(module.register_forward_pre_hook(begins, prepend=True, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(ends).remove)


def vision_tower(model: PreTrainedModel) -> nn.Module:
    """The vision encoder of a model."""
    inner: Any = model.model
    return inner.vision_tower if hasattr(inner, "vision_tower") else inner.visual
