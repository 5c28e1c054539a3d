"""The server with vLLM behind it, asked by OpenAI's own client."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("openai")

from test_serving import Server, chat, free_port, generated

from transformers_sgl.evaluation import Scenes

pytestmark = [pytest.mark.slow]

NUMBER = int(os.environ.get("SGL_ENGINE_REQUESTS", "128"))
IN_FLIGHT = 64
MOST_DIFFERENT = NUMBER // 200  # where two tokens are equally good
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"early_exit_threshold": 0.8}, {"retention_ratio": 0.1})


def started(folder: Path, pair: Path, *more: str) -> tuple[subprocess.Popen[bytes], Server]:
    command = [sys.executable, "-m", "transformers_sgl", "serve", str(pair), "--engine", "vllm", "--device", "cpu"]
    options = '{"enforce_eager": true, "max_num_seqs": 64}'
    port = free_port()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--engine-options", options, "--host", "127.0.0.1", "--port", str(port), *more],
            stdout=log,
            stderr=log,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
            start_new_session=True,
        )
    server = Server(str(pair), port, process.pid)
    server.wait(lambda: process.poll() is None, lambda: (folder / "log").read_text())
    return process, server


@pytest.fixture(scope="module")
def server(embedded_pair_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serving")
    process, server = started(folder, embedded_pair_path)
    yield server
    # What runs is finished after a signal to end, in the middle of many answers.
    asked = [(image, question) for image, question, _ in _asked()]
    with ThreadPoolExecutor(16) as pool:
        begun = threading.Event()

        def ask(number: int) -> str:
            pieces = server.ask(chat(*asked[number]), {"max_new_tokens": 24}, stream=True)
            texts = []
            for piece in pieces:
                begun.set()
                texts.append(piece.choices[0].delta.content or "")
            return "".join(texts)

        answers = [pool.submit(ask, number) for number in range(16)]
        assert begun.wait(60)
        process.send_signal(signal.SIGTERM)
        assert all(each.result() for each in answers)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in (folder / "log").read_text()


def _asked() -> list[tuple[Any, str, dict[str, Any]]]:
    """Questions of which two are always about one image, and each is asked about two images."""
    scenes = list(Scenes("test", seed=5, questions_per_scene=2, length=12))
    asked = []
    for number, scene in enumerate(scenes):
        other = scenes[(number + 1) % len(scenes)]
        settings = SETTINGS[number % len(SETTINGS)]
        asked += [(scene.image, question.question, settings) for question in scene.questions]
        asked.append((other.image, scene.questions[0].question, settings))
    return asked


def test_every_answer_equals_the_sequential_one_and_none_is_lost(server: Server, pair: Any, processor: Any) -> None:
    asked = _asked()
    expected = [
        generated(pair, processor, image, question, max_new_tokens=24, **settings)[0]
        for image, question, settings in asked
    ]
    assert len(set(expected)) > len(asked) // 4

    def ask(number: int) -> str:
        index = number % len(asked)
        image, question, settings = asked[index]
        settings = {**settings, "max_new_tokens": 24}
        if number % 3:
            return "right" if server.answer(chat(image, question), settings) == expected[index] else "wrong"
        chunks = server.ask(chat(image, question), settings, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return "right" if text == expected[index] else "wrong"

    start = time.monotonic()
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        results = Counter(pool.map(ask, range(NUMBER)))
    print(f"{dict(results)} of {NUMBER}, {NUMBER / (time.monotonic() - start):.1f} a second")
    assert results.total() == NUMBER
    assert results["wrong"] <= MOST_DIFFERENT


def test_a_cancelled_request_frees_its_place(embedded_pair_path: Path, server: Server) -> None:
    image, question, _ = _asked()[0]
    long = {"max_new_tokens": 1500, "min_new_tokens": 1500, "guidance_max_new_tokens": 4}
    for _ in range(3):
        with server.ask(chat(image, question), long, stream=True) as stream:
            next(iter(stream))
    start = time.monotonic()
    assert server.answer(chat(image, question), {"max_new_tokens": 8})
    assert time.monotonic() - start < 20


def test_the_report_says_what_was_kept(server: Server) -> None:
    image, question, _ = _asked()[0]
    response = server.ask(chat(image, question), {"retention_ratio": 0.1, "early_exit_threshold": 2})
    assert response.sgl["num_visual_tokens_kept"] == response.sgl["num_visual_tokens"] // 10
    assert response.sgl["average_retention"] == pytest.approx(0.1)
    assert response.sgl["exited_early"] is False
    response = server.ask(chat(image, question), {"early_exit_threshold": 0})
    assert response.sgl["exited_early"] is True
    assert response.sgl["num_visual_tokens_kept"] is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"confirmation_threshold": 0.5}, "lets the large model read a prompt twice, which a request to vLLM cannot"),
        ({"no_repeat_ngram_size": 3}, "`no_repeat_ngram_size` is 3, which vLLM cannot obey"),
        ({"retention_ratio": 2}, "`retention_ratio` is 2"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(server: Server, settings: dict[str, Any], match: str) -> None:
    import json

    image, question, _ = _asked()[0]
    status, sentence = server.refusal(messages=chat(image, question), generation_config=json.dumps(settings))
    assert status == 400
    assert match in sentence


def test_options_of_an_engine_are_checked(embedded_pair_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers_sgl.cli import main

    assert main(["serve", str(embedded_pair_path), "--engine-options", "{}"]) == 2
    assert "--engine-options are for an engine" in capfd.readouterr().err
    assert main(["serve", str(embedded_pair_path), "--engine", "vllm", "--engine-options", "[1]"]) == 2
    assert "pass a JSON object" in capfd.readouterr().err
    assert main(["serve", str(embedded_pair_path), "--engine", "vllm", "--attn-implementation", "sdpa"]) == 2
    assert "vLLM chooses its own attention" in capfd.readouterr().err
