"""Reading LLaVA's layout: any JSON, any size, one entry at a time; what is broken is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_llava.data import entries as module
from dynamic_llava.data.conversations import BadSample, Conversations

TEXT = st.text(max_size=30)
ENTRY = st.fixed_dictionaries(
    {
        "id": TEXT,
        "extra": st.recursive(TEXT | st.integers(), lambda x: st.lists(x) | st.dictionaries(TEXT, x)),
    }
)


def entry(number: int, image: bool = True, turns: int = 1, **changes: Any) -> dict[str, Any]:
    question = "<image>\nWhat is it?" if image else "What is it?"
    messages = []
    for turn in range(turns):
        messages += [
            {"from": "human", "value": question if turn == 0 else f"And {turn}?"},
            {"from": "gpt", "value": f"Answer {number}.{turn}"},
        ]
    picture = {"image": f"{number}.png"} if image else {}
    return {"id": f"s{number}", **picture, "conversations": messages} | changes


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(ENTRY, min_size=1, max_size=8), indent=st.sampled_from([None, 2]), ascii=st.booleans()
)
@pytest.mark.parametrize("block", [7, 2**20])
def test_entries_lie_where_they_are_said_to_lie(
    tmp_path_factory: pytest.TempPathFactory, block: int, entries: list[Any], indent: int | None, ascii: bool
) -> None:
    folder = tmp_path_factory.mktemp("list")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        for name, text in (
            ("list.json", json.dumps(entries, indent=indent, ensure_ascii=ascii)),
            ("lines.jsonl", "\n\n".join(json.dumps(e, ensure_ascii=ascii) for e in entries) + "\n"),
        ):
            path = folder / name
            path.write_text(text, encoding="utf-8", newline="")
            raw = path.read_bytes()
            found = [(raw[start : start + size], given) for start, size, given in module.entries(path)]
            assert [json.loads(piece) for piece, _ in found] == entries == [given for _, given in found]


def test_long_lists_are_read_in_pieces(tmp_path: Path) -> None:
    entries = [entry(i, turns=1 + i % 3, note="é" * (i % 5)) for i in range(5000)]
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    read = Conversations(path)
    assert len(read) == 5000
    for i in (0, 1234, 4999, -1):
        assert read[i].name == entries[i]["id"]
        assert read[i].turns[-1][1] == entries[i]["conversations"][-1]["value"]
    copied = pickle.loads(pickle.dumps(read))
    assert copied[77] == read[77]
    assert read[3:5] == [read[3], read[4]]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"conversations": []}, r"entry 1 \(id s1\): no conversations"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        ({"conversations": [{"from": "human"}]}, "'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": "<image>?"}]}, "do not take turns"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]},
            "in an answer",
        ),
        ({"image": None}, "1 <image> for 0 pictures"),
        ({"image": ["a.png", "b.png"]}, "1 <image> for 2 pictures"),
        ({"image": [None]}, r"entry 1 \(id s1\): 'image' holds NoneType; it must be the name of a picture"),
        ({"image": [["a.png"]]}, "'image' holds list"),
        ({"image": {"path": "a.png"}}, "'image' holds dict"),
        ({"image": 7}, "'image' holds int"),
        ({"image": float("nan")}, "'image' holds float"),
        ({"image": False}, "'image' holds bool"),
        ({"video": "a.mp4"}, r"entry 1 \(id s1\): videos cannot be trained on; leave the entry out"),
        ({"id": None, "conversations": None}, r"entry 1 \(id 1\): no conversations"),
        (
            {"id": "a\nb" + "c" * 999, "conversations": 7},
            r"\(id a b" + "c" * 77 + r"\.\.\.\): no conversations",
        ),
        ({"id": "\ud83d", "conversations": {}}, r"\(id \\ud83d\): no conversations"),
        ({"conversations": [7]}, "'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": None}]}, "'from' and 'value'"),
        ({"conversations": [{"from": "human", "value": ["a"]}]}, "'from' and 'value'"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, r"unknown role \['human'\]"),
        ({"conversations": [{"from": None, "value": "a"}]}, "unknown role None"),
        ({"conversations": [{"from": "x" * 999, "value": "a"}]}, r"unknown role 'x{79}\.\.\.;"),
        ({"conversations": [{"from": "human", "value": "\ud83d?"}]}, r"s1\): the text is not valid Unicode"),
    ],
)
def test_a_broken_entry_is_named(tmp_path: Path, broken: dict[str, Any], says: str) -> None:
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([entry(0), entry(1) | broken, entry(2)]))
    read = Conversations(path)
    assert read[2].turns == (("<image>\nWhat is it?", "Answer 2.0"),)
    with pytest.raises(BadSample, match=says) as caught:
        read[1]
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"id": ', "not JSON"),
        (b'{"id": "\xe9"}', "not UTF-8"),
        (b'{"id": ' + b"[" * 100_000, "too deep"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON: .* digits"),
        (b"null", "expected an object, found NoneType"),
        (b"[1]", "expected an object, found list"),
    ],
)
def test_a_broken_line_is_refused_with_its_file_or_left_to_its_reader(
    tmp_path: Path, line: bytes, says: str
) -> None:
    path = tmp_path / "mix.jsonl"
    path.write_bytes(b"\n".join([json.dumps(entry(0)).encode(), line, json.dumps(entry(2)).encode()]))
    read = Conversations(path, on_error="skip")
    assert [read[i].name for i in (0, 2)] == ["s0", "s2"]
    with pytest.raises(BadSample, match=rf"^mix.jsonl, entry 1: .*{says}"):
        read[1]
    assert read.fingerprint()["entries"] == 3
    if "expected" not in says:
        with pytest.raises(ValueError, match=rf"mix.jsonl, line 2: .*{says}"):
            Conversations(path)


def test_a_message_survives_a_process_that_loads_data() -> None:
    wrapped = (
        "Caught BadSample in worker 0.\nOriginal Traceback:\n  File x\ndynamic_llava.BadSample: x: broken\n"
    )
    assert str(BadSample(wrapped)) == "x: broken"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", '[{"id": 1}, {"id": ', "not a JSON list"),
        ("a.jsonl", '{"id": 1}\n{"id"\n', "line 2: not JSON"),
        ("a.txt", "hello", "neither a JSON list nor JSON lines"),
        ("a.txt", " \n\t" * 99, "it is empty"),
        ("a.json", '[{"id": 1}] [{"id": 2}]', "more than one JSON list: '\\[' follows it, at byte 12"),
        ("a.json", '[{"id": 1}] garbage', "'g' follows it, at byte 12"),
        ("a.json", '[{"id": 1} {"id": 2}]', "'{' after an entry, at byte 11"),
        ("a.json", '[{"id": 1}', "the end of the file after an entry"),
        ("a.json", '[,,{"id": 1}]', "not a JSON list: Expecting value, after byte 1"),
        ("a.json", '[{"id": 1},]', "not a JSON list"),
        ("a.json", "[" * 100_000, "too deep"),
        ("a.json", "[]", "no entries"),
        ("a.json", '[{"id": "\xe9"}]', "not UTF-8"),
        ("a.jsonl", '{"id": "\xe9"}', "line 1: not UTF-8"),
        ("a.json", "[" + "9" * 5000 + "]", "not a JSON list: Exceeds the limit"),
        ("a.json", "\xff\xfe[", "it begins with"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=says):
        Conversations(path)


@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path: Path, opened: bool) -> None:
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([entry(0), entry(1)]))
    read = Conversations(path)
    if opened:
        assert read[0].name == "s0"
    path.write_text(json.dumps([entry(1)]))
    with pytest.raises(ValueError, match=r"mix.json: changed since it was first read"):
        read[1]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        Conversations(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is not a file but a folder"):
        Conversations(tmp_path)
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([entry(0)]))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Conversations(path, tmp_path / "none")


def test_excerpts_may_begin_with_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "mix.json"
    whole = entry(0, image=False)
    whole["conversations"].insert(0, {"from": "gpt", "value": "earlier"})
    path.write_text(json.dumps([whole]))
    assert Conversations(path)[0].turns == (("What is it?", "Answer 0.0"),)
