from __future__ import annotations

import json
from pathlib import Path

import pytest
import render_tables

ROOT = Path(__file__).parents[1]
RECORD = {
    "machine": "2 cores",
    "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
    "seed": 0,
    "date": "2026-11-22",
    "tables": {"speed": {"columns": ["what", "ms"], "rows": [["stock", 12.5], ["pair", 9]], "caption": "Medians."}},
}


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "speed.json").write_text(json.dumps(RECORD))
    (tmp_path / "model_cards" / "tiny").mkdir(parents=True)
    place = "before\n\n<!-- table: {} -->\nold\n<!-- end table -->\n\nafter\n"
    (tmp_path / "README.md").write_text(place.format("speed") + place.format("unknown"))
    (tmp_path / "model_cards" / "tiny" / "README.md").write_text(place.format("presets"))
    return tmp_path


def test_every_table_of_this_repository_is_what_the_json_says(capsys):
    assert render_tables.main(["--check", "--root", str(ROOT)]) == 0, capsys.readouterr().out


def test_tables_are_filled_in_with_their_source(repository):
    assert render_tables.main(["--root", str(repository)]) == 0
    assert (repository / "README.md").read_text() == (
        "before\n\n<!-- table: speed -->\n"
        "| what | ms |\n| --- | --: |\n| stock | 12.5 |\n| pair | 9 |\n\n"
        "*Medians. (2 cores; torch 2.15.0, transformers 5.23.0; seed 0; 2026-11-22; "
        "`benchmarks/results/speed.json`)*\n"
        "<!-- end table -->\n\nafter\n"
        "before\n\n<!-- table: unknown -->\n*Not measured yet.*\n<!-- end table -->\n\nafter\n"
    )


def test_presets_are_the_papers_settings(repository):
    render_tables.main(["--root", str(repository)])
    card = (repository / "model_cards" / "tiny" / "README.md").read_text()
    assert '| `"quality"` | 0.4 | 19/48 | 64% |' in card
    assert '| `"balanced"` | 0.2 | 9/48 | 35% |' in card
    assert '| `"fast"` | 0.05 | 2/48 | 9% |' in card


def test_check_names_what_differs_and_writes_nothing(repository, capsys):
    before = (repository / "README.md").read_text()
    assert render_tables.main(["--check", "--root", str(repository)]) == 1
    assert (repository / "README.md").read_text() == before
    assert capsys.readouterr().out.splitlines() == [
        "README.md differs from the JSON: run scripts/render_tables.py",
        "model_cards/tiny/README.md differs from the JSON: run scripts/render_tables.py",
    ]


def test_check_is_content_after_writing(repository):
    render_tables.main(["--root", str(repository)])
    assert render_tables.main(["--check", "--root", str(repository)]) == 0


def test_two_tables_of_one_name_are_refused(repository):
    (repository / "benchmarks" / "results" / "speed2.json").write_text(json.dumps(RECORD))
    with pytest.raises(ValueError, match="Two benchmarks have a table 'speed'"):
        render_tables.main(["--root", str(repository)])
