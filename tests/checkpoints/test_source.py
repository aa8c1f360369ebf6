"""A source is resolved once: what loading and converting read, they read once.

Python reports every file that it opens to an audit hook; the innermost frame of this library or of
transformers tells whose read it is. Files that compiled code opens raise no such event, so the two functions
that do (``safe_open`` and safetensors' ``load_file``) are counted where this library calls them. So are the
readers of transformers that are asked for a tokenizer, a processor or a config: what they open is their own
affair, that they are asked once is ours.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests import tiny
from tests.checkpoints import official_files
from tests.checkpoints.official_files import shard, write_tokenizer
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, LlavaConfig

import dynamic_llava
from dynamic_llava import checkpoints

READERS = (AutoProcessor, AutoTokenizer, GenerationConfig, LlavaConfig)
_counters: list[Counter[str]] = []  # of the block that counts now, if one does


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _counters or event != "open":
        return
    path, mode, _ = arguments
    is_read = isinstance(path, str | Path) and not set(mode or "r") & set("wax+")
    if is_read and _reader(sys._getframe(1)) == "dynamic_llava":
        _counters[-1][str(Path(path).resolve())] += 1


def _reader(frame: FrameType | None) -> str:
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package in ("dynamic_llava", "transformers", "huggingface_hub"):
            return package
        frame = frame.f_back
    return ""


sys.addaudithook(_note)  # for good, so it does nothing unless a block counts


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count what this library opens, and what it asks transformers to read, by path and by name."""
    counter: Counter[str] = Counter()

    def counted(read: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            counter[str(Path(path).resolve())] += 1
            return read(path, *args, **kwargs)

        return call

    def asked(reader: Any) -> Any:
        whole = reader.from_pretrained

        def call(place: Any, *args: Any, **kwargs: Any) -> Any:
            if _reader(sys._getframe(1)) == "dynamic_llava":
                counter[f"{reader.__name__} of {place}"] += 1
            return whole(place, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("dynamic_llava.checkpoints.weights.safe_open", counted(safe_open))
        patch.setattr("dynamic_llava.adapter.load_file", counted(load_file))
        for reader in READERS:
            patch.setattr(reader, "from_pretrained", asked(reader))
        _counters.append(counter)
        try:
            yield counter
        finally:
            _counters.pop()


def more_than_once(counter: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counter.items() if count > 1}


def names(counter: Counter[str]) -> set[str]:
    return {Path(name).name for name in counter}


@pytest.fixture(params=["one file", "safetensors", "bin"])
def official(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = official_files.write(tmp_path / "official")
    write_tokenizer(folder)
    if request.param != "one file":
        shard(folder, request.param)
    return folder


@pytest.fixture(params=["one file", "safetensors", "bin"])
def stock(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "stock"
    shutil.copytree(checkpoints.resolve("nano"), folder)
    model = tiny.model()
    tiny.sparsifier().attach(model)
    for part in ("model.safetensors", "config.json"):
        (folder / part).unlink()
    model.save_pretrained(folder)
    model.sparsifier.save_pretrained(folder)
    if request.param != "one file":
        shard(folder, request.param)
    return folder


def test_official_load(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting(monkeypatch) as counter:
        _, processor = dynamic_llava.load(official)
    assert processor is not None
    assert more_than_once(counter) == {}
    weights = {path.name for path in official.glob("*model*") if path.suffix in (".safetensors", ".bin")}
    indexes = {path.name for path in official.glob("*.index.json")}
    assert {"config.json", *weights, *indexes} <= names(counter)
    assert counter[str(official.parent / "vision_tower" / "config.json")] == 1
    assert counter[str(official.parent / "vision_tower" / "model.safetensors")] == 1


def test_stock_load(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting(monkeypatch) as counter:
        model, processor = dynamic_llava.load(stock)
    assert processor is not None
    assert hasattr(model, "sparsifier")
    assert more_than_once(counter) == {}
    assert {"config.json", "sparsifier_config.json", "sparsifier.safetensors"} <= names(counter)


def test_predictors_alone(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("sparsifier_config.json", "sparsifier.safetensors"):
        (stock / name).rename(alone / name)
    settings = json.loads((alone / "sparsifier_config.json").read_text())
    named = settings | {"base_model_name_or_path": str(stock)}
    (alone / "sparsifier_config.json").write_text(json.dumps(named))
    with counting(monkeypatch) as counter:
        model, processor = dynamic_llava.load(alone)
    assert processor is not None
    assert hasattr(model, "sparsifier")
    assert more_than_once(counter) == {}
    assert {"sparsifier_config.json", "sparsifier.safetensors", "config.json"} <= names(counter)


def test_conversions(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are copied besides: ``config.json`` is read, and copied for the way back."""
    for source, out, to in ((official, "ours", "transformers"), (tmp_path / "ours", "back", "official")):
        with counting(monkeypatch) as counter:
            checkpoints.convert(source, tmp_path / out, to=to)  # type: ignore[arg-type]
        weights = Counter({name: n for name, n in counter.items() if name.endswith((".safetensors", ".bin"))})
        assert more_than_once(weights) == {}
        assert more_than_once(Counter({n: c for n, c in counter.items() if " of " in n})) == {}
        assert weights


def test_weights_that_are_read_once_are_all_there(official: Path) -> None:
    """The count above would hold, too, for a loader that reads nothing."""
    model = dynamic_llava.load_model(official)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())


def test_nothing_is_read_before_it_is_asked_for(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counting(monkeypatch) as counter:
        source = checkpoints.Source(official)
        assert counter == {}
        assert source.kind == "official"
        assert names(counter) == {"config.json"}
        parts = source.config, source.weights, source.tower, source.processor, source.adapter
        again = source.config, source.weights, source.tower, source.processor, source.adapter
        assert all(one is other for one, other in zip(parts, again, strict=True))
        assert more_than_once(counter) == {}
