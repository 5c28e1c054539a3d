"""Fills the tables of README.md and of the model cards from the benchmarks' JSON files.

A place for a table is a pair of comments, and what stands between them belongs to this script:

    <!-- table: NAME -->
    <!-- end table -->

NAME is looked up in `benchmarks/results/*.json`, which benchmark scripts write:

    {"machine": ..., "versions": {...}, "seed": ..., "date": ...,
     "tables": {NAME: {"columns": [...], "rows": [[...]], "caption": "..."}}}

The one table that is not measured, `presets`, is computed from the package. Without arguments the files are written;
with `--check` nothing is written, and the exit code is 1 if a file differs from what the JSON says.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig, resolve_prune_layer

PLACE = re.compile(r"(?P<start><!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end table -->)", re.DOTALL)
NOT_MEASURED = "*Not measured yet.*\n"
PAPER_NUM_LAYERS = 48  # decoder layers of the paper's large model, InternVL2-26B


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which files differ from the JSON")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="folder of the repository")
    arguments = parser.parse_args(argv)

    tables = {"presets": presets_table(), **read_tables(arguments.root / "benchmarks" / "results")}
    for path in arguments.root.glob("model_cards/*/training.json"):
        tables[f"{path.parent.name}-training"] = training_table(json.loads(path.read_text(encoding="utf-8")))
    stale = []
    for path in [arguments.root / "README.md", *sorted(arguments.root.glob("model_cards/*/README.md"))]:
        text = path.read_text(encoding="utf-8")
        rendered = fill(text, tables)
        if rendered != text:
            stale.append(path.relative_to(arguments.root))
            if not arguments.check:
                path.write_text(rendered, encoding="utf-8")

    for path in stale:
        print(f"{path} {'differs from the JSON: run scripts/render_tables.py' if arguments.check else 'written'}")
    return 1 if stale and arguments.check else 0


def read_tables(folder: Path) -> dict[str, str]:
    """Reads every table in a folder of JSON files as Markdown, by name."""
    tables: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, table in record.get("tables", {}).items():
            if name in tables:
                raise ValueError(f"Two benchmarks have a table {name!r}, the second is {path.name}: rename one.")
            where = "; ".join([*_words(record["machine"]), ", ".join(_words(record["versions"]))])
            source = f"{where}; seed {record['seed']}; {record['date']}; `benchmarks/results/{path.name}`"
            tables[name] = _markdown(table["columns"], table["rows"], f"{table['caption']} ({source})")
    return tables


def presets_table() -> str:
    """The presets and what they mean on the paper's large model."""
    rows = []
    for name, preset in PRESETS.items():
        share = SGLGenerationConfig.from_preset(name).average_retention(PAPER_NUM_LAYERS)
        layer = resolve_prune_layer(preset["prune_layer"], PAPER_NUM_LAYERS)
        rows.append([f'`"{name}"`', f"{preset['retention_ratio']:g}", f"{layer}/{PAPER_NUM_LAYERS}", f"{share:.0%}"])
    columns = ["preset", "`retention_ratio`", "`prune_layer`", "average retention"]
    return _markdown(columns, rows, f"Average retention is that of a large model of {PAPER_NUM_LAYERS} layers.")


def training_table(record: dict[str, Any]) -> str:
    """What a pair's training script wrote down about its stages."""
    rows = [
        [
            stage,
            f"{sum(log['pictures'].values()):,}",
            f"{log['questions']:,}" if log["questions"] else "dense labels only",
            round(log["seconds"] / 60),
        ]
        for stage, log in record["stages"].items()
    ]
    versions = ", ".join(_words(record["versions"]))
    caption = f"On {record['machine']}, one core for each stage; {versions}; seed {record['seed']}; {record['date']}; "
    caption += f"`training.json`. {record['note']}"
    return _markdown(["stage", "pictures seen", "questions answered", "minutes"], rows, caption)


def fill(text: str, tables: dict[str, str]) -> str:
    """Puts the tables into their places; a table that no JSON has is said to be unmeasured."""
    return PLACE.sub(lambda place: place["start"] + tables.get(place["name"], NOT_MEASURED) + place["end"], text)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str) -> str:
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    lines = [_line(columns), _line("--:" if right else "---" for right in numeric), *map(_line, rows)]
    return "\n".join([*lines, "", f"*{caption}*", ""])


def _line(cells: Any) -> str:
    # numbers stay as the benchmark rounded them
    return f"| {' | '.join(map(str, cells))} |"


def _words(value: Any) -> list[str]:
    """`{"torch": "2.15"}` as `["torch 2.15"]`, a plain string as itself."""
    return [f"{key} {word}" for key, word in value.items()] if isinstance(value, dict) else [str(value)]


if __name__ == "__main__":
    sys.exit(main())
