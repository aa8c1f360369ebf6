"""Every family that is served sparse answers as alone; the others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaProcessor

from dynamic_llava import checkpoints

pytest.importorskip("vllm", reason="vLLM is not installed; make check-vllm installs it")

from tests.vllm import small
from vllm.exceptions import VLLMValidationError

from dynamic_llava.families import known
from dynamic_llava.vllm import families
from dynamic_llava.vllm.plugin import refused_family
from evidence import serving_engine


@pytest.mark.parametrize("name", small.FAMILIES)
def test_a_family_answers_as_alone(name: str, processor: LlavaProcessor, tmp_path: Path) -> None:
    folder = small.written(name, processor, tmp_path / name)
    model, own = checkpoints.load_with_processor(folder, dtype=torch.float32, device="cpu")
    # Of several pictures in a prompt, vLLM's OneVision shows the tiles too, and transformers' does not.
    requests = small.asked(name, most=1 if name == "llava_onevision" else 3)
    alone = [serving_engine.alone(model, own, request) for request in requests]
    with serving_engine.engine(folder) as llm:
        run = serving_engine.serve(llm, requests, each=2)
        if name != "llava_next":
            video = {"video": np.zeros((2, 32, 32, 3), dtype=np.uint8)}
            with pytest.raises((ValueError, VLLMValidationError), match="video"):
                llm.generate({"prompt": "USER:", "multi_modal_data": video})
    assert run.answers == {number: answer.tokens for number, answer in enumerate(alone)}
    assert any(answer.slots < answer.prompt for answer in alone)
    assert (run.blocks_left, run.entries_left) == (0, 0)


def test_features_are_added_to_dense_layers_alone(processor: LlavaProcessor, tmp_path: Path) -> None:
    folder = small.written("qwen3_vl", processor, tmp_path / "model")
    file = folder / "sparsifier_config.json"
    file.write_text(file.read_text().replace('"layer": 2', '"layer": 1'))
    with pytest.raises(Exception, match="choose 2 to 3"), serving_engine.engine(folder):
        pass


def test_a_pixtral_tower_is_refused(processor: LlavaProcessor, tmp_path: Path) -> None:
    folder = small.written("llava_next", processor, tmp_path / "model")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    config["vision_config"] |= {"model_type": "pixtral"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a Pixtral tower"), serving_engine.engine(folder):
        pass


def test_every_family_that_is_served_has_a_test() -> None:
    assert set(families.served()) == {"llava", *small.FAMILIES}
    assert set(families.served()) <= set(known())


def test_other_families_are_refused_in_one_line() -> None:
    assert refused_family("llava") == ""
    for model_type in set(known()) - set(families.served()):
        said = refused_family(model_type)
        assert said.startswith(f"{model_type} is not served sparse, only llava, llava_next, ")
        assert "\n" not in said
        assert families.architecture(model_type), f"{model_type} has no architecture to refuse"
