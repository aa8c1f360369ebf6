"""Draws what a server must survive: requests that are wrong, cut off or abandoned, as bytes to send again.

Each kind is an iterator of :class:`Shot`; the same seed draws the same shots.
"""

from __future__ import annotations

import base64
import json
import random
import string
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

CHAT = "/v1/chat/completions"
PATHS = (CHAT, CHAT, CHAT, "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize", "/nowhere")
PATIENCE = 120.0  # seconds
LONGEST = 8  # tokens of an answer: shots are to be many, not long


@dataclass(frozen=True)
class Shot:
    """A request as it goes over the wire.

    Attributes
    ----------
    kind
        What it tries.
    sent
        All that is sent; if it is cut short, no answer is due.
    leaves
        Seconds after which the client leaves, answered or not.
    is_due
        Whether the answer must have begun by then.
    """

    kind: str
    sent: bytes
    leaves: float
    is_due: bool = True


def request(body: bytes, path: str = CHAT, method: str = "POST", *more: str) -> bytes:
    """Return a complete request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *more]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in more):
        lines.append(f"Content-Length: {len(body)}")
    if not any(line.lower().startswith("content-type") for line in more):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "replace") + body


def chat(pictures: list[str], **fields: Any) -> dict[str, Any]:
    """Return the body of a chat with pictures, given as addresses."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [*parts, {"type": "text", "text": "What is there?"}]
    return {
        "model": "nano",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": LONGEST,
    } | fields


def whole_picture(rng: random.Random, kind: str = "PNG") -> bytes:
    """Return a picture of a few pixels."""
    data = BytesIO()
    size = rng.randint(1, 64), rng.randint(1, 64)
    mode = rng.choice(
        {"PNG": ("RGB", "L", "P", "RGBA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK")}.get(kind, ("RGB",))
    )
    Image.new(mode, size).save(data, kind)
    return data.getvalue()


def broken_picture(rng: random.Random) -> bytes:
    """Return what is a picture no more: cut, with bytes changed, or something else altogether."""
    data = bytearray(whole_picture(rng, rng.choice(("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"))))
    match rng.randrange(4):
        case 0:
            return bytes(data[: rng.randrange(len(data))])
        case 1:
            for _ in range(rng.randint(1, 12)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
        case 2:
            return rng.randbytes(rng.randrange(200))
        case _:
            return rng.choice(
                (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"GIF89a", b"\x89PNG\r\n\x1a\n")
            )


def bomb(rng: random.Random) -> bytes:
    """Return a small file that decodes to a huge picture, or to a strip that processors would scale up."""
    width, height = rng.choice(
        ((60_000, 60_000), (20_000, 9_000), (1, 16_000), (100_000, 1), (5_000, 4_000), (0, 7))
    )
    rows = zlib.compress(bytes(min((width + 1) * height, 40_000_000)), 9)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20_000_000), 9)) if rng.random() < 0.3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + text + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def address(rng: random.Random, data: bytes) -> str:
    """Return picture data as an address, now and then a wrong one."""
    coded = base64.b64encode(data).decode()
    if rng.random() < 0.1:
        coded = coded[: rng.randrange(len(coded) + 1)] + rng.choice(("", "!", " ", "=", "\u00e4"))
    kind = rng.choice(
        ("image/png", "image/png", "image/jpeg", "image/x", "text/plain", "application/octet-stream", "")
    )
    return f"data:{kind};base64,{coded}"


def anything(rng: random.Random, depth: int = 0) -> Any:
    """Return any value that JSON can hold, and some that it should not."""
    plain: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice((True, False)),
        lambda: rng.choice((0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**30)),
        lambda: rng.choice((0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"), 0.3)),
        lambda: "".join(rng.choices(LETTERS, k=rng.randrange(20))),
    ]  # fmt: skip
    if depth < 4 and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(FIELDS): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(plain)()


LETTERS = string.printable + "\u0000\ud800\U0001f600\u00e4<image>"
FIELDS = (
    "model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k",
    "n", "stop", "seed", "stream", "stream_options", "logprobs", "top_logprobs", "prompt_logprobs",
    "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens",
    "stop_token_ids", "bad_words", "allowed_token_ids", "ignore_eos", "tools", "tool_choice",
    "response_format", "structured_outputs", "guided_json", "echo", "prompt", "input", "role",
    "content", "type", "text", "image_url", "url", "sparsity", "vllm_xargs", "image_keep_rate",
    "text_keep_rate", "dense", "explain", "kv_transfer_params", "priority", "request_id",
    "chat_template", "mm_processor_kwargs", "add_generation_prompt", "continue_final_message",
    "documents", "cache_salt", "user", "truncate_prompt_tokens", "return_token_ids",
    "skip_special_tokens", "detokenize", "system", "metadata",
)  # fmt: skip


def bodies(rng: random.Random) -> Iterator[Shot]:
    """Draw chats with fields that hold anything."""
    while True:
        pictures = [address(rng, whole_picture(rng)) for _ in range(rng.randrange(3))]
        body: dict[str, Any] = chat(pictures, stream=rng.random() < 0.3)
        path = rng.choice(PATHS)
        if path == "/v1/completions":
            body["prompt"] = "What is there?"
        for _ in range(rng.randint(1, 3)):
            name = rng.choice(FIELDS)
            if name in ("sparsity", "vllm_xargs") and rng.random() < 0.8:
                rates = ("image_keep_rate", "text_keep_rate", "dense", "explain", "rate")
                body[name] = {rng.choice(rates): anything(rng, 3) for _ in range(rng.randrange(4))}
            elif rng.random() < 0.3 and isinstance(body["messages"], list) and body["messages"]:
                message = body["messages"][0]
                if isinstance(message, dict):
                    message[name] = anything(rng)
            else:
                body[name] = anything(rng)
        if isinstance(body.get("max_tokens"), int) and body["max_tokens"] > LONGEST and rng.random() < 0.9:
            body["max_tokens"] = LONGEST
        data = json.dumps(body, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            data = rng.choice(
                (b"[" * 100_000, data[: rng.randrange(len(data))], rng.randbytes(50), b"", b"null")
            )
        yield Shot("body", request(data, path), leaves=PATIENCE)


def pictures(rng: random.Random) -> Iterator[Shot]:
    """Draw chats whose pictures are broken, bombs, or at addresses that are not to be fetched."""
    elsewhere = (
        "http://127.0.0.1:1/a.png",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "ftp://x/y",
        "https://[",
        "",
    )
    while True:
        found = []
        for _ in range(rng.randint(1, 3)):
            draw = rng.random()
            if draw < 0.1:
                found.append(rng.choice(elsewhere))
            else:
                data = bomb(rng) if draw < 0.14 else broken_picture(rng) if draw < 0.8 else whole_picture(rng)
                found.append(address(rng, data))
        yield Shot("picture", request(json.dumps(chat(found)).encode()), leaves=PATIENCE)


def halves(rng: random.Random) -> Iterator[Shot]:
    """Draw requests that stop in the midst, promise other lengths than they have, or are no HTTP."""
    while True:
        body = json.dumps(chat([address(rng, whole_picture(rng))])).encode()
        sent = request(body)
        match rng.randrange(5):
            case 0:
                yield Shot(
                    "half", sent[: rng.randrange(len(sent))], leaves=rng.choice((0.0, 0.05)), is_due=False
                )
            case 1:
                length = rng.choice((len(body) + 10, 2**31, 2**70, "x", "-1", ""))
                more = f"Content-Length: {length}"
                yield Shot("half", request(body, CHAT, "POST", more), leaves=0.1, is_due=False)
            case 2:
                cut = rng.randrange(len(body))
                pieces = (
                    f"{cut:x}\r\n".encode()
                    + body[:cut]
                    + b"\r\n"
                    + rng.choice((b"", b"zz\r\n", b"5\r\nab", b"0\r\n\r\n"))
                )
                more = "Transfer-Encoding: chunked"
                yield Shot("half", request(pieces, CHAT, "POST", more), leaves=0.1, is_due=False)
            case 3:
                yield Shot("half", rng.randbytes(rng.randrange(1, 300)), leaves=0.05, is_due=False)
            case _:
                path = "/" + "".join(
                    rng.choices(string.ascii_letters + "%/.?&=~\u00e4 ", k=rng.randrange(40))
                )
                method = rng.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"))
                yield Shot(
                    "half",
                    request(b"", path, method, "X-A: " + "y" * rng.randrange(3000)),
                    leaves=5,
                    is_due=False,
                )


def leavers(rng: random.Random) -> Iterator[Shot]:
    """Draw good chats whose clients leave while they are answered."""
    while True:
        found = [address(rng, whole_picture(rng)) for _ in range(rng.randrange(4))]
        body = chat(found, max_tokens=60, stream=rng.random() < 0.7, ignore_eos=True)
        if rng.random() < 0.5:
            body["sparsity"] = rng.choice(({"dense": True}, {"image_keep_rate": rng.random() * 0.9 + 0.05}))
        yield Shot("leaver", request(json.dumps(body).encode()), leaves=rng.random() * 0.8, is_due=False)


KINDS = {"body": bodies, "picture": pictures, "half": halves, "leaver": leavers}
"""Kinds of shots that need no schema, by name."""
