"""The model that a command asks: loaded, and changed as the command's options say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

ANSWERED = {
    "photo": "note: photo answered, for research use; --model nano asks nano",
    "nano": "note: nano answered, and knows drawn shapes alone; docs/photo.md has photo, which sees",
}
"""What is said of photographs where nobody named a model."""


@contextmanager
def prepared(
    source: str,
    device: str | None,
    dtype: str | None,
    dense: bool,
    downsample: float | None,
    **settings: Any,
) -> Iterator[tuple[PreTrainedModel, ProcessorMixin]]:
    """Load a model and its processor, and yield them ready to be asked.

    Parameters
    ----------
    source
        Checkpoint folder, hub id, or ``nano``.
    device, dtype
        See :func:`load`.
    dense
        Detach the sparsifier.
    downsample
        Share of the image tokens that pictures are scaled down to; None leaves them as they are.
    settings
        Of the sparsifier, see :func:`configure`.
    """
    model, processor = load(source, device, dtype)
    set_dense(model, dense)
    configure(model, **settings)
    if downsample is None:
        yield model, processor
        return
    from dynamic_llava.methods.downsample import downsampled

    with downsampled(model, processor, downsample) as smaller:
        yield model, smaller


def chosen(model: str | None, drawn: bool) -> str:
    """Return the model that answers: the one that was named, else ``photo`` for photographs, or ``nano``.

    Parameters
    ----------
    model
        What the user named.
    drawn
        Whether all pictures are the bundled ones of drawn shapes, which ``nano`` was trained for.
    """
    if model is not None:
        return model
    from dynamic_llava import photo

    return "photo" if not drawn and photo.is_installed() else "nano"


def load(source: str, device: str | None, dtype: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load what a command asks questions with.

    Parameters
    ----------
    source
        Checkpoint folder, hub id, or ``nano``.
    device
        None means the accelerator if there is one.
    dtype
        None means float32 on a CPU, and the checkpoint's own elsewhere.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such checkpoint, device or dtype, or the checkpoint has no tokenizer.
    """
    from dynamic_llava.checkpoints import load_with_processor
    from dynamic_llava.environment import default_device

    return load_with_processor(source, dtype=dtype, device=default_device() if device is None else device)


def set_dense(model: PreTrainedModel, dense: bool) -> None:
    """Detach the sparsifier if ``dense``; say so where there is none and nobody asked for dense answers."""
    from dynamic_llava.sparsifier import sparsifier_of

    sparsifier = sparsifier_of(model)
    if dense and sparsifier is not None:
        sparsifier.detach()
    elif not dense and sparsifier is None:
        typer.echo("note: the checkpoint has no sparsifier, so it answers dense", err=True)


def configure(model: PreTrainedModel, **settings: Any) -> None:
    """Change those settings of the sparsifier that are not None.

    Raises
    ------
    ValueError
        A value is out of range, or there is no sparsifier to change.
    """
    from dynamic_llava.sparsifier import sparsifier_of

    changes = {name: value for name, value in settings.items() if value is not None}
    if not changes:
        return
    sparsifier = sparsifier_of(model)
    if sparsifier is None:
        options = ", ".join("--" + name.replace("_", "-") for name in changes)
        raise ValueError(f"{options}: the model answers dense; leave it out, or take a sparse checkpoint")
    sparsifier.config = replace(sparsifier.config, **changes)
