"""The shipped recipes for one GPU do what their comments say: a 7B without weights, and a small model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import dynamic_llava
from dynamic_llava.data import scenes
from dynamic_llava.training import bundled, nano, run
from dynamic_llava.training.recipe import Recipe

NAMES = ["llava-1.5-7b-predictors", "llava-1.5-7b-lora"]
SIDE, PATCH = 336, 14
LETTERS = 1150  # of an answer: 830 tokens with the picture


@pytest.fixture(scope="module")
def config_of_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B's config and picture sizes, without weights; the tokenizer is nano's."""
    folder = tmp_path_factory.mktemp("7b")
    processor = nano.build_processor(scene_count=50)
    processor.patch_size = PATCH
    processor.image_processor.size = processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    processor.save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
    config.image_seq_length = (SIDE // PATCH) ** 2
    config.save_pretrained(folder)
    return folder


def write(folder: Path, name: str, init: Path, answer: str, **changes: Any) -> Path:
    """Write a shipped recipe for another model, with conversations of this answer."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes.make(1, "train").open_image().resize((640, 480)).save(folder / "one.png")
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": answer}]
    entries = [{"id": str(n), "image": "one.png", "conversations": turns} for n in range(64)]
    (folder / "talk.json").write_text(json.dumps(entries))
    recipe = yaml.safe_load(bundled.bundled(name).read_text())
    recipe["stage"]["init"] = str(init)
    recipe["data"]["conversations"] |= {"path": str(folder / "talk.json"), "images": str(folder)}
    recipe["data"]["workers"] = 0
    recipe["run"] |= {"output": str(folder / "out"), **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_that_the_results_call_best(name: str) -> None:
    method = Recipe.read(bundled.bundled(name)).method
    assert method is not None
    assert method.image_rates is not None or method.sparsity["ratio_weight"] == 10
    assert method.distill_weight == 0
    assert "distill" not in bundled.bundled(name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_comment(name: str, config_of_7b: Path, tmp_path: Path) -> None:
    text = bundled.bundled(name).read_text()
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    gpu, tokens, memory, hours, checkpoints = (
        float(re.search(pattern, comment)[1])  # type: ignore[index]
        for pattern in (
            r"one GPU of (\d+) GB",
            r"conversations of (\d+) tokens",
            r"(\d+) GB of GPU memory",
            r"(\d+) hours",
            r"([\d.]+) GB for checkpoints",
        )
    )
    answer = ("the teal star is in the middle right of the picture " * 40)[:LETTERS]
    plan = run.dry_run(write(tmp_path, name, config_of_7b, answer))
    assert plan.tokens_per_sample == tokens
    total = plan.memory_bytes["total"]
    assert round(total / 1e9) == memory
    assert total < 0.75 * gpu * 1e9  # the rest is for what no formula counts
    entries = 157_712 if plan.steps == 1 else plan.steps * 32
    work = plan.decoder_flops * (entries / 64 if plan.steps == 1 else 1)
    assert round(work / 100e12 / 3600) == hours
    assert plan.disk_bytes["checkpoints"] / 1e9 == pytest.approx(checkpoints, rel=0.2)
    if name.endswith("predictors"):
        assert plan.disk_bytes["model"] < 60e6
        assert f"a folder of {round(plan.disk_bytes['model'] / 1e6)} MB" in comment
        assert list(plan.parameters) == ["predictors"]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_a_small_model(name: str, small_checkpoint: Path, tmp_path: Path) -> None:
    answer = "red " * 60
    path = write(tmp_path, name, small_checkpoint, answer, steps=2, log_every=1, save_every=1)
    folder = run.train(path)
    assert (folder / "model.safetensors").exists() == name.endswith("lora")
    model, processor = dynamic_llava.load(folder)
    assert processor is not None
    sparsifier = model.sparsifier
    assert (sparsifier.config.image_keep_rate, sparsifier.config.text_keep_rate) == (0.2, 0.5)
    assert len(sparsifier.config.text_margins) == 41  # rates are settings
    assert sparsifier.history["license"] == "llama2"
