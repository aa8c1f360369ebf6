"""Writing weights shard by shard, so that a conversion never holds more than one."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from dynamic_llava.files import write_json

SHARD_BYTES = 2 * 1024**3


class ShardWriter:
    """Writes ``model.safetensors``, or shards with their index where one file would be too large.

    Parameters
    ----------
    folder
        Where the files go.
    limit
        Bytes that a shard may hold.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.limit = limit
        self.names: list[list[str]] = []
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; write the shard before it where both would not fit."""
        if self._pending and self._pending_bytes + tensor.nbytes > self.limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, and name the files by their number."""
        self._flush()
        count = len(self.names)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, file in enumerate(files):
            self._part(i).rename(self.folder / file)
        weight_map = {name: file for file, names in zip(files, self.names, strict=True) for name in names}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self.names)), metadata={"format": "pt"})
        self.names.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"
