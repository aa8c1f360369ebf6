"""Loading: a stock model from transformers' or the official format, its sparsifier attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from dynamic_llava.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from dynamic_llava.checkpoints.layout import to_hub
from dynamic_llava.checkpoints.official.checkpoint import OfficialCheckpoint
from dynamic_llava.checkpoints.official.config import is_official
from dynamic_llava.checkpoints.official.processor import IMAGE_TOKEN, official_processor, official_tokenizer
from dynamic_llava.checkpoints.official.projectors import fit_projector
from dynamic_llava.checkpoints.save import read_config, resolve
from dynamic_llava.checkpoints.weights import Weights
from dynamic_llava.files import first_line
from dynamic_llava.sparsifier import Sparsifier

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


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
    if (base := _base_model(folder)) is not None:
        model, processor = load(base, dtype, device, vision_tower)
        return _exchange_sparsifier(model, folder), processor
    config = read_config(folder)
    processor = None
    try:
        if has_tokenizer(folder) and is_official(config):
            processor = official_processor(folder, config, vision_tower)
        elif has_tokenizer(folder):
            processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the processor cannot be read: {first_line(error)}") from error
    return _named(_load(folder, dtype, device, vision_tower), source), processor


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
        A folder, a hub id, or ``"nano"``, the model that comes with this package. A folder with a sparsifier
        alone loads the base model that it names, too.
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
    if (base := _base_model(folder)) is not None:
        return _exchange_sparsifier(load_model(base, dtype, device, vision_tower), folder)
    return _named(_load(folder, dtype, device, vision_tower), source)


def _named(model: PreTrainedModel, source: str | Path) -> PreTrainedModel:
    """Call a model from the hub by its id there, not by the folder that it was fetched into."""
    if source != "nano" and not Path(source).expanduser().is_dir():
        model.name_or_path = str(source)
    return model


def _base_model(folder: Path) -> str | None:
    """Return the base model of a folder that holds a sparsifier alone; None for a whole checkpoint."""
    if (folder / "config.json").is_file() or not (folder / CONFIG_FILE).is_file():
        return None
    base = Adapter.read(folder).base_model
    if not base:
        raise FileNotFoundError(
            f"{folder / 'config.json'} does not exist: {folder} is no checkpoint, and its sparsifier names "
            "no base model; load the model, then attach Sparsifier.from_pretrained(...)"
        )
    if Path(base).expanduser().resolve() == folder.resolve():
        raise ValueError(f"{folder / CONFIG_FILE} names its own folder as base model, which holds no model")
    return base


def _exchange_sparsifier(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    own = getattr(model, "sparsifier", None)
    if own is not None:
        own.detach()
    Sparsifier.from_pretrained(folder).attach(model)
    return model


def _load(
    folder: Path,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    vision_tower: str | Path | None,
) -> PreTrainedModel:
    config = read_config(folder)
    device = torch.device(device or "cpu")
    dtype = _dtype(dtype, device)
    sparsifier = None
    if is_official(config):
        source = OfficialCheckpoint(folder, vision_tower, _image_token_id(folder, config))
        model, sparsifier = _load_official(source, dtype), source.sparsifier
    elif vision_tower is not None:
        raise ValueError(f"vision_tower was given, but {folder} holds its own vision tower: leave it out")
    else:
        model = _load_stock(folder, dtype, config.get("transformers_weights"))
        if (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists():
            sparsifier = Sparsifier.from_pretrained(folder)
    model.to(device)  # type: ignore[arg-type]  # transformers' own wrapper hides the signature
    model.eval()
    if sparsifier is not None:
        sparsifier.base_model = ""  # it was trained with the model that lies beside it
        sparsifier.attach(model)
    return model


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a checkpoint folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _image_token_id(folder: Path, config: dict[str, Any]) -> int | None:
    if not has_tokenizer(folder):
        return None
    token: Any = official_tokenizer(folder, config).convert_tokens_to_ids(IMAGE_TOKEN)
    return int(token)


def _load_official(source: OfficialCheckpoint, dtype: torch.dtype | str) -> PreTrainedModel:
    state = {to_hub(path): tensor for path, tensor in source.tensors()}
    if dtype == "auto":
        dtype = next(iter(state.values())).dtype
    model = _stock(source.folder, dtype, state.get, config=source.config, state_dict=state)
    model.generation_config = source.generation_config()
    return model


def _load_stock(folder: Path, dtype: torch.dtype | str, named: str | None) -> PreTrainedModel:
    weights = Weights(folder, named)  # names a broken or missing file better than what follows
    model = _stock(folder, dtype, weights.read)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        for name in weights:
            weights.read(name)  # raises with the name of the file and the tensor
    return cast(PreTrainedModel, model)


def _stock(folder: Path, dtype: torch.dtype | str, read: Callable[[str], Any], **given: Any) -> Any:
    """Make the stock model from a folder's files or a state dict, and account for every tensor."""
    try:
        with _quiet():
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                None if given else folder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **given,
            )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the model cannot be read: {first_line(error)}") from error
    model, info = loaded
    projector = fit_projector(model)
    if projector is not None:
        state = {name: read(f"multi_modal_projector.{name}") for name in projector.state_dict()}
        projector.load_state_dict(state)
    for problem in ("missing", "mismatched", "unexpected"):
        keys = [key if isinstance(key, str) else key[0] for key in info[f"{problem}_keys"]]
        names = [key for key in keys if projector is None or "multi_modal_projector." not in key]
        if names:
            reason = "misshapen" if problem == "mismatched" else problem
            raise ValueError(f"{folder}: {len(names)} tensors are {reason}, such as {min(names)}")
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
