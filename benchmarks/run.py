"""A run: one part after the other, each kept once it is measured.

The run owns a folder. A part that has been measured lies there as JSON and is not measured again by the next call, so
that a run that was cut off, or that may only take so long at a time, goes on where it was.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.parts.break_even import measure_break_even
from benchmarks.parts.decode import measure_decode
from benchmarks.parts.drafts import measure_drafts
from benchmarks.parts.end_to_end import measure_end_to_end
from benchmarks.parts.growth import measure_growth
from benchmarks.parts.growth_tiles import measure_growth_tiles
from benchmarks.parts.guidance import measure_guidance
from benchmarks.parts.methods import VISION_SETTINGS, count_operations, measure_methods, pair_settings
from benchmarks.parts.pairing import Pairing
from benchmarks.parts.prefill import measure_prefill
from benchmarks.parts.rounds import measure_passes, measure_rounds
from benchmarks.parts.selection import measure_selection
from benchmarks.parts.startup import measure_startup
from benchmarks.settings import PART_NAMES, BenchmarkSettings
from benchmarks.shapes import SHAPES
from benchmarks.uncomputed import weightless
from benchmarks.workbench import Workbench, count_visual_tokens, num_parameters
from transformers_sgl.architectures import decoder
from transformers_sgl.evaluation.run_folder import measurement_record
from transformers_sgl.storage.files import write_atomically
from transformers_sgl.storage.records import claim

__all__ = ["PARTS", "run_benchmark"]

# Where one thing grows, the others stand still here.
_GROWTH_TOKENS, _GROWTH_ANSWER = 512, 4
_LONG_ROUNDS = 3  # of what takes long


def run_benchmark(
    settings: BenchmarkSettings,
    parts: Sequence[str],
    folder: Path,
    pair: Path,
    announce: Callable[[str], None],
    failed: Callable[[str, Exception], None],
) -> Iterator[dict[str, Any]]:
    """Measures what has not been measured yet; a part that fails does not stop the others.

    Args:
        settings ([`BenchmarkSettings`]): What is measured; checked before.
        parts (sequence of `str`): Some of [`PARTS`].
        folder (`Path`): Gets a JSON file for each part; made if it does not exist.
        pair (`Path`): A saved pair, for the part that loads one.
        announce (`Callable`): Told the name of each part before it is measured.
        failed (`Callable`): Told the name of a part that failed, and the error.

    Yields:
        `dict`: After every part that was measured, and once if none was left, all that the folder holds: machine,
        versions, seed and date; `arguments`; and under `parts` what each found.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If the folder is another run's.
    """
    # As JSON has it, which is what it will be compared with.
    arguments = json.loads(json.dumps(asdict(settings)))
    measurement = measurement_record(settings.seed, settings.device)
    claim(folder, {"benchmark": arguments, "machine": measurement["machine"], "versions": measurement["versions"]})
    bench = Workbench(settings, pair)

    def record() -> dict[str, Any]:
        files = {name: folder / f"{name}.json" for name in PART_NAMES}
        found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
        return {**measurement, "num_threads": torch.get_num_threads(), "arguments": arguments, "parts": found}

    missing = [part for part in parts if not (folder / f"{part}.json").exists()]
    for part in missing:
        announce(part)
        gc.collect()
        try:
            measured = PARTS[part](bench)
        except Exception as error:  # whatever it is, it is this part's
            failed(part, error)
            continue
        write_atomically(folder / f"{part}.json", json.dumps(measured, indent=1) + "\n")
        yield record()
    if not missing:
        yield record()


# -------------------------------------------------------------------------------------------------------------- parts


def _startup(bench: Workbench) -> dict[str, Any]:
    return measure_startup(bench.pair, bench.settings.rounds)


def _guidance(bench: Workbench) -> dict[str, Any]:
    settings = bench.settings
    return measure_guidance(bench.small, bench.inputs(bench.small), settings.answer_tokens, settings.rounds)


def _prefill(bench: Workbench) -> dict[str, Any]:
    settings = bench.settings
    return measure_prefill(bench.large, bench.inputs(bench.large), settings.rounds, settings.seed)


def _decode(bench: Workbench) -> dict[str, Any]:
    settings, inputs = bench.settings, bench.inputs(bench.large)
    return measure_decode(bench.large, inputs, settings.answer_tokens, settings.rounds, settings.seed)


def _drafts(bench: Workbench) -> dict[str, Any]:
    settings, inputs = bench.settings, bench.inputs(bench.large)
    lengths = [length for length in settings.draft_lengths if bench.takes(inputs, length)]
    return measure_drafts(
        bench.large, inputs, lengths, settings.acceptances, bench.settings.sweep_rounds, settings.seed
    )


def _rounds_short(bench: Workbench) -> dict[str, Any]:
    return _rounds(bench, bench.pairing(), bench.settings.round_answers, bench.settings.sweep_rounds)


def _rounds_long_prompt(bench: Workbench) -> dict[str, Any]:
    settings = bench.settings
    return _rounds(bench, _long_pairing(bench), settings.round_answers[-1:], min(settings.sweep_rounds, _LONG_ROUNDS))


def _rounds_long_answer(bench: Workbench) -> dict[str, Any]:
    settings = bench.settings
    return _rounds(bench, bench.pairing(), settings.long_round_answers, min(settings.sweep_rounds, _LONG_ROUNDS))


def _rounds(bench: Workbench, pairing: Pairing, answer_lengths: Sequence[int], rounds: int) -> dict[str, Any]:
    settings = bench.settings
    lengths = [length for length in answer_lengths if bench.takes(pairing.inputs, length)]
    acceptances = settings.round_acceptances, settings.round_acceptances_once
    return measure_rounds(pairing, lengths, *acceptances, rounds, settings.seed)


def _passes(bench: Workbench) -> dict[str, Any]:
    pairings = (pairing for pairing in (bench.pairing(), _long_pairing(bench)) if bench.takes(pairing.inputs, 0))
    return measure_passes(pairings, bench.settings.draft_retention_ratios, seed=bench.settings.seed)


def _long_pairing(bench: Workbench) -> Pairing:
    return Pairing(bench.large, bench.small, bench.inputs_with(bench.settings.round_tokens))


def _end_to_end(bench: Workbench) -> dict[str, Any]:
    settings = bench.settings
    return measure_end_to_end(bench.pairing(), settings.answer_tokens, settings.rounds)


def _methods(bench: Workbench) -> dict[str, Any]:
    settings = bench.settings
    return measure_methods(
        bench.pairing(), settings.image_size, settings.answer_tokens, settings.rounds, settings.seed
    )


def _methods_flops(bench: Workbench) -> dict[str, Any]:
    """Of the unshrunk models, whatever the machine can hold."""
    settings = bench.settings
    large, small = weightless(settings.large), weightless(settings.small)
    pairing = Pairing(large, small, bench.inputs(large, batch_size=1))
    return count_operations(pairing, settings.image_size, settings.answer_tokens, settings.seed)


def _break_even_tokens(bench: Workbench) -> dict[str, Any]:
    def points() -> Iterator[tuple[float, Pairing, int]]:
        for image_size in bench.settings.sweep_image_sizes:
            pairing, answer_tokens = bench.pairing(image_size=image_size), bench.settings.answer_tokens
            if bench.takes(pairing.inputs, answer_tokens):
                yield count_visual_tokens(bench.large, pairing.inputs), pairing, answer_tokens

    return measure_break_even(points(), rounds=bench.settings.sweep_rounds, seed=bench.settings.seed)


def _break_even_answers(bench: Workbench) -> dict[str, Any]:
    settings, pairing = bench.settings, bench.pairing()
    lengths = [length for length in settings.sweep_answers if bench.takes(pairing.inputs, length)]
    points = ((length, pairing, length) for length in lengths)
    return measure_break_even(points, settings.sweep_series, settings.sweep_rounds, settings.seed)


def _break_even_sizes(bench: Workbench) -> dict[str, Any]:
    settings, left_out = bench.settings, {}
    family = SHAPES[settings.large].family
    counts = {name: num_parameters(name) for name, shape in SHAPES.items() if shape.family == family}
    # As large as is usual: above the small model, and up to twice the large one.
    least, most = counts[settings.small], 2 * counts[settings.large]
    larger = sorted((name for name, count in counts.items() if least < count <= most), key=counts.__getitem__)

    def points() -> Iterator[tuple[float, Pairing, int]]:
        for name in larger:
            bench.forget_all_but(settings.small, name)
            try:
                bench.model(name)
            except ValueError as error:  # too large for this machine
                left_out[name] = str(error)
                continue
            yield counts[name] / 1e9, bench.pairing(large=name), settings.answer_tokens

    found = measure_break_even(points(), rounds=bench.settings.sweep_rounds, seed=settings.seed)
    bench.forget_all_but(settings.small, settings.large)
    return {**found, "small_parameters": least / 1e9, "left_out": left_out}


def _growth_tokens(bench: Workbench) -> dict[str, Any]:
    def points() -> Iterator[tuple[PreTrainedModel, float, dict[str, Tensor], int]]:
        for number in bench.settings.growth_tokens:
            inputs = bench.inputs_with(number)
            if bench.takes(inputs, _GROWTH_ANSWER):
                yield bench.small, count_visual_tokens(bench.small, inputs), inputs, _GROWTH_ANSWER

    return measure_growth(points(), bench.settings.sweep_rounds)


def _growth_batches(bench: Workbench) -> dict[str, Any]:
    def points() -> Iterator[tuple[PreTrainedModel, float, dict[str, Tensor], int]]:
        for batch_size in bench.settings.growth_batches:
            inputs = bench.inputs_with(_GROWTH_TOKENS, batch_size)
            if bench.takes(inputs, _GROWTH_ANSWER):
                yield bench.small, batch_size, inputs, _GROWTH_ANSWER

    return measure_growth(points(), bench.settings.sweep_rounds)


def _growth_answers(bench: Workbench) -> dict[str, Any]:
    inputs = bench.inputs_with(_GROWTH_TOKENS)
    lengths = [length for length in bench.settings.growth_answers if bench.takes(inputs, length)]
    points = ((bench.small, length, inputs, length) for length in lengths)
    return measure_growth(points, bench.settings.sweep_rounds)


def _growth_tiles(bench: Workbench) -> dict[str, Any]:
    settings, tokens = bench.settings, count_visual_tokens(bench.small, bench.inputs_with(0))

    def points() -> Iterator[tuple[int, Pairing]]:
        for number in settings.growth_tiles:
            inputs = bench.inputs_with(number * tokens)
            if bench.takes(inputs, settings.answer_tokens):
                yield number, Pairing(bench.large, bench.small, inputs)

    chosen = {name: pair_settings()[name] for name in ("balanced", list(VISION_SETTINGS)[-1])}
    return measure_growth_tiles(points(), chosen, settings.answer_tokens, settings.sweep_rounds)


def _selection(bench: Workbench) -> dict[str, Any]:
    settings, width = bench.settings, decoder(bench.small).config.hidden_size
    inputs = bench.inputs_with(settings.selection_tokens)
    if not bench.takes(inputs, 1):
        raise ValueError("The prompt has more tokens than --max-tokens allows.")
    return measure_selection(bench.large, inputs, width, rounds=settings.sweep_rounds, seed=settings.seed)


PARTS: dict[str, Callable[[Workbench], dict[str, Any]]] = {
    "startup": _startup,
    "guidance": _guidance,
    "prefill": _prefill,
    "decode": _decode,
    "drafts": _drafts,
    "rounds-short": _rounds_short,
    "rounds-long-prompt": _rounds_long_prompt,
    "rounds-long-answer": _rounds_long_answer,
    "passes": _passes,
    "end-to-end": _end_to_end,
    "methods": _methods,
    "methods-flops": _methods_flops,
    "break-even-tokens": _break_even_tokens,
    "break-even-answers": _break_even_answers,
    "growth-tokens": _growth_tokens,
    "growth-batches": _growth_batches,
    "growth-answers": _growth_answers,
    "growth-tiles": _growth_tiles,
    "selection": _selection,
    "break-even-sizes": _break_even_sizes,  # last, because it makes other models
}
