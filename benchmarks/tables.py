"""What a benchmark tells: tables for people and the README, and a figure.

A time is told as a ratio to another of the same rounds, "median [least, greatest]"; milliseconds stand beside it where
a GPU was measured, and not where a CPU with shrunk models stood in for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["as_markdown", "draw_figure", "make_tables"]

_KIB, _MIB = 2**10, 2**20
_WAYS = {
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
    "answers": "answer tokens",
    "sizes": "billion parameters of the large model",
}


# ------------------------------------------------------------------------------------------------------------- tables


def make_tables(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of all parts that were measured.

    Args:
        record (`dict`): From [`run_benchmark`].

    Returns:
        `dict`: By name a table: `columns`, `rows` and `caption`.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.benchmark_report import make_tables

        >>> make_tables({"arguments": {"device": "cpu"}, "parts": {}})
        {}

        ```
    """
    parts, tables = record["parts"], {}
    for name, table in _TABLES.items():
        if name in parts:
            tables[f"speed-{name}"] = table(record, parts[name])
    for name, joined in (("break-even", _break_even_table), ("growth", _growth_table)):
        found = {part.removeprefix(f"{name}-"): parts[part] for part in parts if part.startswith(f"{name}-")}
        if found:
            tables[f"speed-{name}"] = joined(record, found)
    if "end-to-end" in parts:
        tables["speed-exits"] = _exits_table(record, parts["end-to-end"])
    if "growth-tokens" in parts:
        tables["speed-growth-tokens"] = _growth_tokens_table(record, parts["growth-tokens"])
    return tables


def as_markdown(tables: dict[str, dict[str, Any]]) -> str:
    """The tables one below the other.

    Args:
        tables (`dict`): From [`make_tables`].

    Returns:
        `str`: Markdown.
    """
    return "\n\n".join(_markdown(name, table) for name, table in tables.items())


def _markdown(name: str, table: dict[str, Any]) -> str:
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([f"{name}:", "", *rows, "", f"*{table['caption']}*"])


def _table(columns: Sequence[str | None], rows: Sequence[Sequence[Any]], caption: str) -> dict[str, Any]:
    """A table without the columns that have no name."""
    shown = [index for index, column in enumerate(columns) if column is not None]
    return {
        "columns": [columns[index] for index in shown],
        "rows": [[row[index] for index in shown] for row in rows],
        "caption": caption,
    }


def _startup_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, (what, with_us, without) in _STARTUP.items():
        seconds = part[f"{name}_s"]
        rows.append([what, _spread(part[f"{name}_ratio"]), _spread(seconds[with_us]), _spread(seconds[without])])
    columns = ["what", "time / without this package", _clock(record, "s"), _clock(record, "s without")]
    caption = (
        f"Median [least, greatest] of {part['rounds']} rounds; imports in processes of their own. The pair is the "
        "embedded one, whose weights are small, and is compared with loading its two models one after the other."
    )
    return _table(columns, rows, caption)


def _guidance_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, way in part["ways"].items():
        if "skipped" in way:
            rows.append([_WAYS[name], f"left out: {way['skipped']}", "", "", "", "", ""])
            continue
        memory = way["memory"]
        rows.append(
            [
                _WAYS[name],
                _spread(way["time_over_plain"]),
                _ms(way["time"]),
                _spread(part["decoder_prefill"][name]["time_over_plain"]),
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
    if "published_over_capture" in part:
        over = part["published_over_capture"]
        caption += f"With `output_attentions` it takes {_spread(over['time'])} times as long as when it is watched"
        if over["extra_memory"] is not None:
            caption += f", and {_times(over['extra_memory'])} times the extra memory"
        alone = {name: part["ways"][name]["time_over_plain"]["median"] - 1 for name in ("published", "capture")}
        caption += (
            f" (collecting attention adds {alone['published']:.1%} to the answer alone, or {alone['capture']:.1%})"
        )
        decoders = part["decoder_prefill"]["published"]["time_over_capture"]
        caption += f"; in the decoder's first pass, {_spread(decoders)} times as long. "
    if "importance" in part:
        caption += f"The two maps differ by {part['importance']['relative_difference']:.1g} of their maximum at most. "
    columns = [
        "way",
        "time / alone",
        _clock(record, "ms"),
        "decoder's first pass / alone",
        "working memory, MiB",
        "extra, KiB",
        "peak memory / alone",
    ]
    return _table(columns, rows, caption + _models(record))


def _prefill_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [
            name,
            f"{setting['average_retention']:.0%}",
            *_speed_up(setting["decoder"]),
            _share(setting["decoder"]["kernel_reached"]),
            *_speed_up(setting["whole"]),
        ]
        for name, setting in part["settings"].items()
        if name != "unpruned"
    ]
    columns: list[str | None] = ["preset", "average retention"]
    columns += ["decoder: ideal", "measured", "of the ideal", _clock(record, "ms"), "of the kernels' ideal"]
    columns += ["whole pass: ideal", "measured", "of the ideal", _clock(record, "ms")]
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
    return _table(columns, rows, caption + _models(record))


def _speed_up(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['ideal']:.2f}",
        _spread(found["speed_up"]),
        _share(found["reached"]),
        _ms(found["time"]),
    ]


def _decode_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [
            name,
            f"{setting['average_retention']:.0%}",
            _spread(setting["time_over_unpruned"]),
            _ms(setting["time"]),
            f"{setting['cache_bytes'] / _MIB:.1f}",
            f"{setting['cache_over_unpruned']:.2f}",
        ]
        for name, setting in part["settings"].items()
    ]
    columns = [
        "preset",
        "average retention",
        "time of a token / unpruned",
        _clock(record, "ms"),
        "cache, MiB",
        "cache / unpruned",
    ]
    caption = (
        f"The large model's tokens after the first of {part['answer_tokens']}, behind a prompt of "
        f"{part['prompt_length']:,} tokens, {part['num_visual_tokens']:,} of them visual{_batch(part)}. "
    )
    return _table(columns, rows, caption + _models(record))


def _drafts_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [
            row["answer_tokens"],
            "no draft" if row["acceptance"] is None else f"{row['acceptance']:.0%}",
            row["num_forward_passes"],
            _spread(row["time_over_no_draft"]),
            _ms(row["time"]),
        ]
        for row in part["rows"]
    ]
    columns = [
        "answer tokens",
        "draft tokens right",
        "forward passes",
        "time / no draft",
        _clock(record, "ms"),
    ]
    caption = (
        "The large model answers with a draft in which each token is right with the probability given, pruned to "
        f"{part['average_retention']:.0%}{_batch(part)}; the small model is not in the time. "
    )
    return _table(columns, rows, caption + _models(record))


def _end_to_end_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    ways = {"large model alone": part["large"]}
    ways |= {f"guided, {setting['average_retention']:.0%}": setting["guided"] for setting in part["presets"].values()}
    ways["early exit: small model and its scores"] = part["exit"]
    rows = [
        [
            name,
            _spread(way["time_over_large"]),
            _ms(way["time"]),
            "" if way["memory"] is None else f"{way['memory']['peak_bytes'] / 2**30:.2f}",
        ]
        for name, way in ways.items()
    ]
    columns = ["way", "time / large alone", _clock(record, "ms"), "peak memory, GiB"]
    caption = (
        f"A whole answer of {part['answer_tokens']} tokens to a prompt of {part['prompt_length']:,}, "
        f"{part['num_visual_tokens']:,} of them visual: small model, guidance and large model, against the large one "
        f"alone ({part['attention']}); without drafts. Peak memory is weights and tensors of the models that take "
        "part. "
    )
    return _table(columns, rows, caption + _models(record))


def _exits_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for setting in part["presets"].values():
        share = setting["break_even_share"]
        faster = "never" if share is None else "always" if share == 0 else f"from {share:.0%} on"
        cells = [_spread(found) for found in setting["by_exit_share"].values()]
        rows.append([f"{setting['average_retention']:.0%}", *cells, faster])
    shares = [f"{float(share):.0%} exit" for share in next(iter(part["presets"].values()))["by_exit_share"]]
    caption = (
        "Time over that of the large model alone, by the share of questions that the small model answers alone; all "
        f"drafts are scored. Answers of {part['answer_tokens']} tokens, {part['num_visual_tokens']:,} visual tokens. "
    )
    return _table(["average retention", *shares, "faster than large alone"], rows, caption + _models(record))


def _break_even_table(record: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, what in _SWEEPS.items():
        for series in parts.get(name, {}).get("series", []):
            if series["points"]:
                measured = [f"{_number(p['value'])}: {_spread(p['time_over_large'])}" for p in series["points"]]
                rate = series["acceptance"]
                drafts = "none" if rate is None else f"{rate:.0%} right"
                rows.append([what, drafts, "; ".join(measured), _pays(series["break_even"])])
    caption = (
        "Time of small model, guidance and large model, pruned to 35 %, over that of the large model alone. Where it "
        "crosses 1 is taken on the line between two neighbours; always and never hold for what was measured. "
    )
    return _table(["what grows", "drafts", "time / large alone", "faster"], rows, caption + _models(record))


def _pays(found: dict[str, Any]) -> str:
    if found["at"] is None:
        return str(found["pays"])
    return f"{found['pays']} {_number(found['at'])}"


def _growth_table(record: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, what in _GROWTH.items():
        if not parts.get(name, {}).get("points"):
            continue
        values = [point["value"] for point in parts[name]["points"]]
        for way, laws in parts[name]["power_laws"].items():
            if laws["time"] is not None:
                cells = [_law(laws[cost]) for cost in ("time", "working_memory", "extra_memory")]
                rows.append([f"{what}, {_number(values[0])} to {_number(values[-1])}", _WAYS[way], *cells])
    columns = ["what grows", "way", "time", "working memory", "memory beyond the answer alone"]
    caption = (
        "Exponents of the power laws that fit best, with the number of points: 1 is linear, 2 is quadratic. Where a "
        "way did not fit into memory there is no point; costs that are not above 0 are left out. "
    )
    return _table(columns, rows, caption + _models(record))


def _law(law: dict[str, Any] | None) -> str:
    return "" if law is None else f"{law['exponent']:.2f} ({law['num_points']})"


def _growth_tokens_table(record: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for point in part["points"]:
        capture, over = point["ways"]["capture"], point.get("published_over_capture")
        extra = capture["extra_memory_bytes"]
        rows.append(
            [
                f"{point['num_visual_tokens']:,}",
                _spread(capture["time_over_plain"]),
                "" if extra is None else f"{extra / _KIB:+,.0f}",
                "does not fit" if over is None else _spread(over["time"]),
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
    return _table(columns, rows, f"The small model writes {answer}. {_models(record)}")


_TABLES: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "startup": _startup_table,
    "guidance": _guidance_table,
    "prefill": _prefill_table,
    "decode": _decode_table,
    "drafts": _drafts_table,
    "end-to-end": _end_to_end_table,
}


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['min']:.2f}, {found['max']:.2f}]"


def _share(found: dict[str, float]) -> str:
    return f"{found['median']:.0%} [{found['min']:.0%}, {found['max']:.0%}]"


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 100 else f"{factor:.1f}"


def _ms(timing: dict[str, float]) -> str:
    return f"{timing['median_ms']:.1f} [{timing['min_ms']:.1f}, {timing['max_ms']:.1f}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _batch(part: dict[str, Any]) -> str:
    return f", {part['batch_size']} prompts at once" if part["batch_size"] > 1 else ""


def _is_gpu(record: dict[str, Any]) -> bool:
    return str(record["arguments"]["device"]).startswith("cuda")


def _clock(record: dict[str, Any], name: str) -> str | None:
    return name if _is_gpu(record) else None


def _models(record: dict[str, Any]) -> str:
    """What was measured, as a sentence."""
    arguments = record["arguments"]
    shrunk = f", widths divided by {arguments['shrink']}" if arguments["shrink"] > 1 else ""
    return (
        f"Shapes of {arguments['large']} and {arguments['small']}{shrunk}, random weights in {arguments['dtype']}; "
        f"median [least, greatest] of {arguments['rounds']} rounds ({arguments['sweep_rounds']} at each point of a "
        "sweep), in which all ways take turns."
    )


# ------------------------------------------------------------------------------------------------------------- figure


# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers that tell without colour.
_STYLES = {
    "plain": ("#999999", "v"),
    "capture": ("#0072B2", "o"),
    "published": ("#D55E00", "^"),
    "quality": ("#009E73", "s"),
    "balanced": ("#0072B2", "o"),
    "fast": ("#E69F00", "D"),
}


def draw_figure(record: dict[str, Any], path: Path) -> Any:
    """Speed-up of the prefill, time by the share of exits, and how guidance's time and memory grow.

    Args:
        record (`dict`): From [`run_benchmark`]; parts that were not measured have no panel.
        path (`Path`): The picture; its ending names the format.

    Returns:
        `matplotlib.figure.Figure`: What was drawn; `None` where no part has a panel, and then nothing is written.
    """
    # The objects rather than pyplot, which would keep the figure and choose a window system for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(_panels(record["parts"]))
    if not panels:
        return None
    # One above the other and no wider than a phone shows legibly.
    figure = Figure(figsize=(5.2, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    arguments = record["arguments"]
    title = f"{arguments['large']} guided by {arguments['small']}, random weights"
    if arguments["shrink"] > 1:
        title += f", widths / {arguments['shrink']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)
    return figure


def _panels(parts: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
    """What to draw, one function for each panel."""
    if "prefill" in parts:
        yield lambda axes: _draw_prefill(axes, parts["prefill"])
    if "end-to-end" in parts:
        yield lambda axes: _draw_exits(axes, parts["end-to-end"])
    if parts.get("growth-tokens", {}).get("points"):
        growth = parts["growth-tokens"]
        fewest = growth["points"][0]
        unit = f"answer alone at {fewest['num_visual_tokens']:,} tokens"
        yield lambda axes: _draw_growth(axes, growth, partial(_time_over, fewest["ways"]["plain"]), f"time / {unit}")
        yield lambda axes: _draw_growth(axes, growth, _memory_of, "working memory (MiB)")


def _draw_prefill(axes: Any, part: dict[str, Any]) -> None:
    settings = sorted(part["settings"].values(), key=lambda setting: setting["average_retention"])
    retention = [100 * setting["average_retention"] for setting in settings]
    for of, colour, marker in (("decoder", "#0072B2", "o"), ("whole", "#D55E00", "^")):
        label = "decoder" if of == "decoder" else "whole pass"
        ideal = [setting[of]["ideal"] for setting in settings]
        axes.plot(retention, ideal, color=colour, linestyle=":", label=f"{label}, ideal")
        measured = [setting[of]["speed_up"] for setting in settings]
        medians, errors = _with_errors(measured)
        axes.errorbar(retention, medians, errors, color=colour, marker=marker, capsize=2, label=f"{label}, measured")
    axes.set_xlabel("average retention of visual tokens (%)")
    axes.set_ylabel("speed-up of the first pass")


def _draw_exits(axes: Any, part: dict[str, Any]) -> None:
    for name, setting in part["presets"].items():
        colour, marker = _STYLES[name]
        shares = [100 * float(share) for share in setting["by_exit_share"]]
        medians, errors = _with_errors(list(setting["by_exit_share"].values()))
        label = f"average retention {setting['average_retention']:.0%}"
        axes.errorbar(shares, medians, errors, color=colour, marker=marker, capsize=2, label=label)
    axes.axhline(1, color="#555555", linewidth=1, label="large model alone")
    axes.set_xlabel("questions that exit early (%)")
    axes.set_ylabel("end-to-end time / large alone")
    axes.set_ylim(bottom=0)


def _draw_growth(axes: Any, part: dict[str, Any], cost: Callable[[dict[str, Any]], float | None], name: str) -> None:
    for way in ("plain", "capture", "published"):
        colour, marker = _STYLES[way]
        points = [(point["num_visual_tokens"], cost(point["ways"][way])) for point in part["points"]]
        there = [(number, found) for number, found in points if found]
        if there:
            axes.plot(*zip(*there, strict=True), color=colour, marker=marker, label=_WAYS[way].replace("`", ""))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    numbers = [point["num_visual_tokens"] for point in part["points"]]
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.set_xlabel("visual tokens")
    axes.set_ylabel(name)


def _time_over(unit: dict[str, Any], way: dict[str, Any]) -> float | None:
    return None if "skipped" in way else way["time"]["median_ms"] / unit["time"]["median_ms"]


def _memory_of(way: dict[str, Any]) -> float | None:
    return None if "skipped" in way or way["memory"] is None else way["memory"]["working_bytes"] / _MIB


def _with_errors(found: Sequence[dict[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far least and greatest are from them."""
    medians = [each["median"] for each in found]
    below = [each["median"] - each["min"] for each in found]
    return medians, [below, [each["max"] - each["median"] for each in found]]
