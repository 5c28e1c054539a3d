"""The server with the embedded pair, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import openai
import psutil
import pytest
from PIL import Image
from tiny_models import state
from transformers import AutoModelForImageTextToText
from uvicorn import Config
from uvicorn import Server as Uvicorn

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.cli import main
from transformers_sgl.evaluation import Scenes
from transformers_sgl.serving import Limits, PairApp
from transformers_sgl.serving.requests import read_chat

pytestmark = pytest.mark.mechanics

HUB_ID = "org/sgl-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
QUESTION = "describe the red triangle."
ANSWER = "a red triangle labelled B in the bottom left"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def example(embedded_pair_path: Path) -> Image.Image:
    return Image.open(embedded_pair_path / "example.png").convert("RGB")


@pytest.fixture(scope="module")
def server(embedded_pair_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The command, in a process of its own, with a repository that an earlier download left in the cache."""
    folder = tmp_path_factory.mktemp("serving")
    repository = folder / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(embedded_pair_path, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    command = [sys.executable, "-m", "transformers_sgl", "serve", HUB_ID]
    port = free_port()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_CACHE": str(folder / "hub")},
        )
        try:
            running = Server(HUB_ID, port, process.pid)
            running.wait(lambda: process.poll() is None, lambda: (folder / "log").read_text())
            yield running
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) in (130, 0)  # 0 where whoever started the tests had the signal ignored
            assert "Traceback" not in (folder / "log").read_text()
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def inside(
    embedded_pair_path: Path, processor: Any, example: Image.Image
) -> Iterator[tuple[Server, SGLForConditionalGeneration]]:
    """The server in a thread, and the very model that answers in it."""
    model, port = AutoModelForImageTextToText.from_pretrained(embedded_pair_path), free_port()
    app = PairApp("tiny", model, processor)
    uvicorn = Uvicorn(Config(app, host="127.0.0.1", port=port, lifespan="off"))
    thread = threading.Thread(target=uvicorn.run)
    thread.start()
    running = Server("tiny", port)
    running.wait(thread.is_alive)
    running.ask(chat(example))  # transformers has hooks of its own, which it makes on first use and keeps
    yield running, model
    uvicorn.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    """A running server, and how to ask it."""

    model: str
    port: int
    pid: int | None = None

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60
        )

    @contextlib.contextmanager
    def sending(self, *parts: bytes, pause: float = 0) -> Iterator[http.client.HTTPConnection]:
        """A chat whose body is sent in parts, with pauses, and then whatever is made of the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest("POST", "/v1/chat/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(sum(map(len, parts))))
        connection.endheaders()
        for part in parts:
            connection.send(part)
            time.sleep(pause)
        try:
            yield connection
        finally:
            connection.close()

    def wait(self, is_alive: Any, log: Any = lambda: "") -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and is_alive():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.1)
        pytest.fail(f"The server did not start. {log()}")

    def ask(self, messages: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        """One chat; `settings` are those of the request's generation config."""
        if settings is not None:
            options["extra_body"] = {"generation_config": json.dumps(settings)}
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def answer(self, messages: Any, settings: dict[str, Any] | None = None, **options: Any) -> str:
        return self.ask(messages, settings, **options).choices[0].message.content

    def refusal(self, **body: Any) -> tuple[int, str]:
        """Status and sentence of a request that cannot be carried out."""
        body = {"model": self.model, "messages": HELLO, **body}
        with pytest.raises(openai.APIStatusError) as refused:
            self.client.post("/chat/completions", body=body, cast_to=object)
        error = refused.value.body
        return refused.value.status_code, error["message"] if isinstance(error, dict) and "message" in error else ""


def data_url(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def chat(image: Image.Image, question: str = QUESTION) -> list[dict[str, Any]]:
    picture = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def output_of(pair: Any, processor: Any, image: Image.Image | None, text: str, **settings: Any) -> Any:
    """What `generate` itself returns."""
    content = [{"type": "image", "image": image}] if image else []
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = pair.generate(**inputs, **settings, return_dict_in_generate=True)
    output["prompt_length"] = inputs["input_ids"].shape[1]
    return output


def generated(
    pair: Any, processor: Any, image: Image.Image | None, text: str, **settings: Any
) -> tuple[str, int, int]:
    """What `generate` itself answers, and how long prompt and answer are."""
    output = output_of(pair, processor, image, text, **settings)
    length = output["prompt_length"]
    answer = output.sequences[0, length:]
    return processor.decode(answer, skip_special_tokens=True), length, len(answer)


def questions(number: int) -> list[tuple[Image.Image, str]]:
    """Different questions about different images."""
    scenes = Scenes("test", seed=5, questions_per_scene=1, length=number)
    return [(scene.image, scene.questions[0].question) for scene in scenes]


class TestAnswers:
    def test_an_image_gets_the_answer_of_generate(self, server, pair, processor, example):
        response = server.ask(chat(example))
        text, prompt_length, answer_length = generated(pair, processor, example, QUESTION)
        assert response.choices[0].message.content == text == ANSWER
        assert response.choices[0].finish_reason == "stop"
        assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (prompt_length, answer_length)
        assert response.usage.total_tokens == prompt_length + answer_length

    def test_a_text_alone_gets_the_answer_of_generate(self, server, pair, processor):
        response = server.ask(HELLO)
        expected = generated(pair, processor, None, "hello")
        assert (response.choices[0].message.content, *usage(response)) == expected

    def test_several_turns_and_images_are_one_prompt(self, server, pair, processor, example):
        other, question = questions(1)[0]
        messages = [*chat(example), {"role": "assistant", "content": ANSWER}, *chat(other, question)]
        pictures = [
            [{"type": "image", "image": image}, {"type": "text", "text": text}]
            for image, text in (
                (example, QUESTION),
                (other, question),
            )
        ]
        inputs = processor.apply_chat_template(
            [
                {"role": "user", "content": pictures[0]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
                {"role": "user", "content": pictures[1]},
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        answer = pair.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        response = server.ask(messages)
        assert response.choices[0].message.content == processor.decode(answer, skip_special_tokens=True)
        assert usage(response) == (inputs["input_ids"].shape[1], len(answer))

    @pytest.mark.parametrize("settings", [None, {"early_exit_threshold": 0.0}], ids=["large", "early exit"])
    def test_a_stream_is_the_same_answer_in_pieces(self, server, example, settings):
        whole = server.ask(chat(example), settings)
        chunks = list(server.ask(chat(example), settings, stream=True))
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        assert "".join(pieces) == whole.choices[0].message.content
        assert len(pieces) > 4
        assert usage(chunks[-1]) == usage(whole)
        assert chunks[-1].choices[0].finish_reason == "stop"

    def test_length_limits_and_stop_strings_hold(self, server, example):
        short = server.ask(chat(example), max_tokens=3)
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("a red triangle", "length")
        for options in ({"stop": ["labelled"]}, {"stop": "labelled", "temperature": 0}):
            assert server.answer(chat(example), **options) == "a red triangle labelled"

    def test_requests_at_the_same_time_get_each_its_own_answer(self, server, pair, processor):
        asked = questions(8)
        expected = [generated(pair, processor, *question)[0] for question in asked]
        assert len(set(expected)) > 4
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda question: server.answer(chat(*question)), asked)) == expected

    def test_the_pair_is_listed_and_nothing_else(self, server, inside):
        for running in (server, inside[0]):  # a repository in the cache, and a folder
            assert [model.id for model in running.client.models.list()] == [running.model]


class TestReports:
    """The field `sgl`, which OpenAI's client passes on and others ignore."""

    @staticmethod
    def report(server: Server, messages: Any, stream: bool, settings: dict[str, Any] | None = None) -> Any:
        if not stream:
            return server.ask(messages, settings).sgl
        chunks = list(server.ask(messages, settings, stream=True))
        assert [chunk for chunk in chunks if hasattr(chunk, "sgl")] == chunks[-1:]
        return chunks[-1].sgl

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_an_answer_says_what_was_kept(self, server, pair, processor, example, stream):
        settings = {"retention_ratio": 0.5, "prune_layer": 0, "num_draft_tokens": 4}
        expected = output_of(pair, processor, example, QUESTION, **settings)
        assert self.report(server, chat(example), stream, settings) == {
            "num_visual_tokens": 320,
            "num_visual_tokens_kept": 160,
            "average_retention": 0.5,
            "exited_early": False,
            "num_draft_tokens_accepted": int(expected.num_draft_tokens_accepted),
            "vision_share": None,
            "draft_confirmed": None,
        }
        settings = {"vision_retention_ratio": 0.25, "vision_prune_layer": 0, "confirmation_threshold": 0.0}
        expected = output_of(pair, processor, example, QUESTION, **settings)
        confirmed = self.report(server, chat(example), stream, settings)
        assert confirmed["vision_share"] == round(float(expected.vision_share[0]), 4)
        assert confirmed["draft_confirmed"] == bool(expected.draft_confirmed[0])
        unpruned = self.report(server, chat(example), stream, {"retention_ratio": 1.0})
        assert (unpruned["num_visual_tokens_kept"], unpruned["average_retention"]) == (320, 1.0)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_an_answer_says_that_the_small_model_wrote_it(self, server, example, stream):
        report = self.report(server, chat(example), stream, {"early_exit_threshold": 0.0})
        assert report["exited_early"]
        assert (report["num_visual_tokens_kept"], report["average_retention"]) == (None, None)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_a_text_has_no_visual_tokens(self, server, stream):
        report = self.report(server, HELLO, stream)
        assert (report["num_visual_tokens"], report["exited_early"]) == (0, False)

    def test_requests_at_the_same_time_get_each_its_own(self, server, example):
        ratios = [number / 20 for number in range(4, 20)]

        def kept(ratio: float) -> int:
            settings = {"retention_ratio": ratio, "prune_layer": 0}
            return self.report(server, chat(example), ratio > 0.5, settings)["num_visual_tokens_kept"]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(kept, ratios)) == [int(320 * ratio) for ratio in ratios]

    def test_the_endpoint_responses_has_it_too(self, server, example):
        parts = [{"type": "input_image", "image_url": data_url(example)}, {"type": "input_text", "text": QUESTION}]
        response = server.client.responses.create(
            model=server.model, input=[{"role": "user", "content": parts}], stream=False
        )
        assert response.output_text == ANSWER
        assert response.sgl["num_visual_tokens"] == 320


def usage(response: Any) -> tuple[int, int]:
    return response.usage.prompt_tokens, response.usage.completion_tokens


class TestSettings:
    """What a request brings along in the field `generation_config`."""

    def test_the_retention_ratio_reaches_the_model(self, server, pair, processor, example):
        settings = {"retention_ratio": 0.005, "prune_layer": 0}
        expected, _, _ = generated(pair, processor, example, QUESTION, **settings)
        assert expected != ANSWER  # one visual token of 320 is not enough
        assert server.answer(chat(example), settings) == expected
        assert server.answer(chat(example)) == ANSWER

    def test_the_number_of_kept_tokens_is_what_was_asked_for(self, inside, example):
        server, model = inside
        widths: list[int] = []
        last_layer = model.large.get_decoder().layers[-1]
        hook = last_layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        try:
            for ratio in (1.0, 0.5):
                response = server.ask(chat(example), {"retention_ratio": ratio, "verify_draft": False})
                prompt = response.usage.prompt_tokens
                assert max(widths) == prompt - 320 + int(320 * ratio)
                widths.clear()
        finally:
            hook.remove()

    def test_an_early_exit_does_not_call_the_large_model(self, inside, example):
        server, model = inside
        with counted_passes(model.large) as passes:
            for threshold, is_called in ((0.0, False), (1.5, True)):
                passes.clear()
                assert server.answer(chat(example), {"early_exit_threshold": threshold}) == ANSWER
                assert bool(passes) == is_called

    def test_a_verified_draft_saves_passes_and_changes_nothing(self, inside, example):
        server, model = inside
        numbers = []
        with counted_passes(model.large) as passes:
            for verify_draft in (True, False):
                passes.clear()
                assert server.answer(chat(example), {"verify_draft": verify_draft}) == ANSWER
                numbers.append(len(passes))
        assert numbers[0] < numbers[1] / 2

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"retention_ratio": 3}, "`retention_ratio` is 3, but it is the fraction of visual tokens"),
            ({"early_exit_threshold": "high"}, "`early_exit_threshold` is 'high'"),
            (
                {"guidance_queries": "all"},
                "`guidance_queries` is 'all': choose one of 'prompt', 'last', 'generated', 'both'.",
            ),
            ({"max_new_tokens": 0}, "`max_new_tokens` must be greater than 0"),
            ({"retention": 0.5}, "`generation_config` has no field 'retention'"),
            ({"return_dict_in_generate": True}, "a server returns texts only"),
            ([], "pass the JSON text of an object"),
        ],
    )
    def test_bad_settings_are_refused_with_a_sentence(self, server, settings, sentence, stream):
        status, message = server.refusal(generation_config=json.dumps(settings), stream=stream)
        assert status == 400
        assert sentence in message
        assert "\n" not in message

    def test_what_only_the_model_can_refuse_is_a_sentence_too(self, server, example):
        settings = {"early_exit_threshold": 0.5, "do_sample": True}
        status, message = server.refusal(messages=chat(example), generation_config=json.dumps(settings))
        assert status == 400
        assert "set do_sample=False" in message
        with pytest.raises(openai.APIError) as refused:
            list(server.ask(chat(example), settings, stream=True))
        assert "set do_sample=False" in str(refused.value.body)
        assert server.answer(chat(example)) == ANSWER


@contextlib.contextmanager
def counted_passes(model: Any) -> Iterator[list[None]]:
    """Notes every forward pass of a model."""
    passes: list[None] = []
    hook = model.register_forward_pre_hook(lambda module, args: passes.append(None))
    try:
        yield passes
    finally:
        hook.remove()


class TestClientsThatErr:
    @pytest.mark.parametrize(
        ("wrong", "sentence"),
        [
            ({"messages": None}, "`messages` is None: pass the conversation"),
            ({"messages": []}, "`messages` is []"),
            ({"messages": "hello"}, "`messages` is 'hello'"),
            ({"messages": [{"content": "hello"}]}, "pass an object with a `role` and a `content`"),
            ({"messages": [{"role": "user", "content": 5}]}, "`messages[0]` is {'role': 'user', 'content': 5}"),
            ({"messages": [*HELLO, {"role": "user", "content": ["hello"]}]}, "`messages[1]` has a part 'hello'"),
            ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a pair reads parts of the type"),
            ({"temperature": "hot"}, "`temperature` is 'hot': pass a number."),
            ({"max_tokens": True}, "`max_tokens` is True: pass a whole number."),
            ({"stop": 3}, "`stop` is 3: pass a text or a list of texts."),
            ({"generation_config": {"retention_ratio": 0.5}}, "pass the JSON text of an object"),
            ({"generation_config": "{"}, "`generation_config` is '{': pass the JSON text"),
        ],
    )
    def test_a_request_that_makes_no_sense_is_refused(self, server, wrong, sentence):
        status, message = server.refusal(**wrong)
        assert status == 400
        assert sentence in message

    def test_an_image_that_cannot_be_read_is_refused(self, server, example):
        png = data_url(example)
        bitmap = data_url(example, "bmp")
        text = "data:image/png;base64," + base64.b64encode(b"hello").decode()
        for url in ("data:image/png;base64,@@@@", "data:image/png;base64,", png[:-1], png[:400], text, bitmap):
            part = {"type": "image_url", "image_url": {"url": url}}
            status, message = server.refusal(messages=[{"role": "user", "content": [part]}])
            assert (status, "cannot be read" in message) == (400, True), url[:40]
            assert len(message) < 200

    def test_files_of_the_servers_machine_are_out_of_reach(self, server, embedded_pair_path):
        for url in (str(embedded_pair_path / "example.png"), (embedded_pair_path / "example.png").as_uri()):
            part = {"type": "image_url", "image_url": {"url": url}}
            status, message = server.refusal(messages=[{"role": "user", "content": [part]}])
            assert status == 400
            assert "pass the image itself as data:image/png;base64," in message

    def test_the_other_endpoints_are_as_careful(self, server, example, embedded_pair_path):
        def ask(url: str, **options: Any) -> str:
            parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": QUESTION}]
            events = server.client.responses.create(
                model=server.model, input=[{"role": "user", "content": parts}], stream=True, **options
            )
            return "".join(event.delta for event in events if event.type == "response.output_text.delta")

        assert ask(data_url(example)) == ANSWER
        for url in (str(embedded_pair_path / "example.png"), "data:image/png;base64,@@@@"):
            with pytest.raises(openai.BadRequestError, match="image_url"):
                ask(url)
        with pytest.raises(openai.BadRequestError, match="retention_ratio"):
            ask(data_url(example), extra_body={"generation_config": '{"retention_ratio": 0}'})
        video = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/video.mp4"}}]}]
        with pytest.raises(openai.BadRequestError, match="a pair reads texts and images only"):
            server.client.responses.create(model=server.model, input=video)

    def test_other_models_and_fields_are_refused(self, server):
        assert server.refusal(model="org/other")[0] == 400
        status, message = server.refusal(unknown_field=1)
        assert (status, message) == (400, "There is no field 'unknown_field' in such a request: leave it out.")

    def test_what_is_no_json_is_refused_and_the_server_lives_on(self, server, example):
        for body in (b"{", b"[]", b"\xff"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
                connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
                assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        assert server.answer(chat(example)) == ANSWER

    def test_a_client_that_leaves_stops_its_answer(self, inside, example):
        server, model = inside
        before = state(model)
        with counted_passes(model.large) as passes:
            endless = {"min_new_tokens": 900, "max_new_tokens": 900, "verify_draft": False, "retention_ratio": 1.0}
            stream = server.ask(chat(example), endless, stream=True)
            for _ in range(3):
                next(stream)
            stream.close()
            assert server.answer(chat(example)) == ANSWER  # it waits for the one before it
            assert len(passes) < 900
        assert state(model)["hooks"] == before["hooks"]


@pytest.mark.slow
def test_a_hundred_requests_are_answered_and_leave_nothing_behind(inside, pair, processor):
    server, model = inside
    asked = questions(20)
    expected = [generated(pair, processor, *question)[0] for question in asked]
    before = state(model)

    def ask(number: int) -> str:
        question = chat(*asked[number % len(asked)])
        if number % 3:
            return server.answer(question)
        chunks = server.ask(question, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(100))) == expected * 5
    ask(1)  # a stream ends a moment before its call of `generate` does, and one call waits for the other
    assert state(model) == before


class TestLoad:
    """Good requests beside malformed, cancelled and slow ones; `SGL_SERVED_REQUESTS` is how many in all."""

    NUMBER = int(os.environ.get("SGL_SERVED_REQUESTS", "60"))

    def test_every_good_request_is_answered_right(self, server, pair, processor):
        asked = questions(20)
        expected = [generated(pair, processor, *question)[0] for question in asked]
        process, memory, latencies, is_over = psutil.Process(server.pid), [], [], threading.Event()

        def watch() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            while not is_over.wait(0.02):
                started = time.perf_counter()
                connection.request("GET", "/health")
                assert connection.getresponse().read() == b'{"status": "ok"}'
                latencies.append(time.perf_counter() - started)
                memory.append(process.memory_info().rss)

        def ask(number: int) -> str:
            index = number % len(asked)
            if number % 10 == 3:
                return self.malformed(server, number)
            if number % 20 == 7:
                return self.cancelled(server, asked[index])
            if number % 50 == 11:
                return "right" if self.slow(server, asked[index]) == expected[index] else "wrong"
            if number % 3:
                return "right" if server.answer(chat(*asked[index])) == expected[index] else "wrong"
            chunks = server.ask(chat(*asked[index]), stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            return "right" if text == expected[index] else "wrong"

        with ThreadPoolExecutor(1) as watching, ThreadPoolExecutor(8) as pool:
            watched = watching.submit(watch)
            try:
                results = Counter(pool.map(ask, range(self.NUMBER)))
            finally:
                is_over.set()
            watched.result()
        late = sorted(latencies)[int(0.99 * len(latencies))]
        before, after = (int(median(part)) >> 20 for part in (memory[len(memory) // 4 :][:50], memory[-50:]))
        print(f"{dict(results)}, /health at the 99th percentile {1000 * late:.0f} ms, memory {before} to {after} MiB")
        counts = [len(range(first, self.NUMBER, step)) for first, step in ((3, 10), (7, 20), (11, 50))]
        assert results == {"right": self.NUMBER - counts[0] - counts[1], "refused": counts[0], "left": counts[1]}
        assert after < before + 100
        assert late < (0.2 if self.NUMBER >= 2000 else 1)  # on few cores, the tests themselves are in the way

    @staticmethod
    def malformed(server: Server, number: int) -> str:
        wrong: list[dict[str, Any]] = [
            {"messages": None},
            {"n": 2},
            {"generation_config": '{"encoder_no_repeat_ngram_size": 1000000000}'},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            {"messages": [{"role": "user", "content": "x" * 10**6}]},
        ]
        status, message = server.refusal(**wrong[number // 10 % len(wrong)])
        return "refused" if status == 400 and message else "wrong"

    @staticmethod
    def cancelled(server: Server, question: tuple[Image.Image, str]) -> str:
        endless = {"min_new_tokens": 900, "max_new_tokens": 900, "retention_ratio": 1.0}
        body = {"messages": chat(*question), "generation_config": json.dumps(endless)}
        with server.sending(json.dumps(body).encode()):
            time.sleep(0.2)
        return "left"

    @staticmethod
    def slow(server: Server, question: tuple[Image.Image, str]) -> str:
        data = json.dumps({"messages": chat(*question)}).encode()
        size = len(data) // 10 + 1
        with server.sending(*(data[start : start + size] for start in range(0, len(data), size)), pause=0.1) as sent:
            return str(json.loads(sent.getresponse().read())["choices"][0]["message"]["content"])


def test_running_requests_are_answered_after_a_signal_to_stop(embedded_pair_path, pair, processor, example):
    port = free_port()
    command = [sys.executable, "-m", "transformers_sgl", "serve", str(embedded_pair_path), "--port", str(port)]
    key = {"TRANSFORMERS_SGL_API_KEY": "secret"}
    process = subprocess.Popen(command, env={**os.environ, **key}, stderr=subprocess.PIPE, text=True)
    try:
        server = Server(str(embedded_pair_path), port)
        server.wait(lambda: process.poll() is None)
        with pytest.raises(openai.AuthenticationError):
            server.ask(HELLO)
        server.client.api_key = "secret"
        asked = questions(8)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(server.answer, chat(*question)) for question in asked]
            answers[0].result()
            process.send_signal(signal.SIGTERM)
            texts = [answer.result() for answer in answers]
        assert texts == [generated(pair, processor, *question)[0] for question in asked]
        _, log = process.communicate(timeout=30)
        assert "secret" not in log
        assert "Traceback" not in log
    finally:
        process.kill()
        process.wait()


def test_a_generation_config_may_name_every_field():
    fields = {"retention_ratio": 0.5, "prune_layer": 2, "verify_draft": True, "max_new_tokens": 8, "do_sample": False}
    question = read_chat({"messages": HELLO, "generation_config": json.dumps(fields)}, "pair", Limits(), None)
    assert {name: getattr(question.settings, name) for name in fields} == fields


class TestCommand:
    @pytest.mark.parametrize(
        ("model", "sentence"),
        [
            ("no/such/folder", "There is no folder 'no/such/folder'"),
            ("{pair}/large", "is a single model of type 'internvl', not a pair"),
            ("{tmp}/a@b", "a@b' is not a saved pair"),
            ("{tmp}/b@c", "There is no folder"),
            ("{tmp}", "is not a saved pair"),
        ],
    )
    def test_what_is_no_pair_is_not_served(self, embedded_pair_path, tmp_path, capsys, model, sentence):
        (tmp_path / "a@b").mkdir()
        assert main(["serve", model.format(pair=embedded_pair_path, tmp=tmp_path)]) == 2
        captured = capsys.readouterr().err
        assert sentence in captured
        assert captured.count("\n") == 1

    def test_options_are_checked_before_the_pair_is_loaded(self, embedded_pair_path, capsys):
        for options, code in ((["--help"], 0), (["--no-such-option"], 2), (["--port", "x"], 2)):
            assert main(["serve", str(embedded_pair_path), *options]) == code
        captured = capsys.readouterr()
        assert "--port" in captured.out
        assert "transformers-sgl: No such option: --no-such-option" in captured.err
        assert captured.err.count("\n") == 2
        for option, value, sentence in (
            ("--dtype", "float3", "'float3' is not one of"),
            ("--max-body-bytes", "0", "greater than or equal to 1"),
            ("--api-key", " a", "The API key has to be a word"),
        ):
            assert main(["serve", str(embedded_pair_path), option, value]) == 2
            captured = capsys.readouterr().err
            assert captured.count("\n") == 1
            assert sentence in captured

    def test_missing_packages_are_named(self, embedded_pair_path, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        assert main(["serve", str(embedded_pair_path)]) == 2
        assert 'pip install "transformers_sgl[serve]"' in capsys.readouterr().err
