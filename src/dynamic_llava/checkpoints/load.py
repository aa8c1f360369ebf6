"""Loading: a stock model from transformers' or the official format, its sparsifier attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from dynamic_llava.checkpoints.layout import to_hub
from dynamic_llava.checkpoints.official.projectors import fit_projector
from dynamic_llava.checkpoints.source import Source
from dynamic_llava.files import first_line
from dynamic_llava.sparsifier import Sparsifier


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
    found = Source(source, vision_tower)
    processor = found.processor  # before the weights, which take longer
    return _load(found, dtype, device), processor


def load_with_processor(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    vision_tower: str | Path | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model and its processor as :func:`load` does, for a use that cannot do without the processor.

    Raises
    ------
    ValueError
        If the checkpoint has no tokenizer.
    """
    found = Source(source, vision_tower)
    if found.processor is None:
        raise ValueError(
            f"{source}: the checkpoint has no tokenizer or processor; save the model's own beside it"
        )
    return _load(found, dtype, device), found.processor


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
    return _load(Source(source, vision_tower), dtype, device)


def _load(
    source: Source, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> PreTrainedModel:
    if source.kind == "predictors":
        model = _load(source.base, dtype, device)
        _exchange_sparsifier(model, source)
        return model
    if source.kind == "stock" and source.vision_tower is not None:
        raise ValueError(
            f"vision_tower was given, but {source.folder} holds its own vision tower: leave it out"
        )
    device = torch.device(device or "cpu")
    load_kind = _load_official if source.kind == "official" else _load_stock
    model = load_kind(source, _dtype(dtype, device))
    model.to(device)  # type: ignore[arg-type]  # transformers' own wrapper hides the signature
    model.eval()
    if source.adapter is not None:
        sparsifier = Sparsifier.from_adapter(source.adapter, source.folder)
        sparsifier.base_model = ""  # it was trained with the model that lies beside it
        sparsifier.attach(model)
    if source.hub_id is not None:  # not the folder that it was fetched into
        model.name_or_path = source.hub_id
    return model


def _exchange_sparsifier(model: PreTrainedModel, source: Source) -> None:
    own = getattr(model, "sparsifier", None)
    if own is not None:
        own.detach()
    if source.adapter is not None:
        Sparsifier.from_adapter(source.adapter, source.folder).attach(model)


def _load_official(source: Source, dtype: torch.dtype | str) -> PreTrainedModel:
    state = {to_hub(path): tensor for path, tensor in source.official.tensors()}
    if dtype == "auto":
        dtype = next(iter(state.values())).dtype
    model = _stock(source, dtype, state.get, None, state_dict=state)
    model.generation_config = source.official.generation_config()
    return model


def _load_stock(source: Source, dtype: torch.dtype | str) -> PreTrainedModel:
    weights = source.weights  # names a broken or missing file better than what follows
    model = _stock(source, dtype, weights.read, source.folder)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        for name in weights:
            weights.read(name)  # raises with the name of the file and the tensor
    return cast(PreTrainedModel, model)


def _stock(
    source: Source, dtype: torch.dtype | str, read: Callable[[str], Any], folder: Path | None, **given: Any
) -> Any:
    """Make the stock model from a folder's files or a state dict, and account for every tensor."""
    config = source.config
    try:
        with _quiet():
            loaded: Any = LlavaForConditionalGeneration.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **given,
            )
    except Exception as error:  # what a config says of a model may raise anything there
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{source.folder}: the model cannot be read: {reason}") from error
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
            raise ValueError(f"{source.folder}: {len(names)} tensors are {reason}, such as {min(names)}")
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
