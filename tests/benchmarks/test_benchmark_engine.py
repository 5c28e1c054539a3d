"""The benchmark of a pair on vLLM, as far as it needs no vLLM."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import engine
from transformers_sgl.opening import chat_inputs, open_pair, user_turn

ARGUMENTS = engine._parser().parse_args(["--out", "engine.json", "--large", "internvl-2b", "--small", "internvl-1b"])


def record(rounds: int) -> dict[str, Any]:
    arguments = {**vars(ARGUMENTS), "rounds": rounds, "shrink": 16, "shrink_depth": 4}
    loads = [engine._Load(seconds, [seconds / 2]) for seconds in (4.0, 5.0, 6.0)[:rounds]]
    alone = [engine._Load(seconds, [seconds]) for seconds in (8.0, 10.0, 18.0)[:rounds]]
    found = {"large": engine._told(alone, alone, 8), **{way: engine._told(loads, alone, 8) for way in engine.WAYS}}
    return {"arguments": arguments, "dtype": "float32", "versions": {"vllm": "0.32.0"}, "in_flight": {"8": found}}


def test_ratios_are_taken_round_by_round() -> None:
    found = record(3)["in_flight"]["8"]
    assert found["35%"]["throughput_over_large"] == {"median": 2.0, "min": 2.0, "max": 3.0}
    assert found["35%"]["first_token_speedup"] == {"median": 4.0, "min": 4.0, "max": 6.0}
    assert found["35%"]["requests_per_second"]["median"] == pytest.approx(8 / 5)
    assert found["large"]["throughput_over_large"]["median"] == 1.0


def test_tables_have_a_row_for_each_way_and_a_column_for_each_number_in_flight() -> None:
    tables = engine.tables(record(3))
    assert tables["engine-throughput"]["columns"] == ["in flight", "8"]
    assert [row[0] for row in tables["engine-throughput"]["rows"]] == list(engine.WAYS)
    assert tables["engine-throughput"]["rows"][1] == ["35%", "2.00"]
    assert tables["engine-first-token"]["rows"][1] == ["35%", "4.00"]
    assert "vLLM 0.32.0" in tables["engine-throughput"]["caption"]
    assert tables["engine-throughput"]["columns"] != engine.tables(record(1))["engine-throughput"]["columns"]


def test_a_load_keeps_so_many_requests_in_flight() -> None:
    running, most = 0, 0

    async def way(image: Any, index: int) -> float:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return float(index)

    load = asyncio.run(engine._load(way, iter(range(100)), 4, 10))
    assert most == 4
    assert load.first_token_s == [float(index) for index in range(10)]


def test_no_picture_is_made_twice() -> None:
    pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
    made = {engine._picture(pixels, number).tobytes() for number in (*range(300), 65536, 70000)}
    assert len(made) == 302
    assert int(pixels.sum()) == 0


def test_the_saved_pair_of_random_models_reads_tiles_of_the_published_size(tmp_path: Path) -> None:
    engine._save_pair(tmp_path / "pair", ARGUMENTS, 32, 12, "cpu")
    pair, processor = open_pair(tmp_path / "pair", device="cpu")
    image = Image.new("RGB", (896, 448))
    inputs = chat_inputs(pair, processor, [user_turn("what is it?", [image])])
    assert inputs["pixel_values"].shape == (3, 3, 448, 448)
    output = pair.generate(**inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
    assert output.num_visual_tokens.tolist() == [768]


def test_other_numbers_in_flight_are_added_to_a_run_of_the_same_kind(tmp_path: Path) -> None:
    kind = {"machine": "a machine", "seed": 0, "num_threads": 2}
    before, now, other = ({**record(rounds), **kind} for rounds in (3, 3, 1))
    now["arguments"] = {**now["arguments"], "in_flight": "128"}
    file = tmp_path / "engine.json"
    assert engine._measured_before(file, now) == {}
    file.write_text(json.dumps(before), encoding="utf-8")
    assert engine._measured_before(file, now) == before["in_flight"]
    assert engine._measured_before(file, other) == {}
