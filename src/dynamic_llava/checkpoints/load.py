"""Loading: a stock model from transformers' or the official format, its sparsifier attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging

from dynamic_llava.checkpoints.layout import to_hub
from dynamic_llava.checkpoints.official.projectors import fit_projector
from dynamic_llava.checkpoints.source import Source
from dynamic_llava.environment import usable_device
from dynamic_llava.families import family_of
from dynamic_llava.files import first_line
from dynamic_llava.hub import Access
from dynamic_llava.sparsifier import Sparsifier, sparsifier_of

DTYPES = ("float32", "bfloat16", "float16")


class Options(TypedDict, total=False):
    """What loading passes on to transformers and the hub.

    ``device_map``, ``attn_implementation`` and ``quantization_config`` are those of ``from_pretrained``.
    ``revision`` (branch, tag or commit of what ``source`` names), ``token`` and ``cache_dir`` are the hub's,
    for all that is read from there: weights, config, tokenizer, processor, tower, predictors and their base.
    """

    device_map: Any
    attn_implementation: str | None
    quantization_config: Any
    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None


HUB_OPTIONS = frozenset(field.name for field in fields(Access))


@dataclass(frozen=True)
class _Place:
    """In what and where a model is loaded; ``given`` goes to ``from_pretrained`` as it is."""

    dtype: torch.dtype | str
    device: torch.device | None
    given: dict[str, Any]

    @classmethod
    def of(
        cls, dtype: torch.dtype | str | None, device: torch.device | str | None, options: Options
    ) -> _Place:
        """Check what the caller asks for, before anything is read."""
        if unknown := options.keys() - Options.__annotations__.keys():
            known = ", ".join(Options.__annotations__)
            raise TypeError(f"loading takes no {min(unknown)!r}: besides dtype and device, it takes {known}")
        given = {
            name: value for name, value in options.items() if name not in HUB_OPTIONS and value is not None
        }
        if device is not None and "device_map" in given:
            raise ValueError("device and device_map are both given: leave one of them out")
        where = usable_device("cpu" if device is None else device)
        if "quantization_config" in given and device is not None:
            given["device_map"] = {"": where}  # quantized weights are made where they stay
        is_mapped = "device_map" in given or "quantization_config" in given
        return cls(_dtype(dtype, None if is_mapped else where), None if is_mapped else where, given)


def load(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    vision_tower: str | Path | None = None,
    **options: Unpack[Options],
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """Load a model and its processor; takes what :func:`load_model` takes.

    Returns
    -------
    model, processor
        ``processor`` is None where the checkpoint has no tokenizer.
    """
    place = _Place.of(dtype, device, options)
    found = _source(source, vision_tower, options)
    processor = found.processor  # before the weights, which take longer
    return _load(found, place), processor


def load_with_processor(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    vision_tower: str | Path | None = None,
    **options: Unpack[Options],
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model and its processor as :func:`load` does, for a use that cannot do without the processor.

    Raises
    ------
    ValueError
        If the checkpoint has no tokenizer.
    """
    place = _Place.of(dtype, device, options)
    found = _source(source, vision_tower, options)
    processor = _needed_processor(found)
    return _load(found, place), processor


def load_skeleton(
    source: str | Path,
    dtype: torch.dtype | str = "float32",
    vision_tower: str | Path | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make the model that :func:`load_with_processor` loads, without its weights (on the meta device).

    Only configs, processor and predictors are read, and fetched where ``source`` is on the hub; the
    predictors of an official checkpoint, which lie among its weights, are as little there as these.

    Raises
    ------
    ValueError
        If the checkpoint has no tokenizer.
    """
    found = Source(source, vision_tower, has_weights=False)
    processor = _needed_processor(found)
    whole = found.base if found.kind == "predictors" else found
    _check_tower(whole)
    with torch.device("meta"):
        model: Any = _kind(whole.config)(whole.config)
        fit_projector(model)
    model.to(_dtype(dtype, None)).eval()
    model.name_or_path = whole.title
    sparsifier = _without_weights(found)
    if sparsifier is not None:
        sparsifier.attach(model)
        sparsifier.to_empty(device="cpu")  # unlike tensors on the meta device, these can be copied
    return model, processor


def _without_weights(source: Source) -> Sparsifier | None:
    """Return the sparsifier of a model without weights: an official checkpoint has its predictors there."""
    if source.kind == "official":
        sparsity = source.official.sparsity
        return None if sparsity is None else Sparsifier(sparsity, source.config.text_config.hidden_size)
    return None if source.adapter is None else Sparsifier.from_adapter(source.adapter, source.folder)


def load_model(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    vision_tower: str | Path | None = None,
    **options: Unpack[Options],
) -> PreTrainedModel:
    """Load a stock model in evaluation mode, its sparsifier attached where the checkpoint has one.

    Parameters
    ----------
    source
        A folder, a hub id, or ``"nano"``, the model that comes with this package. A folder with a sparsifier
        alone loads the base model that it names, too.
    dtype
        Such as ``torch.bfloat16`` or ``"bfloat16"``. None means float32 on CPU, and the checkpoint's own
        elsewhere and with a ``device_map`` or quantization.
    device
        None means CPU, or what ``device_map`` says.
    vision_tower
        For formats that keep the tower elsewhere; a transformers LLaVA holds its own, so anything but None is
        refused.
    options
        ``device_map``, ``attn_implementation``, ``quantization_config``, ``revision``, ``token`` and
        ``cache_dir``, see :class:`Options`.

    Raises
    ------
    FileNotFoundError
        If there is no such checkpoint.
    ValueError
        If its format is unknown, a tensor is missing or misshapen, or the device is not there.
    """
    place = _Place.of(dtype, device, options)
    return _load(_source(source, vision_tower, options), place)


def _needed_processor(source: Source) -> ProcessorMixin:
    if source.processor is None:
        whole = source.base if source.kind == "predictors" else source
        if not family_of(whole).kinds:
            raise ValueError(
                f"{source.name}: a decoder of text, and this is for models that take pictures: in code, "
                "load_model loads it, and model(..., answer_mask=...) trains its predictors"
            )
        raise ValueError(
            f"{source.name}: the checkpoint has no tokenizer or processor; save the model's own beside it"
        )
    return source.processor


def _source(source: str | Path, vision_tower: str | Path | None, options: Options) -> Source:
    access = Access(**{name: value for name, value in options.items() if name in HUB_OPTIONS})  # type: ignore[arg-type]
    return Source(source, vision_tower, access)


def _load(source: Source, place: _Place) -> PreTrainedModel:
    if source.kind == "predictors":
        model = _load(source.base, place)
        _exchange_sparsifier(model, source)
        return model
    _check_tower(source)
    load_kind = _load_official if source.kind == "official" else _load_stock
    model = load_kind(source, place)
    if place.device is not None:
        model.to(place.device)  # type: ignore[arg-type]  # transformers' own wrapper hides the signature
    model.eval()
    if source.adapter is not None:
        sparsifier = Sparsifier.from_adapter(source.adapter, source.folder)
        base_model, sparsifier.base_model = sparsifier.base_model, ""  # the model beside it fits, by any name
        sparsifier.attach(model)
        sparsifier.base_model = base_model
    model.name_or_path = source.title  # not the folder that a hub id was fetched into
    return model


def _check_tower(source: Source) -> None:
    if source.kind == "stock" and source.vision_tower is not None:
        raise ValueError(
            f"vision_tower was given, but {source.folder} holds its own vision tower: leave it out"
        )


def _exchange_sparsifier(model: PreTrainedModel, source: Source) -> None:
    own = sparsifier_of(model)
    if own is not None:
        own.detach()
    if source.adapter is not None:
        Sparsifier.from_adapter(source.adapter, source.folder).attach(model)


def _load_official(source: Source, place: _Place) -> PreTrainedModel:
    state = {to_hub(path): tensor for path, tensor in source.official.tensors()}
    if place.dtype == "auto":
        place = replace(place, dtype=next(iter(state.values())).dtype)
    model = _stock(source, place, state.get, None, state_dict=state)
    model.generation_config = source.official.generation_config()
    return model


def _load_stock(source: Source, place: _Place) -> PreTrainedModel:
    weights = source.weights  # names a broken or missing file better than what follows
    model = _stock(source, place, weights.read, source.folder)
    if not all(_is_finite(parameter) for parameter in model.parameters()):
        for name in weights:
            weights.read(name)  # raises with the name of the file and the tensor
    return cast(PreTrainedModel, model)


def _is_finite(parameter: Tensor) -> bool:
    """Return whether a parameter is finite; offloaded ones (meta) and quantized ones are not looked at."""
    is_plain = parameter.is_floating_point() and parameter.itemsize > 1 and not parameter.is_meta
    return not is_plain or bool(parameter.isfinite().all())


def _stock(
    source: Source, place: _Place, read: Callable[[str], Any], folder: Path | None, **given: Any
) -> Any:
    """Make the stock model from a folder's files or a state dict, and account for every tensor."""
    config = source.config
    try:
        with _quiet():
            loaded: Any = _kind(config).from_pretrained(
                folder,
                config=config,
                dtype=place.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **given,
                **place.given,
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


def _kind(config: Any) -> Any:
    """Return the class of transformers for a config: a multimodal one, or one for text alone."""
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return multimodal or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


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


def _dtype(dtype: torch.dtype | str | None, device: torch.device | None) -> torch.dtype | str:
    """Return what weights become on ``device``, or where a map or a quantizer puts them (None)."""
    if dtype is None:
        return torch.float32 if device is not None and device.type == "cpu" else "auto"
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return cast(torch.dtype, getattr(torch, dtype))
