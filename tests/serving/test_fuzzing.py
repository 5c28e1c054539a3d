"""Requests at random: whatever a client sends, it gets an answer or a sentence, and soon.

`SGL_FUZZED_REQUESTS` is how many of each kind are sent; 5000 take some minutes.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from asgi import InProcess
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.serving import Limits, PairApp, requests

pytestmark = pytest.mark.mechanics

NUMBER = int(os.environ.get("SGL_FUZZED_REQUESTS", "200"))
LIMITS = Limits(max_body_bytes=100_000, max_prompt_tokens=400, max_new_tokens=3, max_image_pixels=64 * 64)
REFUSED = {400, 413}


@pytest.fixture(scope="module")
def running(embedded_pair_path: Path) -> InProcess:
    pair = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    return InProcess(PairApp("pair", pair, AutoProcessor.from_pretrained(embedded_pair_path), LIMITS))


def data_url(width: int, height: int, mode: str, kind: str) -> str:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


URLS = [
    data_url(8, 8, "RGB", "PNG"),
    data_url(1, 1, "L", "GIF"),
    data_url(64, 1, "P", "PNG"),
    data_url(1, 64, "I;16", "PNG"),
    data_url(9, 8, "CMYK", "JPEG"),
    data_url(8, 9, "RGBA", "WEBP"),
    data_url(65, 64, "RGB", "PNG"),
    "data:image/png;base64,",
    "http://127.0.0.1/a.png",
    "file:///etc/passwd",
]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 10**9, -(10**9), 2**63, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e300,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "hello", "\0", "\ud800", "é漢字🙂", "<IMG_CONTEXT>",
    "<img>", "</s>", "<|im_end|>", "{{ 7 * 7 }}", "{% for x in range(10**9) %}x{% endfor %}", "x" * 5000, "user",
    "assistant", "system", "text", "image_url", "input_text", "high", "both", "none", "auto", [], [[]], [None],
    [1, "x"], ["x"] * 50, {}, {"a": 1}, {"type": "text"}, {"type": "text", "text": "hello"},
    {"role": "user", "content": "hello"}, *URLS,
]  # fmt: skip
OPENAI = [*requests._UNSUPPORTED, *requests._CHAT_FIELDS, *requests._RESPONSE_FIELDS, *requests._IDENTIFIERS]
SETTINGS = [*SGLGenerationConfig().to_dict(), *2 * list(requests._SETTINGS)]
MODEST = {
    "retention_ratio": 0.5, "prune_layer": 1, "verify_draft": True, "do_sample": False, "top_k": 5, "top_p": 0.5,
    "temperature": 0.7, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "early_exit_threshold": 0.5,
    "min_new_tokens": 2, "guidance_queries": "last", "min_p": 0.1, "score_draft": True, "guidance_max_new_tokens": 2,
}  # fmt: skip


def generation_config(random: Random) -> str:
    fields = dict(random.sample(sorted(MODEST.items()), random.randrange(4)))
    for _ in range(random.randrange(3)):
        fields[random.choice(SETTINGS)] = random.choice(VALUES)
    return json.dumps(fields)


def body(random: Random, path: str) -> dict[str, Any]:
    """A request that is answered."""
    is_chat = path == "/v1/chat/completions"
    text = {"type": "text" if is_chat else "input_text", "text": random.choice(["hello", "what is red?", "é🙂"])}
    url = random.choice(URLS[:6])
    image = {"type": "image_url", "image_url": {"url": url}} if is_chat else {"type": "input_image", "image_url": url}
    said = {"role": random.choice(["system", "user", "assistant"]), "content": random.choice(["hello", "", [text]])}
    asked = {"role": "user", "content": random.choice(["hello", [text], [image, text], [text, image]])}
    options = {"stream": random.random() < 0.3, "seed": 5, "temperature": 0, "top_p": 0.5, "model": "pair"}
    if is_chat:
        options |= {"stop": ["."], "n": 1, "logit_bias": {"7": 1}, "stream_options": {}, "max_tokens": 2}
    chosen = dict(random.sample(sorted(options.items()), random.randrange(4)))
    return {"messages" if is_chat else "input": [said, asked][random.randrange(2) :], **chosen}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a value, with each of its keys or indices."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def mutated(random: Random, value: Any) -> Any:
    """The same, with something else somewhere."""
    value = copy.deepcopy(value)
    found = places(value)
    match random.randrange(5) if found else 4:
        case 0 | 1:
            container, key = random.choice(found)
            container[key] = copy.deepcopy(random.choice(VALUES))
        case 2:
            container, key = random.choice(found)
            del container[key]
        case 3:
            container, key = random.choice(found)
            if isinstance(container, dict):
                container[random.choice([*OPENAI, "url", "detail", "type", "role", "x\ud800"])] = random.choice(VALUES)
            else:
                container.insert(key, copy.deepcopy(random.choice(VALUES)))
        case _:
            value[random.choice(OPENAI)] = random.choice(VALUES)
    return value


def damaged(random: Random, data: bytes) -> bytes:
    """The same bytes, with some cut off, changed or doubled."""
    at = random.randrange(len(data))
    other = bytes([random.randrange(256)])
    return random.choice([data[:at], data[:at] + other + data[at + 1 :], data[:at] + data[at:] * 2, other * at])


def check(running: InProcess, path: str, sent: Any, statuses: Counter[int | None]) -> None:
    started = time.perf_counter()
    reply = running.ask(path, sent)
    seconds = time.perf_counter() - started
    statuses[reply.status] += 1
    assert reply.status == 200 or reply.status in REFUSED, (reply.status, sent)
    if reply.status != 200:
        assert 10 < len(reply.sentence) < 800, (reply.sentence, sent)
    assert seconds < 10, (seconds, sent)


def test_any_body_gets_an_answer_or_a_sentence(running):
    random, statuses = Random(5), Counter[int | None]()
    for number in range(NUMBER):
        path = "/v1/responses" if number % 4 == 0 else "/v1/chat/completions"
        sent: Any = body(random, path)
        if random.random() < 0.2:
            sent["generation_config"] = generation_config(random)
        for _ in range(random.randrange(4)):
            sent = mutated(random, sent)
        if random.random() < 0.1:
            sent = damaged(random, json.dumps(sent).encode())
        check(running, path, sent, statuses)
    print(dict(statuses))
    assert min(statuses[200], statuses[400]) > NUMBER / 10


def test_any_generation_config_gets_an_answer_or_a_sentence(running):
    random, statuses = Random(6), Counter[int | None]()
    for _ in range(NUMBER // 2):
        sent = {"messages": [{"role": "user", "content": "hello"}], "generation_config": generation_config(random)}
        if random.random() < 0.1:
            sent["generation_config"] = damaged(random, sent["generation_config"].encode()).decode(errors="replace")
        if random.random() < 0.2:
            image = {"type": "image_url", "image_url": {"url": URLS[0]}}
            sent["messages"] = [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}]
        check(running, "/v1/chat/completions", sent, statuses)
    print(dict(statuses))
    assert min(statuses[200], statuses[400]) > NUMBER / 20
