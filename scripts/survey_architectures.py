"""Tries every architecture that transformers knows, and writes down what each can do.

    python scripts/survey_architectures.py

Every architecture is a tiny random model of its own configuration class, and has to keep the promises of
`tests/architectures/conformance.py` and `vision.py`: the same functions that the tests run. The result goes to
`benchmarks/results/architectures.json`, from which `scripts/render_tables.py` fills `docs/`. Run it with the oldest
and with the newest supported transformers: each version replaces only its own part of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from transformers_sgl import SGLConfig
from transformers_sgl.architectures import (
    ARCHITECTURES,
    UNSUPPORTED,
    AttentionPattern,
    attention_modules,
    attention_pattern,
    check_supported,
    decoder_layers,
    key_sources,
)
from transformers_sgl.evaluation.run_folder import measurement_record
from transformers_sgl.tokens.layouts import LAYOUTS, PLACELESS
from transformers_sgl.transformers_interface import processor_name
from transformers_sgl.vision_towers import NOT_PRUNABLE, UNVERIFIED, VISION_TOWERS

# The processors of types that transformers itself names none for; their checkpoints do.
PROCESSORS = {
    "fast_vlm": "LlavaProcessor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
}
FIELDS = ("guide", "guided", "images", "video", "vision")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from architectures import TINY, conformance, tiny_model, vision  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "architectures.json")
    parser.add_argument("--tables", action="store_true", help="only make the tables of earlier runs again")
    parser.add_argument("--towers", action="store_true", help="try vision towers only, and add that to an earlier run")
    parser.add_argument("--only", nargs="*", help="types of models to try, for a quick look: nothing is written")
    arguments = parser.parse_args()

    if arguments.tables:
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
        record["tables"] = tables(record["runs"], record.get("towers"))
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    names = [name for name in sorted(TINY) if is_supported(name)]
    for name in tqdm([name for name in names if arguments.only is None or name in arguments.only]):
        model_type = TINY[name].config(conformance.NUM_LAYERS).model_type
        found.setdefault(model_type, []).append({"vision": tower(name)} if arguments.towers else survey(name))
    if arguments.only is not None:
        print(json.dumps(found, indent=2))
        return
    record = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.exists() else {}
    runs = record.get("runs", {})
    run = runs.setdefault(transformers.__version__, {}) if arguments.towers else {}
    for model_type, variants in found.items():
        run.setdefault(model_type, {}).update(merged(variants))
    runs[transformers.__version__] = run
    # What only tried towers leaves the earlier run's versions and date as they are, and tells its own.
    head = {**record, "towers": measurement_record(0)} if arguments.towers else measurement_record(0)
    record = {**head, "runs": runs, "tables": tables(runs, head.get("towers"))}
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


def is_supported(name: str) -> bool:
    try:
        check_supported(TINY[name].config(conformance.NUM_LAYERS))
    except ValueError:
        return False
    return True


def survey(name: str) -> dict[str, Any]:
    """What a tiny model can do, and within which limits."""
    can: dict[str, bool | None] = {
        "guide": keeps(conformance.check_guides, name),
        "guided": keeps(conformance.check_is_guided, name) and keeps(conformance.check_pair, name),
        "images": keeps(conformance.check_identity, name),
        "video": None,
        "vision": tower(name),
    }
    if TINY[name].videos:
        checks = (conformance.check_identity, conformance.check_is_guided, conformance.check_pair)
        can["video"] = all(keeps(check, name, video=True) for check in checks)
    return {**can, "limits": limits(name)}


def tower(name: str) -> bool | None:
    """Whether its vision tower can leave out what is not kept; `None` where that is refused."""
    reads_tiles = name in vision.prunable()
    if not reads_tiles and name not in vision.prunable(packed=True):
        return None
    checks = (*vision.CHECKS, *vision.CHECKS_OF_TILES) if reads_tiles else vision.CHECKS
    return all(keeps(check, name, video=video) for check in checks for video in vision.modalities(name))


def keeps(check: Callable[..., None], *args: Any, **kwargs: Any) -> bool:
    """Whether a promise is kept."""
    try:
        check(*args, **kwargs)
    except Exception as error:
        print(f"{args}: {check.__name__}: {error!r}"[:300], file=sys.stderr)
        return False
    return True


def limits(name: str) -> list[str]:
    """What a user of the architecture should know."""
    model = tiny_model(name, conformance.NUM_LAYERS)
    attention, sources = attention_modules(model), key_sources(model.config)
    patterns = {attention_pattern(model, index) for index in attention}
    found = []
    if len(attention) < len(decoder_layers(model)):
        found += ["linear or convolution layers read the kept tokens alone", "no drafts"]
    elif patterns != {AttentionPattern()}:
        found += ["beyond a window: no drafts, no flash attention"]
    if sources:
        found += ["pruned from the shared layers' own keys on, or below"]
    if not TINY[name].batches_alike:
        found += ["one prompt at a time"]
    if "batch" in check_supported(model.config).inputs.values():
        found += ["a batch exits early as a whole"]
    return found


def merged(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """One row for all variants of an architecture: it can do what each of them can."""
    row: dict[str, Any] = {}
    if "limits" in variants[0]:
        row["limits"] = list(dict.fromkeys(limit for each in variants for limit in each["limits"]))
    for field in (each for each in FIELDS if each in variants[0]):
        values = [each[field] for each in variants if each[field] is not None]
        row[field] = all(values) if values else None
    return row


def tables(runs: dict[str, Any], towers: dict[str, Any] | None = None) -> dict[str, Any]:
    """The tables of docs/architectures.md: what is supported, and why the rest is not."""
    words = {True: "yes", False: "no", None: "-"}
    newest_first = sorted(runs, key=lambda version: tuple(map(int, version.split("."))), reverse=True)
    rows = []
    for model_type in sorted(ARCHITECTURES):
        # What one release cannot run by itself is told of the release before.
        found = next((runs[version][model_type] for version in newest_first if model_type in runs[version]), None)
        if found is None:
            continue
        passed = [version for version in reversed(newest_first) if passes(runs[version].get(model_type))]
        rows.append(
            [
                f"`{model_type}`",
                *(words[found[field]] for field in FIELDS[:-1]),
                words[bool(found.get("vision"))],
                words[other_families(model_type)],
                ", ".join(".".join(version.split(".")[:2]) for version in passed),
                "; ".join(found["limits"]),
            ]
        )
    columns = ["architecture", "guide", "guided", "images", "video", "vision tower"]
    columns += ["across families", "transformers", "limits"]
    types = {config.model_type for config in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING} - {
        SGLConfig.model_type
    }
    caption = (
        f"{len(rows)} of the {len(types)} types that answer to `AutoModelForImageTextToText`. "
        "Tiny random models of each architecture's own configuration class. Guide: its importance equals the sum of "
        "its eager attentions; guided: pruned, it writes what it writes with the dropped tokens masked, in batches as "
        "alone, with drafts and early exits; across families: it is known which part of an image each of its tokens "
        "stands for; video: not every one that the processor takes was tried; vision tower: it can leave out tiles "
        "and patches, with everything kept it is stock's to the last bit, and a batch encodes and writes what its "
        "samples do."
    )
    if towers is not None:
        versions = ", ".join(f"{name} {version}" for name, version in towers["versions"].items())
        caption += f" The vision towers were tried by themselves, with {versions}, on {towers['date']}."
    reasons = [
        [f"`{model_type}`", UNSUPPORTED[model_type]] for model_type in sorted(UNSUPPORTED) if model_type in types
    ]
    return {
        "architectures": {"columns": columns, "rows": rows, "caption": caption},
        "unsupported-architectures": {
            "columns": ["architecture", "not supported, because"],
            "rows": reasons,
            "caption": f"{len(reasons)} types are refused, each with this reason.",
        },
        "unpruned-towers": {
            "columns": ["architecture", "its vision tower makes everything, because"],
            "rows": [
                [f"`{model_type}`", NOT_PRUNABLE.get(model_type, UNVERIFIED)]
                for model_type in sorted(ARCHITECTURES.keys() - VISION_TOWERS.keys())
            ],
            "caption": "Settings of the vision tower are refused with this reason; all else works.",
        },
    }


def passes(found: dict[str, Any] | None) -> bool:
    """Whether every promise is kept."""
    return found is not None and all(found.get(field) is not False for field in FIELDS)


def other_families(model_type: str) -> bool:
    """Whether the boxes of an architecture's visual tokens are known."""
    name = PROCESSORS.get(model_type, processor_name(model_type))
    return name in LAYOUTS and name not in PLACELESS


if __name__ == "__main__":
    main()
