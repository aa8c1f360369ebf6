"""A request to ``/v1/chat/completions``, read and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dynamic_llava.page.errors import Refused
from dynamic_llava.page.limits import Limits
from dynamic_llava.page.pictures import read_picture
from dynamic_llava.vllm.rates import NAMES

TAKEN = {
    "model", "messages", "max_tokens", "max_completion_tokens", "stream", "stream_options", "temperature",
    "top_p", "seed", "user", "sparsity", "metadata", "store",
}  # fmt: skip
EMPTY = {
    "n": 1,
    "stop": None,
    "logprobs": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
}
"""Fields that are taken at this value alone, for they ask for nothing then."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """What was asked.

    Attributes
    ----------
    turns
        As chat templates take them.
    sparsity
        The rates that the request asked for.
    explain
        Whether to tell what was kept, patch by patch and word by word.
    """

    turns: list[dict[str, Any]]
    pictures: list[Image.Image]
    new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    sparsity: Mapping[str, Any]
    explain: bool
    streams: bool
    counts_in_stream: bool


def read_chat(body: Any, limits: Limits) -> Chat:
    """Read a request.

    Raises
    ------
    Refused
        It is wrong, or asks for what this server does not do.
    """
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    for name in body.keys() - TAKEN:
        if name not in EMPTY or body[name] not in (None, EMPTY[name]):
            raise Refused(f"{name} is not supported by this server, leave it out", name)
    asked = _field(body, "max_completion_tokens", int, None) or _field(body, "max_tokens", int, None)
    new_tokens = limits.new_tokens if asked is None else asked
    if not 1 <= new_tokens <= limits.new_tokens:
        raise Refused(f"max_tokens must be 1 to {limits.new_tokens}", "max_tokens")
    temperature, top_p = (
        _number(body, name, default) for name, default in (("temperature", 0.0), ("top_p", 1.0))
    )
    if not 0 <= temperature <= 2:
        raise Refused("temperature must be 0 to 2; 0, the default, is greedy", "temperature")
    if not 0 < top_p <= 1:
        raise Refused("top_p must be greater than 0 and at most 1", "top_p")
    sparsity = dict(_field(body, "sparsity", dict, {}) or {})
    explain = bool(sparsity.pop("explain", False))
    if unknown := sorted(sparsity.keys() - set(NAMES)):
        raise Refused(f"sparsity has no {unknown[0]}: choose from {', '.join(NAMES)}, explain", "sparsity")
    turns, pictures = _turns(body.get("messages"), limits)
    stream_options = _field(body, "stream_options", dict, {}) or {}
    return Chat(
        turns, pictures, new_tokens, temperature, top_p, _field(body, "seed", int, None), sparsity, explain,
        bool(_field(body, "stream", bool, False)), bool(stream_options.get("include_usage")),
    )  # fmt: skip


def _turns(messages: Any, limits: Limits) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    if not isinstance(messages, list) or not messages:
        raise Refused("messages must be a list with at least one message", "messages")
    turns: list[dict[str, Any]] = []
    addresses: list[str] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise Refused(f"each message needs a role: {', '.join(ROLES)}", "messages")
        parts, found = _parts(message.get("content"))
        turns.append({"role": message["role"], "content": parts})
        addresses += found
    if turns[-1]["role"] != "user":
        raise Refused("the last message must be the user's", "messages")
    if not any(part["type"] == "image" or part["text"].strip() for part in turns[-1]["content"]):
        raise Refused("the last message is empty, write a question", "messages")
    if len(addresses) > limits.pictures:
        raise Refused(f"{len(addresses)} pictures, the server takes {limits.pictures}", "messages")
    return turns, [read_picture(address, number, limits) for number, address in enumerate(addresses, 1)]


def _parts(content: Any) -> tuple[list[dict[str, str]], list[str]]:
    """Return a message's parts as templates take them, and the addresses of its pictures."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise Refused("the content of a message must be a text or a list of parts", "messages")
    parts: list[dict[str, str]] = []
    addresses: list[str] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                parts.append({"type": "text", "text": text})
            case {"type": "image_url", "image_url": {"url": str(address)}}:
                parts.append({"type": "image"})
                addresses.append(address)
            case _:
                raise Refused("a part must be a text, or an image_url with a url", "messages")
    return parts, addresses


def _field(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(f"{name} must be {_NAMES[kind]}", name)
    return value


_NAMES = {int: "a whole number", bool: "true or false", dict: "an object"}


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"{name} must be a number", name)
    return float(value)
