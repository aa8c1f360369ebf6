"""Loading and saving: a stock transformers folder, with the sparsifier's two files beside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from dynamic_llava.sparsifier import CONFIG_FILE, WEIGHTS_FILE, Sparsifier

OFFICIAL_TYPES = ("llava_llama", "dynamic_llava_llama")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def load(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    vision_tower: str | Path | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """Load a model and its processor; takes what :func:`load_model` takes.

    Returns
    -------
    model, processor
        ``processor`` is None where the checkpoint has no tokenizer.
    """
    folder = resolve(source)
    model = load_model(folder, dtype, device, vision_tower)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return model, None
    try:
        return model, AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the processor cannot be read: {_first_line(error)}") from error


def load_model(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    vision_tower: str | Path | None = None,
) -> PreTrainedModel:
    """Load a stock model in evaluation mode, its sparsifier attached where the checkpoint has one.

    Parameters
    ----------
    source
        A folder, a hub id, or ``"nano"``, the model that comes with this package.
    dtype
        Such as ``torch.bfloat16`` or ``"bfloat16"``. None means float32 on CPU and the checkpoint's own
        elsewhere.
    device
        None means CPU.
    vision_tower
        For formats that keep the tower elsewhere; a transformers LLaVA holds its own, so anything but None is
        refused.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    ValueError
        If its format is unknown, or a tensor is missing or misshapen.
    """
    folder = resolve(source)
    _check_format(folder)
    if vision_tower is not None:
        raise ValueError(f"vision_tower was given, but {folder} holds its own vision tower: leave it out")
    device = torch.device(device or "cpu")
    model = _load_stock(folder, _dtype(dtype, device))
    model.to(device)  # type: ignore[arg-type]  # transformers' own wrapper hides the signature
    model.eval()
    if (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists():
        Sparsifier.from_pretrained(folder).attach(model)
    return model


def save(model: PreTrainedModel, processor: ProcessorMixin | None, folder: str | Path) -> None:
    """Write model, processor and attached sparsifier as one checkpoint, all at once.

    Raises
    ------
    ValueError
        If ``folder`` exists and holds something else than a checkpoint.
    """
    folder = Path(folder)
    if (
        folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
        and not (folder / "config.json").is_file()
    ):
        raise ValueError(f"{folder} exists and is no checkpoint: choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        sparsifier = getattr(model, "sparsifier", None)
        if sparsifier is not None:
            sparsifier.save_pretrained(partial)
        _swap(partial, folder, replaced)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _swap(partial: Path, folder: Path, replaced: Path) -> None:
    """Put ``partial`` in the place of ``folder``, which goes to ``replaced`` and comes back if that fails."""
    if not folder.exists():
        partial.rename(folder)
        return
    folder.rename(replaced)
    try:
        partial.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise


def resolve(source: str | Path) -> Path:
    """Return the local folder of a checkpoint: itself, the bundled model's, or a download of a hub id."""
    if source == "nano":
        return Path(str(resources.files("dynamic_llava") / "models" / "nano"))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    hub_id = str(source)
    if isinstance(source, Path) or hub_id.count("/") != 1 or hub_id[0] in "./~":
        raise FileNotFoundError(
            f"{source}: no such checkpoint; give a folder, a hub id (owner/name), or nano"
        )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = _first_line(error)
        raise FileNotFoundError(
            f"{source}: neither a folder nor a hub model that could be fetched ({reason})"
        ) from error


def _check_format(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no checkpoint")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no model config: {_first_line(error)}") from error
    if model_type in OFFICIAL_TYPES:
        raise ValueError(
            f"{folder} is in the format of the official code ({model_type}), which cannot be loaded yet"
        )
    if model_type != "llava":
        raise ValueError(f"{folder} holds a {model_type} model: only llava checkpoints can be loaded")


def _load_stock(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        with _quiet():
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the model cannot be read: {_first_line(error)}") from error
    model, info = loaded
    for problem in ("missing", "mismatched", "unexpected"):
        tensors = info[f"{problem}_keys"]
        if tensors:
            first: Any = min(tensors)
            name = first if isinstance(first, str) else first[0]
            reason = "misshapen" if problem == "mismatched" else problem
            raise ValueError(f"{folder}: {len(tensors)} tensors are {reason}, such as {name}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back transformers' table of wrong tensors and its progress bar: the error says it in a line."""
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}: choose float32, bfloat16 or float16")
    return dtype


def _first_line(error: Exception) -> str:
    """Return an error's message without the advice that follows it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
