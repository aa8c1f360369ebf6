"""Broken checkpoints: each is refused in one line that names the file, and the tensor where there is one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
from typer.testing import CliRunner

from dynamic_llava import Sparsifier, checkpoints
from dynamic_llava.cli import app

NORM = "model.layers.1.input_layernorm.weight"
WEIGHT = "model.layers.1.mlp.up_proj.weight"
IMAGE = "model.image_score_predictor.down_mlp.1.weight"
TEXT = "model.output_text_score_predictor.output_mlp.1.weight"


class Code:
    """A pickle of this runs code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return eval, ("pytest.fail('code of a pickle ran')",)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    return official_files.write(tmp_path / "official")


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A checkpoint of ours, with a sparsifier."""
    model = tiny.model()
    tiny.sparsifier().attach(model)
    checkpoints.save(model, None, tmp_path / "stock")
    return tmp_path / "stock"


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def refused(folder: Path, *parts: str) -> None:
    """Loading and converting refuse ``folder`` with one line that holds ``parts``."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        checkpoints.load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []
    out = folder.parent / "out"
    to = "official" if config_of(folder)["model_type"] == "llava" else "transformers"
    outcome = CliRunner().invoke(app, ["convert", str(folder), str(out), "--to", to])
    assert outcome.exit_code == 2
    assert outcome.stderr.count("\n") == 1
    assert [part for part in parts if part not in outcome.stderr] == []
    assert sorted(path.name for path in folder.parent.iterdir() if "out" in path.name) == []


# Files


def test_truncated_safetensors(official: Path, stock: Path) -> None:
    for folder in (official, stock):
        truncate(folder / "model.safetensors")
        refused(folder, str(folder / "model.safetensors"))


def test_truncated_bin(official: Path) -> None:
    torch.save(tensors_of(official), official / "pytorch_model.bin")
    (official / "model.safetensors").unlink()
    truncate(official / "pytorch_model.bin")
    refused(official, str(official / "pytorch_model.bin"))


def test_truncated_shard(official: Path) -> None:
    shard(official, "safetensors")
    truncate(official / "model-00002-of-00003.safetensors")
    refused(official, str(official / "model-00002-of-00003.safetensors"))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_shard(suffix: str, official: Path) -> None:
    shard(official, suffix)
    missing = next(official.glob(f"*-00002-of-00003.{suffix}"))
    missing.unlink()
    refused(official, str(missing), "index.json")


def test_missing_shard_of_ours(stock: Path) -> None:
    shard(stock, "safetensors")
    (stock / "model-00003-of-00003.safetensors").unlink()
    refused(stock, "model-00003-of-00003.safetensors")


def test_tensor_that_only_the_index_has(official: Path) -> None:
    shard(official, "safetensors")
    index = official / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of", "model-00002-of"))
    refused(official, str(official / "model-00002-of-00003.safetensors"), "tensor ")


def test_broken_index(official: Path) -> None:
    shard(official, "safetensors")
    (official / "model.safetensors.index.json").write_text("{")
    refused(official, str(official / "model.safetensors.index.json"))


def test_no_weights(official: Path) -> None:
    (official / "model.safetensors").unlink()
    refused(official, str(official), "model.safetensors")


def test_pickle_with_code_is_not_run(official: Path) -> None:
    path = official / "pytorch_model.bin"
    torch.save(tensors_of(official) | {"model.code": Code()}, path)
    (official / "model.safetensors").unlink()
    refused(official, str(path))
    path.write_bytes(pickle.dumps(Code()))
    refused(official, str(path))


def test_pickle_of_something_else(official: Path) -> None:
    torch.save([torch.zeros(1)], official / "pytorch_model.bin")
    (official / "model.safetensors").unlink()
    refused(official, str(official / "pytorch_model.bin"))


def test_broken_vision_tower(official: Path) -> None:
    tower = official.parent / "vision_tower"
    truncate(tower / "model.safetensors")
    refused(official, str(tower.name), "model.safetensors")


# Tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [WEIGHT, IMAGE, "lm_head.weight"])
def test_weights_that_are_not_finite(name: str, value: float, official: Path) -> None:
    tensor = tensors_of(official)[name].clone()
    tensor.view(-1)[-1] = value
    change_tensors(official, **{name: tensor})
    refused(official, str(official / "model.safetensors"), name)


def test_vision_tower_that_is_not_finite(official: Path) -> None:
    tower, name = official.parent / "vision_tower", "vision_model.pre_layrnorm.weight"
    change_tensors(tower, **{name: tensors_of(tower)[name] * float("nan")})
    refused(official, "vision_tower", "model.safetensors", name)


def test_our_weights_that_are_not_finite(stock: Path) -> None:
    name = "language_model.model.norm.weight"
    change_tensors(stock, **{name: tensors_of(stock)[name] * float("nan")})
    refused(stock, str(stock / "model.safetensors"), name)


@pytest.mark.parametrize("name", [WEIGHT, NORM, "model.mm_projector.2.bias", IMAGE, TEXT])
def test_missing_tensor(name: str, official: Path) -> None:
    change_tensors(official, **{name: None})
    refused(official, str(official), name)


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.up_proj.weight", "model.mm_projector.4.weight", "other.weight",
             "model.image_score_predictor.other.weight"]
)  # fmt: skip
def test_left_over_tensor(name: str, official: Path) -> None:
    change_tensors(official, **{name: torch.zeros(2)})
    refused(official, str(official / "model.safetensors"), name)


@pytest.mark.parametrize(
    "name", [WEIGHT, NORM, "model.mm_projector.0.weight", IMAGE, "model.embed_tokens.weight"]
)
def test_misshapen_tensor(name: str, official: Path) -> None:
    tensor = tensors_of(official)[name]
    change_tensors(official, **{name: tensor[:-1].clone()})
    refused(official, str(official / "model.safetensors"), name, str(tuple(tensor.shape)))


def test_our_misshapen_missing_and_left_over_tensors(stock: Path) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    weight = tensors_of(stock)[name]
    for change in (weight[:-1].clone(), None):
        change_tensors(stock, **{name: change})
        refused(stock, str(stock), "mlp.up_proj.weight")
    change_tensors(stock, **{name: weight, "language_model.model.layers.9.mlp.up_proj.weight": weight + 1})
    refused(stock, str(stock), "layers.9.mlp.up_proj.weight")


# Configs


@pytest.mark.parametrize("hidden", [16, 64])
def test_wrong_hidden_size(hidden: int, official: Path) -> None:
    change_config(official, hidden_size=hidden)
    refused(official, str(official / "model.safetensors"), "tensor ", str(hidden))


def test_predictors_without_sparse_config(official: Path) -> None:
    change_config(official, sparse_config=None)
    refused(official, str(official / "model.safetensors"), "_score_predictor.", "sparse_config")


def test_sparse_config_without_predictors(official: Path) -> None:
    sparse = config_of(official)["sparse_config"]
    without_predictors(official)
    change_config(official, sparse_config=sparse)
    refused(official, str(official), "_score_predictor.")


def test_sparse_config_out_of_range(official: Path) -> None:
    change_config(official, sparse_config=config_of(official)["sparse_config"] | {"vision_keep_rate": 1.5})
    refused(official, str(official / "config.json"), "1.5")


@pytest.mark.parametrize("name", ["mlp2x_relu", "mlp0x_gelu", "resampler", ""])
def test_unknown_projector(name: str, official: Path) -> None:
    change_config(official, mm_projector_type=name)
    refused(official, str(official / "config.json"), "mm_projector_type", repr(name))


def test_config_that_is_none(official: Path) -> None:
    for content in ("{", "[]", "{}"):
        (official / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            checkpoints.load_model(official)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_config_without_a_size(field: str, official: Path) -> None:
    """The default of the class would be another model's."""
    change_config(official, **{field: None})
    refused(official, str(official / "config.json"), field)


def test_configs_with_a_value_of_another_type(official: Path, stock: Path) -> None:
    """Transformers checks them in several lines, with an error of its own kind."""
    change_config(stock, text_config=config_of(stock)["text_config"] | {"intermediate_size": "wide"})
    refused(stock, str(stock / "config.json"), "intermediate_size", "wide")
    change_config(official, rms_norm_eps="small")
    refused(official, str(official / "config.json"), "rms_norm_eps", "small")
    change_config(official, rms_norm_eps=1e-5)
    change_config(official.parent / "vision_tower", hidden_act=3)
    refused(official, "vision_tower", "config.json", "hidden_act")


def test_vision_tower_that_is_nowhere(official: Path) -> None:
    change_config(official, mm_vision_tower="./nowhere")
    refused(official, "nowhere", "vision_tower=")
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        checkpoints.load_model(official, vision_tower="./elsewhere")


def test_vision_tower_of_another_kind(official: Path) -> None:
    change_config(official.parent / "vision_tower", model_type="siglip_vision_model")
    refused(official, "vision_tower", "siglip_vision_model")


def test_vision_tower_of_another_width(official: Path) -> None:
    change_config(official.parent / "vision_tower", hidden_size=64)
    refused(official, "model.safetensors", "tensor ")


# Sparsifiers


def test_sparsifier_that_is_not_finite(stock: Path) -> None:
    path, name = stock / "sparsifier.safetensors", "text_predictor.output_mlp.1.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name] * float("nan")}, path)
    with pytest.raises(ValueError, match=f"{path.name}.*{name}"):
        Sparsifier.from_pretrained(stock)


# The result


def test_failed_conversion_leaves_the_old_result(official: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    checkpoints.convert(official, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    change_tensors(official, **{WEIGHT: tensors_of(official)[WEIGHT] * float("nan")})
    with pytest.raises(ValueError, match=WEIGHT):
        checkpoints.convert(official, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
