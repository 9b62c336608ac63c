"""What a prepared data set says about itself, and what training checks before it reads one.

A data set at PREFIX is ``PREFIX.bin`` and ``PREFIX.idx`` (Megatron-Core's indexed data set, one
sequence a document), ``PREFIX.counts.npy`` (occurrences of each token id, int64 of shape [vocab])
and ``PREFIX.json`` (the manifest, written last: where it is present, so is all the rest).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from nemodiff_train.data.index_file import check_index
from nemodiff_train.data.tokenizer import tokenizer_fingerprint, vocabulary_size
from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["InputInfo", "Manifest", "Plan", "TokenizerInfo", "check_blend", "tokenizer_fingerprint"]

SCAN_TOKENS = 10_000_000  # read from a data set that has no counts: well under a second
_CHUNK_TOKENS = 1 << 22


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerInfo(_Record):
    """The tokenizer: where it was loaded from, ids in ``[0, vocab_size)``, and its fingerprint."""

    name: str
    vocab_size: int
    fingerprint: str


class InputInfo(_Record):
    """One INPUT.

    Attributes:
        path: As given on the command line.
        split: Of a Hugging Face data set, else ``None``.
        files: Number of files read, 0 for a hub data set.
        bytes: Their size together, 0 for a hub data set.
        version: SHA-256 of the files' names, sizes and modification times; a hub data set's commit.
    """

    path: str
    split: str | None
    files: int
    bytes: int
    version: str


class Plan(_Record):
    """Everything that the tokens of a data set depend on."""

    format_version: Literal[1] = 1
    tokenizer: TokenizerInfo
    eod_token_id: int
    text_field: str
    chat_template: str | None = None
    """SHA-256 of the template of conversations, whose documents are sequences of prompts and answers in turn, and
    whose answers end with ``eod_token_id``; None where documents are text."""
    inputs: list[InputInfo]

    def same_tokens(self, other: "Plan") -> bool:
        """Whether both turn text into the same ids."""
        mine, theirs = self.tokenizer.fingerprint, other.tokenizer.fingerprint
        same_ends = self.eod_token_id == other.eod_token_id and self.chat_template == other.chat_template
        return mine == theirs and same_ends

    def same_output(self, other: "Plan") -> bool:
        """Whether both produce the same data set."""
        return self.same_tokens(other) and self.inputs == other.inputs and self.text_field == other.text_field


class Manifest(Plan):
    """A finished data set.

    Attributes:
        documents: Number of documents, empty ones left out.
        tokens: Number of tokens, one end-of-document token a document included.
        bytes: UTF-8 bytes of text.
        dtype: NumPy name of the token type in ``.bin``.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    bin_sha256: str
    idx_sha256: str

    @classmethod
    def read(cls, prefix: str) -> Self | None:
        """The manifest at ``prefix``, or ``None`` where there is none.

        Raises:
            UserError: The file is not a manifest of this format.
        """
        path = Path(f"{prefix}.json")
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise UserError(f"{path}: not a data manifest ({where}: {first['msg']})") from error

    def write(self, prefix: str) -> None:
        """Write ``PREFIX.json``."""
        Path(f"{prefix}.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_checksums(prefix: str, manifest: Manifest) -> None:
    """Compare ``.bin`` and ``.idx`` with the manifest; reads all of them.

    Raises:
        UserError: One is not the file that the manifest was written for.
    """
    for suffix, expected in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
        if sha256_of(Path(prefix + suffix)) != expected:
            raise UserError(f"{prefix}{suffix}: its SHA-256 is not the manifest's; prepare it again")


def count_tokens(
    path: Path, dtype: npt.DTypeLike, vocab_size: int, limit: int | None = None
) -> npt.NDArray[np.int64]:
    """Occurrences of each id in the first ``limit`` tokens of a ``.bin`` file.

    The result is longer than ``vocab_size`` only where the file holds larger ids.
    """
    tokens = np.memmap(path, dtype=dtype, mode="r")[:limit]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        found = np.bincount(tokens[start : start + _CHUNK_TOKENS], minlength=len(counts))
        counts = np.pad(counts, (0, len(found) - len(counts))) + found
    return counts


def check_blend(
    prefixes: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    mask_token_id: int | None,
    conversations: bool = False,
) -> None:
    """Refuse data that this tokenizer and mask token (None in a stage without one) cannot be trained on.

    A data set without a manifest (made by another tool) is judged by its first 10 million tokens.

    Args:
        conversations: Whether documents have to be conversations, rather than text.

    Raises:
        UserError: A data set is missing, incomplete, empty, or made with another tokenizer; two end
            their documents differently; the mask token is outside the vocabulary, or is in the text; or it holds
            text instead of conversations, or the other way round.
    """
    vocab_size = vocabulary_size(tokenizer)
    if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
        raise UserError(f"mask token id {mask_token_id} is outside the tokenizer's ids 0..{vocab_size - 1}")
    if not prefixes:
        raise UserError("no training data: name at least one prefix made by 'nemodiff data prepare'")
    fingerprint = tokenizer_fingerprint(tokenizer)
    manifests = {prefix: Manifest.read(prefix) for prefix in prefixes}
    for prefix, manifest in manifests.items():
        check_files(prefix, manifest)
        if manifest is not None and manifest.tokenizer.fingerprint != fingerprint:
            raise UserError(
                f"{prefix}: prepared with another tokenizer than the model's "
                f"('{manifest.tokenizer.name}'); prepare it again with the model's"
            )
        check_index(prefix)
        if conversations != (manifest is not None and manifest.chat_template is not None):
            raise UserError(_other_kind(prefix, conversations))
        _check_counts(prefix, manifest, tokenizer, mask_token_id)
    endings = {manifest.eod_token_id: prefix for prefix, manifest in manifests.items() if manifest}
    if len(endings) > 1:
        described = ", ".join(f"{prefix} with id {token}" for token, prefix in endings.items())
        raise UserError(f"the data sets end documents differently: {described}; prepare them alike")


def _other_kind(prefix: str, conversations: bool) -> str:
    if conversations:
        return f"{prefix}: holds no conversations; prepare it with 'nemodiff data prepare --chat'"
    return f"{prefix}: holds conversations, which recipes for text do not read; use sft, or prepare it without --chat"


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
        raise UserError(f"{prefix}: the data set is empty")
    if manifest is not None and size != manifest.tokens * np.dtype(manifest.dtype).itemsize:
        raise UserError(f"{prefix}.bin: {size} bytes do not hold the manifest's {manifest.tokens} tokens")


def _check_counts(
    prefix: str, manifest: Manifest | None, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int | None
) -> None:
    vocab_size = vocabulary_size(tokenizer)
    stored = Path(f"{prefix}.counts.npy")
    if manifest is not None and stored.is_file():
        counts = np.load(stored)
    else:
        counts = count_tokens(Path(f"{prefix}.bin"), _token_type(prefix), vocab_size, SCAN_TOKENS)
    if len(counts) > vocab_size:
        raise UserError(f"{prefix}: holds token ids beyond the tokenizer's {vocab_size}; prepare it again")
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    text = manifest is None or manifest.chat_template is None
    if text and pad is not None and pad != end and pad < len(counts) and counts[pad]:
        raise UserError(
            f"{prefix}: the tokenizer's padding token {pad} occurs {counts[pad]} times in the data, and Megatron "
            "would train on none of them; prepare it with another --eod-token"
        )
    if mask_token_id is not None and (found := int(counts[mask_token_id])):
        token = tokenizer.convert_ids_to_tokens(mask_token_id)
        raise UserError(
            f"{prefix}: the mask token {mask_token_id} ('{token}') occurs {found} times as text; "
            "choose a token that the data does not use"
        )


def _token_type(prefix: str) -> Any:
    from nemodiff_train.data.indexed import IndexedDataset

    return IndexedDataset(prefix).index.dtype
