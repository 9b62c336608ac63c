"""The manifest of a prepared data set: its tokenizer, inputs, counts and checksums.

A data set at PREFIX is ``PREFIX.bin`` and ``PREFIX.idx`` (Megatron-Core's indexed data set), ``PREFIX.counts.npy``
(occurrences of each token id, int64 of shape [vocab]) and ``PREFIX.json`` (the manifest). The manifest is written
last: where it is present, the other files are complete.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train.errors import UserError
from nemodiff_train.files import sha256_of
from nemodiff_train.schema import checked

_CHUNK_TOKENS = 1 << 22

TokenType = Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TokenizerInfo(_Record):
    """The tokenizer that a data set was prepared with."""

    name: str
    """Directory or Hugging Face name that it was loaded from."""
    vocab_size: int = Field(gt=0, lt=2**31)
    """Token ids lie in ``[0, vocab_size)``."""
    fingerprint: str
    """See :func:`nemodiff_train.data.tokenizer.tokenizer_fingerprint`."""


class InputInfo(_Record):
    """One INPUT of the command."""

    path: str
    """As given on the command line."""
    split: str | None
    """Split of a Hugging Face data set, else None."""
    files: int = Field(ge=0)
    """Number of files read, 0 for a hub data set."""
    bytes: int = Field(ge=0)
    """Size of all files, 0 for a hub data set."""
    version: str
    """SHA-256 of the files' names, sizes and modification times; the commit of a hub data set."""


class Provenance(_Record):
    """Everything that determines the tokens of a data set."""

    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    eod_token_id: int = Field(ge=0, lt=2**31)
    """Ends every document of text, or every answer of conversations."""
    text_field: str
    chat_template: str | None = None
    """SHA-256 of the template of conversations, whose documents are sequences of prompts and answers in turn; None
    where documents are text."""
    inputs: list[InputInfo]

    def same_tokens(self, other: "Provenance") -> bool:
        """Return whether both turn text into the same ids."""
        ours, theirs = ((it.tokenizer.fingerprint, it.eod_token_id, it.chat_template) for it in (self, other))
        return ours == theirs

    def same_output(self, other: "Provenance") -> bool:
        """Return whether both produce the same data set."""
        return self.same_tokens(other) and self.inputs == other.inputs and self.text_field == other.text_field


class Manifest(Provenance):
    """A finished data set."""

    documents: int = Field(gt=0)
    """Number of documents, empty ones left out."""
    tokens: int = Field(gt=0)
    """Number of tokens, ends of documents included."""
    bytes: int = Field(ge=0)
    """UTF-8 bytes of text."""
    dtype: TokenType
    """NumPy name of the token type in ``.bin``."""
    bin_sha256: str
    idx_sha256: str

    @classmethod
    def read(cls, prefix: str) -> Self | None:
        """Return the manifest at ``prefix``, or None where there is none.

        Raises:
            UserError: The file is not a manifest of this format.
        """
        path = Path(f"{prefix}.json")
        remedy = "it is not a data manifest; choose another prefix, or prepare the data again"
        return checked(cls, path.read_bytes(), path, remedy) if path.is_file() else None

    @classmethod
    def require(cls, prefix: str) -> Self:
        """Return the manifest of a data set whose files are complete.

        Raises:
            UserError: There is none, or a file is missing or too short.
        """
        manifest = cls.read(prefix)
        if manifest is None:
            raise UserError(f"{prefix}.json: no such manifest; make the data set with 'nemodiff data prepare'")
        check_files(prefix, manifest)
        return manifest

    def verify_checksums(self, prefix: str) -> None:
        """Compare ``.bin`` and ``.idx`` with the manifest, which reads all of them.

        Raises:
            UserError: One is not the file that the manifest was written for.
        """
        for suffix, expected in ((".bin", self.bin_sha256), (".idx", self.idx_sha256)):
            if sha256_of(Path(prefix + suffix)) != expected:
                raise UserError(f"{prefix}{suffix}: its SHA-256 is not the manifest's; prepare it again")


def read_counts(prefix: str, manifest: Manifest) -> npt.NDArray[np.int64]:
    """Return [vocab] int64: the occurrences of each token id, as ``PREFIX.counts.npy`` has them.

    Raises:
        UserError: The file is not the one that the manifest was written for.
    """
    path = Path(f"{prefix}.counts.npy")
    try:
        counts = np.load(path, mmap_mode="r")  # of objects, or longer than its file, it is refused
    except (ValueError, EOFError, SyntaxError, OverflowError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split()):.200}); prepare the data again") from None
    table = isinstance(counts, np.ndarray) and counts.dtype == np.int64 and counts.ndim == 1
    long = table and len(counts) >= manifest.tokenizer.vocab_size
    if not long or counts.min() < 0 or counts.sum() != manifest.tokens:
        raise UserError(f"{path}: does not count the manifest's {manifest.tokens} tokens; prepare the data again")
    return counts


def check_files(prefix: str, manifest: Manifest | None) -> None:
    """Refuse a data set whose files are missing, empty, or not as long as its manifest says.

    Raises:
        UserError: Names the file.
    """
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{prefix}{suffix}: no such file; make it with 'nemodiff data prepare'")
    size = Path(f"{prefix}.bin").stat().st_size
    if size == 0:
        raise UserError(f"{prefix}: the data set is empty; prepare it again")
    if manifest is not None and size != manifest.tokens * np.dtype(manifest.dtype).itemsize:
        raise UserError(
            f"{prefix}.bin: {size} bytes do not hold the manifest's {manifest.tokens} tokens; prepare it again"
        )


def contents_digest(prefixes: Sequence[str]) -> str:
    """Return a name for the content of data sets, for what is derived from their documents: hex, 16 digits.

    A sample index is a function of the documents' lengths. A manifest has their checksum; without one, the ``.idx``
    is read.
    """
    manifests = [(prefix, Manifest.read(prefix)) for prefix in prefixes]
    digests = [stored.idx_sha256 if stored else sha256_of(Path(f"{prefix}.idx")) for prefix, stored in manifests]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


def count_tokens(
    path: Path, dtype: npt.DTypeLike, vocab_size: int, limit: int | None = None
) -> npt.NDArray[np.int64]:
    """Count the occurrences of each id in the first ``limit`` tokens of a ``.bin`` file.

    Returns:
        [ids] int64; longer than ``vocab_size`` only where the file holds larger ids.
    """
    tokens = np.memmap(path, dtype=dtype, mode="r")[:limit]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        # [ids] counts of a chunk; longer than before where it holds larger ids.
        chunk_counts = np.bincount(tokens[start : start + _CHUNK_TOKENS], minlength=len(counts))
        counts = np.pad(counts, (0, len(chunk_counts) - len(counts))) + chunk_counts
    return counts
