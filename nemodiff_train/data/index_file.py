"""Validate an ``.idx`` file before it is memory-mapped.

Megatron's layout: a magic of 9 bytes, version, token type, number of sequences S and number of document ends D; then
S lengths (int32), S offsets in ``.bin`` (int64, bytes) and D document ends (int64, sequences before them). The first
document end is 0 and the last one is S.
"""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nemodiff_train.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TOKEN_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}  # by Megatron's number; text has integers only
_CHECKED_SEQUENCES = 10_000_000  # well under a second


class Index(NamedTuple):
    """The content of an ``.idx`` file, memory-mapped."""

    dtype: np.dtype[Any]
    """Type of the tokens in ``.bin``."""
    lengths: npt.NDArray[np.int32]
    """[sequences] tokens."""
    offsets: npt.NDArray[np.int64]
    """[sequences] bytes from the start of ``.bin``."""
    document_ends: npt.NDArray[np.int64]
    """[documents + 1] sequences before each end; the first is 0."""


def read_index(prefix: str) -> Index:
    """Return an index that fits its own length and its ``.bin``.

    Sequences are checked one by one up to the ten millionth, and by their sums beyond it.

    Args:
        prefix: Prefix of a data set whose two files exist.

    Raises:
        UserError: The index is damaged or empty.
    """
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise _damaged(path, "it does not begin like one")
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != 1:
        raise _damaged(path, f"its version is {version}, not 1")
    if code not in _TOKEN_TYPES:
        raise _damaged(path, f"its token type {code} is not an integer type")
    needed = _HEADER.size + 12 * sequences + 8 * ends
    size = path.stat().st_size
    if size not in (needed, needed + sequences):  # some tools add one byte per sequence
        raise _damaged(path, f"{size} bytes do not hold {sequences} sequences and {ends} document ends")
    if sequences == 0 or ends < 2:
        raise UserError(f"{prefix}: the data set is empty; prepare it again")
    content = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER.size)
    index = Index(
        dtype=np.dtype(_TOKEN_TYPES[code]),
        lengths=content[: 4 * sequences].view("<i4"),
        offsets=content[4 * sequences : 12 * sequences].view("<i8"),
        document_ends=content[12 * sequences : 12 * sequences + 8 * ends].view("<i8"),
    )
    _check_sequences(path, index, Path(f"{prefix}.bin").stat().st_size)
    documents = index.document_ends
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents[: _CHECKED_SEQUENCES + 1]) < 0).any():
        raise _damaged(path, f"its documents are not made of its {sequences} sequences")
    return index


def _check_sequences(path: Path, index: Index, bin_bytes: int) -> None:
    """Refuse sequences that do not fill ``.bin`` one after another."""
    lengths, offsets = index.lengths[:_CHECKED_SEQUENCES], index.offsets[:_CHECKED_SEQUENCES]
    if (lengths < 0).any():
        raise _damaged(path, "a sequence has a length below 0")
    # Each offset is the number of bytes of all sequences before it.
    nbytes = lengths.astype(np.int64) * index.dtype.itemsize
    if (offsets != np.cumsum(nbytes) - nbytes).any():
        raise _damaged(path, "its sequences do not follow one another")
    last = int(index.offsets[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    if index.lengths[-1] < 0 or last != bin_bytes:
        raise _damaged(path, f"its sequences do not fill the {bin_bytes} bytes of .bin")


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: damaged, or not Megatron's index: {problem}; prepare the data again")
