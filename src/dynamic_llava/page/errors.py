"""Refusals, in the form that clients of OpenAI's API read."""

from __future__ import annotations

from typing import Any


class Refused(Exception):
    """A request that gets an error as its answer.

    Parameters
    ----------
    message
        One line that says what is wrong and what to do.
    param
        The field of the request that it is about.
    status
        The HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}
