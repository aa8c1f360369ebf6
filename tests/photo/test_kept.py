"""The boxes marked by hand, and the share of patches that lie on them."""

from __future__ import annotations

import json

import pytest
from evidence.photo import kept


def test_fifty_pictures_are_marked_with_fractions() -> None:
    pictures = json.loads(kept.BOXES.read_text(encoding="utf-8"))["pictures"]
    assert len({picture["image"] for picture in pictures}) == 50
    for picture in pictures:
        assert picture["boxes"]
        for box in picture["boxes"]:
            left, top, right, bottom = box["box"]
            assert 0 <= left < right <= 1, (picture["image"], box)
            assert 0 <= top < bottom <= 1, (picture["image"], box)


def test_a_patch_lies_on_a_box_if_its_middle_does() -> None:
    flags = kept.on_boxes([{"box": [0.0, 0.0, 0.5, 0.5]}, {"box": [0.8, 0.8, 1.0, 1.0]}], 16)
    assert flags.reshape(4, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_ratio_and_its_interval() -> None:
    result = kept.ratio([0.6, 0.4, 0.5], [0.3, 0.2, 0.25])
    assert result["ratio"] == pytest.approx(2.0)
    assert result["interval_95"] == pytest.approx([2.0, 2.0])
    low, high = kept.ratio([0.9, 0.1, 0.5], [0.3, 0.3, 0.3])["interval_95"]
    assert low < 5 / 3 < high
