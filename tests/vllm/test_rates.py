"""What a request and a server may ask for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dynamic_llava import SparsityConfig
from dynamic_llava.vllm.rates import Rates, explains, request_rates, server_config

CONFIG = SparsityConfig(image_keep_rate=0.25, text_margins=(-4.0, 0.0, 4.0))


def test_a_request_without_wishes_gets_the_servers_rates() -> None:
    assert request_rates(CONFIG, None) == request_rates(CONFIG, {"session_id": "x"}) == Rates(0.25, 0.0)


def test_a_request_changes_its_own_rates_alone() -> None:
    assert request_rates(CONFIG, {"image_keep_rate": 1}).image == 1.0
    assert request_rates(CONFIG, {"text_keep_rate": 0.25}) == Rates(0.25, 2.0)
    assert CONFIG.image_keep_rate == 0.25


@pytest.mark.parametrize("dense", [True, 1])
def test_a_dense_request_drops_nothing(dense: Any) -> None:
    assert request_rates(CONFIG, {"dense": dense}) == Rates(1.0, -math.inf)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"image_keep_rate": 0}, "image_keep_rate is 0"),
        ({"text_keep_rate": "much"}, "text_keep_rate is much"),
        ({"image_keep_rate": True}, r"image_keep_rate is True: it must be a number in \(0, 1\]"),
        ({"dense": "yes"}, "dense is 'yes'"),
    ],
)
def test_wrong_wishes_are_refused_in_one_line(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        request_rates(CONFIG, asked)
    assert "\n" not in str(raised.value)


def test_a_server_has_rates_of_its_own() -> None:
    assert server_config(CONFIG, {"sparsity": {"image_keep_rate": 0.5}}).image_keep_rate == 0.5
    assert server_config(CONFIG, {"other": 1}) == CONFIG
    for wrong in ({"rate": 1}, [1]):
        with pytest.raises(ValueError, match="image_keep_rate, text_keep_rate, dense"):
            server_config(CONFIG, {"sparsity": wrong})


def test_a_server_may_fix_its_rates() -> None:
    fixed = {"sparsity": {"image_keep_rate": 0.5, "fixed": True}}
    assert server_config(CONFIG, fixed).image_keep_rate == 0.5


def test_a_request_asks_to_be_told() -> None:
    assert [explains(extra) for extra in (None, {}, {"explain": 0}, {"explain": 1}, {"explain": True})] == [
        False, False, False, True, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="explain is 'all', it must be true or false"):
        explains({"explain": "all"})
