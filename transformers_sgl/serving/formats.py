"""How answers are written down, in the two formats of OpenAI's that the server speaks."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import uuid4

from transformers_sgl.serving.requests import Limits, Question, read_chat, read_response
from transformers_sgl.serving.texts import Answer

__all__ = ["FORMATS", "Format", "error_content", "event"]

_MESSAGE_LENGTH = 600


def event(content: Mapping[str, Any], kind: str | None = None) -> bytes:
    """One server-sent event."""
    line = "" if kind is None else f"event: {kind}\n"
    return f"{line}data: {json.dumps(content)}\n\n".encode()


def error_content(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """What an error says, in OpenAI's form; a sentence that quotes what a client sent may be of any length."""
    message = " ".join(message.split())
    if len(message) > _MESSAGE_LENGTH:
        message = f"{message[:_MESSAGE_LENGTH]} ..."
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Format(ABC):
    """One answer in one format: whole, or as the events before, for and after its pieces."""

    read: Callable[[Mapping[str, Any], str, Limits, int | None], Question]

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = uuid4().hex
        self.created = int(time.time())

    @abstractmethod
    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""

    @abstractmethod
    def start(self) -> Iterator[bytes]:
        """The events before the first piece."""

    @abstractmethod
    def piece(self, text: str) -> bytes:
        """The event of a piece."""

    @abstractmethod
    def end(self, answer: Answer) -> Iterator[bytes]:
        """The events after the last piece."""


class _Chat(Format):
    read = staticmethod(read_chat)

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": self._reason(answer)}
        return {**self._head("chat.completion"), "choices": [choice], **self._tail(answer)}

    def start(self) -> Iterator[bytes]:
        yield event(self._chunk({"role": "assistant"}))

    def piece(self, text: str) -> bytes:
        return event(self._chunk({"content": text}))

    def end(self, answer: Answer) -> Iterator[bytes]:
        yield event({**self._chunk({}, self._reason(answer)), **self._tail(answer)})
        yield b"data: [DONE]\n\n"

    @staticmethod
    def _reason(answer: Answer) -> str:
        return "length" if answer.is_cut else "stop"

    @staticmethod
    def _tail(answer: Answer) -> dict[str, Any]:
        prompt, completion = answer.num_prompt_tokens, answer.num_answer_tokens
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {"usage": usage, "sgl": answer.report}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


class _Response(Format):
    read = staticmethod(read_response)

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self._number = 0
        self._place = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}

    def whole(self, answer: Answer) -> dict[str, Any]:
        prompt, completion = answer.num_prompt_tokens, answer.num_answer_tokens
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }
        status = "incomplete" if answer.is_cut else "completed"
        response = self._response(status, output=[self._message(status, answer.text)], usage=usage)
        if answer.is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        return {**response, "sgl": answer.report}

    def start(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        item = {**self._message("in_progress", ""), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place, part=self._part(""))

    def piece(self, text: str) -> bytes:
        return self._event("response.output_text.delta", **self._place, delta=text, logprobs=[])

    def end(self, answer: Answer) -> Iterator[bytes]:
        whole = self.whole(answer)
        yield self._event("response.output_text.done", **self._place, text=answer.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=self._part(answer.text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def _event(self, kind: str, **content: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **content}, kind)

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        nothing = dict.fromkeys(("error", "incomplete_details", "instructions", "metadata", "usage"))
        choices = {"output": [], "parallel_tool_calls": False, "tool_choice": "none", "tools": []}
        head = {"id": f"resp_{self.id}", "object": "response", "created_at": self.created, "model": self.model}
        return {**head, "status": status, **nothing, **choices, **more}

    def _message(self, status: str, text: str) -> dict[str, Any]:
        head = {"id": self._place["item_id"], "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": [self._part(text)]}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}


FORMATS: dict[str, type[Format]] = {"/v1/chat/completions": _Chat, "/v1/responses": _Response}
