"""What a benchmark tells, as tables for people and the documentation.

A time is told as a ratio to another of the same rounds, "median [least, greatest]"; milliseconds stand beside it where
a GPU was measured, and not where a CPU with shrunk models stood in for one. A figure of fewer than five rounds has no
interval, and takes part in no verdict; with one or two rounds it is left out. Counts (memory, forward passes) do not
depend on the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cells import FEWEST_FOR_MEDIAN, Shown, Table, as_table
from benchmarks.draft_tables import answers_table, passes_table, rounds_table
from benchmarks.method_tables import growth_tiles_table, methods_table, profile_table
from benchmarks.verdicts import FEWEST_ROUNDS, verdict

__all__ = ["WAYS", "as_markdown", "make_tables"]

_KIB, _MIB = 2**10, 2**20
WAYS = {
    "plain": "answer alone",
    "capture": "watched by `AttentionRecorder`",
    "published": "`output_attentions`, decoder eager",
    "published_whole": "`output_attentions`, all eager",
}
# What is measured, and its seconds with this package and without it.
_STARTUP = {
    "import": ("`import transformers`", "transformers and transformers_sgl", "transformers"),
    "auto_class": ("the same, and its Auto class", "transformers and transformers_sgl", "transformers"),
    "load": ("`from_pretrained`", "pair", "two models"),
}
_GROWTH = {"tokens": "visual tokens", "batches": "batch size", "answers": "answer tokens"}
_SWEEPS = {
    "tokens": "visual tokens",
    "sizes": "billion parameters of the large model",
}


def make_tables(record: dict[str, Any]) -> dict[str, Table]:
    """The tables of all parts that were measured, by name: `columns`, `rows` and `caption`; none without rows.

    The names of those that a GPU was measured for begin with `"speed-gpu-"`, of others with `"speed-"`.

    Example:
        ```python
        >>> from benchmarks.tables import make_tables

        >>> make_tables({"arguments": {"device": "cpu", "rounds": 5, "sweep_rounds": 5}, "parts": {}})
        {}

        ```
    """
    parts, arguments = record["parts"], record["arguments"]
    shown, shown_in_sweeps = (Shown(arguments, arguments[rounds]) for rounds in ("rounds", "sweep_rounds"))
    tables = {}
    for name, table in _TABLES.items():
        if name in parts:
            tables[name] = table(shown, parts[name])
    for name, table in _TABLES_OF_SWEEPS.items():
        if name in parts:
            tables[name] = table(shown_in_sweeps, parts[name])
    for name, joined in (("break-even", _break_even_table), ("growth", _growth_table)):
        found = {part.removeprefix(f"{name}-"): parts[part] for part in parts if part.startswith(f"{name}-")}
        if name == "break-even":
            found.pop("answers", None)  # which has a table of its own
        if found:
            tables[name] = joined(shown_in_sweeps, found)
    in_rounds = [part for name, part in parts.items() if name.startswith("rounds-") and part["rows"]]
    if in_rounds:
        tables["rounds"] = rounds_table(shown_in_sweeps, in_rounds)
    if "end-to-end" in parts:
        tables["exits"] = _exits_table(shown, parts["end-to-end"])
    if "methods" in parts or "methods-flops" in parts:
        tables["methods"] = methods_table(shown, parts.get("methods"), parts.get("methods-flops"))
    if "methods" in parts:
        tables["profile"] = profile_table(shown, parts["methods"])
    kind = "speed-gpu" if shown.of_gpu else "speed"
    return {f"{kind}-{name}": table for name, table in tables.items() if table["rows"]}


def as_markdown(tables: dict[str, Table]) -> str:
    """The tables one below the other."""
    return "\n\n".join(_markdown(name, table) for name, table in tables.items())


def _markdown(name: str, table: Table) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([f"{name}:", "", *rows, "", f"*{table['caption']}*"])


# -------------------------------------------------------------------------------------------------------------- cells


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.1f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _batch(part: dict[str, Any]) -> str:
    return f", {part['batch_size']} prompts at once" if part["batch_size"] > 1 else ""


# ------------------------------------------------------------------------------------------------------------- tables


def _startup_table(shown: Shown, part: dict[str, Any]) -> Table:
    shown = Shown(shown.arguments, part["rounds"])
    rows = []
    for name, (what, with_us, without) in _STARTUP.items():
        seconds = part[f"{name}_s"]
        cells = (part[f"{name}_ratio"], seconds[with_us], seconds[without])
        rows.append([what, *map(shown.spread, cells)])
    columns = ["what", "time / without this package", shown.clock("s"), shown.clock("s without")]
    if shown.rounds < FEWEST_FOR_MEDIAN:
        rows = []
    often = shown.how_often()
    caption = (
        f"{often[0].upper()}{often[1:]}; imports in processes of their own. The pair is the embedded one, whose "
        "weights are small, and is compared with loading its two models one after the other."
    )
    return as_table(columns, rows, caption)


def _guidance_table(shown: Shown, part: dict[str, Any]) -> Table:
    rows = []
    for name, way in part["ways"].items():
        if "skipped" in way:
            rows.append([WAYS[name], f"left out: {way['skipped']}", "", "", "", "", ""])
            continue
        memory = way["memory"]
        rows.append(
            [
                WAYS[name],
                shown.spread(way["time_over_plain"]),
                shown.ms(way["time"]),
                shown.spread(part["decoder_prefill"][name]["time_over_plain"]),
                "" if memory is None else f"{memory['working_bytes'] / _MIB:.1f}",
                "" if memory is None or name == "plain" else f"{way['extra_memory_bytes'] / _KIB:+,.0f}",
                "" if memory is None else f"{way['peak_over_plain']:.3f}",
            ]
        )
    caption = (
        f"The small model reads {part['prompt_length']:,} tokens, {part['num_visual_tokens']:,} of them visual, and "
        f"writes {part['answer_tokens']}{_batch(part)}. Working memory is that of all tensors but the weights; the "
        "peak is both together. "
    )
    over = part.get("published_over_capture")
    if over is not None and shown.spread(over["time"]):
        caption += (
            f"With `output_attentions` it takes {shown.spread(over['time'])} times as long as when it is watched"
        )
        if over["extra_memory"] is not None:
            caption += f", and {_times(over['extra_memory'])} times the extra memory"
        decoders = part["decoder_prefill"]["published"]["time_over_capture"]
        caption += f"; in the decoder's first pass, {shown.spread(decoders)} times as long. "
    if "importance" in part:
        caption += f"The two maps differ by {part['importance']['relative_difference']:.1g} of their maximum at most. "
    columns = [
        "way",
        "time / alone",
        shown.clock("ms"),
        "decoder's first pass / alone",
        "working memory, MiB",
        "extra, KiB",
        "peak memory / alone",
    ]
    return as_table(columns, rows, caption + shown.conditions())


def _prefill_table(shown: Shown, part: dict[str, Any]) -> Table:
    def speed_up(found: dict[str, Any]) -> list[str]:
        cells = [shown.spread(found["speed_up"]), shown.spread(found["reached"], ".0%"), shown.ms(found["time"])]
        return [f"{found['ideal']:.2f}", *cells]

    rows = [
        [
            name,
            f"{setting['average_retention']:.0%}",
            *speed_up(setting["decoder"]),
            shown.spread(setting["decoder"]["kernel_reached"], ".0%"),
            *speed_up(setting["whole"]),
        ]
        for name, setting in part["settings"].items()
        if name != "unpruned"
    ]
    columns: list[str | None] = ["preset", "average retention"]
    columns += ["decoder: ideal", "measured", "of the ideal", shown.clock("ms"), "of the kernels' ideal"]
    columns += ["whole pass: ideal", "measured", "of the ideal", shown.clock("ms")]
    unpruned = part["settings"]["unpruned"]
    caption = (
        f"Speed-up of the large model's first pass over {part['prompt_length']:,} tokens, "
        f"{part['num_visual_tokens']:,} of them visual{_batch(part)}, against the unpruned pass; the ideal is "
        "the ratio of the floating-point operations. The kernels' ideal is what the stock decoder takes on prompts "
        "that have only the kept tokens, for the layers that see only these: products of few rows are less "
        "efficient. The decoder has "
        f"{unpruned['decoder']['flops'] / unpruned['whole']['flops']:.0%} of the unpruned pass's operations; the "
        "vision encoder has most of the others, which pruning leaves. "
    )
    return as_table(columns, rows, caption + shown.conditions())


def _decode_table(shown: Shown, part: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            f"{setting['average_retention']:.0%}",
            shown.spread(setting["time_over_unpruned"]),
            shown.ms(setting["time"]),
            f"{setting['cache_bytes'] / _MIB:.1f}",
            f"{setting['cache_over_unpruned']:.2f}",
        ]
        for name, setting in part["settings"].items()
    ]
    columns = [
        "preset",
        "average retention",
        "time of a token / unpruned",
        shown.clock("ms"),
        "cache, MiB",
        "cache / unpruned",
    ]
    caption = (
        f"The large model's tokens after the first of {part['answer_tokens']}, behind a prompt of "
        f"{part['prompt_length']:,} tokens, {part['num_visual_tokens']:,} of them visual{_batch(part)}. "
    )
    return as_table(columns, rows, caption + shown.conditions())


def _drafts_table(shown: Shown, part: dict[str, Any]) -> Table:
    rows = [
        [
            row["answer_tokens"],
            "no draft" if row["acceptance"] is None else f"{row['acceptance']:.0%}",
            row["num_forward_passes"],
            shown.spread(row["time_over_no_draft"]),
            shown.ms(row["time"]),
        ]
        for row in part["rows"]
    ]
    columns = ["answer tokens", "draft tokens right", "forward passes", "time / no draft", shown.clock("ms")]
    caption = (
        "The large model answers with a draft in which each token is right with the probability given, pruned to "
        f"{part['average_retention']:.0%}{_batch(part)}; the small model is not in the time. "
    )
    return as_table(columns, rows, caption + shown.conditions())


def _end_to_end_table(shown: Shown, part: dict[str, Any]) -> Table:
    ways = {"large model alone": part["large"]}
    presets = {f"{setting['average_retention']:.0%}": setting for setting in part["presets"].values()}
    ways |= {f"guided, {share}": setting["guided"] for share, setting in presets.items()}
    if "one_pass" in part:
        ways["guided, 35%, by one pass of the small model"] = part["one_pass"]
    ways["early exit: small model and its scores"] = part["exit"]
    rows = [
        [
            name,
            shown.spread(way["time_over_large"]),
            shown.ms(way["time"]),
            "" if way["memory"] is None else f"{way['memory']['peak_bytes'] / 2**30:.2f}",
        ]
        for name, way in ways.items()
    ]
    columns = ["way", "time / large alone", shown.clock("ms"), "peak memory, GiB"]
    caption = (
        f"A whole answer of {part['answer_tokens']} tokens to a prompt of {part['prompt_length']:,}, "
        f"{part['num_visual_tokens']:,} of them visual: small model, guidance and large model, against the large one "
        f"alone ({part['attention']}); without drafts. Peak memory is weights and tensors of the models that take "
        f"part. Kept: {'; '.join(f'for {share} {_kept(setting)}' for share, setting in presets.items())}. "
    )
    return as_table(columns, rows, caption + shown.conditions())


def _kept(setting: dict[str, Any]) -> str:
    """Which tokens a preset keeps, in words; records of before there was a choice do not name it."""
    selection = f"by `{setting.get('selection', 'top_k')}`"
    return f"{setting['retention_ratio']:.0%} from layer {setting['prune_layer']} on, {selection}"


def _selection_table(shown: Shown, part: dict[str, Any]) -> Table:
    rows = [
        [name, f"{found['kept']:,}", shown.spread(found["time_over_prefill"], ".2%"), shown.ms(found["time"])]
        for name, ratios in part["selections"].items()
        for found in ratios
    ]
    caption = (
        f"What choosing takes of {part['num_visual_tokens']:,} visual tokens, beside the large model's first pass "
        f"over the prompt of {part['prompt_length']:,}. "
    )
    if shown.rounds < FEWEST_FOR_MEDIAN:
        rows = []
    columns = ["selection", "kept", "time / first pass", shown.clock("ms")]
    return as_table(columns, rows, caption + shown.conditions())


def _exits_table(shown: Shown, part: dict[str, Any]) -> Table:
    shares = list(next(iter(part["presets"].values()))["by_exit_share"])
    rows = []
    for setting in part["presets"].values():
        found = setting["by_exit_share"]
        points = [(float(share), found[share]) for share in shares]
        cells = [f"{setting['average_retention']:.0%}", *(shown.spread(found[share]) for share in shares)]
        rows.append([*cells, verdict(points, shown.rounds, "{:.0%}".format)])
    caption = (
        "Time over that of the large model alone, by the share of questions that the small model answers alone; all "
        f"drafts are scored. Answers of {part['answer_tokens']} tokens, {part['num_visual_tokens']:,} visual tokens. "
    )
    if shown.rounds < FEWEST_FOR_MEDIAN:
        rows = []
    columns = ["average retention", *(f"{float(share):.0%} exit" for share in shares), "faster than large alone"]
    return as_table(columns, rows, caption + shown.conditions())


def _break_even_table(shown: Shown, parts: dict[str, Any]) -> Table:
    rows = []
    for what, series in [
        (what, each) for name, what in _SWEEPS.items() for each in parts.get(name, {"series": []})["series"]
    ]:
        if series["points"] and shown.rounds >= FEWEST_FOR_MEDIAN:
            points = [(point["value"], point["time_over_large"]) for point in series["points"]]
            measured = "; ".join(f"{_number(value)}: {shown.spread(ratio)}" for value, ratio in points)
            rows.append([what, measured, verdict(points, shown.rounds, _number)])
    caption = (
        "Time of small model, guidance and large model, pruned to 35 % and without drafts, over that of the large "
        "model alone. "
    )
    if shown.rounds >= FEWEST_ROUNDS:
        caption += (
            "Always and never hold for what was measured; where an interval contains 1, it is not clear. A crossing "
            "between a point that is slower and one that is faster is taken on the line between their medians. "
        )
    return as_table(["what grows", "time / large alone", "faster"], rows, caption + shown.conditions())


def _growth_table(shown: Shown, parts: dict[str, Any]) -> Table:
    rows = []
    for name, what in _GROWTH.items():
        if not parts.get(name, {}).get("points"):
            continue
        values = [point["value"] for point in parts[name]["points"]]
        for way, laws in parts[name]["power_laws"].items():
            if laws["time"] is not None:
                time = _law(laws["time"]) if shown.rounds >= FEWEST_ROUNDS else ""
                cells = [time, _law(laws["working_memory"]), _law(laws["extra_memory"])]
                rows.append([f"{what}, {_number(values[0])} to {_number(values[-1])}", WAYS[way], *cells])
    columns = ["what grows", "way", "time", "working memory", "memory beyond the answer alone"]
    caption = (
        "Exponents of the power laws that fit best, with the number of points: 1 is linear, 2 is quadratic. Where a "
        "way did not fit into memory there is no point; costs that are not above 0 are left out. "
    )
    return as_table(columns, rows, caption + shown.conditions())


def _law(law: dict[str, Any] | None) -> str:
    return "" if law is None else f"{law['exponent']:.2f} ({law['num_points']})"


def _growth_tokens_table(shown: Shown, part: dict[str, Any]) -> Table:
    rows = []
    for point in part["points"]:
        capture, over = point["ways"]["capture"], point.get("published_over_capture")
        extra = capture["extra_memory_bytes"]
        rows.append(
            [
                f"{point['num_visual_tokens']:,}",
                shown.spread(capture["time_over_plain"]),
                "" if extra is None else f"{extra / _KIB:+,.0f}",
                "does not fit" if over is None else shown.spread(over["time"]),
                "" if over is None or over["extra_memory"] is None else _times(over["extra_memory"]),
            ]
        )
    columns = [
        "visual tokens",
        "watched: time / alone",
        "extra, KiB",
        "`output_attentions`: time / watched",
        "extra memory / watched",
    ]
    answer = f"{part['points'][0]['answer_tokens']} tokens" if part["points"] else "some tokens"
    return as_table(columns, rows, f"The small model writes {answer}. {shown.conditions()}")


_TABLES: dict[str, Callable[[Shown, dict[str, Any]], Table]] = {
    "startup": _startup_table,
    "guidance": _guidance_table,
    "prefill": _prefill_table,
    "decode": _decode_table,
    "end-to-end": _end_to_end_table,
}
_TABLES_OF_SWEEPS: dict[str, Callable[[Shown, dict[str, Any]], Table]] = {
    "drafts": _drafts_table,
    "passes": passes_table,
    "break-even-answers": answers_table,
    "selection": _selection_table,
    "growth-tiles": growth_tiles_table,
    "growth-tokens": _growth_tokens_table,
}
