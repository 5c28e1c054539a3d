"""Both models wherever there is room: on one device or several, in memory or on disk, in one process or in several."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from tiny_models import answers, find_visual_tokens, prompts, samples, state, tiny_internvl
from torch import Tensor
from transformers import AutoModelForImageTextToText, pipeline

from transformers_sgl import SGLForConditionalGeneration, VisualTokenPruner

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "some exit early": {"retention_ratio": 0.4, "prune_layer": 2, "early_exit_threshold": 0.085},
    "pruned at layer 0": {"retention_ratio": 0.4, "prune_layer": 0},
    "draft only": {"retention_ratio": 1.0, "verify_draft": True},
    "pruned in the tower": {"vision_retention_ratio": 0.5, "vision_prune_layer": 0, "prune_layer": 2},
    "tiles left out, drafts confirmed": {"vision_retention_ratio": 0.5, "confirmation_threshold": 0.0},
}
LAYERS = "model.language_model.layers"
# Every other layer on disk, and both ends of the model in memory; and the other way round.
SPLIT = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "cpu",
    **{f"{LAYERS}.{number}": "disk" if number % 2 else "cpu" for number in range(4)},
}
SPLIT_INSIDE_OUT = {module: "cpu" if device == "disk" else "disk" for module, device in SPLIT.items()}


def tiny_pair() -> SGLForConditionalGeneration:
    # Two equal models: the draft fits as long as nothing is pruned, and no longer.
    return SGLForConditionalGeneration(large=tiny_internvl(num_layers=4), small=tiny_internvl(num_layers=4)).eval()


def results(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What does not depend on where the models are: tokens, choices and counts under all settings."""
    found = {}
    for name, settings in SETTINGS.items():
        output = pair.generate(**inputs, **GREEDY, **settings, num_draft_tokens=2, return_dict_in_generate=True)
        assert output.sequences.device == inputs["input_ids"].device
        fields = ("sequences", "keep_mask", "vision_keep_mask", "exited_early", "draft_confirmed")
        fields = (*fields, "num_draft_tokens_accepted")
        found[name] = {field: output[field].tolist() for field in fields if output.get(field) is not None}
        found[name]["passes"] = output.num_large_forward_passes
    return found


@pytest.fixture(scope="module")
def in_memory() -> dict[str, dict[str, Any]]:
    expected = results(tiny_pair(), prompts())
    # The settings must do what their names say, or the comparison would say nothing.
    assert any(expected["some exit early"]["exited_early"])
    assert not all(expected["some exit early"]["exited_early"])
    assert any(expected["draft only"]["num_draft_tokens_accepted"])
    return expected


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    tiny_pair().save_pretrained(folder)
    return folder


def hooked(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


# --- without a second device: weights on disk or in a state dict, fetched by accelerate's hooks ----------------------


@pytest.mark.parametrize(
    ("kind", "part"), [("cpu_offload", "large"), ("cpu_offload", "small"), ("disk_offload", "both")]
)
def test_offloaded_by_accelerate(kind: str, part: str, in_memory: Any, tmp_path: Path) -> None:
    pair = tiny_pair()
    module = pair if part == "both" else getattr(pair, part)
    if kind == "cpu_offload":
        accelerate.cpu_offload(module, torch.device("cpu"))
    else:
        accelerate.disk_offload(module, str(tmp_path), torch.device("cpu"))
    assert any(parameter.device.type == "meta" for parameter in module.parameters())
    pair.generate(**prompts(), **GREEDY)  # transformers installs hooks of its own in the first call
    before = state(pair), hooked(pair)
    assert results(pair, prompts()) == in_memory
    assert (state(pair), hooked(pair)) == before
    alone = samples(prompts())[1]  # and without padding
    assert torch.equal(pair.generate(**alone, **GREEDY), tiny_pair().generate(**alone, **GREEDY))


@pytest.mark.parametrize(
    ("placement", "offloaded"),
    [
        pytest.param({"device_map": "auto"}, "", id="auto"),
        pytest.param({"device_map": "cpu"}, "", id="cpu"),
        pytest.param({"device_map": {"": "disk"}}, "large small", id="disk"),
        pytest.param({"large_device_map": {"": "disk"}}, "large", id="large on disk"),
        pytest.param({"small_device_map": {"": "disk"}}, "small", id="small on disk"),
        pytest.param({"large_device_map": SPLIT, "small_device_map": {"": "cpu"}}, "large", id="large split"),
        pytest.param(
            {"large_device_map": SPLIT_INSIDE_OUT, "small_device_map": SPLIT}, "large small", id="both split"
        ),
        pytest.param({"device_map": "auto", "max_memory": {"cpu": "50KB"}}, "large small", id="little memory"),
        pytest.param({"device_map": "auto", "large_max_memory": {"cpu": "50KB"}}, "large", id="little for one"),
    ],
)
def test_device_maps_and_disk(placement: dict, offloaded: str, in_memory: Any, bundle: Path, tmp_path: Path) -> None:
    pair = AutoModelForImageTextToText.from_pretrained(bundle, **placement, offload_folder=tmp_path / "offload")
    for part in ("large", "small"):
        on_disk = any(parameter.device.type == "meta" for parameter in getattr(pair, part).parameters())
        assert on_disk == (part in offloaded)
    assert results(pair, prompts()) == in_memory


def test_dispatch_model(in_memory: Any, tmp_path: Path) -> None:
    pair = tiny_pair()
    accelerate.dispatch_model(pair.large, SPLIT, offload_dir=str(tmp_path / "large"), main_device="cpu")
    accelerate.dispatch_model(pair.small, SPLIT, offload_dir=str(tmp_path / "small"), main_device="cpu")
    assert results(pair, prompts()) == in_memory

    whole = tiny_pair()
    whole_map = {"large": "cpu", "small": "disk"}
    accelerate.dispatch_model(whole, whole_map, offload_dir=str(tmp_path / "whole"), main_device="cpu")
    assert results(whole, prompts()) == in_memory
    assert whole.hf_device_map == whole_map


def test_hooks_of_both_kinds_come_and_go_in_any_order(in_memory: Any) -> None:
    pair, inputs = tiny_pair(), prompts()
    accelerate.cpu_offload(pair.large, torch.device("cpu"))
    assert results(pair, inputs) == in_memory
    remove_hook_from_module(pair.large, recurse=True)
    assert hooked(pair) == []
    assert results(pair, inputs) == in_memory

    # Inside our own `with`, too: ours are forward hooks, accelerate's replace the modules' forward.
    tokens = find_visual_tokens(inputs)
    keep = tokens.prompt_keep_mask(torch.arange(tokens.num_visual_tokens).expand(tokens.valid.shape) % 3 == 0)
    with VisualTokenPruner(pair.large, keep, 2):
        expected = pair.large.generate(**inputs, **GREEDY)
        accelerate.cpu_offload(pair.large, torch.device("cpu"))
        assert torch.equal(pair.large.generate(**inputs, **GREEDY), expected)
        remove_hook_from_module(pair.large, recurse=True)
        assert torch.equal(pair.large.generate(**inputs, **GREEDY), expected)
    assert not torch.equal(pair.large.generate(**inputs, **GREEDY), expected)


def test_each_model_has_a_folder_of_its_own_for_what_is_written_anew(bundle: Path, tmp_path: Path) -> None:
    offload = tmp_path / "offload"
    AutoModelForImageTextToText.from_pretrained(bundle, device_map={"": "disk"}, offload_folder=offload)
    assert sorted(path.name for path in offload.iterdir()) == ["large", "small"]
    own = {"offload_folder": offload, "small_offload_folder": tmp_path / "elsewhere"}
    AutoModelForImageTextToText.from_pretrained(bundle, device_map={"": "disk"}, **own)
    assert (tmp_path / "elsewhere").is_dir()


def test_an_offloaded_pair_is_saved_whole(in_memory: Any, bundle: Path, tmp_path: Path) -> None:
    placement = {"large_device_map": SPLIT, "small_device_map": {"": "disk"}, "offload_folder": tmp_path / "offload"}
    AutoModelForImageTextToText.from_pretrained(bundle, **placement).save_pretrained(tmp_path / "saved")
    assert results(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved"), prompts()) == in_memory


# --- what transformers asks a placed model for -----------------------------------------------------------------------


def test_the_device_map_is_that_of_both_models(bundle: Path, tmp_path: Path) -> None:
    def load(**placement: Any) -> SGLForConditionalGeneration:
        return AutoModelForImageTextToText.from_pretrained(bundle, **placement, offload_folder=tmp_path)

    assert not hasattr(load(), "hf_device_map")
    assert load(device_map={"": "disk"}).hf_device_map == {"large": "disk", "small": "disk"}
    pair = load(large_device_map=SPLIT_INSIDE_OUT)
    assert pair.hf_device_map == {
        "small": torch.device("cpu"),
        **{f"large.{module}": device for module, device in SPLIT_INSIDE_OUT.items()},
    }
    # Pipelines send their inputs to the first device, which must be one.
    assert next(iter(pair.hf_device_map.values())) != "disk"


@pytest.mark.parametrize(
    "placement",
    [{"large_device_map": {"": "disk"}}, {"device_map": "auto"}],
    ids=str,
)
def test_a_pipeline_leaves_a_placed_model_where_it_is(
    placement: dict, embedded_pair_path: Path, tmp_path: Path
) -> None:
    options = {**placement, "offload_folder": tmp_path}
    pipe = pipeline("image-text-to-text", model=str(embedded_pair_path), model_kwargs=options)
    image = {"type": "image", "path": str(embedded_pair_path / "example.png")}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "describe the red triangle."}]}]
    answer = pipe(text=chat, max_new_tokens=16, return_full_text=False)
    assert answer[0]["generated_text"] == "a red triangle labelled B in the bottom left"


@pytest.mark.parametrize("part", ["large", "small"])
def test_an_offloaded_pair_refuses_to_be_moved(part: str, in_memory: Any, bundle: Path, tmp_path: Path) -> None:
    placement = {f"{part}_device_map": {"": "disk"}, "offload_folder": tmp_path}
    pair = AutoModelForImageTextToText.from_pretrained(bundle, **placement)
    for move in (lambda: pair.to("cpu"), lambda: pair.to(torch.float64), lambda: pair.cuda()):
        with pytest.raises(RuntimeError, match="offloaded to cpu or disk"):
            move()
    assert pair.large.dtype == pair.small.dtype == torch.float32  # nor was the other model moved
    assert results(pair, prompts()) == in_memory


def test_moving_and_casting_reach_both_models() -> None:
    pair = tiny_pair()
    casts: list[tuple[Callable[[], Any], torch.dtype]] = [
        (lambda: pair.to(torch.float64), torch.float64),
        (pair.half, torch.float16),
        (pair.float, torch.float32),
        (lambda: pair.to("cpu", dtype=torch.bfloat16), torch.bfloat16),
    ]
    for cast, dtype in casts:
        assert cast() is pair
        assert {parameter.dtype for parameter in pair.parameters()} == {dtype}
    assert {parameter.device.type for parameter in pair.to("meta").parameters()} == {"meta"}


# --- with CUDA -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "placement",
    [
        pytest.param({"large_device_map": 0, "small_device_map": "cpu"}, id="large"),
        pytest.param({"large_device_map": "cpu", "small_device_map": 0}, id="small"),
        pytest.param({"device_map": "auto"}, id="auto"),
        pytest.param(
            {"large_device_map": {**SPLIT, f"{LAYERS}.0": 0, f"{LAYERS}.2": 0}, "small_device_map": 0},
            id="large split",
        ),
        pytest.param(
            {"large_device_map": 0, "small_device_map": {**SPLIT, f"{LAYERS}.0": 0, f"{LAYERS}.2": 0}},
            id="small split",
        ),
        pytest.param({"device_map": "auto", "max_memory": {0: "50KB", "cpu": "1GB"}}, id="little memory"),
    ],
)
@pytest.mark.parametrize("where", ["cpu", "cuda:0"])
def test_cuda_beside_cpu_and_disk(placement: dict, where: str, in_memory: Any, bundle: Path, tmp_path: Path) -> None:
    pair = AutoModelForImageTextToText.from_pretrained(bundle, **placement, offload_folder=tmp_path)
    inputs = {name: value.to(where) for name, value in prompts().items()}
    assert results(pair, inputs) == in_memory


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "placement",
    [
        pytest.param({"large_device_map": 0, "small_device_map": 1}, id="one each"),
        pytest.param(
            {"large_device_map": {**dict.fromkeys(SPLIT, 1), f"{LAYERS}.0": 0, f"{LAYERS}.3": 0}}, id="split"
        ),
        pytest.param({"device_map": "balanced"}, id="balanced"),
    ],
)
def test_several_cuda_devices(placement: dict, in_memory: Any, bundle: Path) -> None:
    pair = AutoModelForImageTextToText.from_pretrained(bundle, **placement)
    inputs = {name: value.to("cuda:0") for name, value in prompts().items()}
    assert results(pair, inputs) == in_memory


# --- several processes -----------------------------------------------------------------------------------------------

WORKER = """
import json, sys
from accelerate import Accelerator
from accelerate.utils import gather_object
from tiny_models import answers, prompts
from transformers import AutoModelForImageTextToText

accelerator = Accelerator(cpu=True)
pair = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).to(accelerator.device)
found = []
with accelerator.split_between_processes(list(range(7))) as seeds:
    for seed in seeds:
        inputs = prompts(seed=seed)
        sequences = pair.generate(**inputs, **json.loads(sys.argv[2]))
        found.append((seed, accelerator.process_index, answers(sequences, inputs["input_ids"].shape[1])))
found = gather_object(found)
if accelerator.is_main_process:
    print("FOUND", json.dumps(found))
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_answer_as_one_does(bundle: Path, tmp_path: Path) -> None:
    settings = {**GREEDY, **SETTINGS["some exit early"]}
    (tmp_path / "worker.py").write_text(WORKER)
    # Without `--multi_gpu`, accelerate starts a single process on machines without GPUs.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [*launch, str(tmp_path / "worker.py"), str(bundle), json.dumps(settings)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("FOUND "))
    found = json.loads(line.removeprefix("FOUND "))

    pair = tiny_pair()
    expected = [
        answers(pair.generate(**prompts(seed=seed), **settings), prompts(seed=seed)["input_ids"].shape[1])
        for seed in range(7)
    ]
    assert [seed for seed, _, _ in found] == list(range(7))
    assert {process for _, process, _ in found} == {0, 1}
    assert [written for _, _, written in found] == expected
