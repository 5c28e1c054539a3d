"""What a client may ask for, and what is refused before any work."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import pytest
from PIL import Image

from transformers_sgl.serving import Limits
from transformers_sgl.serving.requests import read_chat, read_json, read_response

pytestmark = pytest.mark.mechanics

HELLO = [{"role": "user", "content": "hello"}]
LIMITS = Limits(max_images=2, max_image_pixels=64, max_prompt_tokens=100, max_new_tokens=500)


def read(limits: Limits = LIMITS, **fields: Any) -> Any:
    return read_chat({"messages": HELLO, **fields}, "pair", limits, 48)


def settings(fields: dict[str, Any]) -> Any:
    return read(generation_config=json.dumps(fields)).settings


def picture(width: int = 8, height: int = 8, kind: str = "PNG") -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, kind)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


class TestAChat:
    def test_is_turned_into_a_question(self):
        parts = [picture(), {"type": "text", "text": "what?"}]
        question = read(
            messages=[{"role": "developer", "content": "be brief"}, *user(*parts)], seed=5, stream=True, stop="."
        )
        assert question.messages == [
            {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "what?"}]},
        ]
        assert [image.size for image in question.images] == [(8, 8)]
        assert (question.seed, question.is_stream, question.settings.stop_strings) == (5, True, ["."])

    @pytest.mark.parametrize(
        ("fields", "length"),
        [
            ({}, 500),  # `transformers serve` takes 1024 where the pair says less, but here that is too much
            ({"max_tokens": 7}, 7),
            ({"max_tokens": 7, "max_completion_tokens": 8}, 8),
            ({"max_tokens": 7, "generation_config": '{"max_new_tokens": 9}'}, 7),
            ({"generation_config": '{"max_new_tokens": 9}'}, 9),
        ],
    )
    def test_has_a_limit_of_new_tokens(self, fields, length):
        assert read(**fields).settings.max_new_tokens == length

    def test_samples_where_a_temperature_or_top_p_asks_for_it(self):
        assert read().settings.do_sample is None
        for fields, do_sample in (
            ({"temperature": 0}, False),
            ({"temperature": 0.5}, True),
            ({"top_p": 0.5}, True),
            ({"temperature": 0.5, "generation_config": '{"do_sample": false}'}, False),
        ):
            assert read(**fields).settings.do_sample is do_sample
        assert read(temperature=0.5, top_p=0.25).settings.top_p == 0.25

    def test_may_say_that_it_wants_nothing_special(self):
        read(
            n=1,
            logprobs=False,
            response_format={"type": "text"},
            frequency_penalty=0,
            presence_penalty=0.0,
            tools=[],
            tool_choice="auto",
            user="me",
            metadata={"a": "b"},
            logit_bias={},
            chat_template_kwargs={},
            stream_options={"include_usage": True},
            stop=None,
            model="pair",
        )
        answered = {"role": "assistant", "content": "hello", "refusal": None, "tool_calls": None, "annotations": []}
        read(messages=[*HELLO, answered, *HELLO])

    def test_biases_tokens(self):
        assert read(logit_bias={"42": -100, "7": 1}).settings.sequence_bias == {(42,): -100.0, (7,): 1.0}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        # what nothing would carry out
        ({"n": 2}, "`n` is 2, which this server does not carry out"),
        ({"n": True}, "`n` is True"),
        ({"logprobs": True}, "`logprobs` is True"),
        ({"top_logprobs": 5}, "`top_logprobs` is 5"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is {'type': 'json_object'}"),
        ({"frequency_penalty": 0.5}, "`frequency_penalty` is 0.5"),
        ({"tools": [{"type": "function"}]}, "`tools` is [{'type': 'function'}]"),
        ({"chat_template": "{{ 7 * 7 }}"}, "`chat_template` is '{{ 7 * 7 }}'"),
        ({"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}}, "`chat_template_kwargs` is"),
        ({"prompt": "hello"}, "`prompt` is 'hello'"),
        ({"nonsense": 1}, "There is no field 'nonsense'"),
        ({"model": "org/other"}, "The model is 'org/other', but this server has 'pair' only"),
        # types and ranges
        ({"temperature": "hot"}, "`temperature` is 'hot': pass a number."),
        ({"temperature": 3}, "`temperature` is 3: pass a number from 0 to 2."),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"top_p": -1}, "`top_p` is -1: pass a number from 0 to 1."),
        ({"seed": 2**70}, "`seed` is"),
        ({"seed": -1}, "`seed` is -1"),
        ({"seed": 1.5}, "`seed` is 1.5: pass a whole number."),
        ({"max_tokens": 501}, "`max_tokens` is 501: pass a whole number from 1 to 500."),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"max_completion_tokens": 10**30}, "`max_completion_tokens` is 1000"),
        ({"stream": "yes"}, "`stream` is 'yes': pass true or false."),
        ({"stream_options": 1}, "`stream_options` is 1"),
        ({"logit_bias": {"a": 1}}, "`logit_bias` has the token 'a'"),
        ({"logit_bias": {"1": "x"}}, "`logit_bias` is 'x': pass a number."),
        ({"logit_bias": {str(number): 1 for number in range(301)}}, "with up to 300 token ids"),
        ({"stop": [1]}, "`stop` is 1: pass a text."),
        ({"stop": ""}, "`stop` has a text of 0 characters"),
        ({"stop": "x" * 101}, "`stop` has a text of 101 characters: pass 1 to 100."),
        ({"stop": list("abcde")}, "`stop` has 5 texts: pass up to 4."),
        ({"stop": "\ud800"}, "`stop` has half a character"),
        ({"generation_config": "[" + "[]," * 10**6}, "`generation_config` is '[[]"),
        ({"generation_config": "{}" + " " * 10_000}, "`generation_config` is '{}"),
        # conversations
        ({"messages": [{"role": "tool", "content": "x"}]}, "`messages[0]` has the role 'tool'"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "has a field 'tool_calls'"),
        ({"messages": user({"type": "text", "text": "\udfff"})}, "has half a character"),
        ({"messages": user({"type": "text", "text": "x" * 1600})}, "longer than 1600 characters"),
        ({"messages": HELLO * 100}, "longer than 1600 characters"),
        ({"messages": user(*[{"type": "text", "text": ""}] * 100)}, "longer than 1600 characters"),
        ({"messages": user(*[picture()] * 3)}, "more than 2 images"),
        ({"messages": user(picture(9, 8))}, "9 x 8 pixels, more than the 64 that are allowed"),
        ({"messages": user({"type": "image_url", "image_url": {"url": "x", "detail": "low"}})}, "the detail 'low'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value)[:30],
)
def test_what_is_not_carried_out_or_out_of_range_is_refused(fields, sentence):
    with pytest.raises(ValueError, match="^") as refused:
        read(**fields)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 400


class TestAGenerationConfig:
    def test_sets_what_a_client_may_choose(self):
        chosen = settings({"retention_ratio": 0.5, "do_sample": True, "top_k": 5, "early_exit_threshold": None})
        assert (chosen.retention_ratio, chosen.do_sample, chosen.top_k) == (0.5, True, 5)

    @pytest.mark.parametrize(
        "fields",
        [
            {"encoder_no_repeat_ngram_size": 10**9},
            {"no_repeat_ngram_size": 10**9},
            {"min_new_tokens": 501},
            {"max_new_tokens": 501},
            {"guidance_max_new_tokens": 501},
            {"num_beams": 1000},
            {"num_return_sequences": 2},
            {"suppress_tokens": [10**9]},
            {"eos_token_id": "x"},
            {"cache_implementation": "static"},
            {"custom_generate": "org/code"},
            {"stop_strings": ["x"]},
            {"watermarking_config": {}},
            {"max_time": "x"},
            {"retention_ratio": [0.5]},
            {"retention_ratio": 10**400},
            {"min_tokens_per_image": 10**30},
            {"top_k": "5"},
            {"temperature": 0},
            {"do_sample": 1},
            {"guidance_queries": ["both"]},
            {"verify_draft": "yes"},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_is_refused_where_it_has_other_fields_or_values(self, fields):
        with pytest.raises(ValueError, match=next(iter(fields))):
            settings(fields)


def test_a_large_value_is_not_read_to_the_end_for_a_sentence():
    huge: Any = [[]] * 10**6
    started = time.perf_counter()
    for fields in ({"messages": {"a": huge}}, {"messages": [huge]}, {"stop": {"x": huge}}, {"nonsense": huge}):
        with pytest.raises(ValueError, match="^"):
            read(**fields)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": NaN}', b"[" * 10**6, b'{"a": ' + b"1" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(ValueError, match="^The request is not") as refused:
        read_json(body, LIMITS)
    assert len(str(refused.value)) < 200


def test_a_body_of_very_many_values_is_refused_before_it_is_read():
    started = time.perf_counter()
    for values in (b"[]," * 3_000_000, b'"",' * 3_000_000, b'{"":0},' * 1_000_000):
        with pytest.raises(ValueError, match="shorten it"):
            read_json(b'{"messages": [' + values + b"0]}", Limits())
    assert time.perf_counter() - started < 1
    read_json(json.dumps({"messages": user(*[{"type": "text", "text": "[{,"}] * 16384)}).encode(), Limits())


class TestAResponse:
    def test_is_turned_into_a_question(self):
        image = {"type": "input_image", "image_url": picture()["image_url"]["url"], "detail": "auto"}
        answered = {"type": "output_text", "text": "red", "annotations": [], "logprobs": []}
        said = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [answered]}
        asked = [{"role": "user", "content": [image, {"type": "input_text", "text": "what?"}]}, said, *HELLO]
        question = read_response(
            {"input": asked, "instructions": "be brief", "max_output_tokens": 9}, "pair", LIMITS, None
        )
        assert [message["role"] for message in question.messages] == ["system", "user", "assistant", "user"]
        assert question.messages[1]["content"][0] == {"type": "image", "image": 0}
        assert question.settings.max_new_tokens == 9

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"input": None}, "`input` is None"),
            ({"previous_response_id": "resp_1"}, "`previous_response_id` is 'resp_1'"),
            ({"text": {"format": {"type": "json_schema"}}}, "`text` is"),
            ({"messages": HELLO}, "There is no field 'messages'"),
            ({"max_output_tokens": 10**6}, "`max_output_tokens` is 1000000"),
            ({"instructions": ["x"]}, "`instructions` is ['x']: pass a text."),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)),
    )
    def test_is_refused_as_a_chat_is(self, fields, sentence):
        with pytest.raises(ValueError, match="^") as refused:
            read_response({"input": "hello", **fields}, "pair", LIMITS, None)
        assert sentence in str(refused.value)
