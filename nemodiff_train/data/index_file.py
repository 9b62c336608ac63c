"""Whether an ``.idx`` file is what it says, before anything maps it into memory and believes it.

Megatron's layout: a magic of 9 bytes, version, type of the tokens, number of sequences S and of document ends D;
then S lengths (int32), S places in ``.bin`` (int64, bytes) and D document ends (int64, sequences before them), of
which the first is 0 and the last S.
"""

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nemodiff_train.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # by Megatron's number of an integer type; text has no others
_SEQUENCES = 10_000_000  # looked at: well under a second


def check_index(prefix: str) -> None:
    """Refuse an index that does not fit its own length or its ``.bin``.

    The first 10 million sequences are looked at one by one; of the others, the sums.

    Args:
        prefix: Of a data set whose files are both there.

    Raises:
        UserError: Names the file and what is wrong with it.
    """
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise _damaged(path, "it does not begin like one")
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != 1:
        raise _damaged(path, f"its version is {version}, not 1")
    if code not in _ITEM_BYTES:
        raise _damaged(path, f"its token type {code} is none of whole numbers")
    needed = _HEADER.size + 12 * sequences + 8 * ends
    size = path.stat().st_size
    if size not in (needed, needed + sequences):  # some tools add a byte a sequence
        raise _damaged(path, f"{size} bytes do not hold {sequences} sequences and {ends} document ends")
    if sequences == 0 or ends < 2:
        raise UserError(f"{prefix}: the data set is empty")
    content = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER.size)
    lengths = content[: 4 * sequences].view("<i4")
    places = content[4 * sequences : 12 * sequences].view("<i8")
    _check_places(path, lengths, places, _ITEM_BYTES[code])
    _check_ends(path, content[12 * sequences : 12 * sequences + 8 * ends].view("<i8"), sequences)


def _check_places(path: Path, lengths: npt.NDArray[np.int32], places: npt.NDArray[np.int64], item_bytes: int) -> None:
    """Sequences must lie one behind another and fill ``.bin``."""
    size = path.with_name(f"{path.name.removesuffix('.idx')}.bin").stat().st_size
    if (lengths[:_SEQUENCES] < 0).any():
        raise _damaged(path, "a sequence has a length below 0")
    nbytes = lengths[:_SEQUENCES].astype(np.int64) * item_bytes
    expected = np.cumsum(nbytes) - nbytes
    if (places[:_SEQUENCES] != expected).any():
        raise _damaged(path, "its sequences do not lie one behind another")
    if lengths[-1] < 0 or int(places[-1]) + int(lengths[-1]) * item_bytes != size:
        raise _damaged(path, f"its sequences do not fill the {size} bytes of .bin")


def _check_ends(path: Path, ends: npt.NDArray[np.int64], sequences: int) -> None:
    shown = ends[: _SEQUENCES + 1]
    if ends[0] != 0 or ends[-1] != sequences or (np.diff(shown) < 0).any():
        raise _damaged(path, f"its documents are not made of its {sequences} sequences")


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: damaged, or no index of Megatron's: {problem}; prepare the data again")
