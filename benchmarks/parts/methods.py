"""All methods side by side: what each takes of the large model alone, in time and in operations.

The pair runs with every preset and with settings of its own; its rivals run at the presets' average retentions.
Everything a method does for a whole answer is in its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.parts.baselines import baselines
from benchmarks.parts.pairing import Pairing, kept_by_preset, sizes
from benchmarks.parts.profile import measure_profile
from benchmarks.timing import Timing, ratio, take_turns
from benchmarks.uncomputed import Uncomputed
from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation.cost import flop_counter
from transformers_sgl.generation_config_sgl import PRESETS, preset_settings
from transformers_sgl.generation_output_sgl import SGLGenerateOutput
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.tokens.tile_retention import TileRetentionProcessor

__all__ = ["AGAIN_SHARE", "EXIT_SHARE", "VISION_SETTINGS", "count_operations", "measure_methods", "pair_settings"]

EXIT_SHARE = 0.5  # the share of questions that exit early, in the figures with exits
# The share of questions that the large model reads again, since it has not confirmed the draft; none of them exits.
AGAIN_SHARE = 0.3
# Settings of the pair that reach the large model's vision tower, by name; its decoder is pruned as by "balanced".
VISION_SETTINGS: dict[str, dict[str, Any]] = {
    "half of the tiles": {"vision_retention_ratio": 0.5},
    "35% of each tile in the tower": {"vision_retention_ratio": 0.35, "vision_prune_layer": 0.2},
    "35% of each of 60% of the tiles": {
        "vision_retention_ratio": 0.35,
        "vision_prune_layer": 0.2,
        "vision_processor": TileRetentionProcessor(0.6),
    },
}

_A_WORD = 7  # a token without a meaning
_LARGE, _EXIT, _SCORED = "large", "exit", ", scored"
_RIGHT, _WRONG = "confirmed: draft right", "confirmed: draft wrong"
_Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class _Method:
    """A row of the comparison: by way, the share of the questions that it answers.

    Attributes:
        kind: `"large"`, `"pair"`, `"exit"` or `"baseline"`.
        shares: Without early exits.
        with_exits: With them; nothing for a method that has none.
    """

    kind: str
    shares: dict[str, float]
    with_exits: dict[str, float] = field(default_factory=dict)


def pair_settings() -> dict[str, dict[str, Any]]:
    """By name, the settings with which the pair runs, apart from the preset "confirmed"."""
    return {**PRESETS, **{name: PRESETS["balanced"] | settings for name, settings in VISION_SETTINGS.items()}}


def measure_methods(
    pairing: Pairing,
    image_size: tuple[int, int] = (896, 1344),
    answer_tokens: int = 16,
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures whole answers of all methods in turn.

    Args:
        pairing ([`Pairing`]): The models and one question.
        image_size (`tuple` of two `int`, defaults to `(896, 1344)`): Width and height of the question's image.
        answer_tokens (`int`, defaults to 16): How many tokens are written.
        rounds (`int`, defaults to 5): How often each way is timed.
        seed (`int`, defaults to 0): What random pruning is drawn from.

    Returns:
        `dict`: Under `methods`, by name, each with its `kind`, `average_retention`, `tower_share` (of the vision
        tower's work on patches), `time` and `time_over_large`. The pair has `time_over_large_with_exits`, too: at
        batch size 1 a share of the questions then takes as long as an exit, and the others as long as an answer whose
        draft is scored. Under `profile` what [`measure_profile`] finds.
    """
    methods, ways = _methods_of(pairing, image_size, answer_tokens, seed)
    num_layers = len(decoder_layers(pairing.large))
    retained = {name: _retained(way(), num_layers) for name, way in ways.items()}  # that each ran once warms up
    timings = take_turns(ways, rounds, pairing.large.device, warmup=0)
    samples = [{name: timing.samples[number] for name, timing in timings.items()} for number in range(rounds)]
    found = _described(methods, retained)
    for name, method in methods.items():
        timing = Timing(tuple(_mixed(method.shares, sample) for sample in samples))
        found[name] |= {"time": timing.to_dict(), "time_over_large": ratio(timing, timings[_LARGE])}
        if method.with_exits:
            timing = Timing(tuple(_mixed(method.with_exits, sample) for sample in samples))
            found[name]["time_over_large_with_exits"] = ratio(timing, timings[_LARGE])
    profiled = (_LARGE, "balanced", *list(VISION_SETTINGS)[-1:], _RIGHT)
    return {
        **sizes(pairing.large, pairing.inputs),
        "answer_tokens": answer_tokens,
        "methods": found,
        "profile": measure_profile(pairing, {name: ways[name] for name in profiled}, rounds),
    }


def count_operations(
    pairing: Pairing, image_size: tuple[int, int] = (896, 1344), answer_tokens: int = 16, seed: int = 0
) -> dict[str, Any]:
    """Counts the floating-point operations of whole answers of all methods, large tensors uncomputed.

    Counting takes a while for each operation, and decoding has many small ones. So answers of one and two tokens are
    counted, and every further token as the second: it attends to few tokens more, which is less than a millionth.

    Args:
        pairing ([`Pairing`]): Models, which may be [`weightless`], and one question.
        image_size (`tuple` of two `int`, defaults to `(896, 1344)`): Width and height of the question's image.
        answer_tokens (`int`, defaults to 16): How many tokens are written.
        seed (`int`, defaults to 0): What random pruning is drawn from.

    Returns:
        `dict`: Under `methods`, by name, each with its `kind`, `average_retention` and `tower_share`, and with `flops`
        and `flops_over_large`, for the pair also `flops_over_large_with_exits`.
    """
    counts: list[dict[str, int]] = []
    retained: dict[str, dict[str, float]] = {}
    for length in (1, 2):
        methods, ways = _methods_of(pairing, image_size, length, seed)
        counts.append({})
        for name, way in ways.items():
            with Uncomputed(), flop_counter() as counter:
                retained[name] = _retained(way(), len(decoder_layers(pairing.large)))
            counts[-1][name] = counter.get_total_flops()
    one, two = counts
    flops = {name: one[name] + (answer_tokens - 1) * (two[name] - one[name]) for name in one}
    found = _described(methods, retained)
    for name, method in methods.items():
        count = _mixed(method.shares, flops)
        found[name] |= {"flops": count, "flops_over_large": count / flops[_LARGE]}
        if method.with_exits:
            found[name]["flops_over_large_with_exits"] = _mixed(method.with_exits, flops) / flops[_LARGE]
    return {**sizes(pairing.large, pairing.inputs), "answer_tokens": answer_tokens, "methods": found}


def _described(methods: dict[str, _Method], retained: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of which kind each method is, and how much of the visual tokens and of the tower's work is left."""
    shares = {
        what: {way: each[what] for way, each in retained.items()} for what in ("average_retention", "tower_share")
    }
    return {
        name: {"kind": method.kind, **{what: _mixed(method.shares, of) for what, of in shares.items()}}
        for name, method in methods.items()
    }


def _mixed(shares: Mapping[str, float], values: Mapping[str, float]) -> float:
    """The mean over the questions of a value that each way has."""
    return sum(share * values[way] for way, share in shares.items())


def _methods_of(
    pairing: Pairing, image_size: tuple[int, int], answer_tokens: int, seed: int
) -> tuple[dict[str, _Method], _Ways]:
    """By name, the methods, and the ways to an answer that they take."""
    run = partial(pairing.guided, max_new_tokens=answer_tokens, verify_draft=False, return_dict_in_generate=True)
    ways: _Ways = {_LARGE: partial(pairing.large.generate, **pairing.inputs, max_new_tokens=answer_tokens)}
    confirmed = preset_settings("confirmed")
    # Random models never agree, unless both write one token again and again.
    right = {"confirmation_threshold": 0.0, "sequence_bias": {(_A_WORD,): 1e4}}
    for name, settings in {**pair_settings(), _RIGHT: confirmed | right, _WRONG: confirmed}.items():
        never = {"early_exit_threshold": NEVER_EXIT, **settings}
        ways |= {
            name: partial(run, score_draft=False, **never),
            name + _SCORED: partial(run, score_draft=True, **never),
        }
    ways[_EXIT] = partial(run, early_exit_threshold=0.0)

    others = 1 - EXIT_SHARE
    methods = {_LARGE: _Method("large", {_LARGE: 1.0})}
    for name in pair_settings():
        methods[name] = _Method("pair", {name: 1.0}, {_EXIT: EXIT_SHARE, name + _SCORED: others})
    methods[f"confirmed, {AGAIN_SHARE:.0%} read again"] = _Method(
        "pair",
        {_RIGHT: 1 - AGAIN_SHARE, _WRONG: AGAIN_SHARE},
        {_EXIT: EXIT_SHARE, _RIGHT + _SCORED: others - AGAIN_SHARE, _WRONG + _SCORED: AGAIN_SHARE},
    )
    methods |= {name: _Method("pair", {name: 1.0}) for name in (_RIGHT, _WRONG)}
    methods[_EXIT] = _Method("exit", {_EXIT: 1.0})
    points = {name: kept_by_preset(pairing.large, name) for name in PRESETS}
    for name, way in baselines(pairing, image_size, points, answer_tokens, seed).items():
        methods[name], ways[name] = _Method("baseline", {name: 1.0}), way
    return methods, ways


def _retained(output: Any, num_layers: int) -> dict[str, float]:
    """How many visual tokens the large model processed, averaged over its layers, and the same of its tower."""
    if isinstance(output, SGLGenerateOutput):
        encodes_all = float(output.exited_early is None or not output.exited_early[0])
        share = encodes_all if output.vision_share is None else float(output.vision_share[0])
        return {"average_retention": float(output.average_retention(num_layers)[0]), "tower_share": share}
    if isinstance(output, dict):
        return output
    return {"average_retention": 1.0, "tower_share": 1.0}
