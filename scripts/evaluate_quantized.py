"""Measures what quantising the large model of the embedded pair costs in answers and saves in memory.

    pip install "transformers_sgl[quantization]"
    python scripts/evaluate_quantized.py

The same questions of easy-VQA's test split are answered with the large model in float32, in 8 bit (LLM.int8) and in
4 bit (NF4), each time by the large model alone and by the pair, guided and pruned as the preset "paper-35" says; the
small model stays in float32. An answer counts if it is the expected one to the letter. The differences to float32
come with a 95 % paired-bootstrap interval. The script fails if 4 bit costs more than two points.

Quantised is the text decoder: the vision encoder's layers are too narrow for blocks of 64 weights. The result goes to
`benchmarks/results/sgl_tiny_quantized.json`, from which `scripts/render_tables.py` fills `docs/`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from tiny_pair_evaluation import (
    MAX_NEW_TOKENS,
    Evaluation,
    Method,
    argument_parser,
    difference,
    percent,
    write_record,
)
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, PreTrainedModel

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.evaluation import load_samples
from transformers_sgl.evaluation.run_folder import measurement_record

NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
WEIGHTS: dict[str, BitsAndBytesConfig | None] = {
    "float32": None,
    "8 bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED),
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=NOT_QUANTIZED),
}
MOST_POINTS_LOST = 2.0


def main() -> None:
    arguments = argument_parser(__doc__, "sgl_tiny_quantized.json", limit=500).parse_args()

    easy = load_samples("easy-vqa")
    order = np.random.default_rng(arguments.seed).permutation(len(easy))[: arguments.limit]
    samples = [easy[index] for index in order]
    processor = AutoProcessor.from_pretrained(arguments.model)
    right: dict[str, dict[str, np.ndarray]] = {}
    megabytes: dict[str, list[float]] = {}
    for name, quantization_config in WEIGHTS.items():
        model = AutoModelForImageTextToText.from_pretrained(
            arguments.model, device_map=arguments.device, large_quantization_config=quantization_config
        )
        megabytes[name] = [round(size / 1e6, 2) for size in (weight_bytes(model.large), weight_bytes(model.small))]
        megabytes[name].append(round(model.get_memory_footprint() / 1e6, 2))
        evaluate = Evaluation(model, processor, arguments.batch_size)
        hits = evaluate(samples, {"large": evaluate.large_alone, "pair": guided(model)}, name)
        right[name] = {method: np.array(values, dtype=float) for method, values in hits.items()}

    versions = {**measurement_record(arguments.seed)["versions"], "bitsandbytes": version("bitsandbytes")}
    write_record(arguments, {"sgl-tiny-quantized": table(right, megabytes, arguments.seed)}, versions=versions)
    for method, hits in right["4 bit"].items():
        lost = percent(right["float32"][method]) - percent(hits)
        if lost > MOST_POINTS_LOST:
            raise AssertionError(f"4 bit costs {lost:.1f} points ({method}), more than {MOST_POINTS_LOST}.")


def guided(model: PreTrainedModel) -> Method:
    """The pair with the preset "paper-35"."""
    settings = SGLGenerationConfig.from_preset("paper-35", max_new_tokens=MAX_NEW_TOKENS)
    return lambda inputs, indices: model.generate(**inputs, generation_config=settings)


def weight_bytes(model: PreTrainedModel) -> int:
    """The bytes of a model's parameters and of the constants by which quantised ones are read."""
    total = 0
    for parameter in model.parameters():
        constants = [getattr(parameter, "SCB", None)]  # 8 bit: one factor for each row
        quant_state = getattr(parameter, "quant_state", None)  # 4 bit: one factor for each block
        if quant_state is not None:
            constants += [quant_state.absmax, quant_state.code]
        total += parameter.nbytes + sum(tensor.nbytes for tensor in constants if tensor is not None)
    return total


def table(right: dict[str, dict[str, np.ndarray]], megabytes: dict[str, list[float]], seed: int) -> dict[str, Any]:
    rows = []
    for name, hits in right.items():
        row: list[Any] = [name, *megabytes[name]]
        for method, values in hits.items():
            versus = "" if name == "float32" else difference(values, right["float32"][method], seed)
            row += [percent(values), versus]
        rows.append(row)
    return {
        "columns": [
            "large model's decoder",
            "large, MB",
            "small, MB",
            "memory footprint, MB",
            "large alone",
            "difference",
            "guided pair",
            "difference",
        ],
        "rows": rows,
        "caption": (
            f"Exact match in percent on {len(next(iter(right['float32'].values())))} questions of easy-VQA's test "
            "split; differences to float32 with their 95 % paired-bootstrap intervals. MB are those of the parameters "
            "with their quantisation constants; the memory footprint is what the pair's `get_memory_footprint` "
            "counts, parameters and buffers. Vision encoder, projector and token embeddings stay in float32."
        ),
    }


if __name__ == "__main__":
    main()
