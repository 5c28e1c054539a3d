"""Images of requests: opened without decoding them, and fetched only from hosts that were allowed."""

from __future__ import annotations

import asyncio
import base64
import io
import ssl
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import h11
from PIL import Image

__all__ = ["check_url", "fetch", "open_image", "read_data_url"]

# By Pillow's names.
_FORMATS = ("GIF", "JPEG", "PNG", "WEBP")
_PORTS = {"http": 80, "https": 443}
_MOST_REDIRECTS = 3
_TIMEOUT_S = 10.0
_CHUNK_BYTES = 2**16
# Addresses that count as public, but through which IPv4 addresses that are not can be reached.
_TRANSLATED = [ip_network("64:ff9b::/96"), ip_network("2001::/32"), ip_network("2002::/16")]


def read_data_url(name: str, url: str) -> bytes:
    """The bytes of an image in a `data:` address; raises `ValueError` for any other address."""
    kind, comma, payload = url.partition(",")
    if not (kind.startswith("data:image/") and kind.endswith(";base64") and comma):
        raise ValueError(f"`{name}` is {_shortened(url)}: pass the image itself as data:image/png;base64,...")
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise _unreadable(name) from error


def open_image(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """Opens an image without decoding it; raises `ValueError` if it is none, or too large to be decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"`{name}` has an image that is too large: {max_pixels} pixels are allowed.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(name) from error
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"`{name}` has an image of {image.width} x {image.height} pixels, more than the {max_pixels} that are "
            "allowed: make it smaller."
        )
    return image


def decode(name: str, image: Image.Image) -> None:
    """Decodes an open image, which takes time; raises `ValueError` if it is damaged."""
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(name) from error


def check_url(name: str, url: str, hosts: tuple[str, ...]) -> SplitResult:
    """The parts of an address from which an image may be fetched; raises `ValueError` for any other."""
    if not hosts:
        raise ValueError(
            f"`{name}` is {_shortened(url)}, but this server fetches no images (see --allow-image-urls): pass the "
            "image itself as data:image/png;base64,..."
        )
    try:
        parts = urlsplit(url)
        place = (
            f"{parts.hostname}" if parts.port in (None, _PORTS.get(parts.scheme)) else f"{parts.hostname}:{parts.port}"
        )
    except ValueError:
        parts, place = urlsplit(""), ""
    is_plain = url.isascii() and url.isprintable() and " " not in url and "@" not in parts.netloc
    if not (is_plain and parts.scheme in _PORTS and parts.hostname and place in hosts):
        raise ValueError(
            f"`{name}` is {_shortened(url)}, but this server fetches images from {', '.join(hosts)} only: pass the "
            "image itself as data:image/png;base64,..."
        )
    return parts


async def fetch(name: str, url: str, hosts: tuple[str, ...], max_bytes: int) -> bytes:
    """Fetches an image from an allowed host with a public address, within ten seconds.

    Raises `ValueError` if that cannot be done. The address that was checked is the one that is connected to, also
    after a redirect.
    """
    try:
        return await asyncio.wait_for(_follow(name, url, hosts, max_bytes), _TIMEOUT_S)
    except (TimeoutError, asyncio.TimeoutError):
        raise ValueError(f"`{name}` is {_shortened(url)}, which took longer than {_TIMEOUT_S:g} s to fetch.") from None
    except (EOFError, OSError, h11.ProtocolError) as error:
        raise ValueError(f"`{name}` is {_shortened(url)}, which cannot be fetched: pass the image itself.") from error


async def _follow(name: str, url: str, hosts: tuple[str, ...], max_bytes: int) -> bytes:
    for _ in range(1 + _MOST_REDIRECTS):
        parts = check_url(name, url, hosts)
        response, data = await _get(parts, await _public_address(name, parts), max_bytes)
        if response.status_code == 200:
            if data is None:
                raise ValueError(f"`{name}` has more than the {max_bytes} bytes that are allowed.")
            return data
        location = next((value.decode("latin-1") for key, value in response.headers if key == b"location"), None)
        if not (300 <= response.status_code < 400 and location):
            raise ValueError(f"`{name}` is {_shortened(url)}, which was answered with status {response.status_code}.")
        url = urljoin(url, location)
    raise ValueError(f"`{name}` leads from address to address more than {_MOST_REDIRECTS} times.")


async def _public_address(name: str, parts: SplitResult) -> str:
    """An address of a host all of whose addresses are public."""
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, _port(parts), type=1)
    addresses = [str(place[0]) for *_, place in found]
    if not addresses or not all(map(_is_public, addresses)):
        raise ValueError(f"`{name}` is on a host whose address is not public: nothing is fetched from there.")
    return addresses[0]


def _is_public(text: str) -> bool:
    address = ip_address(text.partition("%")[0])
    if address.version == 6:
        address = address.ipv4_mapped or address
    is_translated = any(address in network for network in _TRANSLATED if network.version == address.version)
    return address.is_global and not address.is_multicast and not is_translated


def _port(parts: SplitResult) -> int:
    return parts.port or _PORTS[parts.scheme]


async def _get(parts: SplitResult, address: str, max_bytes: int) -> tuple[h11.Response, bytes | None]:
    """One request; the data is `None` where there is too much of it."""
    tls, tls_name = (_certificates(), parts.hostname) if parts.scheme == "https" else (None, None)
    reader, writer = await asyncio.open_connection(address, _port(parts), ssl=tls, server_hostname=tls_name)
    try:
        connection = h11.Connection(h11.CLIENT)
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        headers = [("Host", parts.netloc), ("User-Agent", "transformers-sgl"), ("Connection", "close")]
        for part in (h11.Request(method="GET", target=target, headers=headers), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        await writer.drain()
        response: h11.Response | None = None
        data = bytearray()
        while True:
            event: Any = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK_BYTES))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                data += event.data
            if response is not None and (len(data) > max_bytes or isinstance(event, h11.EndOfMessage)):
                return response, bytes(data) if len(data) <= max_bytes else None
            if isinstance(event, h11.ConnectionClosed):
                raise EOFError
    finally:
        writer.close()


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def _unreadable(name: str) -> ValueError:
    return ValueError(
        f"`{name}` has an image that cannot be read: it is not a whole GIF, JPEG, PNG or WebP file in base64."
    )


def _shortened(url: str) -> str:
    return repr(url) if len(url) <= 60 else f"{url[:50]!r} ..."
