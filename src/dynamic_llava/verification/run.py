"""Runs every golden file of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch

from dynamic_llava.environment import usable_device
from dynamic_llava.verification.comparison import Comparison, Result
from dynamic_llava.verification.dialogue import check_dialogue
from dynamic_llava.verification.files import GoldenFile, find
from dynamic_llava.verification.generation import check_both, check_cached, check_without_cache
from dynamic_llava.verification.pictures import check_pictures
from dynamic_llava.verification.prefill import check_prefill
from dynamic_llava.verification.subject import Subject
from dynamic_llava.verification.training import check_training
from dynamic_llava.verification.unit import check_unit

Check = Callable[[Subject, GoldenFile, Comparison], None]
CHECKS: dict[str, Check] = {
    "a_": check_prefill,
    "b_": check_prefill,
    "c_": check_cached,
    "d_gen_cache": check_both,
    "d_gen_nocache": check_without_cache,
    "e_": check_training,
    "f_": check_dialogue,
    "g_": check_pictures,
}


def verify(
    folder: Path,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    track: Callable[[list[GoldenFile]], Iterable[GoldenFile]] = iter,
) -> list[Result]:
    """Compute every golden file of ``folder`` again and compare.

    Parameters
    ----------
    folder
        Golden files themselves beside their ``checkpoint/``, or subfolders of such, one a configuration; the
        attention unit needs no checkpoint.
    attention
        Attention implementation of the models, ``"sdpa"`` or ``"eager"``.
    device, dtype
        Of the models, as ``load_model`` takes them; the comparison itself runs on the CPU.
    track
        Passes the files on one by one; a progress bar.

    Returns
    -------
    list of Result
        In the order of the files. A check that raises is a failure with the error's line.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing to verify, a golden file cannot be read, or there is no such device.
    """
    place = usable_device(device)
    load = lru_cache(maxsize=1)(lambda checkpoint: Subject(checkpoint, attention, place, dtype))
    results: list[Result] = []
    for file in track(find(folder)):
        comparison = Comparison(file)
        try:
            _check(file, comparison, load)
            comparison.finish()
        except Exception as error:  # whatever goes wrong in one file must not hide what the others say
            line = next(iter(str(error).strip().splitlines()), "")
            comparison.fail("(run)", f"{type(error).__name__}: {line}")
        results += comparison.results
    return results


def _check(file: GoldenFile, comparison: Comparison, load: Callable[[Path], Subject]) -> None:
    if file.name.startswith("h_"):
        check_unit(file, comparison)
        return
    check = next((check for prefix, check in CHECKS.items() if file.name.startswith(prefix)), None)
    if check is None:
        raise ValueError(f"no check for this kind of file: {', '.join([*CHECKS, 'h_'])} are known")
    check(load(file.checkpoint), file, comparison)
