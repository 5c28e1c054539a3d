"""Loads mutated bundles and recipes, each in a process of its own with little time and memory, and prints the outcome.

Run by `test_mutated_pairs.py`, as a script: a fork of the test's own process would inherit whatever ran there before.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import tiny_family_pair
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.hub import validate

SECONDS, BYTES = 10, 2 * 2**30

# Missing, null, of a wrong type, huge, negative, and what leads to code where code can be named.
MISSING = object()
OTHERS: list[Any] = [
    *(MISSING, MISSING, None, None),
    *("text", "", True, 1.5, [], {}, ["text"], [1, 2, 3], {"text": 1}, {"0": {}}, "load", float("nan")),
    *(10**6, 5_000, 10**9, 2**31, 2**63, 10**30, 1e300, -1, -(10**9), 0, -1.5),
    *("evil.Evil", "some/repository--evil.Evil", "some/kernel", "weights.bin", "../../weights.bin", "./large"),
]
# Settings that are not in the files, and would lead somewhere.
MORE: dict[str, Any] = {
    "_attn_implementation": "some/kernel",
    "_attn_implementation_internal": "some/kernel",
    "_experts_implementation": "some/kernel",
    "attn_implementation": {"text_config": "some/kernel"},
    "audio_tokenizer": {"audio_tokenizer_class": "BertModel", "audio_tokenizer_name_or_path": "./large"},
    "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor"), "evil.Evil"),
    "configuration_files": ["config.json", "other.json"],
    "custom_generate": "./large",
    "fusion_config": {"patch_embeddings": True},
    "num_labels": 10**9,
    "per_layer_config": {"0": {"hidden_size": 10**9}},
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "transformers_weights": "weights.bin",
    "trust_remote_code": True,
}


def places(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value in a JSON value is, the outermost included."""
    yield keys
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in entries:
        yield from places(each, (*keys, key))


def mutate_json(path: Path, rng: random.Random) -> str:
    """Changes one value, and tells which."""
    text = path.read_text(encoding="utf-8")
    if rng.random() < 0.06:
        broken = rng.choice(["", "{", "[]", "null", "5", text[: rng.randrange(len(text))], "[" * 10**5, "\0", "é"])
        path.write_text(broken, encoding="latin-1")
        return f"is {broken[:10]!r}..."
    content = json.loads(text)
    if rng.random() < 0.1:
        inner = rng.choice([keys for keys in places(content) if isinstance(at(content, keys), dict)])
        key = rng.choice(sorted(MORE))
        at(content, inner)[key] = copy.deepcopy(MORE[key])
        path.write_text(json.dumps(content), encoding="utf-8")
        return f"{'.'.join(map(str, inner))} has {key}"
    keys = rng.choice([keys for keys in places(content) if keys])
    parent, old, new = at(content, keys[:-1]), at(content, keys), rng.choice(OTHERS)
    if new is MISSING:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = [new] * len(old) if isinstance(old, list) and rng.random() < 0.5 else copy.deepcopy(new)
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{'.'.join(map(str, keys))} = {'nothing' if new is MISSING else new!r}"


def at(value: Any, keys: tuple[Any, ...]) -> Any:
    """The value at a place."""
    for key in keys:
        value = value[key]
    return value


def mutate_weights(path: Path, rng: random.Random) -> str:
    """Damages a file of weights, and tells how."""
    content, kind = (
        path.read_bytes(),
        rng.choice(["cut", "empty", "header", "bytes", "lacking", "other shape", "index"]),
    )
    length = int.from_bytes(content[:8], "little")
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header":
        path.write_bytes(rng.choice([0, 1, 2**40, 2**63]).to_bytes(8, "little") + content[8:])
    elif kind == "bytes":
        place = 8 + rng.randrange(length)
        path.write_bytes(content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :])
    elif kind in ("lacking", "other shape"):
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        if kind == "other shape":
            tensors[name] = torch.zeros(*tensor.shape, 2)
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        names = list(load_file(path))
        path.unlink()
        entry = rng.choice(["weights.bin", "../../weights.bin", "/dev/zero", "absent.safetensors", 5, None])
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, entry)}
        path.with_name("model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        kind = f"index of {entry}"
    return kind


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def write_originals(folder: Path) -> list[Path]:
    """A bundle of one family, one of two, and a recipe; beside the weights code that must not run."""
    found = []
    for name, families in {"one": ("internvl", "internvl"), "two": ("qwen2_vl", "llava")}.items():
        for part in tiny_family_pair(*families):
            part.save_pretrained(folder / name)
        found.append(folder / name)
    recipe = folder / "recipe"
    shutil.copytree(folder / "one", recipe)
    config = json.loads((recipe / "config.json").read_text(encoding="utf-8"))
    for part in ("large", "small"):
        del config[f"{part}_config"]
        config[part] = {"name_or_path": f"./{part}", "dtype": "float32", "attn_implementation": "sdpa"}
    (recipe / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (*found, recipe):
        for part in (path, path / "large", path / "small"):
            (part / "evil.py").write_text("import pathlib\npathlib.Path('trace').touch()\nclass Evil: pass\n")
            torch.save({"weight": Evil(Path("trace"))}, part / "weights.bin")
    return [*found, recipe]


def attempt(folder: Path, rng: random.Random) -> tuple[str, str]:
    """Loads a pair and its processor, by their own classes or by the Auto classes, and checks the folder."""
    models, processors = SGLForConditionalGeneration, SGLProcessor
    if rng.random() < 0.3:
        models, processors = AutoModelForImageTextToText, AutoProcessor
    steps = [lambda: models.from_pretrained(folder), lambda: processors.from_pretrained(folder)]
    if rng.random() < 0.3:
        steps.append(lambda: validate(folder))
    results = [result for result in map(outcome, steps) if result is not None]
    worst = next((result for result in results if result[0] != "refused"), None)
    if worst is not None:
        return worst
    return ("refused", " | ".join(message for _, message in results)) if results else ("loaded", "")


def outcome(step: Callable[[], Any]) -> tuple[str, str] | None:
    """What came of one step, and the error's message; `None` if it went well."""
    try:
        step()
    except BaseException as error:
        # transformers' own Auto classes read two of the files before this package is asked.
        frames = traceback.extract_tb(error.__traceback__)
        if not any("transformers_sgl" in frame.filename for frame in frames):
            return "stock", repr(error)
        if not isinstance(error, OSError | ValueError):
            return "traceback", "".join(traceback.format_exception(error)[-6:])
        return ("no sentence" if "\n" in str(error) else "refused"), str(error)
    return None


def run_case(originals: list[Path], number: int, seed: int) -> dict[str, Any]:
    """One case, in a child process."""
    rng = random.Random(f"{seed}-{number}")
    original = originals[number % len(originals)]
    folder = Path(tempfile.mkdtemp(dir=original.parent))
    shutil.copytree(original, folder, dirs_exist_ok=True)
    files = sorted(folder.rglob("*.json"))
    weights = sorted(folder.rglob("*.safetensors"))
    if rng.random() < 0.1:
        path = rng.choice(weights)
        change = mutate_weights(path, rng)
    else:
        path = rng.choice(files)
        change = mutate_json(path, rng)
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
        result = attempt(folder, rng)
        os.write(writing, json.dumps(result)[:60_000].encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    outcome, message = json.loads(answer) if answer else ("killed", "")
    if (folder / "trace").exists():
        outcome, message = "code ran", message
    name = str(path.relative_to(folder))
    shutil.rmtree(folder)
    return {
        "number": number,
        "pair": original.name,
        "file": name,
        "change": change,
        "outcome": outcome,
        "message": message.replace(str(folder), ""),
        "seconds": round(time.monotonic() - start, 2),
    }


def main() -> None:
    """Runs the cases, as many at a time as there are cores, and prints one line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        originals = write_originals(Path(folder))
        for path in originals:  # imports what the children need
            SGLForConditionalGeneration.from_pretrained(path)
            SGLProcessor.from_pretrained(path)
            validate(path)
        numbers = range(arguments.first, arguments.first + arguments.cases)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for result in pool.map(lambda number: run_case(originals, number, arguments.seed), numbers):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
