"""Paths that cannot be written to are refused before any work, and asking leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamic_llava.files import check_file, check_folder, write_json


def folder(here: Path) -> Path:
    return here


def below_a_file(here: Path) -> Path:
    (here / "notes").touch()
    return here / "notes" / "more" / "result.json"


def read_only(here: Path) -> Path:
    path = here / "result.json"
    path.write_text("{}")
    path.chmod(0o444)
    return path


def device(here: Path) -> Path:
    return Path(os.devnull)


def long_name(here: Path) -> Path:
    return here / ("n" * 245 + ".json")  # the name itself is allowed, that of the file beside it is not


def in_no_real_folder(here: Path) -> Path:
    if not Path("/proc").is_dir():
        pytest.skip("there is no folder that looks as if it could be written to")
    return Path("/proc/result.json")


def in_read_only_folder(here: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (here / "mine").mkdir(mode=0o555)
    return here / "mine" / "deeper" / "result.json"


BAD_FILES = [
    pytest.param(make, message, id=make.__name__)
    for make, message in (
        (folder, "it must name a file, not a folder or a device"),
        (below_a_file, "notes is no folder that can be written to, choose another"),
        (read_only, "result.json is read-only, choose another"),
        (device, "it must name a file, not a folder or a device"),
        (long_name, "File name too long"),
        (in_no_real_folder, "/proc is no folder that can be written to, choose another"),
        (in_read_only_folder, "mine is no folder that can be written to, choose another"),
    )
]


@pytest.mark.parametrize(("make", "message"), BAD_FILES)
def test_bad_file(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message):
        check_file("--output", path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("make", [below_a_file, in_no_real_folder, in_read_only_folder])
def test_bad_folder(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--plot: .* is no folder that can be written to, choose another$"):
        check_folder("--plot", make(tmp_path).parent)


def test_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "plots").touch()
    with pytest.raises(ValueError, match=r"plots is no folder that can be written to"):
        check_folder("--plot", tmp_path / "plots")


def test_names_that_are_no_text_are_written_all_the_same(tmp_path: Path) -> None:
    content = {"command": "evaluate --data caf\udce9 \ud83d", "accent": "\u00e9"}
    write_json(tmp_path / "result.json", content)
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "\u00e9" in text


@pytest.mark.parametrize("name", ["result.json", "new/folders/result.json"])
def test_good_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), tmp_path / name):
        check_file("--output", path)
        check_folder("--plot", path.parent)
        assert list(tmp_path.iterdir()) == []
    write_json(Path(name), {"number": 1})
    check_file("--output", Path(name))  # what is there is replaced
