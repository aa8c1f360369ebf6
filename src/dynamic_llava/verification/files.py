"""Golden files: named arrays in ``.npz``, a folder for each configuration."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class GoldenFile:
    """The arrays of one file; remembers which of them were looked at.

    Parameters
    ----------
    path
        An ``.npz`` file, no pickles inside.

    Raises
    ------
    ValueError
        If the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path) as file:
                self._arrays: dict[str, np.ndarray] = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no readable .npz file of plain arrays: {error}") from error
        self.used: set[str] = set()

    @property
    def name(self) -> str:
        """The file's name without its suffix, such as ``a_prefill_b1_keep0.2``."""
        return self.path.name.removesuffix(".npz")

    @property
    def label(self) -> str:
        """Folder and name, for a reader."""
        return f"{self.path.parent.name}/{self.name}"

    @property
    def checkpoint(self) -> Path:
        """Where the model of this file's configuration lies."""
        return self.path.parent / "checkpoint"

    @property
    def keys(self) -> list[str]:
        """Names of the arrays."""
        return list(self._arrays)

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> Tensor:
        """Return an array of numbers as a tensor."""
        self.used.add(key)
        if key not in self._arrays:
            raise KeyError(f"{self.label} holds no array {key}")
        return torch.from_numpy(np.array(self._arrays[key]))

    def strings(self, key: str) -> list[str]:
        """Return an array of names."""
        self.used.add(key)
        return [str(value) for value in self._arrays[key]]

    def starting(self, prefix: str) -> list[str]:
        """Return the names of the arrays that start with ``prefix``."""
        return [key for key in self._arrays if key.startswith(prefix)]


def find(folder: Path) -> list[GoldenFile]:
    """Read the golden files in ``folder`` and in its direct subfolders, in the order of their names.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no ``.npz`` in it.
    ValueError
        If a file cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that holds golden .npz files")
    paths = sorted(folder.glob("*.npz")) + sorted(folder.glob("*/*.npz"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no golden files: no .npz in it or in its subfolders")
    return [GoldenFile(path) for path in paths]
