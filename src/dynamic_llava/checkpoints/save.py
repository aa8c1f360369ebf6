"""Writing a checkpoint folder, all at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from dynamic_llava.adapter import CONFIG_FILE, check_merged
from dynamic_llava.sparsifier import Sparsifier, sparsifier_of

MARK = ".converted"  # lists what `convert` wrote
OWN_FILES = (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".md", ".gitattributes", MARK)
OWN_FOLDERS = ("official", "vision_tower")


def save(model: PreTrainedModel, processor: ProcessorMixin | None, folder: str | Path) -> None:
    """Write model, processor and attached sparsifier as one checkpoint, all at once.

    Raises
    ------
    ValueError
        If ``folder`` exists and holds something else than a checkpoint, or if peft's
        adapters are in ``model``.
    """
    check_merged(model, "the model")
    with replacing_folder(Path(folder)) as partial:
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        sparsifier = sparsifier_of(model)
        if sparsifier is not None:
            sparsifier.adapter().anywhere().save(partial, with_card=False)  # its base lies beside it


def save_predictors(sparsifier: Sparsifier, folder: str | Path) -> None:
    """Write the predictors, the name of their base model and a model card, all at once.

    Raises
    ------
    ValueError
        If ``folder`` exists and holds something else than a checkpoint, or if peft's adapters are in the
        predictors.
    """
    with replacing_folder(Path(folder)) as partial:
        sparsifier.adapter().save(partial)


def check_checkpoint(folder: Path) -> None:
    """Raise ``ValueError`` if ``folder`` exists and holds something else than a checkpoint."""
    stranger = _stranger(folder)
    if stranger is not None:
        raise ValueError(
            f"{folder} holds {stranger}, which is no part of a checkpoint: choose another folder or remove it"
        )


@contextmanager
def replacing_folder(folder: Path, check: Callable[[Path], None] = check_checkpoint) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of ``folder`` if the block succeeds.

    Until then nothing of ``folder`` is touched, and it goes as a whole or not at all.

    Raises
    ------
    ValueError
        If ``check`` raises it, because ``folder`` holds what must stay.
    """
    folder = folder.resolve()
    partial, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)  # a run was killed between the two names that a swap gives
    check(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _swap(partial, folder, replaced)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _stranger(folder: Path) -> str | None:
    """Return something in ``folder`` that a checkpoint would not hold; None if it may be replaced whole."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "a file of that name"
    entries = sorted(folder.iterdir())
    if entries and not any((folder / name).is_file() for name in ("config.json", CONFIG_FILE)):
        return entries[0].name
    own = [e for e in entries if e.name in OWN_FOLDERS or _is_own_file(e)]
    return next((entry.name for entry in entries if entry not in own), None)


def _is_own_file(path: Path) -> bool:
    return path.is_file() and (path.suffix in OWN_FILES or path.name in OWN_FILES)


def _swap(partial: Path, folder: Path, replaced: Path) -> None:
    """Put ``partial`` in the place of ``folder``, which goes to ``replaced`` and comes back if that fails."""
    if not folder.exists():
        partial.rename(folder)
        return
    folder.rename(replaced)
    try:
        partial.rename(folder)
    except BaseException:
        replaced.rename(folder)
        raise
