"""Runs every golden file of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from dynamic_llava.verification.comparison import Comparison, Result
from dynamic_llava.verification.dialogue import check_dialogue
from dynamic_llava.verification.files import GoldenFile, find
from dynamic_llava.verification.generation import check_both, check_cached, check_without_cache
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
}


def verify(
    folder: Path,
    attention: str = "sdpa",
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
    track
        Passes the files on one by one; a progress bar.

    Returns
    -------
    list of Result
        In the order of the files. A check that raises is a failure with the error's line.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing to verify, or a golden file cannot be read.
    """
    subjects: dict[Path, Subject] = {}
    results: list[Result] = []
    for file in track(find(folder)):
        comparison = Comparison(file)
        try:
            _check(file, comparison, subjects, attention)
            comparison.finish()
        except Exception as error:  # whatever goes wrong in one file must not hide what the others say
            line = next(iter(str(error).strip().splitlines()), "")
            comparison.fail("(run)", f"{type(error).__name__}: {line}")
        results += comparison.results
    return results


def _check(file: GoldenFile, comparison: Comparison, subjects: dict[Path, Subject], attention: str) -> None:
    if file.name.startswith("h_"):
        check_unit(file, comparison)
        return
    check = next((check for prefix, check in CHECKS.items() if file.name.startswith(prefix)), None)
    if check is None:
        raise ValueError(f"no check for this kind of file: {', '.join([*CHECKS, 'h_'])} are known")
    if file.checkpoint not in subjects:
        subjects.clear()  # one model in memory at a time
        subjects[file.checkpoint] = Subject(file.checkpoint, attention)
    check(subjects[file.checkpoint], file, comparison)
