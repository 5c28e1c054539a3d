"""A run of the benchmark: random models of real shapes, one part after the other, each kept once it is measured.

The run owns a folder. A part that has been measured lies there as JSON and is not measured again by the next call, so
that a run that was cut off, or that may only take so long at a time, goes on where it was. The models are made when a
part first needs them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.architectures import check_supported, visual_tokens_of
from transformers_sgl.evaluation import benchmark
from transformers_sgl.evaluation.benchmark import Pairing
from transformers_sgl.evaluation.cost import available_memory
from transformers_sgl.evaluation.random_models import SHAPES, random_inputs, random_model
from transformers_sgl.evaluation.run_folder import claim, measurement_record
from transformers_sgl.evaluation.startup import measure_startup
from transformers_sgl.storage.files import write_atomically

__all__ = ["PARTS", "BenchmarkSettings", "check_settings", "find_parts", "run_benchmark"]

# How much of the memory that is left a model's weights may fill; the rest is for its work.
_USABLE = 0.9


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured.

    Attributes:
        large: The large model's shape, one of [`SHAPES`].
        small: The small model's, of the same family.
        shrink: By what the widths of both are divided.
        image_size: The picture's width and height in pixels.
        prompt_tokens: Text tokens behind it.
        answer_tokens: How many tokens either model writes.
        batch_size: How many prompts are read at once, in the parts that look at one model alone.
        rounds: How often each way is timed.
        sweep_rounds: The same at each point of the sweeps: drafts, break-even and growth.
        device: Where the models run.
        dtype: The weights' type, as PyTorch calls it.
        seed: What weights, images and answers are drawn from.
        max_tokens: Points of the sweeps with more tokens than this, answers included, are left out; 0 leaves out none.
        draft_lengths: Lengths of answers with verified drafts.
        acceptances: How probably a draft's token is right.
        sweep_image_sizes: Pictures, for where the break-even lies.
        sweep_answers: Lengths of answers, for where the break-even lies.
        growth_tokens: Visual tokens, for the growth of what guidance costs.
        growth_batches: Batch sizes, for the same.
        growth_answers: Lengths of answers, for the same.
    """

    large: str = "internvl-26b"
    small: str = "internvl-2b"
    shrink: int = 1
    image_size: tuple[int, int] = (896, 1344)
    prompt_tokens: int = 32
    answer_tokens: int = 16
    batch_size: int = 1
    rounds: int = 5
    sweep_rounds: int = 3
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    max_tokens: int = 0
    draft_lengths: tuple[int, ...] = (8, 64)
    acceptances: tuple[float, ...] = (0.0, 0.5, 0.8, 0.95, 1.0)
    sweep_image_sizes: tuple[tuple[int, int], ...] = ((448, 448), (448, 896), (896, 1344), (1344, 1792))
    sweep_answers: tuple[int, ...] = (1, 32, 128)
    growth_tokens: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    growth_batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    growth_answers: tuple[int, ...] = (1, 4, 16, 64, 256)


# Where one thing grows, the others stand still here.
_GROWTH_TOKENS, _GROWTH_ANSWER = 512, 4
_SWEEP_ACCEPTANCES = (None, 0.5, 0.8, 1.0)


def check_settings(settings: BenchmarkSettings) -> None:
    """Raises where something cannot be measured, before anything heavy is made.

    Args:
        settings ([`BenchmarkSettings`]): The settings.

    Raises:
        ValueError: If there is no such shape, the two do not belong together, or a number is out of range.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.benchmark_run import BenchmarkSettings, check_settings

        >>> check_settings(BenchmarkSettings("internvl-26b", "qwen2.5-vl-3b"))
        Traceback (most recent call last):
        ValueError: 'internvl-26b' and 'qwen2.5-vl-3b' cut images differently: name two shapes of one family.

        ```
    """
    for name in (settings.large, settings.small):
        if name not in SHAPES:
            raise ValueError(f"There is no shape {name!r}: name one of {', '.join(SHAPES)}.")
    if SHAPES[settings.large].family != SHAPES[settings.small].family:
        raise ValueError(
            f"{settings.large!r} and {settings.small!r} cut images differently: name two shapes of one family."
        )
    for name in ("shrink", "prompt_tokens", "answer_tokens", "batch_size", "rounds", "sweep_rounds"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`{name}` is {getattr(settings, name)}: pass a whole number of 1 or more.")
    for name in ("seed", "max_tokens"):
        if getattr(settings, name) < 0:
            raise ValueError(f"`{name}` is {getattr(settings, name)}: pass a whole number of 0 or more.")
    if min(settings.image_size) < 1:
        raise ValueError(f"The image size is {_size(settings.image_size)}: pass width and height, such as 896x1344.")


def find_parts(names: str) -> list[str]:
    """The parts that are asked for, in the order in which they are measured.

    Args:
        names (`str`): Names separated by commas; `"growth"` stands for all that begin so, `"all"` for every part.

    Returns:
        `list` of `str`: Keys of [`PARTS`].

    Raises:
        ValueError: If there is no such part.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.benchmark_run import find_parts

        >>> find_parts("prefill,growth")
        ['prefill', 'growth-tokens', 'growth-batches', 'growth-answers']

        ```
    """
    chosen: set[str] = set()
    for name in names.split(","):
        found = {part for part in PARTS if name == "all" or part == name or part.startswith(f"{name}-")}
        if not found:
            raise ValueError(f"There is no part {name!r} of the benchmark: name some of {', '.join(PARTS)}, or all.")
        chosen |= found
    return [part for part in PARTS if part in chosen]


def run_benchmark(
    settings: BenchmarkSettings,
    parts: Sequence[str],
    folder: Path,
    pair: Path,
    announce: Callable[[str], None] = lambda part: None,
) -> dict[str, Any]:
    """Measures what has not been measured yet, and returns all that was asked for.

    Args:
        settings ([`BenchmarkSettings`]): What is measured.
        parts (sequence of `str`): Keys of [`PARTS`].
        folder (`Path`): Gets a JSON file for each part; made if it does not exist.
        pair (`Path`): A saved pair, for the part that loads one.
        announce (`Callable`, *optional*): Told the name of each part that is measured now.

    Returns:
        `dict`: Machine, versions, seed and date; `arguments`; and under `parts` what each found.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If a setting cannot be measured, a model does not fit, or the folder is another run's.
    """
    check_settings(settings)
    # As JSON has it, which is what it will be compared with.
    arguments = json.loads(json.dumps(asdict(settings)))
    measurement = measurement_record(settings.seed, settings.device)
    claim(folder, {"benchmark": arguments, "machine": measurement["machine"], "versions": measurement["versions"]})
    bench, found = _Bench(settings, pair), {}
    for part in parts:
        file = folder / f"{part}.json"
        if not file.exists():
            announce(part)
            try:
                measured = PARTS[part](bench)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"The part {part!r} does not fit into the memory of {settings.device!r}: name smaller shapes, or "
                    "pass a larger --shrink or a --max-tokens; what was measured before is kept."
                ) from error
            write_atomically(file, json.dumps(measured, indent=1) + "\n")
        found[part] = json.loads(file.read_text(encoding="utf-8"))
    return {**measurement, "num_threads": torch.get_num_threads(), "arguments": arguments, "parts": found}


# -------------------------------------------------------------------------------------------------------------- parts


def _startup(bench: _Bench) -> dict[str, Any]:
    return measure_startup(bench.pair, bench.settings.rounds)


def _guidance(bench: _Bench) -> dict[str, Any]:
    settings = bench.settings
    return benchmark.measure_guidance(bench.small, bench.inputs(bench.small), settings.answer_tokens, settings.rounds)


def _prefill(bench: _Bench) -> dict[str, Any]:
    settings = bench.settings
    return benchmark.measure_prefill(bench.large, bench.inputs(bench.large), settings.rounds, settings.seed)


def _decode(bench: _Bench) -> dict[str, Any]:
    settings, inputs = bench.settings, bench.inputs(bench.large)
    return benchmark.measure_decode(bench.large, inputs, settings.answer_tokens, settings.rounds, settings.seed)


def _drafts(bench: _Bench) -> dict[str, Any]:
    settings, inputs = bench.settings, bench.inputs(bench.large)
    lengths = [length for length in settings.draft_lengths if bench.takes(inputs, length)]
    return benchmark.measure_drafts(
        bench.large, inputs, lengths, settings.acceptances, bench.settings.sweep_rounds, settings.seed
    )


def _end_to_end(bench: _Bench) -> dict[str, Any]:
    settings = bench.settings
    return benchmark.measure_end_to_end(bench.pairing(), settings.answer_tokens, settings.rounds)


def _break_even_tokens(bench: _Bench) -> dict[str, Any]:
    def points() -> Iterator[tuple[float, Pairing, int]]:
        for image_size in bench.settings.sweep_image_sizes:
            pairing, answer_tokens = bench.pairing(image_size=image_size), bench.settings.answer_tokens
            if bench.takes(pairing.inputs, answer_tokens):
                yield _num_visual_tokens(bench.large, pairing.inputs), pairing, answer_tokens

    return benchmark.measure_break_even(points(), rounds=bench.settings.sweep_rounds, seed=bench.settings.seed)


def _break_even_answers(bench: _Bench) -> dict[str, Any]:
    pairing = bench.pairing()
    lengths = [length for length in bench.settings.sweep_answers if bench.takes(pairing.inputs, length)]
    points = ((length, pairing, length) for length in lengths)
    return benchmark.measure_break_even(points, _SWEEP_ACCEPTANCES, bench.settings.sweep_rounds, bench.settings.seed)


def _break_even_sizes(bench: _Bench) -> dict[str, Any]:
    settings, left_out = bench.settings, {}
    family = SHAPES[settings.large].family
    counts = {name: _num_parameters(name) for name, shape in SHAPES.items() if shape.family == family}
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

    found = benchmark.measure_break_even(points(), rounds=bench.settings.sweep_rounds, seed=settings.seed)
    bench.forget_all_but(settings.small, settings.large)
    return {**found, "small_parameters": least / 1e9, "left_out": left_out}


def _growth_tokens(bench: _Bench) -> dict[str, Any]:
    def points() -> Iterator[tuple[PreTrainedModel, float, dict[str, Tensor], int]]:
        for number in bench.settings.growth_tokens:
            inputs = bench.inputs_with(number)
            if bench.takes(inputs, _GROWTH_ANSWER):
                yield bench.small, _num_visual_tokens(bench.small, inputs), inputs, _GROWTH_ANSWER

    return benchmark.measure_growth(points(), bench.settings.sweep_rounds)


def _growth_batches(bench: _Bench) -> dict[str, Any]:
    def points() -> Iterator[tuple[PreTrainedModel, float, dict[str, Tensor], int]]:
        for batch_size in bench.settings.growth_batches:
            inputs = bench.inputs_with(_GROWTH_TOKENS, batch_size)
            if bench.takes(inputs, _GROWTH_ANSWER):
                yield bench.small, batch_size, inputs, _GROWTH_ANSWER

    return benchmark.measure_growth(points(), bench.settings.sweep_rounds)


def _growth_answers(bench: _Bench) -> dict[str, Any]:
    inputs = bench.inputs_with(_GROWTH_TOKENS)
    lengths = [length for length in bench.settings.growth_answers if bench.takes(inputs, length)]
    points = ((bench.small, length, inputs, length) for length in lengths)
    return benchmark.measure_growth(points, bench.settings.sweep_rounds)


PARTS: dict[str, Callable[[_Bench], dict[str, Any]]] = {
    "startup": _startup,
    "guidance": _guidance,
    "prefill": _prefill,
    "decode": _decode,
    "drafts": _drafts,
    "end-to-end": _end_to_end,
    "break-even-tokens": _break_even_tokens,
    "break-even-answers": _break_even_answers,
    "growth-tokens": _growth_tokens,
    "growth-batches": _growth_batches,
    "growth-answers": _growth_answers,
    "break-even-sizes": _break_even_sizes,
}


# ------------------------------------------------------------------------------------------------- models and prompts


class _Bench:
    """The models of a run, made when they are first needed, and prompts for them.

    Args:
        settings ([`BenchmarkSettings`]): What is measured.
        pair (`Path`): A saved pair.
    """

    def __init__(self, settings: BenchmarkSettings, pair: Path) -> None:
        self.settings = settings
        self.pair = pair
        self._models: dict[str, PreTrainedModel] = {}

    @property
    def large(self) -> PreTrainedModel:
        return self.model(self.settings.large)

    @property
    def small(self) -> PreTrainedModel:
        return self.model(self.settings.small)

    def model(self, name: str) -> PreTrainedModel:
        if name not in self._models:
            settings, dtype = self.settings, getattr(torch, self.settings.dtype)
            needed = _num_parameters(name, settings.shrink) * dtype.itemsize
            left = available_memory(settings.device)
            if left is not None and needed > _USABLE * left:
                raise ValueError(
                    f"The weights of {name!r} take {needed / 2**30:.1f} GiB, but {left / 2**30:.1f} GiB of memory are "
                    "left: name a smaller shape, or pass a larger --shrink."
                )
            self._models[name] = random_model(name, settings.shrink, settings.device, dtype, settings.seed)
        return self._models[name]

    def forget_all_but(self, *names: str) -> None:
        """Gives back the memory of the other models."""
        self._models = {name: model for name, model in self._models.items() if name in names}
        gc.collect()
        if torch.device(self.settings.device).type == "cuda":
            torch.cuda.empty_cache()

    def inputs(
        self, model: PreTrainedModel, batch_size: int | None = None, image_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        settings = self.settings
        return random_inputs(
            model,
            image_size or settings.image_size,
            settings.prompt_tokens,
            batch_size or settings.batch_size,
            settings.seed,
        )

    def pairing(self, large: str | None = None, image_size: tuple[int, int] | None = None) -> Pairing:
        """Both models and one prompt."""
        model = self.model(large or self.settings.large)
        return Pairing(model, self.small, self.inputs(model, batch_size=1, image_size=image_size))

    def inputs_with(self, num_visual_tokens: int, batch_size: int = 1) -> dict[str, Tensor]:
        """Prompts for the small model with about so many visual tokens, exactly so many where images are tiles."""
        if check_supported(self.small.config).inputs == {"pixel_values": "tile"}:
            side = self.small.config.vision_config.image_size[0]
            inputs = self.inputs(self.small, batch_size, (side, side))
            number = num_visual_tokens // _num_visual_tokens(self.small, inputs)
            return _with_tiles(self.small, inputs, max(1, number))
        # Twice the tokens are an image twice as wide, or twice as high.
        doublings = (num_visual_tokens // 256).bit_length() - 1
        size = 448 * 2 ** (doublings - doublings // 2), 448 * 2 ** (doublings // 2)
        return self.inputs(self.small, batch_size, size)

    def takes(self, inputs: dict[str, Tensor], answer_tokens: int) -> bool:
        """Whether a point of a sweep is to be measured."""
        batch_size, length = inputs["input_ids"].shape
        limit = self.settings.max_tokens
        return limit == 0 or batch_size * (length + answer_tokens) <= limit


def _with_tiles(model: PreTrainedModel, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Prompts whose image is one tile, with so many of them instead."""
    tokens = visual_tokens_of(model.config, inputs)
    first, last = int(tokens.positions.min()), int(tokens.last_position.max())
    ids = inputs["input_ids"]
    image = ids[:, first : last + 1].repeat(1, number)
    input_ids = torch.cat([ids[:, :first], image, ids[:, last + 1 :]], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": inputs["pixel_values"].repeat_interleave(number, dim=0),
    }


def _num_visual_tokens(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    return visual_tokens_of(model.config, inputs).num_visual_tokens


def _num_parameters(name: str, shrink: int = 1) -> int:
    return int(random_model(name, shrink, "meta").num_parameters())


def _size(image_size: tuple[int, int]) -> str:
    return "x".join(map(str, image_size))
