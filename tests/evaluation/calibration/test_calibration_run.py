from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hub_stub import HubStub
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.evaluation import Scenes
from transformers_sgl.evaluation.calibration import Record
from transformers_sgl.evaluation.calibration.calibrate import run_facts
from transformers_sgl.evaluation.calibration.run import run_samples
from transformers_sgl.evaluation.data import Sample, read_samples
from transformers_sgl.evaluation.methods import Pair
from transformers_sgl.storage import files
from transformers_sgl.storage.files import write_atomically


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "dot.png"
    path.parent.mkdir()
    Image.new("RGB", (8, 8)).save(path)
    return path


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


class FakeInputs(dict[str, Any]):
    def to(self, *args: Any, **kwargs: Any) -> FakeInputs:
        return self


class FakePair:
    """A pair and its processor in one: answers question `i` with the number `i`, and counts what it is asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, stop_before: int | None = None) -> None:
        self.config, eos = SimpleNamespace(), SimpleNamespace(eos_token_id=None)
        self.large = self.small = SimpleNamespace(dtype=torch.float32, generation_config=eos)
        self.generation_config = SGLGenerationConfig(retention_ratio=0.25)
        self.small_processor = self.tokenizer = self
        self.asked: list[list[int]] = []
        self.asked_for_exits: list[list[int]] = []
        self.stop_before = stop_before

    def get_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, chats: list[Any], **kwargs: Any) -> FakeInputs:
        questions = [int(chat[0]["content"][1]["text"]) for chat in chats]
        assert all(isinstance(chat[0]["content"][0]["image"], Image.Image) for chat in chats)
        return FakeInputs(input_ids=torch.tensor(questions)[:, None])

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        asked = input_ids[:, 0].tolist()
        if self.stop_before in asked:
            raise KeyboardInterrupt
        assert kwargs["early_exit_threshold"] == 0 or kwargs["early_exit_threshold"] > 1
        (self.asked if kwargs["early_exit_threshold"] else self.asked_for_exits).append(asked)
        score = input_ids[:, 0] / 64
        return SimpleNamespace(
            sequences=input_ids.repeat(1, 2),
            draft_sequences=input_ids // 2,
            exited_early=torch.zeros(len(asked), dtype=torch.bool),
            num_draft_tokens_accepted=None,
            average_retention=lambda num_layers: torch.ones(len(asked)),
            decision_score=0.75 * score,
            draft_complete=input_ids[:, 0] % 4 > 0,
        )

    def batch_decode(self, sequences: torch.Tensor, **kwargs: Any) -> list[str]:
        return [f" {row[0]}" for row in sequences.tolist()]


def written(folder: Path) -> list[dict[str, Any]]:
    """The records, without the times that they took."""
    return [{**json.loads(line), "seconds": None} for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def ten_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pair, "num_layers", 10)


@pytest.fixture
def ten_samples(tmp_path: Path, picture: Path) -> list[Sample]:
    lines = ({"image": "images/dot.png", "question": str(i), "answers": [str(i), "0"]} for i in range(10))
    return read_samples(write_lines(tmp_path / "data.jsonl", *lines))


@pytest.mark.usefixtures("ten_layers")
class TestRun:
    facts: ClassVar = {"model": "fake", "max_new_tokens": 8}

    def run(self, pair: FakePair, samples: list[Sample], folder: Path, **facts: Any) -> list[Record]:
        return run_samples(Pair(pair, pair, 8), samples, folder, {**self.facts, **facts}, batch_size=4)

    def test_records_are_what_the_models_said(self, tmp_path: Path, ten_samples: list[Sample]) -> None:
        pair = FakePair()
        records = self.run(pair, ten_samples, tmp_path / "out" / "deep")
        assert pair.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert records[3] == Record(False, True, 2.25 / 64)
        assert [r.draft_right for r in records] == [True, True] + [False] * 8
        assert [index for index, r in enumerate(records) if not r.complete] == [0, 4, 8]
        lines = written(tmp_path / "out" / "deep")
        assert [line["sample"] for line in lines] == list(range(10))
        assert [line["decision_score"] for line in lines] == [r.decision_score for r in records]
        assert (lines[3]["draft"], lines[3]["answer"]) == ("1", "3")

    def test_a_choice_is_offered_and_may_be_made_by_its_letter(self, tmp_path: Path, picture: Path) -> None:
        prompts = []

        class ChoosingPair(FakePair):
            def apply_chat_template(self, chats: list[Any], **kwargs: Any) -> FakeInputs:
                prompts.extend(chat[0]["content"][1]["text"] for chat in chats)
                return FakeInputs(input_ids=torch.tensor([[2]]))

            def batch_decode(self, sequences: torch.Tensor, **kwargs: Any) -> list[str]:
                return ["B. a dot" if row[0] == 2 else "A" for row in sequences.tolist()]

        line = {"image": "images/dot.png", "question": "what?", "answer": "B", "choices": ["a line", "a dot"]}
        (record,) = self.run(
            ChoosingPair(), read_samples(write_lines(tmp_path / "data.jsonl", line)), tmp_path / "out"
        )
        assert (record.large_right, record.draft_right) == (True, False)
        assert set(prompts) == {"what?\nA. a line\nB. a dot"}

    def test_a_batch_is_on_disk_before_the_next_one_begins(
        self, tmp_path: Path, ten_samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair, seen = FakePair(), []
        generate = pair.generate

        def watched(**kwargs: Any) -> SimpleNamespace:
            file = tmp_path / "samples-0.jsonl"
            seen.append(len(file.read_text().splitlines()) if file.exists() else None)
            return generate(**kwargs)

        monkeypatch.setattr(pair, "generate", watched)
        self.run(pair, ten_samples, tmp_path)
        assert seen == [None, 0, 4, 8]

    def test_it_is_asked_once_whether_the_pair_can_exit_at_all(
        self, tmp_path: Path, ten_samples: list[Sample]
    ) -> None:
        pair = FakePair()
        self.run(pair, ten_samples, tmp_path)
        assert pair.asked_for_exits == [[0]]

    def test_it_goes_on_where_it_was_stopped(self, tmp_path: Path, ten_samples: list[Sample]) -> None:
        whole = self.run(FakePair(), ten_samples, tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt, match="Stopped after 2 of 3 batches; the same command goes on"):
            self.run(FakePair(stop_before=9), ten_samples, tmp_path / "cut")
        pair = FakePair()
        assert self.run(pair, ten_samples, tmp_path / "cut") == whole
        assert pair.asked == [[8, 9]]
        assert written(tmp_path / "cut") == written(tmp_path / "whole")
        pair = FakePair()
        assert self.run(pair, ten_samples, tmp_path / "cut") == whole
        assert pair.asked == []

    @pytest.mark.parametrize("num_bytes", [1, 30])
    def test_a_half_written_line_is_run_again(self, tmp_path: Path, ten_samples: list[Sample], num_bytes: int) -> None:
        whole = self.run(FakePair(), ten_samples, tmp_path)
        file, before = tmp_path / "samples.jsonl", written(tmp_path)
        file.write_bytes(file.read_bytes()[:-num_bytes])
        pair = FakePair()
        assert self.run(pair, ten_samples, tmp_path) == whole
        assert pair.asked == [[8, 9]]
        assert written(tmp_path) == before

    def test_another_run_is_refused_and_untouched(self, tmp_path: Path, ten_samples: list[Sample]) -> None:
        self.run(FakePair(), ten_samples, tmp_path)
        (tmp_path / "samples.jsonl").write_bytes((tmp_path / "samples.jsonl").read_bytes()[:-5])
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match="differs in max_new_tokens and seed: give another `out`, or delete"):
            self.run(FakePair(), ten_samples, tmp_path, max_new_tokens=9, seed=0)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    @pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
    def test_a_damaged_run_json_is_refused(self, tmp_path: Path, ten_samples: list[Sample], content: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be read as the record of a run: give another `out`"):
            self.run(FakePair(), ten_samples, tmp_path)

    def test_records_of_an_unknown_run_are_refused(self, tmp_path: Path, ten_samples: list[Sample]) -> None:
        (tmp_path / "samples.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match="no run.json that says what they are of"):
            self.run(FakePair(), ten_samples, tmp_path)
        assert not (tmp_path / "run.json").exists()

    @pytest.mark.parametrize("line", ["{}", "[]", "half a li", '{"sample": 12}'])
    def test_a_damaged_record_is_named(self, tmp_path: Path, ten_samples: list[Sample], line: str) -> None:
        self.run(FakePair(), ten_samples, tmp_path)
        file = tmp_path / "samples.jsonl"
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        with pytest.raises(ValueError, match="samples.jsonl', line 2: this is no record of a sample .*; delete the"):
            self.run(FakePair(), ten_samples, tmp_path)

    def test_a_pair_that_scores_nothing_is_refused(
        self, tmp_path: Path, ten_samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def generate(*args: Any, **kwargs: Any) -> SimpleNamespace:
            return SimpleNamespace(
                **{**vars(answer(*args, **kwargs)), "draft_sequences": None, "decision_score": None}
            )

        pair = FakePair()
        answer = pair.generate
        monkeypatch.setattr(pair, "generate", generate)
        with pytest.raises(ValueError, match="data.jsonl', line 1: the small model did not answer"):
            self.run(pair, ten_samples, tmp_path)

    def test_a_score_that_is_no_number_is_refused(
        self, tmp_path: Path, ten_samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = FakePair()
        generate = pair.generate

        def broken(**kwargs: Any) -> SimpleNamespace:
            output = generate(**kwargs)
            output.decision_score[output.decision_score == 1.5 / 64] = math.nan
            return output

        monkeypatch.setattr(pair, "generate", broken)
        with pytest.raises(ValueError, match="data.jsonl', line 3: the decision score is nan"):
            self.run(pair, ten_samples, tmp_path)

    def test_a_damaged_image_is_named_when_it_is_its_turn(
        self, tmp_path: Path, picture: Path, ten_samples: list[Sample]
    ) -> None:
        picture.write_bytes(picture.read_bytes()[:40])
        with pytest.raises(OSError, match="data.jsonl', line 1: .* which cannot be read as an image"):
            self.run(FakePair(), ten_samples, tmp_path)


def test_the_embedded_pair_says_what_it_would_return(tmp_path: Path, embedded_pair_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    processor = AutoProcessor.from_pretrained(embedded_pair_path)
    samples = []
    for index, scene in enumerate(Scenes("test", seed=4, questions_per_scene=2, length=6)):
        scene.image.save(tmp_path / f"{index}.png")
        samples += [Sample(tmp_path / f"{index}.png", q.question, (q.answer,)) for q in scene.questions]

    def run(name: str, **fields: Any) -> list[Record]:
        model.generation_config.update(**fields)
        return run_samples(Pair(model, processor, 20), samples, tmp_path / name, {}, batch_size=5)

    # Whether something is pruned, and whether the pair exits early already, makes no difference to what is scored.
    pruned = run("pruned")
    whole = run("whole", retention_ratio=1.0, early_exit_threshold=0.0)
    of_pruned, of_whole = written(tmp_path / "pruned"), written(tmp_path / "whole")
    assert [line["draft"] for line in of_pruned] == [line["draft"] for line in of_whole]
    assert [r.decision_score for r in pruned] == pytest.approx([r.decision_score for r in whole], abs=1e-4)
    assert all(r.complete for r in pruned)
    assert len({r.decision_score for r in pruned}) == len(samples)
    for lines, ratio in ((of_pruned, 0.2), (of_whole, 1.0)):
        for line, sample in list(zip(lines, samples, strict=True))[::4]:
            inputs = Pair(model, processor).inputs(processor, [sample], [sample.open_image()])
            answer = model.generate(**inputs, max_new_tokens=20, early_exit_threshold=2.0, retention_ratio=ratio)
            answer = answer[0, inputs["input_ids"].shape[1] :]
            assert processor.decode(answer, skip_special_tokens=True) == line["answer"]
    # A draft of two tokens with its end is whole; one that wanted to go on is not returned.
    short = run("short", guidance_max_new_tokens=2)
    assert {r.complete for r in short} == {True, False}
    tokenizer = processor.small_processor.tokenizer
    assert [r.complete for r in short] == [len(tokenizer(r["draft"])["input_ids"]) + 1 <= 2 for r in of_whole]


def test_facts_tell_apart_what_the_records_depend_on(tmp_path: Path) -> None:
    data, weights = tmp_path / "data.jsonl", tmp_path / "pair" / "large" / "model.safetensors"
    weights.parent.mkdir(parents=True)

    def facts(
        source: str = str(tmp_path / "pair"), limit: int = 8, content: str = "x", tensors: bytes = b"x", **fields: Any
    ) -> dict[str, Any]:
        data.write_text(content)
        weights.write_bytes(tensors)
        pair = FakePair()
        pair.generation_config.update(**fields)
        found = run_facts(pair, source, data, limit)
        assert json.loads(json.dumps(found)) == found
        return found

    first = facts()
    assert facts(early_exit_threshold=0.5) == first  # a second calibration is not another run
    assert facts(str(tmp_path / "pair" / "large" / "..")) == first
    with HubStub() as hub:
        hub.add_repo("org/pair", {"config.json": b"{}"})
        with hub.connected(tmp_path / "cache"):
            of_hub = facts("org/pair")
        assert of_hub["weights"] == hub.repos["org/pair"].branches["main"]
    for changed, name in (
        (of_hub, "model"),
        (facts(limit=9), "max_new_tokens"),
        (facts(content="y"), "data_sha256"),
        (facts(tensors=b"y"), "weights"),
        (facts(retention_ratio=0.5), "generation_config"),
    ):
        assert first[name] != changed[name]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    file = tmp_path / "settings.json"
    file.write_text("old")

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("settings.json", "old")]
