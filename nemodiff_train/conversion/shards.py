"""Write weights as sharded safetensors, one tensor at a time.

A safetensors file begins with a table of names, shapes and offsets, followed by plain bytes.  As shapes are
known before the first tensor is at hand, the files are laid out first and filled in any order: no shard is
ever held in memory, and several ranks can write at once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from nemodiff_train.conversion.weights import CHECKSUMS, checksum, raw_bytes
from nemodiff_train.errors import UserError
from nemodiff_train.model.headers import INDEX
from nemodiff_train.model.hf_directory import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class ShardWriter:
    """The weight files of a directory, laid out at once and filled tensor by tensor.

    Args:
        directory: Existing folder for the files.
        shapes: Shapes of all tensors by name.
        dtype: Dtype of all tensors.
        max_shard_size: Largest file, such as ``"5GB"``; a larger tensor has a file of its own.

    Raises:
        UserError: ``max_shard_size`` is not a size.
    """

    directory: Path
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    max_shard_size: str | int = "5GB"
    checksums: dict[str, str] = field(default_factory=dict)
    """CRC-32 of each tensor that this process has written, by name."""

    def __post_init__(self) -> None:
        try:
            plan = split_state_dict_into_shards_factory(
                self.shapes,
                get_storage_size=self.nbytes,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=self.max_shard_size,
            )
        except ValueError as error:
            raise UserError(f"--max-shard-size {self.max_shard_size}: {error}") from None
        self._file_of, self._sharded = plan.tensor_to_filename, plan.is_sharded
        self._headers: dict[str, bytes] = {}
        """Table of each file with its length, in the order in which the files are dealt out."""
        self._offsets: dict[str, int] = {}
        """Offset of each tensor's data from the start of its file."""
        self._sizes: dict[str, int] = {}
        """Bytes of each file."""
        for file, tensors in plan.filename_to_tensors.items():
            self._lay_out(file, tensors)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of this shape."""
        return self.dtype.itemsize * int(torch.Size(shape).numel())

    @property
    def total(self) -> int:
        """Return the bytes of all tensors."""
        return sum(map(self.nbytes, self.shapes.values()))

    def owner(self, name: str, ranks: int) -> int:
        """Return the rank that writes a tensor: files are dealt out in turn."""
        return list(self._headers).index(self._file_of[name]) % ranks

    def create_files(self) -> None:
        """Create the files, complete but for the data, and the index; called on one rank."""
        for name, header in self._headers.items():
            with (self.directory / name).open("wb") as file:
                file.write(header)
                file.truncate(self._sizes[name])
        if self._sharded:
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(self._file_of.items()))}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, values: Tensor) -> None:
        """Write one tensor at its offset.

        Raises:
            ValueError: Its shape or dtype is not the planned one.
        """
        if tuple(values.shape) != self.shapes[name] or values.dtype != self.dtype:
            actual, planned = (values.dtype, list(values.shape)), (self.dtype, list(self.shapes[name]))
            raise ValueError(f"{name} is {actual}, but {planned} was planned")
        values = values.detach().cpu()
        self.checksums[name] = checksum(values)
        with (self.directory / self._file_of[name]).open("r+b") as file:
            file.seek(self._offsets[name])
            file.write(raw_bytes(values))

    def close(self, checksums: dict[str, str]) -> None:
        """Record the checksums of all tensors; called on one rank, after all have written.

        Raises:
            ValueError: A tensor was never written.
        """
        if missing := sorted(set(self.shapes) - set(checksums)):
            raise ValueError(f"{len(missing)} tensors were not written, such as {missing[0]}")
        (self.directory / CHECKSUMS).write_text(json.dumps(dict(sorted(checksums.items())), indent=2) + "\n")

    def _lay_out(self, file: str, tensors: Iterable[str]) -> None:
        """Lay out one file: its table, in which offsets count from the end of the table, and its tensors in turn."""
        table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in tensors:
            starts[name], end = end, end + self.nbytes(self.shapes[name])
            offsets = [starts[name], end]
            table[name] = {"dtype": _NAMES[self.dtype], "shape": list(self.shapes[name]), "data_offsets": offsets}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # data begin at a multiple of 8
        self._headers[file] = len(header).to_bytes(8, "little") + header
        self._sizes[file] = 8 + len(header) + end
        self._offsets |= {name: 8 + len(header) + start for name, start in starts.items()}
