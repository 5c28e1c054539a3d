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
    results = tmp_path / render_tables.RESULTS
    results.mkdir(parents=True)
    (results / "speed.json").write_text(json.dumps(RECORD))
    (results / "speed.png").write_bytes(b"picture")
    (tmp_path / "model_cards" / "tiny").mkdir(parents=True)
    place = "before\n\n<!-- table: {} -->\nold\n<!-- end table -->\n\nafter\n"
    (tmp_path / "README.md").write_text(place.format("speed") + place.format("unknown"))
    (tmp_path / "model_cards" / "tiny" / "README.md").write_text(place.format("presets"))
    (tmp_path / "docs").mkdir()
    sources = "<!-- sources -->\nold\n<!-- end sources -->\n"
    (tmp_path / "docs" / "speed.md").write_text(place.format("speed") + place.format("speed") + sources)
    return tmp_path


def test_a_page_names_the_machine_once(repository):
    render_tables.main(["--root", str(repository)])
    page = (repository / "docs" / "speed.md").read_text()
    assert page.count("| pair | 9 |\n\n*Medians.*\n<!-- end table -->") == 2
    assert page.count("2 cores") == 1
    assert page.endswith(
        "<!-- sources -->\nMeasured on 2 cores; torch 2.15.0, transformers 5.23.0; seed 0; 2026-11-22 "
        f"(`{render_tables.RESULTS}/speed.json`).\n<!-- end sources -->\n"
    )


def test_pictures_are_copied(repository):
    render_tables.main(["--root", str(repository)])
    assert (repository / "docs" / "pictures" / "speed.png").read_bytes() == b"picture"


def test_what_was_measured_of_the_presets():
    def table(name, *rows):
        return render_tables.Table(name, rows, "", "2 cores", ("a.json",))

    rows = [
        ["large model alone", "99.5 [99, 100]", "", ""],
        ["**guided, facility location** (`sgp-facility`)", "98.4", "98.3", "96.2"],
        ["**facility location in the middle** (`sgp-facility-late`)", "99.4", "97.3", "97.2 [95, 97]"],
    ]
    accuracies = table(["method", "64%", "35%", "9%"], *rows)
    found = render_tables.presets_measured_table({"methods-easy-vqa": accuracies, "methods-scenes": accuracies})
    # Of the preset's own selection, from its own layer.
    assert [row[2] for row in found.rows] == ["99.4", "98.3", "97.2 [95, 97]"]
    assert found.rows[2][2:] == ["97.2 [95, 97]", "97.2 [95, 97]", *3 * ["not measured"]]
    assert "reach 99.5 [99, 100], 99.5 [99, 100], not measured" in found.caption
    assert "the presets themselves come to 64%, 35% and 5% on their 10 layers" in found.caption
    assert (found.measured, found.files) == ("2 cores", ("a.json",))


def test_every_table_of_this_repository_is_what_the_results_say(capsys):
    assert render_tables.main(["--check", "--root", str(ROOT)]) == 0, capsys.readouterr().out


def test_tables_are_filled_in_with_their_source(repository):
    assert render_tables.main(["--root", str(repository)]) == 0
    assert (repository / "README.md").read_text() == (
        "before\n\n<!-- table: speed -->\n"
        "| what | ms |\n| --- | --: |\n| stock | 12.5 |\n| pair | 9 |\n\n"
        "*Medians. (2 cores; torch 2.15.0, transformers 5.23.0; seed 0; 2026-11-22; "
        f"`{render_tables.RESULTS}/speed.json`)*\n"
        "<!-- end table -->\n\nafter\n"
        "before\n\n<!-- table: unknown -->\n*Not measured yet.*\n<!-- end table -->\n\nafter\n"
    )


def test_presets_are_told(repository):
    render_tables.main(["--root", str(repository)])
    card = (repository / "model_cards" / "tiny" / "README.md").read_text()
    assert '| `"quality"` | 0.4 | 19/48 | `"facility_location"` | 64% |' in card
    assert '| `"balanced"` | 0.35 | 0/48 | `"facility_location"` | 35% |' in card
    assert '| `"fast"` | 0.05 | 2/48 | `"facility_location"` | 9% |' in card


def test_check_names_what_differs_and_writes_nothing(repository, capsys):
    before = (repository / "README.md").read_text()
    assert render_tables.main(["--check", "--root", str(repository)]) == 1
    assert (repository / "README.md").read_text() == before
    assert capsys.readouterr().out.splitlines() == [
        f"{name} differs from the results: run scripts/render_tables.py"
        for name in ("README.md", "docs/speed.md", "model_cards/tiny/README.md", "docs/pictures/speed.png")
    ]


def test_check_is_content_after_writing(repository):
    render_tables.main(["--root", str(repository)])
    assert render_tables.main(["--check", "--root", str(repository)]) == 0


def test_two_tables_of_one_name_are_refused(repository):
    (repository / render_tables.RESULTS / "speed2.json").write_text(json.dumps(RECORD))
    with pytest.raises(ValueError, match="Two benchmarks have a table 'speed'"):
        render_tables.main(["--root", str(repository)])
