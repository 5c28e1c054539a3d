"""What a client may ask for: every field of a request is checked before any work, and turned into a question."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from math import inf
from reprlib import Repr
from typing import Any

from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.serving.images import check_url, open_image, read_data_url

__all__ = ["Limits", "Question", "read_chat", "read_json", "read_response"]

# More characters than any prompt of so many tokens has: it saves the work of counting the tokens.
_CHARACTERS_PER_TOKEN = 16
_VALUES_PER_TOKEN = 8  # JSON values beside the texts
_SETTINGS_LENGTH = 10_000
_STOP_STRING_LENGTH = 100
# As in `transformers serve`, where neither the client nor the pair wants more.
_DEFAULT_NEW_TOKENS = 1024
_SEEDS = 2**63 - 1
_MOST_BIASED_TOKENS = 300

_ROLES = {"assistant": "assistant", "developer": "system", "system": "system", "user": "user"}
_IDENTIFIERS = ("metadata", "prompt_cache_key", "safety_identifier", "user")  # for the operator, not for the answer
# Fields of OpenAI's that are not carried out, and the values with which they ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "conversation": (),
    "frequency_penalty": (0, 0.0),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "include": ([],),
    "logprobs": (False,),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (False, True),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": (),
    "web_search_options": (),
}
_BOTH = ("generation_config", "model", "seed", "stream", "stream_options", "temperature", "top_p")
_CHAT_FIELDS = (*_BOTH, "logit_bias", "max_completion_tokens", "max_tokens", "messages", "stop")
_RESPONSE_FIELDS = (*_BOTH, "input", "instructions", "max_output_tokens")
_MARKS = ("id", "status", "type")  # of an item of a response
# What a message may say beside its role and content, as long as it says nothing: clients send answers back whole.
_EMPTY: tuple[Any, ...] = (None, "", [], {})

# The fields of a generation config that a client may set, and between what bounds; `None` is the limit of new tokens.
# A bound that `SGLGenerationConfig` itself checks, with a better sentence, is wide here.
_SETTINGS: dict[str, tuple[Any, float, float | None]] = {
    "confirmation_threshold": (float, -inf, inf),
    "consistency_reduction": (str, 0, 0),
    "consistency_retention_ratio": (float, -inf, inf),
    "do_sample": (bool, 0, 0),
    "draft_retention_ratio": (float, -inf, inf),
    "early_exit_threshold": (float, -inf, inf),
    "guidance": (str, 0, 0),
    "guidance_layers": (float, -inf, inf),
    "guidance_max_new_tokens": (int, -inf, None),
    "guidance_queries": (str, 0, 0),
    "max_new_tokens": (int, -inf, None),
    "min_new_tokens": (int, 0, None),
    "min_p": (float, 0, 1),
    "min_tokens_per_image": (int, 0, 1e6),
    "no_repeat_ngram_size": (int, 0, 64),
    "num_draft_tokens": (int, -inf, None),
    "prune_layer": (float, -inf, inf),
    "repetition_penalty": (float, 0.1, 10),
    "retention_ratio": (float, -inf, inf),
    "score_draft": (bool, 0, 0),
    "selection": (str, 0, 0),
    "temperature": (float, 0.01, 10),
    "top_k": (int, 0, 1000),
    "top_p": (float, 0.01, 1),
    "unsure_retention_ratio": (float, -inf, inf),
    "unsure_threshold": (float, -inf, inf),
    "verify_draft": (bool | str, 0, 0),
    "vision_prune_layer": (float, -inf, inf),
    "vision_retention_ratio": (float, -inf, inf),
}
_KINDS: dict[Any, str] = {
    bool: "true or false",
    bool | str: "true, false or a text",
    float: "a number",
    int: "a whole number",
    str: "a text",
}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Args:
        max_body_bytes (`int`): The length of its body, and of all images that are fetched for it.
        max_images (`int`): Images.
        max_image_pixels (`int`): Width times height of one image.
        max_prompt_tokens (`int`): Tokens of the prompt, visual tokens included.
        max_new_tokens (`int`): Tokens of the answer.
        max_stop_strings (`int`): Stop strings.
        image_hosts (`tuple[str, ...]`): Hosts, as `name` or `name:port`, from which images may be fetched.
    """

    max_body_bytes: int = 10 * 2**20
    max_images: int = 8
    max_image_pixels: int = 4096 * 4096
    max_prompt_tokens: int = 16384
    max_new_tokens: int = 2048
    max_stop_strings: int = 4
    image_hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """A request that has been checked.

    Attributes:
        messages (`list[dict]`): The conversation as a processor takes it; a part `image` has its number in `images`.
        images (`list[Image | str]`): Images that are open but not yet decoded, or their addresses.
        settings ([`SGLGenerationConfig`]): How to answer.
        seed (`int`, *optional*): What sampling starts from.
        is_stream (`bool`): Whether the answer is wanted piece by piece.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    settings: SGLGenerationConfig
    seed: int | None
    is_stream: bool


def read_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """Reads the body of a request; raises `ValueError` if it is no JSON object, or one of too many values."""
    # To read millions of empty lists takes seconds, in which nothing else runs. Texts may have such signs, too.
    most = limits.max_prompt_tokens * (_CHARACTERS_PER_TOKEN + _VALUES_PER_TOKEN)
    if sum(map(body.count, (b"[", b"{", b","))) > most:
        raise ValueError(f"The request is not for a prompt of {limits.max_prompt_tokens} tokens: shorten it.")
    try:
        request = json.loads(body, parse_constant=_no_number)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"The request is not JSON: {_shortened(str(error))}.") from error
    if not isinstance(request, dict):
        raise ValueError("The request is not a JSON object.")
    return request


def read_chat(request: Mapping[str, Any], model: str, limits: Limits, own_new_tokens: int | None) -> Question:
    """Checks a request of `/v1/chat/completions`; raises `ValueError` with what is wrong and what to pass."""
    given = _given(request, _CHAT_FIELDS, model)
    chat = _Chat(limits, text_types=("text",), image_type="image_url")
    messages = chat.messages("messages", given.get("messages"))
    settings = _settings(given, limits, ("max_tokens", "max_completion_tokens"), own_new_tokens)
    stop = _stop_strings(given.get("stop", []), limits)
    bias = _logit_bias(given.get("logit_bias", {}))
    if stop:
        settings["stop_strings"] = stop
    if bias:
        settings["sequence_bias"] = bias
    return _question(given, messages, chat, settings)


def read_response(request: Mapping[str, Any], model: str, limits: Limits, own_new_tokens: int | None) -> Question:
    """Checks a request of `/v1/responses`, as `read_chat` does for a chat."""
    given = _given(request, _RESPONSE_FIELDS, model)
    chat = _Chat(limits, text_types=("input_text", "output_text", "text"), image_type="input_image", marks=_MARKS)
    asked = given.get("input")
    if isinstance(asked, str):
        asked = [{"role": "user", "content": asked}]
    messages = chat.messages("input", asked)
    if "instructions" in given:
        text = chat.text("instructions", given["instructions"])
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": text}]})
    return _question(given, messages, chat, _settings(given, limits, ("max_output_tokens",), own_new_tokens))


def _question(
    given: Mapping[str, Any], messages: list[dict[str, Any]], chat: _Chat, settings: dict[str, Any]
) -> Question:
    is_stream, seed = given.get("stream", False), given.get("seed")
    _check_kind("stream", is_stream, bool)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or any(not isinstance(value, bool) for value in options.values()):
        raise ValueError(
            f"`stream_options` is {_shortened(options)}: pass an object such as {{'include_usage': true}}."
        )
    if seed is not None:
        _check_number("seed", seed, int, 0, _SEEDS)
    return Question(messages, chat.images, SGLGenerationConfig(**settings), seed, is_stream)


def _given(request: Mapping[str, Any], known: tuple[str, ...], model: str) -> dict[str, Any]:
    """The fields that are set; refuses those that nothing would carry out."""
    given = {name: value for name, value in request.items() if value is not None and name not in _IDENTIFIERS}
    for name in given.keys() - set(known):
        if name not in _UNSUPPORTED:
            raise ValueError(f"There is no field {_shortened(name)} in such a request: leave it out.")
        value = given[name]
        if not any(type(value) is type(nothing) and value == nothing for nothing in _UNSUPPORTED[name]):
            raise ValueError(f"`{name}` is {_shortened(value)}, which this server does not carry out: leave it out.")
    if given.get("model", model) != model:
        raise ValueError(f"The model is {_shortened(given['model'])}, but this server has {model!r} only.")
    return given


class _Chat:
    """Reads a conversation, and counts what it would take."""

    def __init__(
        self, limits: Limits, text_types: tuple[str, ...], image_type: str, marks: tuple[str, ...] = ()
    ) -> None:
        self.images: list[Any] = []
        self._limits = limits
        self._text_types, self._image_type, self._marks = text_types, image_type, marks
        self._room = self._most = limits.max_prompt_tokens * _CHARACTERS_PER_TOKEN

    def messages(self, name: str, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"`{name}` is {_shortened(value)}: pass the conversation, a list of messages.")
        return [self._message(f"{name}[{number}]", message) for number, message in enumerate(value)]

    def text(self, name: str, value: Any) -> str:
        _check_text(name, value)
        self._take(len(value))
        return str(value)

    def _take(self, characters: int) -> None:
        self._room -= characters
        if self._room < 0:
            raise ValueError(
                f"The conversation is longer than {self._most} characters, so than the prompts of "
                f"{self._limits.max_prompt_tokens} tokens that this server takes: shorten it."
            )

    def _message(self, name: str, message: Any) -> dict[str, Any]:
        self._take(_CHARACTERS_PER_TOKEN)  # a message without a text is a token or more, too
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str | list | None)
        ):
            raise ValueError(
                f"`{name}` is {_shortened(message)}: pass an object with a `role` and a `content`, which is a text or "
                "a list of parts."
            )
        if message["role"] not in _ROLES:
            raise ValueError(
                f"`{name}` has the role {_shortened(message['role'])}: pass one of {', '.join(map(repr, _ROLES))}."
            )
        _check_nothing_else(name, message, ("role", "content", *self._marks))
        content = message.get("content") or []
        if isinstance(content, str):
            content = [{"type": self._text_types[0], "text": content}]
        return {"role": _ROLES[message["role"]], "content": [self._part(name, part) for part in content]}

    def _part(self, name: str, part: Any) -> dict[str, Any]:
        self._take(_CHARACTERS_PER_TOKEN)
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in self._text_types and isinstance(part.get("text"), str):
            _check_nothing_else(name, part, ("type", "text"))
            return {"type": "text", "text": self.text(f"{name}.content", part["text"])}
        if kind == self._image_type:
            image = part.get("image_url")
            if not isinstance(image, dict):
                image = {"url": image, "detail": part.get("detail")} if self._image_type == "input_image" else {}
            if isinstance(image.get("url"), str):
                _check_nothing_else(name, part, ("type", "image_url", "detail"))
                return {"type": "image", "image": self._image(f"{name}.image_url", image)}
        raise ValueError(
            f"`{name}` has a part {_shortened(part)}: a pair reads parts of the type `{self._text_types[0]}`, with a "
            f"`text`, and `{self._image_type}`, with an `image_url` that has a `url`: a pair reads texts and images "
            "only."
        )

    def _image(self, name: str, image: dict[str, Any]) -> int:
        """Adds an image and returns its number."""
        _check_nothing_else(name, image, ("url", "detail"))
        if image.get("detail") not in (None, "auto", "high"):
            raise ValueError(f"`{name}` has the detail {_shortened(image['detail'])}: pass 'auto' or 'high'.")
        if len(self.images) == self._limits.max_images:
            raise ValueError(f"There are more than {self._limits.max_images} images: ask about fewer at once.")
        url = image["url"]
        if url.startswith(("http://", "https://")):
            check_url(name, url, self._limits.image_hosts)
            self.images.append(url)
        else:
            self.images.append(open_image(name, read_data_url(name, url), self._limits.max_image_pixels))
        return len(self.images) - 1


def _settings(
    given: Mapping[str, Any], limits: Limits, length_names: tuple[str, ...], own_new_tokens: int | None
) -> dict[str, Any]:
    """The settings of an answer: those of `generation_config`, over which the request's own fields win."""
    settings = _generation_config(given["generation_config"], limits) if "generation_config" in given else {}
    for name, at_most in (("temperature", 2), ("top_p", 1)):
        if name in given:
            _check_number(name, given[name], float, 0, at_most)
    if given.get("temperature") == 0 or given.get("top_p") == 0:
        settings["do_sample"] = False
    elif "temperature" in given or "top_p" in given:
        settings = {"do_sample": True, **settings}
        settings.update({name: max(float(given[name]), 0.01) for name in ("temperature", "top_p") if name in given})
    for name in length_names:  # the last one wins
        if name in given:
            _check_number(name, given[name], int, 1, limits.max_new_tokens)
            settings["max_new_tokens"] = given[name]
    if "max_new_tokens" not in settings:
        wanted = max(own_new_tokens or 0, settings.get("min_new_tokens", 0), _DEFAULT_NEW_TOKENS)
        settings["max_new_tokens"] = min(wanted, limits.max_new_tokens)
    return settings


def _generation_config(text: Any, limits: Limits) -> dict[str, Any]:
    is_text = isinstance(text, str) and len(text) <= _SETTINGS_LENGTH
    try:
        settings = json.loads(text, parse_constant=_no_number) if is_text else None
    except (RecursionError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"`generation_config` is {_shortened(text)}: pass the JSON text of an object.")
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings.get("return_dict_in_generate"):
        raise ValueError("`return_dict_in_generate` is set, but a server returns texts only: leave it out.")
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise ValueError(
                f"`generation_config` has no field {_shortened(name)} that a client may set: these are "
                f"{', '.join(_SETTINGS)}."
            )
        kind, low, high = _SETTINGS[name]
        if kind in (int, float):
            _check_number(name, value, kind, low, limits.max_new_tokens if high is None else high)
        else:
            _check_kind(name, value, kind)
    SGLGenerationConfig(**settings)
    return settings


def _stop_strings(stop: Any, limits: Limits) -> list[str]:
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list):
        raise ValueError(f"`stop` is {_shortened(stop)}: pass a text or a list of texts.")
    if len(texts) > limits.max_stop_strings:
        raise ValueError(f"`stop` has {len(texts)} texts: pass up to {limits.max_stop_strings}.")
    for text in texts:
        _check_text("stop", text)
        if not 1 <= len(text) <= _STOP_STRING_LENGTH:
            raise ValueError(f"`stop` has a text of {len(text)} characters: pass 1 to {_STOP_STRING_LENGTH}.")
    return texts


def _logit_bias(bias: Any) -> dict[tuple[int, ...], float]:
    if not isinstance(bias, dict) or len(bias) > _MOST_BIASED_TOKENS:
        raise ValueError(
            f"`logit_bias` is {_shortened(bias)}: pass an object with up to {_MOST_BIASED_TOKENS} token ids."
        )
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ValueError(f"`logit_bias` has the token {_shortened(token)}: pass ids, such as '42'.")
        _check_number("logit_bias", value, float, -100, 100)
    return {(int(token),): float(value) for token, value in bias.items()}


def _check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    wanted = _KINDS[kind]
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise ValueError(f"`{name}` is {_shortened(value)}: pass {wanted}.")
    if not low <= value <= high:
        bounds = f"up to {high:g}" if low == -inf else f"from {low:g} to {high:g}"
        raise ValueError(f"`{name}` is {_shortened(value)}: pass {wanted} {bounds}.")


def _check_kind(name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"`{name}` is {_shortened(value)}: pass {_KINDS[kind]}.")


def _check_text(name: str, value: Any) -> None:
    _check_kind(name, value, str)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` has half a character: pass whole ones, without lone surrogates.") from error


def _check_nothing_else(name: str, value: dict[str, Any], known: tuple[str, ...]) -> None:
    for key, more in value.items():
        if key not in known and more not in _EMPTY:
            raise ValueError(f"`{name}` has a field {_shortened(key)}, which is not carried out: leave it out.")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


class _Short(Repr):
    """Reads no more of a value than it shows, in its order."""

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        items = (
            f"{self.repr1(key, level)}: {self.repr1(value[key], level - 1)}" for key in islice(value, self.maxdict)
        )
        return f"{{{', '.join(items) if level > 0 else '...'}{', ...' if len(value) > self.maxdict else ''}}}"


def _shortened(value: Any) -> str:
    """A value's `repr`, cut to fit in a sentence; the value may be of any size and depth."""
    short = _Short()
    short.maxstring = short.maxother = 50
    text = short.repr(value)
    return text if len(text) <= 60 else f"{text[:50]} ..."
