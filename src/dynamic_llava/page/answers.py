"""Answers in the form of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from typing import Any

from dynamic_llava.page.engine import Answer


class Form:
    """The answers to one request.

    Parameters
    ----------
    model
        Its name.
    """

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return an answer in one piece."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": reason(answer), "logprobs": None}
        body = self._head | {"object": "chat.completion", "choices": [choice], "usage": usage(answer)}
        return body if answer.sparsity is None else body | {"sparsity": answer.sparsity}

    def piece(self, text: str, is_first: bool) -> dict[str, Any]:
        """Return a piece of an answer's text."""
        role = {"role": "assistant"} if is_first else {}
        return self._chunk([{"index": 0, "delta": role | {"content": text}, "finish_reason": None}])

    def end(self, answer: Answer) -> dict[str, Any]:
        """Return the piece that ends an answer."""
        body = self._chunk([{"index": 0, "delta": {}, "finish_reason": reason(answer)}])
        return body if answer.sparsity is None else body | {"sparsity": answer.sparsity}

    def count(self, answer: Answer) -> dict[str, Any]:
        """Return the piece with the counts of tokens, for those who asked for it."""
        return self._chunk([]) | {"usage": usage(answer)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}


def reason(answer: Answer) -> str:
    """Return why an answer ended."""
    return "length" if answer.is_cut else "stop"


def usage(answer: Answer) -> dict[str, int]:
    """Return the counts of tokens."""
    total = answer.prompt_tokens + answer.new_tokens
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.new_tokens,
        "total_tokens": total,
    }
