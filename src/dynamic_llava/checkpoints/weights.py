"""The weight files of a checkpoint, read one tensor at a time: safetensors or pickled, single or sharded."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamic_llava.files import first_line, read_object

INDEX = ".index.json"
# The order in which transformers looks for weights, so that a folder with several is the same model to both.
PRECEDENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
NAMED_AT_MOST = 3  # files in a warning


class Weights:
    """The tensors of a checkpoint folder by name; a tensor is read when it is asked for.

    Where a folder holds the weights of several times, those count that transformers would take; a warning
    names the files that are ignored. Each file is opened once.

    Parameters
    ----------
    folder
        Holds ``model.safetensors``, ``pytorch_model.bin``, or the shards that an index of these names lists.
    named
        File that the config names by ``transformers_weights``; it comes before all others.

    Attributes
    ----------
    files
        File of each tensor.

    Raises
    ------
    FileNotFoundError
        If there are no weights, or a shard is missing.
    ValueError
        If a file is broken, lacks a tensor that its index names, or is a pickle that holds more than tensors.
    """

    def __init__(self, folder: Path, named: str | None = None) -> None:
        self.folder = folder
        self._files: dict[Path, _File] = {}
        head = self._head(named)
        self.files = self._indexed(head) if head.name.endswith(INDEX) else self._single(head)
        self._warn_of_others(head)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> Tensor:
        """Return a tensor, on CPU, in its own dtype.

        Raises
        ------
        ValueError
            If it cannot be read, or holds NaN or infinite values.
        """
        if name not in self.files:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        path = self.files[name]
        try:
            tensor = self._open(path)[name]
        except KeyError:
            raise ValueError(f"{path}: tensor {name} is missing, though the index names it") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {name} cannot be read: {error}") from error
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")
        return tensor

    def _head(self, named: str | None) -> Path:
        """Return the file that says where the tensors are: an index, or the only file."""
        if named is not None:
            if not isinstance(named, str):
                raise ValueError(
                    f"{self.folder / 'config.json'}: transformers_weights is {named!r}, it must name a file"
                )
            if not (self.folder / named).is_file():
                raise FileNotFoundError(
                    f"{self.folder / named} is missing: transformers_weights in config.json names it"
                )
            return self.folder / named
        found = next((name for name in PRECEDENCE if (self.folder / name).is_file()), None)
        if found is None:
            singles = [name for name in PRECEDENCE if not name.endswith(INDEX)]
            raise FileNotFoundError(f"{self.folder} holds no weights: neither {' nor '.join(singles)}")
        return self.folder / found

    def _indexed(self, path: Path) -> dict[str, Path]:
        try:
            listed = read_object(path)["weight_map"]
            files = {tensor: self.folder / file for tensor, file in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no index of weights: {error}") from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: {path.name} names it")
        return files

    def _single(self, path: Path) -> dict[str, Path]:
        return dict.fromkeys(self._open(path).names(), path)

    def _warn_of_others(self, head: Path) -> None:
        used = {head, *self.files.values()}
        weights = [path for path in self.folder.iterdir() if WEIGHTS.fullmatch(path.name)]
        ignored = sorted(path.name for path in weights if path not in used)
        if ignored:
            shown = ", ".join(ignored[:NAMED_AT_MOST])
            if len(ignored) > NAMED_AT_MOST:
                shown += f" and {len(ignored) - NAMED_AT_MOST} more"
            warnings.warn(
                f"{self.folder}: weights are read from {head.name}, as transformers does; ignored: {shown}",
                stacklevel=2,
            )

    def _open(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]


class _File:
    """One open file of tensors, mapped into memory where its format allows that."""

    def __init__(self, path: Path) -> None:
        self._tensors = _opened(path)

    def names(self) -> list[str]:
        return list(self._tensors.keys())

    def __getitem__(self, name: str) -> Tensor:
        if isinstance(self._tensors, dict):
            tensor = self._tensors[name].clone()  # apart from those that share its memory
        elif name in self.names():
            tensor = self._tensors.get_tensor(name)
        else:
            raise KeyError(name)
        return tensor


def _opened(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safe_open(path, framework="pt")
        tensors = _unpickled(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: the pickle holds more than tensors and was not loaded, for loading it could run code"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is broken: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is no file of tensors by name")
    return tensors


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
