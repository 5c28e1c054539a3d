"""Killed at any moment, a save, a publication, an evaluation and a calibration lose, double and halve nothing.

A copy of this process does the work and is killed with SIGKILL at a random moment, and another goes on, until one
comes to its end. What is there then is what undisturbed work leaves. `SGL_NUM_KILLS=50` kills each fifty times.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import HubStub
from killing import NUM_KILLS, Killer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from transformers_sgl import SGLForConditionalGeneration, SGLGenerationConfig
from transformers_sgl.evaluation import LargeCallBudget, Scenes, calibrate, evaluate
from transformers_sgl.hub import publish

pytestmark = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if ".saving-" not in name}


@pytest.fixture(scope="module")
def pair(embedded_pair_path: Path) -> tuple[PreTrainedModel, ProcessorMixin]:
    model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    return model, AutoProcessor.from_pretrained(embedded_pair_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for index in range(6):
        scene = Scenes("test", seed=6, size=64)[index]
        scene.image.save(folder / f"{index}.png")
        question = scene.questions[0]
        lines.append({"image": f"{index}.png", "question": question.question, "answer": question.answer})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "data.jsonl"


def test_a_save_over_an_earlier_one(pair: tuple[Any, Any], embedded_pair_path: Path, tmp_path: Path) -> None:
    model, processor = pair
    killer, older, newer = Killer(seed=1), tmp_path / "older", tmp_path / "newer"
    model.save_pretrained(older)
    processor.save_pretrained(older)
    changed = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.neg_()
    changed.generation_config = SGLGenerationConfig.from_preset("fast")

    def save(folder: Path) -> None:
        changed.save_pretrained(folder, max_shard_size="1MB")
        processor.save_pretrained(folder)

    seconds = killer.seconds(save, newer)
    save(shutil.copytree(older, tmp_path / "undisturbed"))
    whole = visible(tmp_path / "undisturbed")
    weights = [dict(each.state_dict()) for each in (model, changed)]

    def check(folder: Path) -> None:
        try:
            loaded = SGLForConditionalGeneration.from_pretrained(folder).state_dict()
        except OSError as error:
            assert "There is no finished pair" in str(error)  # noqa: PT017
            return
        assert any(all(torch.equal(loaded[name], each[name]) for name in each) for each in weights)

    while killer.kills < NUM_KILLS:
        folder = Path(shutil.copytree(older, tmp_path / f"killed-{killer.kills}"))
        killer.until_it_is_done(save, folder, seconds, check)
        assert contents(folder) == whole
        shutil.rmtree(folder)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStub]:
    with HubStub() as stub, stub.connected(tmp_path / "cache", token=stub.token):
        yield stub


def test_a_publication(hub: HubStub, embedded_pair_path: Path) -> None:
    killer, wanted = Killer(seed=2), visible(embedded_pair_path)
    upload = partial(publish, embedded_pair_path)
    seconds = killer.seconds(upload, "me/undisturbed")
    assert hub.repos["me/undisturbed"].files == wanted

    def check(name: str) -> None:
        repo = hub.repos.get(name)
        assert repo is None or repo.files in ({}, wanted)

    while killer.kills < NUM_KILLS:
        name = f"me/pair-{killer.kills}"
        killer.until_it_is_done(upload, name, seconds, check)
        assert hub.repos[name].files == wanted
        assert all(commit.files in ({}, wanted) for commit in hub.repos[name].commits.values())


def records(folder: Path) -> list[dict[str, Any]]:
    """Every record of an evaluation or a calibration, without the times that it tells."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{**line, "seconds": None} for line in lines]


def names(folder: Path) -> set[str]:
    return set(contents(folder))


def test_an_evaluation(pair: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    killer, undisturbed = Killer(seed=3), tmp_path / "undisturbed"
    options: dict[str, Any] = {"methods": ["large", "random"], "retentions": [0.35], "batch_size": 2}

    def run(out: Path) -> None:
        evaluate(pair, str(data), out=out, **options, max_new_tokens=2, device="cpu")

    seconds = killer.seconds(run, undisturbed)

    def check(out: Path) -> None:
        for name, content in visible(out).items():
            if name.endswith(".json"):
                json.loads(content)  # it is whole
            if name.endswith(".png"):
                assert content.endswith(b"IEND\xaeB`\x82")

    while killer.kills < NUM_KILLS:
        out = tmp_path / f"killed-{killer.kills}"
        killer.until_it_is_done(run, out, seconds, check)
        assert (out / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()
        assert records(out) == records(undisturbed)
        assert names(out) == names(undisturbed)


def test_an_evaluation_on_a_full_disk(pair: tuple[Any, Any], data: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stops the same writes as a full disk; where there is room again, it goes on."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    options: dict[str, Any] = {"methods": ["large"], "batch_size": 2, "max_new_tokens": 2, "device": "cpu"}
    evaluate(pair, str(data), out=undisturbed, **options)

    def run_into(limit: int) -> None:
        message = ""
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            evaluate(pair, str(data), out=out, **options)
        except OSError as error:
            message = str(error)
        assert "cannot be written: File too large. To go on, make room there" in message

    for limit, file in ((0, "run.json"), (1_000, "samples-0.jsonl"), (10_000, "figure.png")):
        Killer(seed=0).seconds(run_into, limit)
        assert visible(out).get(file, b"").count(b"\n") < 6
    evaluate(pair, str(data), out=out, **options)
    assert (out / "summary.json").read_bytes() == (undisturbed / "summary.json").read_bytes()
    assert records(out) == records(undisturbed)
    assert names(out) == names(undisturbed)


def test_a_calibration(data: Path, embedded_pair_path: Path, tmp_path: Path) -> None:
    killer = Killer(seed=4)
    calibrated = Path(shutil.copytree(embedded_pair_path, tmp_path / "pair"))
    before = contents(calibrated)

    def run(out: Path) -> None:
        settings = {"confidence": 0.2, "batch_size": 2, "max_new_tokens": 2, "device": "cpu"}
        calibrate(calibrated, data, LargeCallBudget(0.9), out=out, **settings)

    undisturbed = tmp_path / "undisturbed"
    seconds = killer.seconds(run, undisturbed)
    after = contents(calibrated)
    assert {name for name in after if after[name] != before[name]} == {"generation_config.json"}

    def check(_: Path) -> None:
        settings = visible(calibrated)
        assert {**settings, "generation_config.json": b""} == {**before, "generation_config.json": b""}
        assert settings["generation_config.json"] in (
            before["generation_config.json"],
            after["generation_config.json"],
        )

    while killer.kills < NUM_KILLS:
        (calibrated / "generation_config.json").write_bytes(before["generation_config.json"])
        out = tmp_path / f"killed-{killer.kills}"
        killer.until_it_is_done(run, out, seconds, check)
        assert contents(calibrated) == after
        assert records(out) == records(undisturbed)
        assert names(out) == names(undisturbed)
        for name in ("calibration.json", "generation_config.json"):
            assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
