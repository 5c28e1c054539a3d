"""All methods side by side: what each takes of the large model alone, in time and in operations.

The pair runs with every preset and with settings of its own; its rivals run at the presets' average retentions.
Everything a method does for a whole answer is in its figures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from benchmarks.parts.baselines import baselines
from benchmarks.parts.pairing import Pairing, kept_by_preset, sizes
from benchmarks.parts.profile import measure_profile
from benchmarks.timing import Timing, ratio, spread, take_turns
from benchmarks.uncomputed import Uncomputed
from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation.cost import flop_counter
from transformers_sgl.generation_config_sgl import PRESETS
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.tokens.tile_retention import TileRetentionProcessor

__all__ = ["EXIT_SHARE", "VISION_SETTINGS", "measure_methods", "pair_settings"]

EXIT_SHARE = 0.5  # the share of questions that exit early, in the figures with exits
# Settings of the pair that reach the large model's vision tower, by name; its decoder is pruned as by "balanced".
VISION_SETTINGS: dict[str, dict[str, Any]] = {
    "half of the tiles": {"vision_retention_ratio": 0.5},
    "half of each tile in the tower": {"vision_retention_ratio": 0.5, "vision_prune_layer": 0.2},
    "35% of each tile in the tower": {"vision_retention_ratio": 0.35, "vision_prune_layer": 0.2},
    "35% of each of 60% of the tiles": {
        "vision_retention_ratio": 0.35,
        "vision_prune_layer": 0.2,
        "vision_processor": TileRetentionProcessor(0.6),
    },
}

_COUNTED = 3  # lengths of answers for which operations are counted
_LARGE, _EXIT, _SCORED = "large", "exit", ", scored"
_Ways = dict[str, Callable[[], Any]]


def pair_settings() -> dict[str, dict[str, Any]]:
    """By name, the settings with which the pair runs."""
    return {**PRESETS, **{name: PRESETS["balanced"] | settings for name, settings in VISION_SETTINGS.items()}}


def measure_methods(
    pairing: Pairing,
    whole: Pairing | None = None,
    image_size: tuple[int, int] = (896, 1344),
    answer_tokens: int = 16,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures whole answers of all methods in turn, and counts their operations.

    Args:
        pairing ([`Pairing`]): The models and one question.
        whole ([`Pairing`], *optional*): Weightless models of the unshrunk shapes and the same question, for their
            operations.
        image_size (`tuple` of two `int`, defaults to `(896, 1344)`): Width and height of the question's image.
        answer_tokens (`int`, defaults to 16): How many tokens are written.
        rounds (`int`, defaults to 5): How often each way is timed.
        seed (`int`, defaults to 0): What random pruning is drawn from.

    Returns:
        `dict`: Under `methods`, by name, each with its `kind`, `average_retention`, `tower_share` (of the vision
        tower's work on patches), `time`, `time_over_large`, `flops` and `flops_over_large`, with `whole` also
        `whole_flops` and their ratio. The pair has the ratios `with_exits`, too: at batch size 1 half of the questions
        then take as long as an exit, and the others as the pair with a scored draft. Under `profile` what
        [`measure_profile`] finds.
    """
    kinds, ways = _ways_of(pairing, image_size, answer_tokens, seed)
    counts, outputs = _count(pairing, image_size, answer_tokens, seed, nullcontext)  # that each ran once warms up
    retained = {name: _retained(output, len(decoder_layers(pairing.large))) for name, output in outputs.items()}
    flops = {"flops": counts}
    if whole is not None:
        flops["whole_flops"], _ = _count(whole, image_size, answer_tokens, seed, Uncomputed)
    timings = take_turns(ways, rounds, pairing.large.device, warmup=0)
    methods: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        methods[name] = {
            "kind": kind,
            **retained[name],
            "time": timings[name].to_dict(),
            "time_over_large": ratio(timings[name], timings[_LARGE]),
        }
        for what, counts in flops.items():
            methods[name] |= {what: counts[name], f"{what}_over_large": counts[name] / counts[_LARGE]}
        if kind == "pair":
            methods[name]["with_exits"] = _with_exits(name, timings, flops)
    profiled = [_LARGE, "balanced", *list(VISION_SETTINGS)[-1:]]
    return {
        **sizes(pairing.large, pairing.inputs),
        "answer_tokens": answer_tokens,
        "methods": methods,
        "profile": measure_profile(pairing, {name: ways[name] for name in profiled}, rounds),
    }


def _ways_of(
    pairing: Pairing, image_size: tuple[int, int], answer_tokens: int, seed: int
) -> tuple[dict[str, str], _Ways]:
    """By name, what kind of method it is; and the ways to an answer, those with a scored draft among them."""
    run = partial(pairing.guided, max_new_tokens=answer_tokens, verify_draft=False, return_dict_in_generate=True)
    ways: _Ways = {_LARGE: partial(pairing.large.generate, **pairing.inputs, max_new_tokens=answer_tokens)}
    kinds = {_LARGE: "large", **dict.fromkeys(pair_settings(), "pair"), _EXIT: "exit"}
    for name, settings in pair_settings().items():
        never = {"early_exit_threshold": NEVER_EXIT, **settings}
        ways |= {
            name: partial(run, score_draft=False, **never),
            name + _SCORED: partial(run, score_draft=True, **never),
        }
    ways[_EXIT] = partial(run, early_exit_threshold=0.0)
    points = [kept_by_preset(pairing.large, name) for name in PRESETS]
    for name, way in baselines(pairing, image_size, points, answer_tokens, seed).items():
        kinds[name], ways[name] = "baseline", way
    return kinds, ways


def _retained(output: Any, num_layers: int) -> dict[str, float]:
    """How many visual tokens the large model processed, averaged over its layers, and the same of its tower."""
    if isinstance(output, SGLGenerateOutput):
        encodes_all = float(output.exited_early is None or not output.exited_early[0])
        share = encodes_all if output.vision_share is None else float(output.vision_share[0])
        return {"average_retention": float(output.average_retention(num_layers)[0]), "tower_share": share}
    if isinstance(output, dict):
        return output
    return {"average_retention": 1.0, "tower_share": 1.0}


def _count(
    pairing: Pairing,
    image_size: tuple[int, int],
    answer_tokens: int,
    seed: int,
    within: Callable[[], AbstractContextManager[Any]],
) -> tuple[dict[str, int], dict[str, Any]]:
    """By way, its floating-point operations, and what it returned for a shorter answer.

    Counting takes a while for each operation, and decoding has many small ones. A token attends to one more than the
    token before, so the operations are a quadratic function of the answer's length, which three lengths give.
    """
    counts: dict[str, list[int]] = {}
    outputs: dict[str, Any] = {}
    for length in range(1, _COUNTED + 1) if answer_tokens > _COUNTED else [answer_tokens]:
        for name, way in _ways_of(pairing, image_size, length, seed)[1].items():
            with within(), flop_counter() as counter:
                outputs[name] = way()
            counts.setdefault(name, []).append(counter.get_total_flops())
    return {name: _at_length(answer_tokens, found) for name, found in counts.items()}, outputs


def _at_length(answer_tokens: int, counts: list[int]) -> int:
    """The value of the quadratic function with these values at 1, 2 and 3; a single value is the one asked for."""
    if len(counts) == 1:
        return counts[0]
    steps, (first, second, third) = answer_tokens - 1, counts
    return first + steps * (second - first) + steps * (steps - 1) // 2 * (third - 2 * second + first)


def _with_exits(name: str, timings: dict[str, Timing], flops: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Ratios to the large model alone where a share of the questions exits early."""

    def mixed(of: dict[str, Any]) -> float:
        return float((EXIT_SHARE * of[_EXIT] + (1 - EXIT_SHARE) * of[name + _SCORED]) / of[_LARGE])

    samples = {way: timings[way].samples for way in (_EXIT, name + _SCORED, _LARGE)}
    rounds = [dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)]
    found: dict[str, Any] = {"time_over_large": spread([mixed(each) for each in rounds])}
    return found | {f"{what}_over_large": mixed(counts) for what, counts in flops.items()}
