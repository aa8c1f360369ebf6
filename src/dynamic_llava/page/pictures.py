"""Pictures of a request: sent with it, or fetched from hosts that the server was told to trust."""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from dynamic_llava.chat.images import MAX_ASPECT, read_image, size_of
from dynamic_llava.page.errors import Refused
from dynamic_llava.page.limits import Limits

PARAM = "messages"
SECONDS = 10
SHORTEST = 32
"""No picture has fewer characters in base64."""


def read_picture(address: str, number: int, limits: Limits) -> Image.Image:
    """Return the picture at an address, as RGB.

    Parameters
    ----------
    address
        ``data:image/...;base64,...``, or ``https://`` and a host of ``limits.picture_hosts``.
    number
        Its place in the request, for messages.

    Raises
    ------
    Refused
        It may not be fetched, or is no picture.
    """
    name = f"picture {number}"
    data = inline(address, name) if address.startswith("data:") else fetched(address, name, limits)
    check_size(data, name, limits)
    try:
        return read_image(data, name)
    except ValueError as error:
        raise Refused(str(error), PARAM) from error


def check_size(data: bytes, name: str, limits: Limits) -> None:
    """Refuse a picture that would grow too large: by its pixels, or once its short side is scaled."""
    try:
        width, height = size_of(data)
    except ValueError as error:
        raise Refused(f"{name}: {error}", PARAM) from error
    if width * height > limits.pixels:
        raise Refused(f"{name}: {width} x {height} pixels, the server takes {limits.pixels:,}", PARAM)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Refused(
            f"{name}: {width} x {height} pixels, a side is over {MAX_ASPECT} times the other", PARAM
        )


def check_inline(body: Any, limits: Limits) -> None:
    """Refuse a body of JSON if a picture somewhere in it is too large; what is broken is not judged here."""
    waiting, number = [body], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and len(value) >= SHORTEST:
            number += 1
            _, _, encoded = value.rpartition(",") if value.startswith("data:") else ("", "", value)
            with suppress(binascii.Error, ValueError):
                check_size(base64.b64decode(encoded, validate=True), f"picture {number}", limits)


def inline(address: str, name: str) -> bytes:
    """Return what a data address holds."""
    head, _, body = address.partition(",")
    if not head.endswith(";base64"):
        raise Refused(f"{name}: a data address must be data:image/...;base64,...", PARAM)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name}: its base64 is broken, encode it again", PARAM) from error


def fetched(address: str, name: str, limits: Limits) -> bytes:
    """Fetch a picture by https from a trusted host, at a public address, without redirects."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port or 443
    except ValueError as error:
        raise Refused(
            f"{name}: its address is broken, send it as data:image/...;base64,...", PARAM
        ) from error
    if parts.scheme != "https" or host not in limits.picture_hosts or port != 443:
        raise Refused(
            f"{name}: this server fetches no pictures from {address[:80]!r}; send it as "
            "data:image/...;base64,..., or start the server with --allow-picture-host",
            PARAM,
        )
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection = Pinned(host, public_address(host))
        try:
            connection.request("GET", path, headers={"Accept": "image/*"})
            answer = connection.getresponse()
            data = answer.read(limits.body_bytes + 1) if answer.status == 200 else b""
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        raise Refused(f"{name}: {host} could not be reached", PARAM) from error
    if answer.status != 200 or len(data) > limits.body_bytes:
        raise Refused(f"{name}: {host} answered with {answer.status}, or with too much", PARAM)
    return data


def public_address(host: str) -> str:
    """Return an address of a host, all of whose addresses are public: none leads into this network."""
    found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    if not found or not all(ipaddress.ip_address(address).is_global for address in found):
        raise OSError(f"{host} has no public address")
    return sorted(found)[0]


class Pinned(http.client.HTTPSConnection):
    """A connection to the address that was judged: a second look-up could lead elsewhere."""

    def __init__(self, host: str, address: str) -> None:
        self._tls = ssl.create_default_context()
        super().__init__(host, timeout=SECONDS, context=self._tls)
        self._address = address

    def connect(self) -> None:
        """Connect, and check that the certificate is the host's."""
        plain = socket.create_connection((self._address, 443), SECONDS)
        self.sock = self._tls.wrap_socket(plain, server_hostname=self.host)
