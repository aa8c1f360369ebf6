"""Checkpoints of the official code: loading, converting there and back, and refusing what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.checkpoints import official

import dynamic_llava
from dynamic_llava.checkpoints import convert, save
from dynamic_llava.checkpoints.official import processor as processors
from dynamic_llava.checkpoints.writing import ShardWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Dynamic-LLaVA checkpoint in the official format, its tower beside it."""
    return official.write(tmp_path / "official")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inputs = tiny.row(9, 1, 0)
    inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE_TOKEN] = model.config.image_token_id
    out: torch.Tensor = model(**inputs).logits[..., : tiny.VOCABULARY]
    return out


def test_official_weights_answer_as_the_model_they_came_from(folder: Path) -> None:
    model = dynamic_llava.load_model(folder)
    assert model.sparsifier.config.image_keep_rate == 0.25
    torch.testing.assert_close(logits(model), logits(official.reference()), atol=1e-5, rtol=0)
    assert model.generation_config.suppress_tokens == [tiny.VOCABULARY]


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral"])
def test_official_llava_without_predictors(folder: Path, model_type: str) -> None:
    configure(folder, model_type=model_type, sparse_config=None)
    rewrite(folder, lambda state: [state.pop(name) for name in list(state) if "predictor" in name])
    model = dynamic_llava.load_model(folder)
    assert not hasattr(model, "sparsifier")
    assert model.config.text_config.model_type == model_type.removeprefix("llava_")
    stock = official.reference()
    stock.sparsifier.detach()
    torch.testing.assert_close(logits(model), logits(stock), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shard_bytes", [2**31, 20_000])
def test_there_and_back_is_bit_exact(folder: Path, tmp_path: Path, shard_bytes: int) -> None:
    rewrite(folder, lambda state: state.update({"model.image_newline": torch.randn(32)}))
    ours, back = tmp_path / "ours", tmp_path / "back"
    done = convert(folder, ours, shard_bytes=shard_bytes)
    assert done.has_sparsifier
    assert (done.shards > 1) == (shard_bytes < 2**31)
    convert(ours, back, to="official")
    before, after = (load_file(place / "model.safetensors") for place in (folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (folder / "config.json").read_text() == (back / "config.json").read_text()
    torch.testing.assert_close(
        logits(dynamic_llava.load_model(ours)), logits(dynamic_llava.load_model(folder)), atol=0, rtol=0
    )


def test_our_own_model_becomes_an_official_one(tmp_path: Path) -> None:
    model = official.reference()
    save(model, None, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "official", to="official")
    loaded = dynamic_llava.load_model(tmp_path / "official")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert loaded.sparsifier.config == model.sparsifier.config


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu", "identity"])
def test_projectors_that_transformers_does_not_have(tmp_path: Path, projector: str) -> None:
    folder = official.write(tmp_path / "official", projector=projector)
    model = dynamic_llava.load_model(folder)
    convert(folder, tmp_path / "ours")
    again = dynamic_llava.load_model(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    convert(tmp_path / "ours", tmp_path / "back", to="official")
    assert (
        load_file(tmp_path / "back/model.safetensors").keys()
        == load_file(folder / "model.safetensors").keys()
    )


def test_tower_of_the_config_wins_over_the_copy_unless_it_was_trained(folder: Path, tmp_path: Path) -> None:
    zeroed = tmp_path / "zeroed"
    shutil.copytree(folder / "vision_tower", zeroed)
    state = load_file(zeroed / "model.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in state.items()}, zeroed / "model.safetensors")
    rewrite(folder, lambda state: state.update(official.tower_copy()))
    expected = logits(official.reference())
    torch.testing.assert_close(logits(dynamic_llava.load_model(folder)), expected, atol=1e-5, rtol=0)
    other = logits(dynamic_llava.load_model(folder, vision_tower=zeroed))
    assert not torch.allclose(other, expected, atol=1e-3)
    configure(folder, mm_vision_tower="nowhere/at-all")
    with pytest.raises(FileNotFoundError, match="nowhere/at-all"):
        dynamic_llava.load_model(folder)


def test_converting_refuses_what_makes_no_sense(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already"):
        convert(folder, tmp_path / "out", to="official")
    with pytest.raises(ValueError, match="source itself"):
        convert(folder, folder)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"taken holds notes\.txt, which convert did not write: .* --force"):
        convert(folder, tmp_path / "taken")


def test_converting_replaces_what_it_wrote_and_asks_before_it_replaces_more(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(folder, out)
    convert(folder, out)
    dynamic_llava.load_model(out)
    for spoil in (
        lambda: (out / "config.json").write_text((out / "config.json").read_text()),  # edited since
        lambda: (out / "official" / "mine.txt").write_text("mine"),
        lambda: (out / ".converted").unlink(),
        lambda: (out / ".converted").write_text('{"files": 7}'),
        lambda: [shutil.rmtree(out), out.mkdir(), (out / "a").symlink_to("nowhere")],
    ):
        spoil()
        before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
        with pytest.raises(ValueError, match=r"which convert did not write: .* or pass --force"):
            convert(folder, out)
        assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before
        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "close", disk_full)
            with pytest.raises(OSError, match="disk full"):
                convert(folder, out, force=True)
        assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before
        convert(folder, out, force=True)
        assert not (out / "official" / "mine.txt").exists()
        dynamic_llava.load_model(out)


def disk_full(self: ShardWriter) -> None:
    raise OSError("disk full")


def test_converting_never_replaces_what_is_in_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, what in (
        (folder.parent, "the source"),
        (Path(), "the current folder"),
        (tmp_path / "home", "your"),
    ):
        with pytest.raises(ValueError, match=f"holds {what}"):
            convert(folder, out, force=True)


def test_a_folder_that_was_being_replaced_comes_back(folder: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds mine\.txt"):
        convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_adapter_names_its_base_and_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    model.name_or_path = "someone/base-7b"
    sparsifier = tiny.sparsifier().attach(model)
    sparsifier.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "sparsifier_config.json").read_text())["base_model_name_or_path"] == (
        "someone/base-7b"
    )
    again = dynamic_llava.Sparsifier.from_pretrained(tmp_path)
    other = tiny.model()
    other.name_or_path = "someone/other-7b"
    with pytest.warns(UserWarning, match="trained for someone/base-7b"):
        again.attach(other)

    uploaded: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, repo_id, folder_path, **_: uploaded.update(
            {"to": repo_id, "files": sorted(path.name for path in Path(folder_path).iterdir())}
        ),
    )
    sparsifier.push_to_hub("someone/sparse")
    assert uploaded == {"to": "someone/sparse", "files": ["sparsifier.safetensors", "sparsifier_config.json"]}
    monkeypatch.setattr("dynamic_llava.hub.snapshot_download", lambda *_, **__: str(tmp_path))
    pulled = dynamic_llava.Sparsifier.from_pretrained("someone/sparse")
    assert all(torch.equal(a, b) for a, b in zip(pulled.parameters(), sparsifier.parameters(), strict=True))


def test_model_from_the_hub_is_called_by_its_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamic_llava.hub.snapshot_download", lambda *_, **__: str(folder))
    model = dynamic_llava.load_model("someone/sparse-7b")
    assert model.name_or_path == "someone/sparse-7b"
    assert model.sparsifier.adapter().base_model == "someone/sparse-7b"


@pytest.mark.parametrize(
    ("name", "start"), [("VICUNA", "Be brief. USER: Hi"), ("MISTRAL", "Be brief. [INST] Hi [/INST]")]
)
def test_system_message_is_no_answer(name: str, start: str) -> None:
    template = jinja2.Template(getattr(processors, name))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages=turns, eos_token="</s>", add_generation_prompt=False).startswith(start)
