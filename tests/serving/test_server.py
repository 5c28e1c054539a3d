"""The server against clients who mean harm, who leave, and who are many."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import fields
from inspect import signature
from typing import Any

import pytest
from asgi import InProcess
from PIL import Image
from tiny_models import state

from transformers_sgl.cli.serve import serve as cli_serve
from transformers_sgl.serving import Limits, PairApp, images, server

pytestmark = pytest.mark.mechanics

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
LONG = {**HELLO, "max_tokens": 500, "generation_config": json.dumps({"min_new_tokens": 500, "verify_draft": False})}
LIMITS = Limits(max_body_bytes=20_000, max_prompt_tokens=400, max_new_tokens=500, image_hosts=("pictures.test",))


@pytest.fixture(scope="module")
def running(pair: Any, processor: Any) -> InProcess:
    running = InProcess(PairApp("pair", pair, processor, LIMITS, max_queue=4))
    assert running.ask(body=HELLO).status == 200
    return running


@pytest.fixture(scope="module")
def hello(running: InProcess) -> str:
    return running.ask(body=HELLO).text


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def about(url: str, number: int = 1) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}] * number
    return {**HELLO, "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]}


@contextlib.contextmanager
def held_back(model: Any) -> Iterator[tuple[threading.Event, list[None]]]:
    """Lets a model's passes wait until the event is set, and notes how many there were."""
    go, passes = threading.Event(), []

    def wait(module: Any, arguments: Any) -> None:
        passes.append(None)
        go.wait(60)

    hook = model.register_forward_pre_hook(wait)
    try:
        yield go, passes
    finally:
        go.set()
        hook.remove()


def until(condition: Any) -> None:
    """Waits for something that happens soon."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestWhatIsThere:
    def test_is_three_endpoints_and_two_lists(self, running):
        assert running.ask("/health").content == {"status": "ok"}
        assert [model["id"] for model in running.ask("/v1/models").content["data"]] == ["pair"]
        assert running.ask(body=HELLO).content["object"] == "chat.completion"
        assert running.ask("/v1/responses", {"input": "hello", "max_output_tokens": 1}).content["object"] == "response"

    @pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/completions", "/docs", "/", "//health"])
    def test_is_nothing_else(self, running, path):
        for body in ({}, None):
            reply = running.ask(path, body)
            assert (reply.status, "There is nothing at" in reply.sentence) == (404, True)

    def test_has_its_methods(self, running):
        for path, method, allowed in (
            ("/v1/chat/completions", "GET", "POST"),
            ("/health", "POST", "GET, HEAD"),
            ("/v1/models", "DELETE", "GET, HEAD"),
        ):
            reply = running.ask(path, method=method)
            assert (reply.status, reply.headers["allow"]) == (405, allowed)

    def test_is_no_web_site_s(self, running):
        """A page may send a simple request anywhere, but not with this content type; nor may it read a reply."""
        for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            reply = running.ask(body=HELLO, headers={"content-type": content_type, "origin": "https://page.test"})
            assert reply.status == 415
        reply = running.ask(body=HELLO, headers={"origin": "https://page.test"})
        assert not any(name.startswith("access-control") for name in reply.headers)


@pytest.fixture(scope="module")
def locked(pair: Any, processor: Any) -> InProcess:
    return InProcess(PairApp("pair", pair, processor, LIMITS, api_key="secret"))


def test_sites_that_are_named_may_ask(pair, processor, monkeypatch):
    served = []
    monkeypatch.setattr(server, "Server", lambda config: served.append(config) or config)
    monkeypatch.setattr(server.Config, "run", lambda config: None, raising=False)
    server.serve(PairApp("pair", pair, processor), cors_origins=["https://page.test"])
    (config,) = served
    assert config.host == "localhost"
    running = InProcess(config.app)
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    for origin, status in (("https://page.test", 200), ("https://other.test", 400)):
        reply = running.ask("/v1/chat/completions", method="OPTIONS", headers={"origin": origin, **asking})
        assert reply.status == status
        assert reply.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_options_have_the_defaults_of_the_limits():
    options = signature(cli_serve).parameters
    names = {field.name: "allow_image_urls" if field.name == "image_hosts" else field.name for field in fields(Limits)}
    assert {name: options[option].default or () for name, option in names.items()} == vars(Limits())
    assert options["max_queue"].default == signature(PairApp).parameters["max_queue"].default


class TestKey:
    @pytest.mark.parametrize("key", [None, "", "secret", "Basic secret", "Bearer", "Bearer secre", "Bearer secret!"])
    @pytest.mark.parametrize(("path", "body"), [("/v1/models", None), ("/v1/chat/completions", HELLO), ("/x", None)])
    def test_is_asked_for(self, locked, key, path, body):
        reply = locked.ask(path, body, headers={} if key is None else {"authorization": key})
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert "secret" not in reply.sentence

    def test_opens(self, locked):
        assert locked.ask("/health").status == 200
        assert locked.ask(body=HELLO, headers={"authorization": "Bearer secret"}).status == 200


class TestBodies:
    def test_that_are_too_long_are_not_read(self, running):
        read = []

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(100):
                read.append(None)
                yield b" " * 1000

        assert running.ask(body=b"", headers={"content-length": "20001"}, parts=parts()).status == 413
        assert not read
        reply = running.ask(parts=parts())
        assert (reply.status, reply.sentence) == (
            413,
            "The request is longer than the 20000 bytes that this server takes.",
        )
        assert len(read) == 21

    def test_that_come_slowly_are_given_up(self, running, monkeypatch):
        monkeypatch.setattr(server, "_PATIENCE_S", 0.2)

        async def parts() -> AsyncIterator[bytes]:
            while True:
                await asyncio.sleep(0.05)
                yield b" "

        assert running.ask(parts=parts()).status == 408

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10_000])
    def test_that_are_no_json_are_refused(self, running, body):
        assert running.ask(body=body).status == 400


class TestPrompts:
    def test_that_are_too_long_are_refused(self, running):
        long = running.ask(body={**HELLO, "messages": [{"role": "user", "content": "red " * 450}]})
        assert long.status == 400
        assert "The prompt has" in long.sentence
        assert "more than the 400 that this server takes" in long.sentence
        assert running.ask(body=about(picture(), number=7)).status == 400

    @pytest.mark.parametrize("text", ["<IMG_CONTEXT>", "<img>", "<video>", "<|im_start|>system", "\0", ""])
    def test_with_odd_texts_get_an_answer_or_a_sentence(self, running, text):
        for body in ({**HELLO, "messages": [{"role": "user", "content": text}]}, about(picture())):
            reply = running.ask(body=body)
            assert reply.status in (200, 400)

    @pytest.mark.parametrize("stream", [False, True])
    def test_with_damaged_images_are_refused(self, running, stream):
        file = io.BytesIO()
        Image.effect_noise((32, 32), 50).save(file, "PNG")
        cut = "data:image/png;base64," + base64.b64encode(file.getvalue()[:-200]).decode()
        reply = running.ask(body={**about(cut), "stream": stream})
        assert (reply.status, "cannot be read" in reply.sentence) == (400, True)


class TestImagesFromElsewhere:
    def test_that_do_not_come_leave_the_server_alive(self, running, hello, monkeypatch):
        """Whoever waits for an image holds no turn: others are answered, and the request ends by itself."""
        monkeypatch.setattr(images, "_TIMEOUT_S", 1.0)

        async def hang(name: str, parts: Any) -> str:
            await asyncio.sleep(60)
            return ""

        monkeypatch.setattr(images, "_public_address", hang)
        waiting = running.send(body=about("http://pictures.test/a.png"))
        assert running.ask("/health").status == 200
        assert running.ask(body=HELLO).text == hello
        assert not waiting.done()
        reply = waiting.result(timeout=30)
        assert (reply.status, "took longer than 1 s" in reply.sentence) == (400, True)

    def test_are_read_as_those_inside(self, running, monkeypatch):
        data = base64.b64decode(picture().partition(",")[2])
        left = []

        async def fetch(name: str, url: str, hosts: Any, max_bytes: int) -> bytes:
            left.append(max_bytes)
            return data

        monkeypatch.setattr(server, "fetch", fetch)
        inside = running.ask(body=about(picture(), number=2))
        assert running.ask(body=about("http://pictures.test/a.png", number=2)).text == inside.text
        assert left == [20_000, 20_000 - len(data)]

    def test_are_not_those_of_other_hosts(self, running):
        for url in ("http://127.0.0.1/a.png", "http://localhost:8000/", "https://other.test/a.png"):
            reply = running.ask(body=about(url))
            assert (reply.status, "fetches images from pictures.test only" in reply.sentence) == (400, True)


class TestQueue:
    def test_has_an_end(self, running, pair, hello):
        with held_back(pair.large) as (go, _):
            asked = [running.send(body=HELLO) for _ in range(4)]
            until(lambda: running.app._places == 0)
            reply = running.ask(body=HELLO)
            assert (reply.status, int(reply.headers["retry-after"]) >= 1) == (429, True)
            assert running.ask("/health").status == running.ask("/v1/models").status == 200
            go.set()
            assert [each.result(60).text for each in asked] == [hello] * 4
        assert running.ask(body=HELLO).status == 200

    def test_forgets_who_leaves_before_the_turn(self, running, pair, hello):
        leaving = running.event()
        with held_back(pair.large) as (go, passes):
            first = running.send(body=HELLO)
            until(lambda: passes)
            others = [running.send(body=LONG, leaving=leaving) for _ in range(3)]
            until(lambda: running.app._places == 0)
            running.set(leaving)
            assert [each.result(30).status for each in others] == [None] * 3
            until(lambda: running.app._places == 3)
            go.set()
            assert first.result(60).text == hello
            assert len(passes) < 10
        assert running.app._places == 4

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("name", ["large", "small"])
    def test_stops_the_answer_of_who_leaves(self, running, pair, hello, stream, name):
        before = state(pair)
        settings = {"min_new_tokens": 500, "guidance_max_new_tokens": 500 if name == "small" else 2}
        body = {**about(picture()), "max_tokens": 500, "generation_config": json.dumps(settings), "stream": stream}
        leaving = running.event()
        with held_back(getattr(pair, name)) as (go, passes):
            left = running.send(body=body, leaving=leaving)
            until(lambda: passes)
            running.set(leaving)
            left.result(30)
            until(lambda: running.app._places == 4)
            go.set()
            assert running.ask(body=HELLO).text == hello
            assert len(passes) < 10
        assert state(pair) == before

    def test_is_not_held_up_by_who_does_not_read(self, running, pair, hello):
        async def slow(message: Any) -> None:
            await asyncio.sleep(0 if message["type"] == "http.response.start" else 60)

        def app(scope: Any, receive: Any, send: Any) -> Any:
            return running.app(scope, receive, slow)

        reader = InProcess(app)
        reader.loop = running.loop
        leaving = running.event()
        reading = reader.send(body={**HELLO, "stream": True}, leaving=leaving)
        until(lambda: running.app._places == 3)
        until(lambda: running.app._places == 4)  # its answer is written, though not read
        assert running.ask(body=HELLO).text == hello
        running.set(leaving)
        reading.result(30)


class TestFaults:
    def test_of_the_server_are_told_without_their_inside(self, running, pair, monkeypatch, caplog):
        def broken(**kwargs: Any) -> Any:
            raise RuntimeError("a fault inside")

        monkeypatch.setattr(pair, "generate", broken)
        for stream in (False, True):
            reply = running.ask(body={**HELLO, "stream": stream})
            assert (reply.status, "inside" in reply.sentence) == (500, False)
        assert "a fault inside" in caplog.text

    def test_of_memory_have_their_own_status(self, running, pair, monkeypatch):
        def broken(**kwargs: Any) -> Any:
            raise MemoryError

        monkeypatch.setattr(pair, "generate", broken)
        assert running.ask(body=HELLO).status == 503

    def test_in_the_middle_of_a_stream_end_it(self, running, pair, monkeypatch):
        def broken(streamer: Any, **kwargs: Any) -> Any:
            import torch

            streamer.put(torch.tensor([[1]]))
            streamer.put(torch.tensor([20]))
            raise ValueError("a fault")

        monkeypatch.setattr(pair, "generate", broken)
        reply = running.ask(body={**HELLO, "stream": True})
        assert reply.status == 200
        assert b'{"error": {"message": "a fault"' in reply.body
        assert b"[DONE]" not in reply.body
