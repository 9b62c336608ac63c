"""Read the headers of the weights in a Hugging Face directory, without torch."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError, safe_open

from nemodiff_train.errors import UserError
from nemodiff_train.schema import checked, read_json

INDEX = "model.safetensors.index.json"

_ITEM_SIZES = {"F32": 4, "BF16": 2, "F16": 2}
"""Bytes per element of the dtypes that hold plain weights."""


class _Index(TypedDict):
    weight_map: dict[str, str]


_LONGEST = 255  # bytes of a file's name
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class TensorHeader:
    """Header of one tensor in a file."""

    file: Path
    dtype: str
    """Its name in safetensors, such as ``BF16``."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the data."""
        return _ITEM_SIZES.get(self.dtype, 1) * math.prod(self.shape)


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Return every tensor of a directory by name, from the headers of its files.

    Raises:
        UserError: No safetensors, a file that is missing or cut off, an index that does not fit the files, or weights
            beside those of the index.
    """
    weight_map = _index(directory)
    files = sorted({directory / name for name in weight_map.values()})
    # Some publishers put the weights beside them a second time, under names of their own.
    standard = sorted(directory.glob("model*.safetensors"))
    if files and (others := sorted(set(standard) - set(files))):
        raise UserError(
            f"'{directory}' holds two models: '{INDEX}' names {files[0].name}, but not {others[0].name}, which is "
            "there too; remove the index or the file, whichever is old"
        )
    files = files or standard or sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"'{directory}' has no *.safetensors; only safetensors weights are read")
    for file in files:
        _check_siblings(file)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        with open_safetensors(file, framework="np") as content:
            for name in content.keys():  # noqa: SIM118  (not a mapping)
                if name in tensors:
                    raise UserError(f"'{name}' is both in '{tensors[name].file}' and in '{file}'; fetch both again")
                header = content.get_slice(name)
                tensors[name] = TensorHeader(file, header.get_dtype(), tuple(header.get_shape()))
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise UserError(
                f"'{directory / INDEX}' says that '{name}' is in {file_name}, but it is not; fetch it again"
            )
    if weight_map and (extra := sorted(set(tensors) - set(weight_map))):
        raise UserError(
            f"'{tensors[extra[0]].file}' holds '{extra[0]}', which '{INDEX}' does not name; fetch it again"
        )
    return tensors


@contextmanager
def open_safetensors(file: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file for reading.

    Args:
        file: The file.
        framework: Kind of the tensors that it gives: ``pt``, or ``np``, which does not import torch.

    Raises:
        UserError: It is missing, cut off or not a safetensors file.
    """
    if not file.is_file():
        raise UserError(f"'{file}' is missing; fetch it again")
    try:
        with safe_open(file, framework=framework) as content:
            yield content
    except SafetensorError as error:
        raise UserError(f"'{file}' is damaged or incomplete ({error}); fetch it again") from None


def _index(directory: Path) -> dict[str, str]:
    """Return the file of each tensor by name; nothing where there is no index."""
    file = directory / INDEX
    if not file.is_file():
        return {}
    names = checked(_Index, read_json(file), file)["weight_map"]
    for shard in names.values():
        if Path(shard).name != shard or len(shard.encode(errors="replace")) > _LONGEST:
            raise UserError(f"'{file}' names '{shard:.200}', which is not a file beside it; fetch it again")
    return names


def _check_siblings(file: Path) -> None:
    """Refuse a numbered file without all of its siblings; without an index a missing one would go unnoticed."""
    if numbered := _NUMBERED.fullmatch(file.name):
        stem, _, count = numbered.groups()
        for number in range(1, int(count) + 1):
            sibling = file.with_name(f"{stem}-{number:05d}-of-{count}.safetensors")
            if not sibling.is_file():
                raise UserError(f"'{sibling}' is missing, but there are others of {int(count)}; fetch it again")
