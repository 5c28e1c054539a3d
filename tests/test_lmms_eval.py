"""The pair as a model of lmms-eval, which has to be installed: `pip install -e ".[dev,lmms-eval]"`."""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.evaluation import load_samples
from transformers_sgl.evaluation.lmms_eval import model as lmms_eval_model
from transformers_sgl.evaluation.lmms_eval.model import SGLChatModel

ROOT = Path(__file__).parents[1]
TASK = Path(__file__).parent / "lmms_eval_task"
QUESTIONS = load_samples("easy-vqa")[:200]


@pytest.fixture(scope="module")
def pair(embedded_pair_path):
    model = SGLForConditionalGeneration.from_pretrained(embedded_pair_path)
    return SimpleNamespace(model=model, processor=SGLProcessor.from_pretrained(embedded_pair_path))


@pytest.fixture
def make(embedded_pair_path):
    def make(arguments: str = "", **more) -> SGLChatModel:
        arguments = ",".join(filter(None, [f"pretrained={embedded_pair_path}", arguments]))
        return SGLChatModel.create_from_arg_string(arguments, {"device": "cpu", **more})

    return make


def answers_of(model, processor, conversations, **settings) -> list[str]:
    """What `generate` answers, without lmms-eval."""
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    sequences = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(sequences, skip_special_tokens=True)]


def ask(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def requests_for(model: SGLChatModel, *pairs: tuple[list[dict], dict]) -> list[Instance]:
    """lmms-eval's requests for conversations, each with its generation settings."""
    model.task_dict = {"mine": {"test": [conversation for conversation, _ in pairs]}}
    return [
        Instance(
            request_type="generate_until",
            arguments=("", lambda conversation: conversation, settings, doc_id, "mine", "test"),
            idx=0,
            metadata={"task": "mine", "doc_id": doc_id, "repeats": 1},
        )
        for doc_id, (_, settings) in enumerate(pairs)
    ]


# ------------------------------------------------------------------------------------------------------ a whole task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "part", "settings"),
    [
        ("retention_ratio=0.02,prune_layer=0", None, {"retention_ratio": 0.02, "prune_layer": 0}),
        ("preset=fast,prune_layer=0", None, {"retention_ratio": 0.05, "prune_layer": 0}),
        ("early_exit_threshold=0.8", None, {"early_exit_threshold": 0.8}),
        ("method=large", "large", {}),
        ("method=small", "small", {}),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_a_task_gets_the_answers_and_the_accuracy_of_generate(embedded_pair_path, pair, arguments, part, settings):
    results = simple_evaluate(
        model="sgl",
        model_args=f"pretrained={embedded_pair_path},{arguments}",
        tasks=["easy_vqa"],
        task_manager=TaskManager(include_path=str(TASK), include_defaults=False, model_name="sgl"),
        batch_size=16,
        device="cpu",
        limit=len(QUESTIONS),
    )
    samples = sorted(results["samples"]["easy_vqa"], key=lambda sample: sample["doc_id"])

    model, processor = (
        (pair.model, pair.processor)
        if part is None
        else (getattr(pair.model, part), getattr(pair.processor, f"{part}_processor"))
    )
    expected = []
    for start in range(0, len(QUESTIONS), 25):  # batches of another size than lmms-eval's
        batch = QUESTIONS[start : start + 25]
        chats = [ask({"type": "image", "image": item.open_image()}, text(item.question)) for item in batch]
        expected += answers_of(model, processor, chats, max_new_tokens=40, **settings)
    accuracy = float(np.mean([answer == item.answers[0] for answer, item in zip(expected, QUESTIONS, strict=True)]))

    assert [sample["filtered_resps"][0] for sample in samples] == expected
    assert [sample["target"] for sample in samples] == [item.answers[0] for item in QUESTIONS]
    assert results["results"]["easy_vqa"]["exact_match,none"] == pytest.approx(accuracy)
    if arguments in ("retention_ratio=0.02,prune_layer=0", "method=small"):
        assert 0.5 < accuracy < 1  # so that equal accuracies mean something


def test_the_share_of_early_exits_stands_in_the_results(embedded_pair_path):
    results = simple_evaluate(
        model="sgl",
        model_args=f"pretrained={embedded_pair_path},early_exit_threshold=0.0",
        tasks=["easy_vqa"],
        task_manager=TaskManager(include_path=str(TASK), include_defaults=False, model_name="sgl"),
        device="cpu",
        limit=3,
    )
    assert results["throughput"]["avg_early_exit_rate"] == 1


@pytest.mark.slow
def test_two_processes_answer_as_one_from_the_command_line(embedded_pair_path, tmp_path):
    command = ["-m", "lmms_eval", "--model", "sgl", "--tasks", "easy_vqa", "--include_path", str(TASK)]
    command += ["--model_args", f"pretrained={embedded_pair_path},method=small", "--batch_size", "8"]
    command += ["--limit", "41", "--log_samples", "--output_path"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    answers = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        folder = tmp_path / str(processes)
        subprocess.run([sys.executable, *launcher, *command, str(folder)], env=environment, check=True, cwd=ROOT)
        (log,) = folder.rglob("*_samples_easy_vqa.jsonl")
        samples = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        answers.append({sample["doc_id"]: (sample["filtered_resps"], sample["exact_match"]) for sample in samples})
    assert len(answers[0]) == 41
    assert answers[0] == answers[1]


# ---------------------------------------------------------------------------------------------------------- requests


def test_answers_come_in_the_order_of_the_requests_whatever_their_settings(make, pair):
    model = make(batch_size="2")
    chats = [ask({"type": "image", "url": item.open_image()}, text(item.question)) for item in QUESTIONS[:6]]
    settings = [{"max_new_tokens": 8 if index % 2 else 40} for index in range(6)]
    answers = model.generate_until(requests_for(model, *zip(chats, settings, strict=True)))
    assert [answer.text for answer in answers] == [item.answers[0] for item in QUESTIONS[:6]]
    assert len({item.answers[0] for item in QUESTIONS[:6]}) > 2


def test_conversations_with_no_image_or_several_share_a_batch(make, pair):
    first, second = (item.open_image() for item in QUESTIONS[:10:9])
    prompts = [[first], [], [first, second]]
    question = text("what is the red shape?")
    model = make(batch_size=3)
    answers = model.generate_until(
        requests_for(
            model,
            *(
                (ask(*({"type": "image", "url": image} for image in images), question), {"max_new_tokens": 6})
                for images in prompts
            ),
        )
    )
    for answer, images in zip(answers, prompts, strict=True):
        chat = ask(*({"type": "image", "image": image} for image in images), question)
        assert [answer.text] == answers_of(pair.model, pair.processor, [chat], max_new_tokens=6)


def test_videos_are_read_with_the_number_of_frames_asked_for(make):
    frames = np.stack([np.asarray(item.open_image()) for item in QUESTIONS[::20]])
    counts = []
    for arguments in ("", "num_frames=2", "num_frames=4"):
        model = make(arguments)
        generate = model.model.generate
        with mock.patch.object(model.model, "generate", wraps=generate) as spy:
            chat = ask({"type": "video", "url": frames}, text("what is shown?"))
            model.generate_until(requests_for(model, (chat, {"max_new_tokens": 2})))
        counts.append(int((spy.call_args.kwargs["input_ids"] == model.model.large.config.image_token_id).sum()))
    assert counts == [len(frames) * 64, 2 * 64, 4 * 64]


@pytest.mark.parametrize(
    ("asked", "expected", "absent"),
    [
        ({}, {"max_new_tokens": 77, "do_sample": False}, {"stop_strings"}),
        ({"max_new_tokens": 5, "until": ["\n\n"]}, {"max_new_tokens": 5}, {"stop_strings"}),
        ({"until": ["\n\n", "ASSISTANT:"]}, {"stop_strings": ["ASSISTANT:"]}, {"until"}),
        ({"until": "."}, {"stop_strings": ["."]}, {"until"}),
        (
            {"temperature": 0, "top_p": 1.0, "num_beams": 1},
            {"do_sample": False, "num_beams": 1},
            {"temperature", "top_p"},
        ),
        ({"temperature": 0.2, "do_sample": False}, {"do_sample": False}, {"temperature"}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, set()),
        ({"temperature": 0, "do_sample": True}, {"do_sample": False}, {"temperature"}),
        ({"do_sample": True, "top_p": None}, {"do_sample": True}, {"top_p"}),
        ({"image_aspect_ratio": "original"}, {}, {"image_aspect_ratio"}),
    ],
)
def test_a_task_sets_how_its_answers_are_generated(make, monkeypatch, asked, expected, absent):
    model = make("max_new_tokens=77,preset=quality")
    generate, seen = model.model.generate, {}

    def spy(**kwargs):
        seen.update(kwargs)
        return generate(**{**kwargs, "max_new_tokens": 2})

    monkeypatch.setattr(model.model, "generate", spy)
    chat = ask({"type": "image", "url": QUESTIONS[0].open_image()}, text(QUESTIONS[0].question))
    model.generate_until(requests_for(model, (chat, asked)))
    assert seen.items() >= {**expected, "retention_ratio": 0.4, "prune_layer": 19 / 48}.items()
    assert not absent & seen.keys()


def test_an_answer_ends_before_the_first_stop_string(make):
    model = make()
    chat = ask({"type": "image", "url": QUESTIONS[0].open_image()}, text(QUESTIONS[0].question))
    whole, cut = model.generate_until(requests_for(model, (chat, {}), (chat, {"until": ["ngl", "a"]})))
    assert whole.text == "triangle"
    assert cut.text == "tri"


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("method=both", "`method` is 'both': choose one of 'pair', 'large', 'small'."),
        ("preset=faster", "There is no preset 'faster'"),
        ("retention_ratio=2", "`retention_ratio` is 2"),
        ("method=large,preset=fast,prune_layer=3", "`preset`, `prune_layer` guides a pair"),
        ("batch_size=auto", "`batch_size` is 'auto'"),
        ("batch_size=0", "`batch_size` is 0"),
        ("max_batch_size=8", "pass a whole number of 1 or more as `batch_size` alone"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_anything_is_loaded(make, monkeypatch, arguments, sentence):
    monkeypatch.setattr(SGLForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make(arguments)


def test_a_device_map_is_refused_where_there_are_several_processes(make, monkeypatch):
    accelerator = SimpleNamespace(process_index=1, num_processes=2, device="cpu")
    monkeypatch.setattr(lmms_eval_model, "Accelerator", lambda: accelerator)
    with pytest.raises(ValueError, match="there are 2 processes, and each has a device of its own"):
        make("device_map=auto")
    model = make()
    assert (model.rank, model.world_size) == (1, 2)


def test_what_a_pair_cannot_answer_is_refused(make):
    model = make()
    requests = requests_for(model, (ask({"type": "audio", "url": "a.wav"}, text("who speaks?")), {}))
    with pytest.raises(ValueError, match="'mine' holds audio"):
        model.generate_until(requests)
    with pytest.raises(ValueError, match="'mine' compares the likelihood"):
        model.loglikelihood(requests)
    with pytest.raises(ValueError, match="'mine' asks on after an answer"):
        model.generate_until_multi_round(requests)


# --------------------------------------------------------------------------------------------- examples and the script


def test_the_docstrings_example_runs():
    results = doctest.testmod(lmms_eval_model)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.slow
def test_the_papers_script_names_tasks_that_exist():
    done = run_script("--check")
    assert "knows the model sgl and all 13 tasks" in done.stdout
    assert (
        run_script("--check", TASKS="gqa,no_such_task").stderr.strip()
        == "lmms-eval has no task of the name no_such_task."
    )


@pytest.mark.slow
def test_the_papers_script_runs_every_row_on_a_local_task(embedded_pair_path, tmp_path):
    settings = {"TASKS": "easy_vqa", "MODEL": str(embedded_pair_path), "OUTPUT": str(tmp_path)}
    done = run_script("--limit", "4", "--include_path", str(TASK), **settings)
    assert done.returncode == 0, done.stderr
    rows = {}
    for file in tmp_path.rglob("*_results.json"):
        rows[file.relative_to(tmp_path).parts[0]] = json.loads(file.read_text(encoding="utf-8"))["config"][
            "model_args"
        ]
    assert {name: arguments.rsplit(",", 1)[1] for name, arguments in rows.items()} == {
        "large": "method=large",
        "small": "method=small",
        "sgp_64": "preset=quality",
        "sgp_35": "preset=balanced",
        "sgp_9": "preset=fast",
    }


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true", **environment}
    command = ["bash", str(ROOT / "scripts" / "reproduce_paper.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
