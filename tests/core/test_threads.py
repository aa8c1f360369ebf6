"""Several threads use one attached model: each gets the answer, and the report, of its own calls."""

from __future__ import annotations

import pytest
from tests import tiny

from dynamic_llava import methods
from evidence import threads


@pytest.mark.parametrize("policy", methods.names("image"))
def test_threads_answer_as_each_call_does_alone(policy: str) -> None:
    """``python -m evidence.threads`` asks the same of 8 threads and 20 calls each."""
    model = tiny.model()
    tiny.sparsifier(**tiny.policies(policy)).attach(model)
    calls = threads.tiny_calls(8)
    alone, found = (threads.together(model, calls, count) for count in (1, 2))
    assert threads.different(alone, found) == {}
