"""Asking an ASGI application in this process: faster than over the network, and a client can leave when it wants."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass
class Reply:
    status: int | None  # None: the client left before there was one
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def sentence(self) -> str:
        """What an error says."""
        return str(self.content["error"]["message"])

    @property
    def text(self) -> str:
        """The answer to a chat."""
        return str(self.content["choices"][0]["message"]["content"])


class InProcess:
    """An application and the event loop in which it runs, in a thread."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def ask(self, path: str = "/v1/chat/completions", body: Any = None, **options: Any) -> Reply:
        """One request and its reply; see `send`."""
        return self.send(path, body, **options).result(timeout=120)

    def send(
        self,
        path: str = "/v1/chat/completions",
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parts: Any = None,
        leaving: asyncio.Event | None = None,
    ) -> Future[Reply]:
        """Sends a request and returns at once.

        Args:
            path: Where to.
            body: Bytes, or what is sent as JSON; with `None` the request is a GET.
            method: Another method.
            headers: Further headers, or other ones.
            parts: An async iterator over the parts of the body, instead of `body`.
            leaving: When set, the client leaves.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "method": method or ("GET" if body is None and parts is None else "POST"),
            "path": path,
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
        }
        return asyncio.run_coroutine_threadsafe(self._exchange(scope, data, parts, leaving), self.loop)

    def event(self) -> asyncio.Event:
        """An event that `set` sets from any thread."""
        return asyncio.Event()

    def set(self, event: asyncio.Event) -> None:
        self.loop.call_soon_threadsafe(event.set)

    async def _exchange(self, scope: Any, data: bytes, parts: Any, leaving: asyncio.Event | None) -> Reply:
        leaving = leaving or asyncio.Event()
        reply = Reply(None, {}, b"")
        is_sent = False

        async def receive() -> Any:
            nonlocal is_sent
            if parts is not None and not leaving.is_set():
                try:
                    return {"type": "http.request", "body": await anext(parts), "more_body": True}
                except StopAsyncIteration:
                    pass
            if not is_sent:
                is_sent = True
                return {"type": "http.request", "body": b"" if parts is not None else data, "more_body": False}
            await leaving.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                reply.body += message["body"]

        await self.app(scope, receive, send)
        return reply
