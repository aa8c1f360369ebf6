"""What official checkpoints differ in: types of tensors, switched-off predictors, files, towers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.checkpoints import official_files
from tests.checkpoints.official_files import (
    change_config,
    change_tensors,
    config_of,
    shard,
    tensors_of,
    without_predictors,
)
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from dynamic_llava import checkpoints
from dynamic_llava.cli import app

TOWER_KEY = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"


def there_and_back(folder: Path) -> Path:
    """Convert and convert back; return the converted folder."""
    before = tensors_of(folder)
    ours, back = folder.parent / "ours", folder.parent / "back"
    checkpoints.convert(folder, ours)
    checkpoints.convert(ours, back, to="official")
    after = tensors_of(back)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert (folder / "config.json").read_bytes() == (back / "config.json").read_bytes()
    return ours


def switch(folder: Path, **settings: bool) -> None:
    change_config(folder, sparse_config=config_of(folder)["sparse_config"] | settings)


def remove(folder: Path, part: str) -> None:
    change_tensors(folder, **{name: None for name in tensors_of(folder) if part in name})


# Predictors and types of tensors


@pytest.mark.parametrize("question", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_comes_back(dtype: torch.dtype, question: bool, tmp_path: Path) -> None:
    ours = there_and_back(official_files.write(tmp_path, dtype, question))
    assert checkpoints.load_model(ours).sparsifier.config.sparsify_prompt == question


@pytest.mark.parametrize("part", ["mm_projector", "output_text_score_predictor", "lm_head"])
def test_mixed_types_come_back(part: str, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path, torch.bfloat16)
    change_tensors(folder, **{name: t.float() for name, t in tensors_of(folder).items() if part in name})
    there_and_back(folder)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("setting", "ours", "part"),
    [
        ("use_vision_predictor", "sparsify_image", "image_score"),
        ("use_output_text_predictor", "sparsify_text", "output_text_score"),
        ("use_text_predictor", "sparsify_text", "output_text_score"),
        ("use_instruct_predictor", "sparsify_prompt", "instruct_score"),
    ],
)
def test_predictor_that_is_off(setting: str, ours: str, part: str, there: bool, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path, torch.float16, question=part == "instruct_score")
    switch(folder, **{setting: False})
    if not there:
        remove(folder, part)
    sparsifier = checkpoints.load_model(there_and_back(folder)).sparsifier
    assert not getattr(sparsifier.config, ours)


def test_buffers_and_newline_come_back(tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    change_tensors(
        folder,
        **{
            "model.image_newline": torch.ones(32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            f"{TOWER_KEY.rpartition('.pre')[0]}.embeddings.position_ids": torch.arange(5)[None],
        },
    )
    there_and_back(folder)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_mistral"])
def test_llava_without_predictors_comes_back(model_type: str, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    without_predictors(folder)
    change_config(folder, model_type=model_type)
    model = checkpoints.load_model(there_and_back(folder))
    assert not hasattr(model, "sparsifier")


def test_mistral_keeps_a_null_window(tmp_path: Path) -> None:
    """LLaVA-1.6's config says null, the class's default is 4096; a window would forbid a sparsifier."""
    folder = official_files.write(tmp_path)
    without_predictors(folder)
    config = config_of(folder) | {"model_type": "llava_mistral", "sliding_window": None}
    official_files.write_config(folder, config)
    model = checkpoints.load_model(folder)
    assert model.config.text_config.sliding_window is None
    checkpoints.save(model, None, tmp_path / "saved")
    checkpoints.convert(tmp_path / "saved", tmp_path / "official", to="official")
    assert config_of(tmp_path / "official")["sliding_window"] is None


def test_dtype_casts_the_model_alone(tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    checkpoints.convert(folder, tmp_path / "ours", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "ours").values()} == {torch.bfloat16}
    assert checkpoints.load_model(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_changed_settings_do_not_come_back_as_the_old_ones(tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    checkpoints.convert(folder, tmp_path / "ours")
    settings = tmp_path / "ours" / "sparsifier_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_keep_rate": 0.5}))
    with pytest.raises(ValueError, match=r"sparsifier_config\.json was changed"):
        checkpoints.convert(tmp_path / "ours", tmp_path / "back", to="official")
    shutil.rmtree(tmp_path / "ours" / "official")
    checkpoints.convert(tmp_path / "ours", tmp_path / "back", to="official")
    assert config_of(tmp_path / "back")["sparse_config"]["vision_keep_rate"] == 0.5


# Files


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_load_as_one_file(suffix: str, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    expected = checkpoints.load_model(folder).state_dict()
    shard(folder, suffix)
    state = checkpoints.load_model(folder).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_of_any_age_and_shared_memory_converts(zipped: bool, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    checkpoints.convert(folder, tmp_path / "ours")
    ours = tensors_of(tmp_path / "ours")
    assert torch.equal(ours["language_model.lm_head.weight"][:40], tensors["lm_head.weight"])


def test_files_have_the_names_that_transformers_writes(tmp_path: Path) -> None:
    checkpoints.convert(official_files.write(tmp_path), tmp_path / "ours")
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    stock.save_pretrained(tmp_path / "saved")
    assert tensors_of(tmp_path / "saved").keys() == tensors_of(tmp_path / "ours").keys()


# Towers


def other_tower(folder: Path) -> None:
    """Make the tower beside a checkpoint differ from its own copy."""
    tower = folder.parent / "vision_tower"
    change_tensors(tower, **{name: torch.zeros_like(t) for name, t in tensors_of(tower).items()})


def tower_is_zero(model: Any) -> bool:
    return not bool(model.model.vision_tower.pre_layrnorm.bias.any())


@pytest.mark.parametrize("trained", [True, False])
def test_own_copy_counts_where_it_was_trained(trained: bool, tmp_path: Path) -> None:
    folder = official_files.write(tmp_path, unfreeze_mm_vision_tower=trained)
    other_tower(folder)
    assert tower_is_zero(checkpoints.load_model(folder)) != trained
    there_and_back(folder)


def test_tower_beside_the_checkpoint_comes_before_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = official_files.write(tmp_path / "official")
    elsewhere = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(folder.parent / "vision_tower", elsewhere.parent / "vision_tower")
    other_tower(folder)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert tower_is_zero(checkpoints.load_model(folder))
    assert not tower_is_zero(checkpoints.load_model(folder, vision_tower="../vision_tower"))


def test_tower_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = official_files.write(tmp_path, mm_vision_tower="someone/clip")
    asked = []

    def download(name: str, **_: Any) -> str:
        asked.append(name)
        return str(tmp_path / "vision_tower")

    monkeypatch.setattr("dynamic_llava.hub.snapshot_download", download)
    checkpoints.load_model(folder)
    assert asked == ["someone/clip"]


def test_added_row_never_wins(tmp_path: Path) -> None:
    model: Any = checkpoints.load_model(official_files.write(tmp_path))
    hidden = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    assert bool((model.lm_head(hidden).argmax(-1) < 40).all())


# Ours, and predictors alone


def test_a_saved_checkpoint_loads_without_a_warning_and_names_no_folder(tmp_path: Path) -> None:
    model = tiny.model()
    model.name_or_path = str(tmp_path / "dense")  # which another machine does not have
    tiny.sparsifier().attach(model)
    checkpoints.save(model, None, tmp_path / "dynamic")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = checkpoints.load_model(tmp_path / "dynamic")
        checkpoints.save(loaded, None, tmp_path / "again")
        checkpoints.load_model(tmp_path / "again")
    for name in ("dynamic", "again"):
        settings = json.loads((tmp_path / name / "sparsifier_config.json").read_text())
        assert settings["base_model_name_or_path"] == ""
    loaded.sparsifier.save_pretrained(tmp_path / "alone")
    settings = json.loads((tmp_path / "alone" / "sparsifier_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "dynamic")


def test_predictors_alone_load_with_their_base(tmp_path: Path) -> None:
    checkpoints.save(tiny.model(), None, tmp_path / "base")
    model = checkpoints.load_model(tmp_path / "base")
    sparsifier = tiny.sparsifier(image_keep_rate=0.5).attach(model)
    sparsifier.save_pretrained(tmp_path / "alone")
    loaded: Any = checkpoints.load_model(tmp_path / "alone")
    assert loaded.sparsifier.config.image_keep_rate == 0.5
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    sparsifier.detach()
    tiny.sparsifier().save_pretrained(tmp_path / "nameless")
    with pytest.raises(FileNotFoundError, match="names no base model"):
        checkpoints.load(tmp_path / "nameless")
    with pytest.raises(ValueError, match="predictors alone"):
        checkpoints.convert(tmp_path / "alone", tmp_path / "out", to="official")


def test_the_hub_sees_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tiny.model(), None, tmp_path / "base")
    sparsifier = tiny.sparsifier().attach(checkpoints.load_model(tmp_path / "base"))
    uploaded: dict[str, Any] = {}

    def upload(_: Any, folder_path: str, **__: Any) -> None:
        uploaded.update(json.loads((Path(folder_path) / "sparsifier_config.json").read_text()))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    sparsifier.push_to_hub("someone/sparse")
    assert uploaded["base_model_name_or_path"] == ""
    assert uploaded["hidden_size"] == 32


# The command


def test_command_converts_and_tells(tmp_path: Path) -> None:
    folder = official_files.write(tmp_path)
    arguments = ["convert", str(folder), str(tmp_path / "ours"), "--dtype", "bfloat16", "--json"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0
    told = json.loads(outcome.stdout.splitlines()[-1])
    assert told["has_sparsifier"]
    assert told["tensors"] == len(tensors_of(tmp_path / "ours"))
    assert told["bytes"] == sum(tensor.nbytes for tensor in tensors_of(tmp_path / "ours").values())
    again = CliRunner().invoke(app, ["convert", str(tmp_path / "ours"), str(tmp_path / "x")])
    assert again.exit_code == 2
    assert again.stderr.count("\n") == 1
