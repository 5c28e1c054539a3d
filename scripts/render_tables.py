"""Fills the tables of README.md, docs/ and the model cards from the benchmarks' JSON files.

A place for a table is a pair of comments, and what stands between them belongs to this script:

    <!-- table: NAME -->
    <!-- end table -->

NAME is looked up in the JSON files of [`RESULTS`], which benchmark scripts write:

    {"machine": ..., "versions": {...}, "seed": ..., "date": ...,
     "tables": {NAME: {"columns": [...], "rows": [[...]], "caption": "..."}}}

Where a file has a place `<!-- sources -->` ... `<!-- end sources -->`, machine, versions, seed and date of its tables
are named there, once; else every caption names them. Two tables are computed: `presets` from the package, and
`presets-measured` from several results. Pictures that go with results are copied to `docs/pictures/`.

Without arguments the files are written; with `--check` nothing is written, and the exit code is 1 if a file differs
from what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_sgl.generation_config_sgl import PRESETS, SGLGenerationConfig, resolve_prune_layer

RESULTS = "benchmarks/results"  # the folder of the JSON files, from the repository's root
PICTURES = (f"{RESULTS}/*.png", "model_cards/*/methods-*.png")

PLACE = re.compile(r"(?P<start><!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end table -->)", re.DOTALL)
SOURCES = re.compile(r"(?P<start><!-- sources -->\n)(?P<body>.*?)(?P<end><!-- end sources -->)", re.DOTALL)
NOT_MEASURED = "*Not measured yet.*\n"
PAPER_NUM_LAYERS = 48  # decoder layers of the paper's large model, InternVL2-26B
EMBEDDED_NUM_LAYERS = 10  # of the embedded pair's large model


@dataclass(frozen=True)
class Table:
    """A table, and where its figures come from.

    Attributes:
        columns: The names of the columns.
        rows: The cells, as Markdown or numbers.
        caption: What is shown.
        measured: Machine, versions, seed and date, in words; none for a table that nobody measured.
        files: The files that hold the figures.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str
    measured: str = ""
    files: tuple[str, ...] = ()

    def to_markdown(self, with_source: bool) -> str:
        """The table with its caption below it."""
        numeric = [all(isinstance(row[i], (int, float)) for row in self.rows) for i in range(len(self.columns))]
        lines = [_line(self.columns), _line("--:" if right else "---" for right in numeric), *map(_line, self.rows)]
        source = f" ({self.measured}; {_code(self.files)})" if with_source and self.measured else ""
        return "\n".join([*lines, "", f"*{self.caption}{source}*", ""])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say which files differ from the results")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="folder of the repository")
    arguments = parser.parse_args(argv)

    root = arguments.root
    tables = {"presets": presets_table(), **read_tables(root / RESULTS)}
    tables["presets-measured"] = presets_measured_table(tables)
    for path in root.glob("model_cards/*/training.json"):
        tables[f"{path.parent.name}-training"] = training_table(json.loads(path.read_text(encoding="utf-8")))
    contents = {path: fill(path.read_text(encoding="utf-8"), tables).encode() for path in _pages(root)}
    for picture in (found for pattern in PICTURES for found in root.glob(pattern)):
        contents[root / "docs" / "pictures" / picture.name] = picture.read_bytes()

    stale = [path for path, content in contents.items() if not path.exists() or path.read_bytes() != content]
    for path in stale:
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[path])
        said = "differs from the results: run scripts/render_tables.py" if arguments.check else "written"
        print(f"{path.relative_to(root)} {said}")
    return 1 if stale and arguments.check else 0


def read_tables(folder: Path) -> dict[str, Table]:
    """Reads every table in a folder of JSON files, by name."""
    tables: dict[str, Table] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, table in record.get("tables", {}).items():
            if name in tables:
                raise ValueError(f"Two benchmarks have a table {name!r}, the second is {path.name}: rename one.")
            where = "; ".join([*_words(record["machine"]), ", ".join(_words(record["versions"]))])
            measured = f"{where}; seed {record['seed']}; {record['date']}"
            tables[name] = Table(**table, measured=measured, files=(f"{RESULTS}/{path.name}",))
    return tables


def presets_table() -> Table:
    """The presets and what they mean on the paper's large model."""
    rows = []
    for name, preset in PRESETS.items():
        layer = resolve_prune_layer(preset["prune_layer"], PAPER_NUM_LAYERS)
        share = _average_retention(name)
        selection = f'`"{preset["selection"]}"`'
        ratio = f"{preset['retention_ratio']:g}"
        rows.append([f'`"{name}"`', ratio, f"{layer}/{PAPER_NUM_LAYERS}", selection, share])
    columns = ["preset", "`retention_ratio`", "`prune_layer`", "`selection`", "average retention"]
    return Table(columns, rows, f"Average retention is that of a large model of {PAPER_NUM_LAYERS} layers.")


def presets_measured_table(tables: dict[str, Table]) -> Table:
    """What was measured of each preset, and on what; a cell whose result is missing says so."""

    def cell(table: str, row: str, column: str | int) -> str:
        found = tables.get(table)
        cells = next((cells for cells in found.rows if str(cells[0]).startswith(row)), None) if found else None
        if found is None or cells is None:
            return "not measured"
        place = column if isinstance(column, int) else list(found.columns).index(column)
        return str(cells[place])

    sets = {name: f"methods-{name.lower()}" for name in ("easy-VQA", "scenes", "reading")}
    late, first = (
        "**facility location in the middle** (`sgp-facility-late`)",
        "**guided, facility location** (`sgp-facility`)",
    )
    times = {"time, H100": "speed-gpu-end-to-end", "time, CPU": "speed-end-to-end"}
    rows = []
    for name, preset in PRESETS.items():
        share, method = _average_retention(name), late if preset["prune_layer"] else first
        accuracies = [cell(table, method, share) for table in sets.values()]
        measured_times = [cell(table, f"guided, {share}", 1) for table in times.values()]
        rows.append([f'`"{name}"`', share, *accuracies, *measured_times])
    unpruned = ", ".join(cell(table, "large model alone", 1) for table in sets.values())
    columns = ["preset", "average retention", *(f"accuracy, {name}" for name in sets), *times]
    caption = (
        "Accuracy: of the embedded pairs, tiny models trained on drawn shapes and on small pages of text; exact match "
        f"in %, on pages ANLS. Unpruned, the large models reach {unpruned}. They were pruned to each row's average "
        f"retention; the presets themselves come to {_of_embedded_layers()} on their {EMBEDDED_NUM_LAYERS} layers. "
        "Time: a whole answer of 16 tokens without early exit or drafts, relative to the large model alone, on random "
        "weights of the sizes of InternVL 2B and 26B, and on a CPU of their proportions, where arithmetic is what "
        'takes time; on the H100 "fast" still selected with `dpp`. Brackets: 95 % intervals of accuracies; least and '
        "greatest of times."
    )
    used = [tables[name] for name in (*sets.values(), *times.values()) if name in tables]
    measured = "; ".join(dict.fromkeys(table.measured for table in used))
    return Table(
        columns, rows, caption, measured, tuple(dict.fromkeys(file for table in used for file in table.files))
    )


def training_table(record: dict[str, Any]) -> Table:
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
    return Table(["stage", "pictures seen", "questions answered", "minutes"], rows, caption)


def fill(text: str, tables: dict[str, Table]) -> str:
    """Puts tables and sources into their places; a table that no JSON has is said to be unmeasured."""
    names = [place["name"] for place in PLACE.finditer(text)]
    shown = [tables[name] for name in names if name in tables]
    with_source = SOURCES.search(text) is None

    def table(place: re.Match[str]) -> str:
        body = tables[place["name"]].to_markdown(with_source) if place["name"] in tables else NOT_MEASURED
        return place["start"] + body + place["end"]

    text = PLACE.sub(table, text)
    return SOURCES.sub(lambda place: place["start"] + sources(shown) + place["end"], text)


def sources(tables: Sequence[Table]) -> str:
    """One sentence for each machine on which tables were measured."""
    files: dict[str, list[str]] = {}
    for table in tables:
        if table.measured:
            files.setdefault(table.measured, []).extend(table.files)
    return "".join(f"Measured on {measured} ({_code(dict.fromkeys(names))}).\n" for measured, names in files.items())


def _pages(root: Path) -> list[Path]:
    return [root / "README.md", *sorted(root.glob("docs/**/*.md")), *sorted(root.glob("model_cards/*/README.md"))]


def _average_retention(preset: str, num_layers: int = PAPER_NUM_LAYERS) -> str:
    return f"{SGLGenerationConfig.from_preset(preset).average_retention(num_layers):.0%}"


def _of_embedded_layers() -> str:
    """What the presets are on the embedded pair, in words."""
    *shares, last = (_average_retention(preset, EMBEDDED_NUM_LAYERS) for preset in PRESETS)
    return f"{', '.join(shares)} and {last}"


def _line(cells: Any) -> str:
    # numbers stay as the benchmark rounded them
    return f"| {' | '.join(map(str, cells))} |"


def _code(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _words(value: Any) -> list[str]:
    """`{"torch": "2.15"}` as `["torch 2.15"]`, a plain string as itself."""
    return [f"{key} {word}" for key, word in value.items()] if isinstance(value, dict) else [str(value)]


if __name__ == "__main__":
    sys.exit(main())
