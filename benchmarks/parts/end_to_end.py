"""Both models against the large one alone, by preset, and by the share of questions that exit early."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.memory import measure_memory
from benchmarks.parts.pairing import Pairing, kept_by_preset, sizes
from benchmarks.timing import ratio, spread, take_turns
from transformers_sgl.generation_config_sgl import PRESETS
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["EXIT_SHARES", "measure_end_to_end"]

# Shares of questions that the small model answers alone.
EXIT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure_end_to_end(
    pairing: Pairing, answer_tokens: int = 16, rounds: int = 5, memory: bool = True
) -> dict[str, Any]:
    """Measures whole answers of the pair and of the large model alone.

    Drafts are not verified here: random models never agree. At batch size 1 the expected time is linear in the share
    of exits: an exit costs the small model and its scoring, any other question that and the large model as well.

    Args:
        pairing ([`Pairing`]): The models and the question.
        answer_tokens (`int`, defaults to 16): How many tokens either model writes.
        rounds (`int`, defaults to 5): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: The time of `large` alone, of an `exit`, and of the preset "balanced" with guidance by `one_pass` of
        the small model, which writes nothing then; and under `presets`, for each, the time of guidance
        (`guided`), of guidance with a scored draft (`scored`), each with its ratio to large alone, and that ratio at
        each share of exits (`by_exit_share`).
    """
    large = pairing.large
    ways = _ways(pairing, answer_tokens)
    memories = {
        name: measure_memory(way, large, *([] if name == "large" else [pairing.small]))
        for name, way in ways.items()
        if memory and not name.startswith("scored")
    }
    timings = take_turns(ways, rounds, large.device)

    def described(name: str) -> dict[str, Any]:
        return {
            "time": timings[name].to_dict(),
            "time_over_large": ratio(timings[name], timings["large"]),
            "memory": memories.get(name),
        }

    presets = {}
    for name in PRESETS:
        samples = (timings[way].samples for way in (f"scored-{name}", "exit", "large"))
        rounds_of = list(zip(*samples, strict=True))
        presets[name] = {
            **kept_by_preset(large, name),
            "selection": PRESETS[name]["selection"],
            "guided": described(f"guided-{name}"),
            "scored": described(f"scored-{name}"),
            "by_exit_share": {
                f"{share:g}": spread([(share * out + (1 - share) * on) / alone for on, out, alone in rounds_of])
                for share in EXIT_SHARES
            },
        }
    return {
        **sizes(large, pairing.inputs),
        "answer_tokens": answer_tokens,
        "large": described("large"),
        "exit": described("exit"),
        "one_pass": described("one_pass"),
        "presets": presets,
    }


def _ways(pairing: Pairing, answer_tokens: int) -> dict[str, Callable[[], Any]]:
    """By name, the ways to an answer."""
    run = partial(pairing.guided, max_new_tokens=answer_tokens, verify_draft=False)
    ways: dict[str, Callable[[], Any]] = {
        "large": partial(pairing.large.generate, **pairing.inputs, max_new_tokens=answer_tokens),
        "exit": partial(run, early_exit_threshold=0.0),
    }
    for name, preset in PRESETS.items():
        never = {"early_exit_threshold": NEVER_EXIT, **preset}
        ways[f"guided-{name}"] = partial(run, score_draft=False, **never)
        ways[f"scored-{name}"] = partial(run, score_draft=True, return_dict_in_generate=True, **never)
    ways["one_pass"] = partial(run, guidance="prompt", **PRESETS["balanced"])
    return ways
