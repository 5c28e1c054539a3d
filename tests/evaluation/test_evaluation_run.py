"""The run behind an evaluation: what is recorded, and that being cut off or shared changes nothing."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scene_data import write_data

from transformers_sgl.cli import main
from transformers_sgl.evaluation import load_samples
from transformers_sgl.evaluation import run as run_module
from transformers_sgl.evaluation.calibration import allowed_failures
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.evaluate import (
    check_disjoint,
    check_enough,
    check_retentions,
    choose_thresholds,
    load_scorable,
    other_split,
)
from transformers_sgl.evaluation.methods import METHODS, Answer, Batch, Method, Pair, Setting
from transformers_sgl.evaluation.metrics import METRICS
from transformers_sgl.evaluation.run import Result, Run, plan, run_methods

PICTURE = Image.new("RGB", (8, 8))
FAKE_PAIR = Pair(SimpleNamespace(device=torch.device("cpu"), large=None), None)
FACTS = {"runs": 2, "seed": 0}


@dataclass(frozen=True)
class Fake(Method):
    """Answers question `i` with the number `i`, and writes down what it was asked."""

    asked: list[tuple[int, ...]] = field(default_factory=list)
    stop_before: int | None = None
    name: str = ""
    order: list[str] = field(default_factory=list)
    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        if self.stop_before in batch.indices:
            raise KeyboardInterrupt
        assert len(batch.samples) == len(batch.images)
        assert all(image.mode == "RGB" for image in batch.images)
        self.asked.append(tuple(batch.indices))
        self.order.append(self.name)
        return [
            Answer(str(index), 1 + index, 0.5, draft="0", num_draft_tokens_accepted=index) for index in batch.indices
        ]


def questions(number: int) -> list[Sample]:
    return [Sample(PICTURE, str(index), (str(index % 4),), image_id=str(index)) for index in range(number)]


def runs_of(**methods: Method) -> list[Run]:
    return plan(methods, [0.35], 10)


def run(folder: Path, runs: list[Run], number: int = 10, **facts: Any) -> list[Result]:
    return run_methods(FAKE_PAIR, questions(number), runs, folder, {**FACTS, **facts}, batch_size=4)


def without_time(results: list[Result]) -> list[Result]:
    return [replace(result, seconds=0.0) for result in results]


class TestRun:
    def test_records_are_what_the_methods_said(self, tmp_path: Path) -> None:
        one, other = Fake(), Fake()
        results = run(tmp_path / "out" / "deep", runs_of(one=one, other=other))
        # The first batch is answered once more, before time is taken.
        assert one.asked == other.asked == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
        assert [(result.method, result.sample) for result in results] == [
            (name, index) for name in ("one", "other") for index in range(10)
        ]
        assert without_time(results)[13] == Result(
            3, "other", None, "3", 1.0, 0.0, 4, 0.5, draft="0", draft_score=0.0, num_draft_tokens_accepted=3
        )
        assert [result.score for result in results[:10]] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
        assert all(result.seconds > 0 for result in results)
        assert len({result.seconds for result in results[:4]}) == 1  # a batch's questions share its time
        lines = (tmp_path / "out" / "deep" / "samples.jsonl").read_text().splitlines()
        assert [Result(**json.loads(line)) for line in lines] == results
        assert sorted(file.name for file in (tmp_path / "out" / "deep").iterdir()) == ["run.json", "samples.jsonl"]

    def test_a_batch_is_on_disk_before_the_next_one_begins(self, tmp_path: Path) -> None:
        seen = []

        class Watching(Fake):
            def answer(self, *arguments: Any) -> list[Answer]:
                file = tmp_path / "samples-0.jsonl"
                seen.append(len(file.read_text().splitlines()) if file.exists() else None)
                return super().answer(*arguments)

        run(tmp_path, runs_of(one=Watching()))
        assert seen == [None, 0, 4, 8]

    def test_runs_take_turns_in_changing_order(self, tmp_path: Path) -> None:
        order: list[str] = []
        names = ("a", "b", "c", "d")
        run(tmp_path, runs_of(**{name: Fake(name=name, order=order) for name in names}), number=160)
        batches = [tuple(order[start : start + 4]) for start in range(4, len(order), 4)]
        assert all(sorted(batch) == list(names) for batch in batches)
        for name in names:
            assert {batch[0] for batch in batches} == set(names)
            followed = {before for batch in batches for before, after in pairwise(batch) if after == name}
            assert followed == set(names) - {name}

    def test_it_goes_on_where_it_was_stopped(self, tmp_path: Path) -> None:
        whole = run(tmp_path / "whole", runs_of(one=Fake(), other=Fake()))
        with pytest.raises(KeyboardInterrupt, match="Stopped after 2 of 3 batches; the same command goes on from"):
            run(tmp_path / "cut", runs_of(one=Fake(), other=Fake(stop_before=9)))
        one = Fake()
        again = run(tmp_path / "cut", runs_of(one=one, other=Fake()))
        assert without_time(again) == without_time(whole)
        assert one.asked == [(8, 9), (8, 9)]
        one = Fake(stop_before=0)
        assert run(tmp_path / "cut", runs_of(one=one, other=Fake())) == again
        assert one.asked == []

    @pytest.mark.parametrize("num_bytes", [1, 30, 400])
    def test_a_torn_last_line_is_run_again(self, tmp_path: Path, num_bytes: int) -> None:
        whole = run(tmp_path, runs_of(one=Fake(), other=Fake()))
        # As if killed while the last batch was written.
        file = tmp_path / "samples.jsonl"
        file.rename(tmp_path / "samples-0.jsonl")
        file = tmp_path / "samples-0.jsonl"
        file.write_bytes(file.read_bytes()[:-num_bytes])
        one = Fake()
        assert without_time(run(tmp_path, runs_of(one=one, other=Fake()))) == without_time(whole)
        assert one.asked[-1] == (8, 9)

    def test_what_several_processes_left_counts_once(self, tmp_path: Path) -> None:
        whole = run(tmp_path, runs_of(one=Fake(), other=Fake()))
        lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "samples-0.jsonl").write_text("".join(lines[3:9]))  # killed before it could be taken away
        (tmp_path / "samples-1.jsonl").write_text("".join(lines[5:]))
        (tmp_path / "samples.jsonl").write_text("".join(lines[:9]))
        one = Fake()
        assert run(tmp_path, runs_of(one=one, other=Fake())) == whole
        assert one.asked == []
        assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json", "samples.jsonl"]
        assert (tmp_path / "samples.jsonl").read_text() == "".join(lines)

    def test_processes_share_the_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = run(tmp_path / "one", runs_of(one=Fake()))
        # The second of two does its share and waits, while the first one has long been done.
        first = Fake()
        answered = [each for each in whole if each.sample < 4 or each.sample > 7]
        folder = tmp_path / "two"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(FACTS))
        waits = []

        def wait() -> None:
            waits.append(None)
            if len(waits) == 3:  # the second waits for all to be done
                lines = [json.dumps(vars(each)) + "\n" for each in answered]
                (folder / "samples-0.jsonl").write_text("".join(lines))

        state = SimpleNamespace(is_main_process=False, process_index=1, num_processes=2, wait_for_everyone=wait)
        monkeypatch.setattr(run_module, "all_processes", lambda: state)
        assert without_time(run(folder, runs_of(one=first))) == without_time(whole)
        assert first.asked == [(4, 5, 6, 7), (4, 5, 6, 7)]
        assert not (folder / "samples.jsonl").exists()  # the first one's work

    def test_another_run_is_refused_and_nothing_is_asked_or_changed(self, tmp_path: Path) -> None:
        run(tmp_path, runs_of(one=Fake()))
        (tmp_path / "samples.jsonl").write_bytes((tmp_path / "samples.jsonl").read_bytes()[:-5])
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        fake = Fake()
        with pytest.raises(
            ValueError, match="holds the records of another run, which differs in seed and limit: give"
        ):
            run(tmp_path, runs_of(one=fake), seed=1, limit=3)
        assert fake.asked == []
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"sample": 10}, "there is no sample 10"),
            ({"sample": -1}, "there is no sample -1"),
            ({"method": "best"}, "of .'best', None."),
            ({"average_retention": 0.35}, "of .'one', 0.35."),
            ({"seconds_": 1}, "unexpected keyword"),
        ],
    )
    def test_a_damaged_record_is_named(self, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
        run(tmp_path, runs_of(one=Fake()))
        file = tmp_path / "samples.jsonl"
        first, second, *rest = file.read_text().splitlines()
        changed = json.dumps({**json.loads(second), **change})
        file.write_text("\n".join([first, changed, *rest]) + "\n")
        with pytest.raises(ValueError, match=f"samples.jsonl', line 2: this is no record .*{reason}.*; delete the"):
            run(tmp_path, runs_of(one=Fake()))


class TestThresholds:
    @pytest.fixture
    def drafts(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
        """Lets guided pruning answer everything rightly, with drafts and scores as they are told."""

        def told(draft_right: Callable[[int, float], bool], score: Callable[[int], float], right: bool = True) -> None:
            @dataclass(frozen=True)
            class Told(Method):
                scores_draft: bool = False

                def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
                    assert self.scores_draft
                    return [
                        Answer(
                            str(index % 4) if right else "no",
                            2,
                            draft=str(index % 4) if draft_right(index, setting.average_retention) else "no",
                            decision_score=score(index),
                            draft_complete=index != 998,
                        )
                        for index in batch.indices
                    ]

            monkeypatch.setattr(self, "method", Told(scores_draft=True), raising=False)
            monkeypatch.setattr(Pair, "num_layers", 10)

        return told

    def choose(self, folder: Path, keep_accuracy: float = 0.95) -> dict[float, float]:
        return choose_thresholds(
            FAKE_PAIR,
            questions(1000),
            self.method,
            [0.64, 0.35],
            folder,
            FACTS,
            keep_accuracy=keep_accuracy,
            num_evaluated=1000,
            batch_size=500,
        )

    def test_by_hand(self, tmp_path: Path, drafts: Any) -> None:
        # Of 1,000 questions 29 may fail for 95 % to stay right. The score is the question's number. At one retention
        # every tenth draft is wrong: counted from above, number 700 is the 30th, and it must not be returned. At the
        # other every hundredth is: ten, so all drafts may be.
        assert allowed_failures(1000, 1000, 0.05) == 29
        drafts(lambda index, average: index % (10 if average == 0.64 else 100) != 0, lambda index: index / 1000)
        assert self.choose(tmp_path) == {0.64: 0.701, 0.35: 0.0}
        lines = (tmp_path / "samples.jsonl").read_text().splitlines()
        assert len(lines) == 2000

    def test_a_draft_that_was_cut_off_is_not_returned(self, tmp_path: Path, drafts: Any) -> None:
        # Number 998 is no whole draft, so that it can do no harm: the wrong ones are 998, 996, ... and the 30th that
        # can be returned is number 938.
        drafts(lambda index, _: index % 2 != 0, lambda index: index / 1000)
        assert self.choose(tmp_path)[0.64] == 0.939

    def test_a_promise_that_cannot_be_kept_is_not_given(self, tmp_path: Path, drafts: Any) -> None:
        drafts(lambda *_: True, lambda index: 0.5, right=False)
        with pytest.raises(ValueError, match="Of the 1000 calibration questions .* answers 0 rightly, .* too few"):
            self.choose(tmp_path)

    def test_the_fewest_questions(self) -> None:
        # 0.99 ** 459 < 0.01 < 0.99 ** 458
        check_enough(questions(459), 0.99)
        with pytest.raises(ValueError, match="There are 458 calibration questions, .* takes 459 .*: give more"):
            check_enough(questions(458), 0.99)
        with pytest.raises(ValueError, match="keep_accuracy"):
            check_enough(questions(9), 1.0)


class TestChecks:
    def test_shared_images(self) -> None:
        samples = questions(4)
        check_disjoint(samples[:2], samples[2:])
        with pytest.raises(ValueError, match="2 images are in the data and in the calibration data, such as '1'"):
            check_disjoint(samples[:3], samples[1:])

    def test_metrics_that_do_not_suit(self, tmp_path: Path) -> None:
        data = str(write_data(tmp_path / "test.jsonl", "test", 3))
        options: dict[str, Any] = {"columns": None, "limit": None, "seed": 0}
        assert load_scorable(data, metric_name="anls", **options) == load_samples(data)
        with pytest.raises(ValueError, match="line 1: .*choice"):
            load_scorable(data, metric_name="choice_accuracy", **options)
        with pytest.raises(ValueError, match="best.*exact_match"):
            load_scorable(data, metric_name="best", **options)

    def test_other_splits(self) -> None:
        assert other_split("scenes") == "scenes:calibration"
        assert other_split("easy-vqa") == other_split("easy-vqa:test") == "easy-vqa:train"
        with pytest.raises(
            ValueError, match="nothing tells which go with 'my.jsonl': name other questions as `calibration_data`"
        ):
            other_split("my.jsonl")

    def test_retentions(self) -> None:
        assert check_retentions([0.64, 0.35, 0.64]) == [0.64, 0.35]
        for wrong in ([0.0], [1.0], [64.0], [0.5, -0.1], [math.nan]):
            with pytest.raises(ValueError, match="The average retention is .*: pass a fraction"):
                check_retentions(wrong)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, embedded_pair_path: Path) -> list[str]:
    """An evaluation of 16 questions, answered four at a time; where to is still missing."""
    folder = tmp_path_factory.mktemp("data")
    data, calibration = (
        write_data(folder / "test.jsonl", "test", 16),
        write_data(folder / "c.jsonl", "calibration", 12),
    )
    arguments = ["evaluate", str(embedded_pair_path), "--data", str(data), "--calibration", str(calibration)]
    arguments += ["--methods", "large,sgl,random", "--retention", "0.35", "--batch-size", "4"]
    return [*arguments, "--keep-accuracy", "0.5", "--max-new-tokens", "4", "--device", "cpu", "--out"]


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*command, str(out)]) == 0
    return out


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def all_but_time(folder: Path) -> list[dict[str, Any]]:
    return [{**record, "seconds": None} for record in records(folder)]


@pytest.mark.slow
class TestCommand:
    def test_what_comes_of_it(self, uninterrupted: Path) -> None:
        names = {path.name for path in uninterrupted.iterdir()}
        assert names == {
            "by_small_answer.md",
            "calibration",
            "costs.jsonl",
            "figure.png",
            "run.json",
            "samples.jsonl",
            "speed.json",
            "summary.json",
            "table.md",
        }
        summary = json.loads((uninterrupted / "summary.json").read_text())
        found = [(row["method"], row["target_retention"]) for row in summary["rows"]]
        assert found == [("large", None), ("sgl", 0.35), ("random", 0.35)]
        assert summary["num_samples"] == summary["num_images"] == 16
        (threshold,) = summary["thresholds"]["sgl"]
        run_facts = json.loads((uninterrupted / "run.json").read_text())
        assert run_facts["thresholds"] == summary["thresholds"]
        assert len(records(uninterrupted)) == 16 * 3
        assert len({(r["method"], r["average_retention"], r["sample"]) for r in records(uninterrupted)}) == 16 * 3
        of_pair = [record for record in records(uninterrupted) if record["method"] == "sgl"]
        assert all(record["exited_early"] == (record["decision_score"] >= threshold) for record in of_pair)

    def test_killed_and_resumed_it_says_the_same(
        self, command: list[str], uninterrupted: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        started = subprocess.Popen(
            [sys.executable, "-m", "transformers_sgl", *command, str(out)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        file = out / "samples-0.jsonl"
        try:
            for _ in range(20_000):
                if file.exists() and file.read_bytes().count(b"\n") >= 4 * 3:
                    break
                assert started.poll() is None
                time.sleep(0.005)
        finally:
            started.send_signal(signal.SIGKILL)
            started.wait()
        left = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        assert 4 * 3 <= len(left) < 16 * 3
        assert not (out / "summary.json").exists()

        assert main([*command, str(out)]) == 0
        assert (out / "summary.json").read_bytes() == (uninterrupted / "summary.json").read_bytes()
        assert all_but_time(out) == all_but_time(uninterrupted)
        seconds = {(r["method"], r["average_retention"], r["sample"]): r["seconds"] for r in records(out)}
        for record in left[: len(left) - len(left) % 12]:  # what whole batches had left was not done again
            key = record["method"], record["average_retention"], record["sample"]
            assert seconds[key] == record["seconds"]

    def test_two_processes_say_the_same_as_one(self, command: list[str], uninterrupted: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        found = subprocess.run(
            [*launcher, "-m", "transformers_sgl", *command, str(out)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, found.stderr[-3000:]
        assert (out / "summary.json").read_bytes() == (uninterrupted / "summary.json").read_bytes()
        assert all_but_time(out) == all_but_time(uninterrupted)
        assert found.stdout.count("| large |") == 1  # one of them tells

    def test_a_folder_of_another_run_is_left_alone(
        self,
        command: list[str],
        uninterrupted: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*arguments: Any, **kwargs: Any) -> None:
            raise AssertionError("a model was asked")

        monkeypatch.setattr("transformers_sgl.evaluation.methods.guided.SGP._generate", fail)
        monkeypatch.setattr("transformers_sgl.evaluation.methods.base.Pair.write", fail)
        before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
        for changed, name in ((["--retention", "0.64"], "runs"), (["--limit", "9"], "data_sha256")):
            assert main([*command, str(uninterrupted), *changed]) == 2
            assert f"another run, which differs in {name}: give another `out`" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()} == before


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("the models were loaded")

    monkeypatch.setattr("transformers_sgl.opening.open_pair", fail)


@pytest.mark.usefixtures("no_models")
class TestWrongArguments:
    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (["--methods", "large,best"], "There is no method 'best': take some of large, small"),
            (["--methods", "large,"], "There is no method ''"),
            *(
                (["--retention", wrong], f"--retention is {wrong!r}: write fractions")
                for wrong in ("much", "", "0.6,")
            ),
            (["--retention", "64"], "The average retention is 64.0: pass a fraction"),
            (["--metric", "bleu"], "bleu"),
            (["--metric", "choice_accuracy"], "line 1: "),
            (["--batch-size", "0"], "`batch_size` is 0: pass a whole number of 1 or more."),
            (["--limit", "0"], "`limit` is 0: pass a whole number of 1 or more"),
            (["--calibration-limit", "-1"], "`calibration_limit` is -1"),
            (["--seed", "-1"], "`seed` is -1: pass a whole number of 0 or more."),
            (["--max-new-tokens", "0"], "max_new_tokens"),
            (["--columns", "image"], "--columns is 'image': write ours=theirs"),
            (["--columns", "image=picture"], "has no columns to be named"),
            (["--data", "nothing.jsonl"], "There is no data file 'nothing.jsonl'"),
            (["--data", "nothing"], "The data set 'nothing' cannot be loaded"),
            (["--methods", "sgl"], "nothing tells which go with"),
            (["--methods", "sgl", "--calibration", "{data}"], "3 images are in the data and in the calibration data"),
            (
                ["--methods", "sgl", "--calibration", "{other}"],
                "There are 2 calibration questions, and to promise that",
            ),
            (["--methods", "sgl", "--calibration", "{other}", "--keep-accuracy", "1.5"], "keep_accuracy"),
            (["--out", "{data}"], "is a file, but a folder is needed"),
        ],
    )
    def test_they_are_said_in_a_sentence(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
    ) -> None:
        data, other = (
            write_data(tmp_path / "test.jsonl", "test", 3),
            write_data(tmp_path / "o.jsonl", "calibration", 2),
        )
        options = [option.format(data=data, other=other) for option in options]
        before = sorted(tmp_path.iterdir())
        arguments = ["evaluate", "pair", "--data", str(data), "--methods", "large", "--out", str(tmp_path / "out")]
        assert main([*arguments, *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("transformers-sgl: ")
        assert err.count("\n") == 1
        assert sentence in err
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize("missing", ["easy_vqa", "matplotlib"])
    def test_a_package_that_is_missing(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
    ) -> None:
        monkeypatch.setitem(sys.modules, missing, None)
        arguments = ["evaluate", "pair", "--data", "easy-vqa", "--methods", "large", "--out", str(tmp_path / "out")]
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "run `pip install" in err

    def test_help_names_all_there_is(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "2000")
        assert main(["evaluate", "--help"]) == 0
        text = capsys.readouterr().out
        listed = re.search(r"Methods: ([^.]*)\.", text)
        assert listed is not None
        assert listed[1].split(", ") == list(METHODS)
        assert set(METRICS) <= set(re.findall(r"\w+", text))


def test_stopped_by_hand_it_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **kwargs: Any) -> None:
        run(tmp_path / "out", runs_of(one=Fake(stop_before=9)))

    monkeypatch.setattr("transformers_sgl.opening.open_pair", stopped)
    data = write_data(tmp_path / "test.jsonl", "test", 1)
    arguments = ["evaluate", "pair", "--data", str(data), "--methods", "large", "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    expected = "transformers-sgl: Stopped after 2 of 3 batches; the same command goes on from there.\n"
    assert capsys.readouterr().err.endswith(expected)
