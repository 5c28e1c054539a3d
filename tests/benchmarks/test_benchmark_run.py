"""A run from its settings to its tables, with tiny models in place of those of real shapes."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TOKENS_PER_TILE, prompts, tiny_internvl

from benchmarks import __main__ as command
from benchmarks import run, settings, workbench
from benchmarks.figure import draw_figure
from benchmarks.parts import methods
from benchmarks.random_models import random_inputs, random_model
from benchmarks.run import PARTS
from benchmarks.settings import PART_NAMES, BenchmarkSettings, check_settings, find_parts
from benchmarks.tables import as_markdown, make_tables
from benchmarks.workbench import Workbench, count_visual_tokens, num_parameters, with_tiles

# Billions of parameters; what they really are, `random_model` counts on the meta device.
SIZES = {
    "internvl-1b": 1,
    "internvl-2b": 2,
    "internvl-8b": 8,
    "internvl-26b": 26,
    "internvl-38b": 38,
    "internvl-78b": 78,
}
LAYERS = {"internvl-26b": 6, "internvl-8b": 4, "internvl-38b": 8}
SWEEPS = {
    "draft_lengths": (4,),
    "acceptances": (0.0, 1.0),
    "round_answers": (2, 4),
    "long_round_answers": (6,),
    "round_acceptances": (0.0, 1.0),
    "round_tokens": 80,
    "sweep_image_sizes": ((16, 16), (32, 32)),
    "sweep_answers": (1, 3),
    "growth_tokens": (16, 32, 64),
    "growth_batches": (1, 2),
    "growth_answers": (1, 2),
    "growth_tiles": (1, 3),
    "selection_tokens": 32,
}
SPREAD = {"median": 1.05, "min": 1.0, "max": 1.1}
IMPORTED = dict.fromkeys(("transformers", "transformers and transformers_sgl", "transformers_sgl"), SPREAD)
STARTUP = {
    "rounds": 1,
    **dict.fromkeys(("import_ratio", "auto_class_ratio", "load_ratio"), SPREAD),
    "import_s": IMPORTED,
    "auto_class_s": IMPORTED,
    "load_s": {"two models": SPREAD, "pair": SPREAD},
}
OPTIONS = ["--image-size", "32x32", "--answer-tokens", "3", "--rounds", "1", "--sweep-rounds", "1"]
OPTIONS += ["--shrink", "4", "--device", "cpu"]


def tiny_model(name: str) -> Any:
    model = tiny_internvl(LAYERS.get(name, 2), hidden_size=64 if name in LAYERS else 32)
    model.generation_config.eos_token_id = None
    return model


def tiny_inputs(model: Any, image_size: tuple[int, int], tokens: int, batch_size: int, seed: int) -> Any:
    tiles = image_size[0] * image_size[1] // 16**2
    return prompts([[tiles]] * batch_size, [tokens] * batch_size, seed)


def put_in_place(patch: pytest.MonkeyPatch) -> list[str]:
    """Tiny models and short sweeps; returns the names of the models that are made, which are none yet."""
    made: list[str] = []

    def make(name: str, *_: Any) -> Any:
        made.append(name)
        return tiny_model(name)

    patch.setattr(workbench, "random_model", make)
    patch.setattr(workbench, "random_inputs", tiny_inputs)
    for module in (run, workbench):
        patch.setattr(module, "num_parameters", lambda name, shrink=1: SIZES[name] * 10**9 // shrink**2)
    patch.setattr(run, "weightless", tiny_model)
    patch.setattr(methods, "baselines", lambda *_: {})
    for module in (methods, run):
        patch.setattr(module, "VISION_SETTINGS", {"half of the tiles": {"vision_retention_ratio": 0.5}})
    patch.setattr(run, "_GROWTH_TOKENS", TOKENS_PER_TILE)
    patch.setattr(settings, "BenchmarkSettings", lambda **given: BenchmarkSettings(**SWEEPS | given))
    patch.setattr(run, "measure_startup", lambda pair, rounds: STARTUP | {"rounds": rounds})
    return made


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return put_in_place(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    """A run of all parts: its folder, what it printed, and the models that it made."""
    folder, out, err = tmp_path_factory.mktemp("whole") / "out", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        made = put_in_place(patch)
        assert bench(folder) == 0
    return types.SimpleNamespace(folder=folder, out=out.getvalue(), err=err.getvalue(), made=made)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "benchmark.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def bench(folder: Path, *options: str) -> int:
    return command.main([*OPTIONS, *options, "--out", str(folder)])


def test_all_parts_from_command_to_figure(whole):
    folder = whole.folder
    record = record_of(folder)
    assert list(record["parts"]) == list(PARTS)
    assert {"machine", "versions", "seed", "date", "num_threads", "arguments"} <= set(record)
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert [line.split()[1] for line in whole.err.splitlines() if line.startswith("measuring")] == list(PARTS)
    assert make_tables(record) == record["tables"]
    assert all(f"{name}:" in whole.out for name in record["tables"])
    assert whole.out.rstrip().endswith(f"written: {folder / 'benchmark.json'}, {folder / 'benchmark.png'}")

    growth = record["parts"]["growth-tokens"]["points"]
    assert [point["value"] for point in growth] == [16, 32, 64]
    assert [point["batch_size"] for point in record["parts"]["growth-batches"]["points"]] == [1, 2]
    (sizes,) = record["parts"]["break-even-sizes"]["series"]
    assert [round(point["value"]) for point in sizes["points"]] == [8, 26, 38]  # and neither 1B, 2B nor 78B
    (tokens,) = record["parts"]["break-even-tokens"]["series"]
    assert [point["value"] for point in tokens["points"]] == [16, 64]
    answers = record["parts"]["break-even-answers"]["series"]
    drafts = [(series["drafts"], series["acceptance"] or 0.0) for series in answers]
    assert drafts == list(BenchmarkSettings().sweep_series)
    assert all([point["value"] for point in series["points"]] == [1, 3] for series in answers)
    rounds = [record["parts"][f"rounds-{name}"] for name in ("short", "long-prompt", "long-answer")]
    assert [part["num_visual_tokens"] for part in rounds] == [64, 80, 64]
    assert [{row["answer_tokens"] for row in part["rows"]} for part in rounds] == [{2, 4}, {4}, {6}]
    passes = record["parts"]["passes"]["rows"]
    assert [row["num_visual_tokens"] for row in passes] == [64] * 5 + [80] * 5
    # Both once; for the sizes, which come last, the other ones; and the large model is the last but one.
    assert whole.made == ["internvl-2b", "internvl-26b", "internvl-8b", "internvl-26b", "internvl-38b"]


def with_rounds(record: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The same figures, as if they rested on so many rounds."""
    record["arguments"] |= {"rounds": rounds, "sweep_rounds": rounds}
    for name in ("startup", "passes", "rounds-short", "rounds-long-prompt", "rounds-long-answer"):
        record["parts"][name]["rounds"] = rounds
    return record


TIMELESS = {"speed-guidance", "speed-prefill", "speed-decode", "speed-drafts", "speed-end-to-end"}
TIMELESS |= {
    "speed-rounds",
    "speed-growth",
    "speed-growth-tokens",
    "speed-growth-tiles",
    "speed-methods",
}  # which hold counts, too
TIMED = {"speed-startup", "speed-exits", "speed-break-even", "speed-break-even-answers", "speed-passes"}
TIMED |= {"speed-profile", "speed-selection"}


def test_tables_of_enough_rounds(whole):
    tables = make_tables(with_rounds(record_of(whole.folder), 5))
    assert set(tables) == TIMELESS | TIMED
    for name, table in tables.items():
        assert table["rows"], name
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
        assert not {"ms", "s"} & set(table["columns"])  # of a CPU only ratios are told
        assert name == "speed-growth" or any("[" in str(cell) for row in table["rows"] for cell in row), name
        assert "[least, greatest] of 5 rounds" in table["caption"].replace("Median", "median")
    assert tables["speed-exits"]["columns"][-1] == "faster than large alone"
    assert tables["speed-break-even"]["columns"][-1] == "faster"
    assert "time" in tables["speed-growth"]["columns"]


def test_too_few_rounds_have_neither_interval_nor_verdict(whole):
    tables = make_tables(with_rounds(record_of(whole.folder), 4))
    assert set(tables) == TIMELESS | TIMED
    for table in tables.values():
        shown = str([table["columns"], *table["rows"]])
        assert not any(word in shown for word in ("faster", "always", "never", "above", "below"))
        assert not any("[" in str(cell) for row in table["rows"] for cell in row)
        assert "edian of 4 rounds, too few for an interval" in table["caption"]
        assert "lways" not in table["caption"]
    assert "time" not in tables["speed-growth"]["columns"]
    assert "time / large alone" in tables["speed-end-to-end"]["columns"]


def test_rows_of_too_few_rounds_have_no_interval_beside_others_that_have(whole):
    record = with_rounds(record_of(whole.folder), 5)
    record["parts"]["rounds-long-prompt"]["rounds"] = 3
    table = make_tables(record)["speed-rounds"]
    place = table["columns"].index("speed-up of decoding")
    for row in table["rows"]:
        assert ("[" in row[place]) == (row[0] == "64")
    assert "Without an interval, medians of 3 rounds." in table["caption"]


@pytest.mark.parametrize("rounds", [1, 2])
def test_so_few_rounds_have_no_times_at_all(whole, rounds):
    tables = make_tables(with_rounds(record_of(whole.folder), rounds))
    assert set(tables) == TIMELESS
    for table in tables.values():
        assert not any("time" in column for column in table["columns"])
    assert tables["speed-drafts"]["columns"] == ["answer tokens", "draft tokens right", "forward passes"]


def test_what_was_measured_is_kept_and_the_rest_is_added(tiny, folder, capsys):
    assert bench(folder, "--parts", "decode") == 0
    measured = (folder / "decode.json").read_text()
    capsys.readouterr()
    assert bench(folder, "--parts", "drafts,decode") == 0
    assert capsys.readouterr().err == "measuring drafts ...\n"
    assert (folder / "decode.json").read_text() == measured
    assert list(record_of(folder)["parts"]) == ["decode", "drafts"]
    assert not (folder / "benchmark.png").exists()  # neither has a panel


def test_another_run_s_folder_is_refused(tiny, whole, capsys):
    assert bench(whole.folder, "--parts", "decode", "--seed", "1") == 2
    assert "holds the records of another run, which differs in benchmark" in capsys.readouterr().err


def test_points_beyond_the_limit_are_left_out(tiny, folder):
    assert (
        bench(folder, "--parts", "growth-tokens,break-even-tokens", "--max-tokens", "60", "--prompt-tokens", "5") == 0
    )
    parts = record_of(folder)["parts"]
    assert [point["value"] for point in parts["growth-tokens"]["points"]] == [16, 32]
    assert [point["value"] for point in parts["break-even-tokens"]["series"][0]["points"]] == [16]


def test_a_model_that_does_not_fit(tiny, folder, capsys, monkeypatch):
    # A sixteenth of 8 billion numbers, 4 bytes each, is 2 of 3 GB; no larger model fits.
    monkeypatch.setattr(workbench, "available_memory", lambda device: 3 * 10**9)
    assert bench(folder, "--parts", "break-even-sizes") == 0
    found = record_of(folder)["parts"]["break-even-sizes"]
    assert [point["value"] for point in found["series"][0]["points"]] == [8]
    assert list(found["left_out"]) == ["internvl-26b", "internvl-38b"]
    assert "The weights of 'internvl-26b' take 6.1 GiB, but 2.8 GiB" in found["left_out"]["internvl-26b"]
    capsys.readouterr()
    assert bench(folder, "--parts", "prefill") == 1
    assert "name a smaller shape, or pass a larger --shrink." in capsys.readouterr().err


def test_a_part_that_does_not_fit(tiny, folder, capsys, monkeypatch):
    def fail(_: Any) -> Any:
        raise torch.OutOfMemoryError

    assert bench(folder, "--parts", "decode") == 0
    monkeypatch.setitem(PARTS, "prefill", fail)
    assert bench(folder, "--parts", "decode,prefill") == 1
    error = capsys.readouterr().err
    assert "The part 'prefill' does not fit into the memory of 'cpu': name smaller" in error
    assert error.endswith("Not measured: prefill.\n")
    assert (folder / "decode.json").exists()
    assert not (folder / "prefill.json").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--large", "gpt-7b"], "There is no shape 'gpt-7b': name one of internvl-1b"),
        (["--small", "qwen2.5-vl-3b"], "cut images differently: name two shapes of one family."),
        (["--parts", "prefill,lunch"], "There is no part 'lunch' of the benchmark: name some of startup"),
        (["--image-size", "448"], "--image-size is '448': write width and height in pixels, such as 896x1344."),
        (["--image-size", "0x448"], "The image size is 0x448: pass width and height"),
        (["--rounds", "0"], "`rounds` is 0: pass a whole number of 1 or more."),
        (["--sweep-rounds", "0"], "`sweep_rounds` is 0: pass a whole number of 1 or more."),
        (["--shrink-depth", "0"], "`shrink_depth` is 0: pass a whole number of 1 or more."),
        (["--shrink", "0"], "`shrink` is 0: pass a whole number of 1 or more."),
        (["--max-tokens", "-1"], "`max_tokens` is -1: pass a whole number of 0 or more."),
        (["--answer-tokens", "0"], "`answer_tokens` is 0: pass a whole number of 1 or more."),
        (["--device", "cuda:99"], "There is no device 'cuda:99' on this machine"),
    ],
)
def test_what_can_be_wrong_is_said_before_a_model_is_made(tiny, folder, capsys, options, sentence):
    assert bench(folder, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert tiny == []
    assert not folder.exists()


def test_a_file_is_no_folder(tiny, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert bench(file) == 2
    assert "is a file, but a folder is needed" in capsys.readouterr().err


def test_parts_by_name():
    assert find_parts("all") == list(PARTS)
    assert find_parts("break-even,decode") == ["decode", "break-even-tokens", "break-even-answers", "break-even-sizes"]


def test_settings_that_are_right():
    check_settings(BenchmarkSettings())
    assert num_parameters("internvl-2b") == pytest.approx(2.2e9, rel=0.02)


def test_tiles_by_hand():
    model = random_model("internvl-1b", shrink=64)
    inputs = random_inputs(model, (448, 448), num_prompt_tokens=3, batch_size=2)
    more = with_tiles(model, inputs, 3)
    assert more["input_ids"].shape == more["attention_mask"].shape == (2, 4 + 3 * 256 + 3)
    assert torch.equal(more["input_ids"][:, -3:], inputs["input_ids"][:, -3:])
    assert torch.equal(more["input_ids"][:, :4], inputs["input_ids"][:, :4])
    pixels = inputs["pixel_values"]
    assert torch.equal(more["pixel_values"], pixels[[0, 0, 0, 1, 1, 1]])  # each sample has its own tiles


def test_models_without_tiles_get_larger_images():
    of_qwen = Workbench(BenchmarkSettings("qwen2.5-vl-7b", "qwen2.5-vl-3b", shrink=64, prompt_tokens=4), Path())
    for number in (256, 512):
        inputs = of_qwen.inputs_with(number)
        assert count_visual_tokens(of_qwen.small, inputs) == number


def test_tables_of_a_gpu_tell_milliseconds_and_what_was_left_out(whole):
    record = record_of(whole.folder)
    with_rounds(record, 5)["arguments"]["device"] = "cuda:0"
    for way in ("published", "published_whole"):
        record["parts"]["guidance"]["ways"][way] = {"skipped": "the matrices are large"}
    del record["parts"]["guidance"]["published_over_capture"]
    tables = make_tables(record)
    for name in ("guidance", "prefill", "decode", "drafts", "end-to-end", "selection"):
        assert "ms" in tables[f"speed-gpu-{name}"]["columns"]
    assert tables["speed-gpu-startup"]["columns"][2:] == ["s", "s without"]
    assert [row[2] for row in tables["speed-gpu-startup"]["rows"]] == ["1.05 [1.00, 1.10]"] * 3
    (row,) = (row for row in tables["speed-gpu-guidance"]["rows"] if row[0] == "`output_attentions`, decoder eager")
    assert row[1:] == ["left out: the matrices are large", "", "", "", "", ""]
    assert "| left out: the matrices are large |" in as_markdown(tables)


def test_a_figure_has_the_panels_of_what_was_measured(whole, tmp_path):
    record = record_of(whole.folder)
    figure = draw_figure(record, tmp_path / "all.png")
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["average retention of visual tokens (%)", "questions that exit early (%)"]
    ideal, measured = figure.axes[0].get_lines()[0].get_ydata(), figure.axes[0].get_lines()[1].get_ydata()
    assert (ideal[-1], measured[-1]) == (1.0, 1.0)  # unpruned
    assert not figure.axes[0].collections  # one round has no interval
    record["arguments"]["rounds"] = 5
    record["parts"] = {"prefill": record["parts"]["prefill"]}
    figure = draw_figure(record, tmp_path / "one.png")
    assert len(figure.axes) == 1
    assert figure.axes[0].collections


def test_the_documentation_s_json_is_what_the_folder_holds(tiny, whole, tmp_path, capsys):
    output, work = tmp_path / "speed.json", tmp_path / "work"
    more = ["--record", str(output)]
    assert bench(work, *more, "--parts", "decode") == 0
    record = json.loads(output.read_text())
    assert list(record["tables"]) == ["speed-decode"]
    assert {"machine", "versions", "seed", "date"} <= set(record)
    assert not list(tmp_path.glob("*.png"))  # this part has no panel

    shutil.rmtree(work)
    tiny.clear()
    shutil.copytree(whole.folder, work)  # nothing is left to measure
    assert bench(work, *more) == 0
    record = json.loads(output.read_text())
    assert list(record["parts"]) == list(PARTS)
    assert record["tables"] == make_tables(record_of(whole.folder))
    assert output.with_suffix(".png").exists()
    assert tiny == []
    assert capsys.readouterr().out.rstrip().endswith(f"{output}, {output.with_suffix('.png')}")


def test_the_documentation_s_json_is_written_after_every_part_and_a_failing_one_stops_nothing(
    tiny, tmp_path, monkeypatch, capsys
):
    def fail(_: Any) -> Any:
        seen.append(list(json.loads(output.read_text())["parts"]))
        raise AssertionError("this kernel cannot be counted")

    seen: list[list[str]] = []
    output, work = tmp_path / "speed.json", tmp_path / "work"
    more = ["--record", str(output)]
    with monkeypatch.context() as patch:
        patch.setitem(PARTS, "prefill", fail)
        assert bench(work, *more, "--parts", "guidance,prefill,decode") == 1
    assert seen == [["guidance"]]
    error = capsys.readouterr().err
    assert "this kernel cannot be counted" in error
    assert error.endswith("Not measured: prefill.\n")
    assert list(json.loads(output.read_text())["parts"]) == ["guidance", "decode"]

    assert bench(work, *more, "--parts", "prefill,end-to-end") == 0  # another process adds to what is there
    assert capsys.readouterr().err.count("measuring") == 2
    assert list(json.loads(output.read_text())["parts"]) == ["guidance", "prefill", "decode", "end-to-end"]

    claimed = json.loads((work / "run.json").read_text())
    (work / "run.json").write_text(json.dumps({**claimed, "machine": "old"}))
    assert bench(work, *more, "--parts", "decode") == 2
    assert "another run, which differs in machine" in capsys.readouterr().err


def test_names_are_checked_before_packages(tiny, folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert bench(folder, "--large", "gpt-7b") == 2
    assert "There is no shape 'gpt-7b'" in capsys.readouterr().err
    assert bench(folder, "--parts", "lunch") == 2
    assert "There is no part 'lunch'" in capsys.readouterr().err
    assert bench(folder) == 2
    assert "needs a package that is missing: pip install matplotlib." in capsys.readouterr().err
    assert not folder.exists()


def test_nothing_measured_is_told(tiny, folder, capsys, monkeypatch):
    def fail(_: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setitem(PARTS, "decode", fail)
    assert bench(folder, "--parts", "decode") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no such thing" in printed.err
    assert not (folder / "benchmark.json").exists()


def test_help_names_shapes_and_parts_without_torch():
    code = "import sys; from benchmarks.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    shown = " ".join(result.stdout.split())
    for name in ("internvl-26b", "llava-onevision-7b", *PART_NAMES):
        assert name.replace("-", "") in shown.replace("-", "").replace(" ", "")
