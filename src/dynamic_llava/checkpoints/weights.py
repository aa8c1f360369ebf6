"""The weight files of a checkpoint, read one tensor at a time: safetensors or pickled, single or sharded."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamic_llava.files import first_line

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


class Shards:
    """The tensors of a checkpoint folder by name; a tensor is read when it is asked for.

    Parameters
    ----------
    folder
        Holds ``model.safetensors``, ``pytorch_model.bin``, or the shards that an index of these names lists.

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

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._indexed() or self._single()

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
            tensor = _open(path)[name]
        except KeyError:
            raise ValueError(f"{path}: tensor {name} is missing, though the index names it") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: tensor {name} cannot be read: {error}") from error
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: tensor {name} holds NaN or infinite values")
        return tensor

    def _indexed(self) -> dict[str, Path] | None:
        for name in INDEXES:
            path = self.folder / name
            if not path.is_file():
                continue
            try:
                listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
                files = {tensor: self.folder / file for tensor, file in listed.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is no index of weights: {error}") from error
            for file in sorted(set(files.values())):
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing: {path.name} names it")
            return files
        return None

    def _single(self) -> dict[str, Path]:
        for name in SINGLES:
            path = self.folder / name
            if path.is_file():
                return dict.fromkeys(_open(path).names(), path)
        raise FileNotFoundError(f"{self.folder} holds no weights: neither {' nor '.join(SINGLES)}")


class _File:
    """One open file of tensors."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors.keys())

    def __getitem__(self, name: str) -> Tensor:
        if isinstance(self.tensors, dict):
            tensor = self.tensors[name].clone()  # apart from those that share its memory
        elif name in self.names():
            tensor = self.tensors.get_tensor(name)
        else:
            raise KeyError(name)
        return tensor


@lru_cache(maxsize=1)  # tensors come shard by shard; one open file bounds the memory of a pickle
def _cached(path: Path, stamp: tuple[int, int]) -> _File:
    try:
        if path.suffix == ".safetensors":
            return _File(safe_open(path, framework="pt"))
        is_zip = zipfile.is_zipfile(path)  # files of before torch 1.6 are not, and cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: the pickle holds more than tensors and was not loaded, for loading it could run code"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is broken: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is no file of tensors by name")
    return _File(tensors)


def _open(path: Path) -> _File:
    status = path.stat()
    return _cached(path, (status.st_size, status.st_mtime_ns))
