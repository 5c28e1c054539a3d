"""Images of requests: none is decoded that is too large, none is fetched from where it must not be."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from transformers_sgl.serving import images

pytestmark = pytest.mark.mechanics


def png(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG file that says it has so many black pixels, with the data of some rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 + (width + 7) // 8) * rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class TestOpening:
    def test_needs_no_pixels(self):
        image = images.open_image("image", png(8, 8, rows=8), max_pixels=64)
        assert image.size == (8, 8)
        images.decode("image", image)

    @pytest.mark.parametrize("side", [9, 13_000, 30_000, 100_000])
    def test_refuses_a_large_image_at_once(self, side):
        started = time.perf_counter()
        with pytest.raises(ValueError, match="allowed"):
            images.open_image("image", png(side, side), max_pixels=64)
        assert time.perf_counter() - started < 0.5

    def test_refuses_what_is_damaged_when_it_is_decoded(self):
        image = images.open_image("image", png(8, 8)[:-20], max_pixels=64)
        with pytest.raises(ValueError, match="`image` has an image that cannot be read"):
            images.decode("image", image)

    @pytest.mark.parametrize("url", ["x.png", "file:///etc/passwd", "data:text/plain;base64,eA==", "data:image/png,x"])
    def test_reads_no_other_address(self, url):
        with pytest.raises(ValueError, match="pass the image itself"):
            images.read_data_url("image", url)


HOSTS = ("pictures.test", "odd.test:8080")


class TestAllowedAddresses:
    def test_are_those_of_the_hosts(self):
        for url in ("http://pictures.test/a.png", "https://PICTURES.test:443/?a=b", "http://odd.test:8080/"):
            images.check_url("image", url, HOSTS)

    @pytest.mark.parametrize(
        "url",
        [
            "http://other.test/",
            "http://pictures.test.other.test/",
            "http://other.test/pictures.test",
            "http://pictures.test@other.test/",
            "http://me:secret@pictures.test/",
            "http://pictures.test:8080/",
            "https://pictures.test:80/",
            "http://odd.test/",
            "http://pictures.test:0x50/",
            "http://[pictures.test/",
            "http://pictures.test/\r\nHost: other.test",
            "http://pictures.test/a b",
            "http://pictures.test\t/",
            "http:///a.png",
            "http://p\u0131ctures.test/",
        ],
    )
    def test_are_no_others(self, url):
        with pytest.raises(ValueError, match="fetches images from pictures.test, odd.test:8080 only"):
            images.check_url("image", url, HOSTS)

    def test_are_none_unless_asked_for(self):
        with pytest.raises(ValueError, match="fetches no images .see --allow-image-urls"):
            images.check_url("image", "http://pictures.test/", ())


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        *dict.fromkeys(
            [
                "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
                "255.255.255.255", "224.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
                "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001::1",
            ],
            False,
        ).items(),
    ],
)  # fmt: skip
def test_only_public_addresses_are_connected_to(address, is_public):
    assert images._is_public(address) == is_public


class Host:
    """A server of images on this machine, which passes for a public one."""

    def __init__(self, answer: Callable[[str], bytes | None]) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def _serve(self, reader: Any, writer: Any) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        data = self.answer(head.split()[1])
        if data is None:
            await asyncio.sleep(60)
        writer.write(data or b"")
        await writer.drain()
        writer.close()

    def fetch(self, path: str, max_bytes: int = 100, hosts: tuple[str, ...] = ()) -> bytes:
        async def run() -> bytes:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            allowed = (f"localhost:{self.port}", *hosts)
            return await images.fetch("image", f"http://localhost:{self.port}{path}", allowed, max_bytes)

        return asyncio.run(run())


def replied(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class TestFetching:
    @pytest.fixture(autouse=True)
    def _loopback_passes_for_public(self, monkeypatch):
        monkeypatch.setattr(images, "_is_public", lambda address: address in ("127.0.0.1", "::1"))
        monkeypatch.setattr(images, "_TIMEOUT_S", 0.5)
        # one address, whatever else this machine calls itself
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(2, 1, 6, "", ("127.0.0.1", a[1]))])

    @pytest.mark.parametrize("headers", [{"Content-Length": "5"}, {}])
    def test_returns_the_bytes(self, headers):
        host = Host(lambda path: replied("200 OK", b"hello", **headers))
        assert host.fetch("/a.png?b=c") == b"hello"
        assert host.asked[0].startswith("GET /a.png?b=c HTTP/1.1\r\n")
        assert f"Host: localhost:{host.port}\r\n" in host.asked[0]

    @pytest.mark.parametrize(
        ("reply", "sentence"),
        [
            (None, "took longer than 0.5 s"),
            (b"", "cannot be fetched"),
            (b"hello", "cannot be fetched"),
            (replied("404 Not Found", **{"Content-Length": "0"}), "status 404"),
            (replied("200 OK", b"x", **{"Content-Length": "50"}), "cannot be fetched"),
            (replied("200 OK", b"x" * 101), "more than the 100 bytes"),
            (replied("302 Found", Location="/again"), "more than 3 times"),
            (replied("302 Found", Location="http://169.254.169.254/latest"), "fetches images from"),
            (replied("302 Found", Location="file:///etc/passwd"), "fetches images from"),
            (replied("302 Found", Location="http://private.test/"), "not public"),
        ],
    )
    def test_refuses_with_a_sentence(self, reply, sentence, monkeypatch):
        def resolve(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
            return [(2, 1, 6, "", ("10.0.0.1" if host == "private.test" else "127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(ValueError, match="^`image` ") as refused:
            Host(lambda path: reply).fetch("/a.png", hosts=("private.test",))
        assert sentence in str(refused.value)

    def test_connects_to_the_address_that_was_checked(self, monkeypatch):
        answers = iter(["127.0.0.1", "10.0.0.1"])  # a name server that changes its mind
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *a, **k: (
            [(2, 1, 6, "", (next(answers) if host == "localhost" else host, port))]
        ))  # fmt: skip
        assert Host(lambda path: replied("200 OK", b"hello")).fetch("/") == b"hello"
        assert next(answers) == "10.0.0.1"

    def test_nobody_is_asked_about_a_name_that_may_be_private(self, monkeypatch):
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *a, **k: [
            (2, 1, 6, "", ("127.0.0.1", port)), (2, 1, 6, "", ("10.0.0.1", port))
        ])  # fmt: skip
        host = Host(lambda path: b"")
        with pytest.raises(ValueError, match="not public"):
            host.fetch("/")
        assert not host.asked
