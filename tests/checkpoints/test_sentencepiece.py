"""Official checkpoints as published: their tokenizer is a ``tokenizer.model`` of sentencepiece alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints import official_files
from tests.checkpoints.test_processors import answer, write_with_rows
from typer.testing import CliRunner

from dynamic_llava import checkpoints
from dynamic_llava.cli import app

VOCABULARY = 380
TEXTS = ("what is it?", "USER: is the dog red? ASSISTANT:", "héllo ☃ w3\nnew  line")
AVAILABLE = "dynamic_llava.checkpoints.tokenizer.is_sentencepiece_available"


def write_model(folder: Path) -> Any:
    """Train a model of LLaMA's kind, byte pairs and bytes; return sentencepiece's own reader of it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra 'official' is not installed")
    sentences = [f"the dog w{i % 40} jumps over {i} red ones, what is it? it is a dog." for i in range(99)]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=made, vocab_size=VOCABULARY, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    write_settings(folder)
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_settings(folder: Path) -> None:
    """Write the files that lie beside ``tokenizer.model`` in LLaVA-1.5."""
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": None, "legacy": False, "model_max_length": 2048,
        "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def test_published_checkpoint_loads_answers_and_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_with_rows(tmp_path, VOCABULARY - 40)
    pieces = write_model(folder)
    assert pieces.vocab_size() == VOCABULARY
    model, processor = checkpoints.load(folder)
    tokenizer: Any = processor.tokenizer  # type: ignore[union-attr]
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert model.config.image_token_id == VOCABULARY
    said = answer(model, processor)
    ours, back = tmp_path / "ours", tmp_path / "back"
    checkpoints.convert(folder, ours)
    checkpoints.convert(ours, back, to="official")
    assert (back / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert not (back / "tokenizer.json").exists()
    assert answer(*checkpoints.load(back)) == said
    monkeypatch.setattr(AVAILABLE, lambda: False)  # what was converted does without it
    assert answer(*checkpoints.load(ours)) == said


@pytest.mark.parametrize("kind", ["official", "stock"])
def test_without_the_extra_the_error_names_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = official_files.write(tmp_path)
    if kind == "stock":
        checkpoints.convert(folder, tmp_path / "ours")
        folder = tmp_path / "ours"
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    write_settings(folder)
    monkeypatch.setattr(AVAILABLE, lambda: False)
    with pytest.raises(ImportError, match=r"tokenizer\.model needs sentencepiece.*dynamic-llava\[official\]"):
        checkpoints.load(folder)
    if kind == "official":
        outcome = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out")])
        assert outcome.exit_code == 2
        assert outcome.stderr.count("\n") == 1
        assert "dynamic-llava[official]" in outcome.stderr
        assert not (tmp_path / "out").exists()


def test_pointer_in_place_of_the_model(tmp_path: Path) -> None:
    """A clone without large files leaves pointers; transformers then asks for another library."""
    pytest.importorskip("sentencepiece", reason="the extra 'official' is not installed")
    folder = official_files.write(tmp_path)
    (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:9e\n")
    write_settings(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.model is no model of sentencepiece") as caught:
        checkpoints.load(folder)
    assert "\n" not in str(caught.value)
