"""The unfinished output of ``nemodiff data``: chunks that survive an interruption, then joined and moved into place.

``PREFIX.partial/`` holds the chunks ``00000.{bin,idx}``, ``00001...`` and ``state.json``, which lists the finished
ones; a chunk that it does not list is written again. Joining needs the size of the output once more. Where prepared
data sets are merged, they are the chunks, and they stay where they are.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt

from nemodiff_train.data.encode import EncodedBatch
from nemodiff_train.data.index_file import read_index
from nemodiff_train.data.manifest import Manifest, Provenance, TokenType, count_tokens
from nemodiff_train.errors import UserError
from nemodiff_train.files import (
    check_can_be_made,
    locked,
    replace_atomic,
    sha256_of,
    sync,
    usable_directory,
    write_atomic,
)
from nemodiff_train.schema import checked

if TYPE_CHECKING:
    from nemodiff_train.data.indexed import IndexedDatasetBuilder

CHUNK_BYTES = 128 << 20  # of text: an interruption costs a minute or so of one worker's time
SUFFIXES = (".bin", ".idx", ".counts.npy", ".json")  # the manifest last: it vouches for the others


class ChunkSize(BaseModel):
    """Number of documents, of tokens, and of UTF-8 bytes of text."""

    documents: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    bytes: NonNegativeInt = 0

    def __add__(self, other: "ChunkSize") -> "ChunkSize":
        return ChunkSize(**{name: value + getattr(other, name) for name, value in self})


class Chunk(BaseModel):
    """A finished chunk."""

    stem: str
    """Path of its files without ``.bin``, absolute or relative to ``PREFIX.partial/``."""
    size: ChunkSize
    left_out: dict[str, NonNegativeInt] = {}
    """Number of inputs without a document, by reason."""
    unread: dict[str, NonNegativeInt] = {}
    """Number of parts of messages that the chat template does not read."""


class State(BaseModel):
    """The content of ``state.json``."""

    provenance: Provenance
    started: datetime = Field(default_factory=datetime.now)
    """Time at which the first chunk was begun, by whichever run."""
    chunks: list[Chunk] = []
    """The finished ones."""


class PartialOutput:
    """The chunks of one output, written by one process at a time (see `locked`).

    Args:
        prefix: Prefix of the output.
        provenance: Everything that determines its tokens.
    """

    def __init__(self, prefix: str, provenance: Provenance) -> None:
        self._prefix = prefix
        self._folder = Path(f"{prefix}.partial")
        self._afresh = f"remove the directory {self._folder} to start afresh"
        self.state = State(provenance=provenance)
        # The smallest type that Megatron stores ids of this vocabulary in.
        self._dtype = np.dtype(np.uint16 if provenance.tokenizer.vocab_size < 65_500 else np.int32)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other processes from writing the output.

        Raises:
            UserError: The folder cannot be created, or another process writes the output.
        """
        check_can_be_made(self._folder)
        with locked(Path(self._prefix)):
            usable_directory(self._folder)
            yield

    def restore(self, overwrite: bool) -> ChunkSize:
        """Take over the finished chunks of an interrupted run.

        Args:
            overwrite: Drop chunks of another output instead of refusing them.

        Returns:
            The size of all finished chunks.

        Raises:
            UserError: They were made from other inputs or with another tokenizer, or one is damaged.
        """
        stored = self._stored()
        if stored is not None and stored.provenance.same_output(self.state.provenance):
            for number, chunk in enumerate(stored.chunks):
                self._check_chunk(number, chunk)
            self.state.chunks, self.state.started = stored.chunks, stored.started
        elif stored is not None and not overwrite:
            raise UserError(
                f"{self._folder}: left by an interrupted run with other inputs, tokenizer or options; "
                "repeat that command, or start afresh with --overwrite"
            )
        return self.size

    def _check_chunk(self, number: int, chunk: Chunk) -> None:
        """Refuse a finished chunk whose files are not those that the state describes."""
        prefix = self._folder / chunk.stem
        try:
            if Path(chunk.stem).is_absolute():
                return  # a data set that is merged, which its manifest vouches for
            if chunk.stem != f"{number:05d}":
                raise UserError(f"state.json names '{chunk.stem}' as chunk {number}")
            if int(read_index(str(prefix)).lengths.sum()) != chunk.size.tokens:
                raise UserError(f"'{prefix}.idx' does not hold the {chunk.size.tokens} tokens of state.json")
        except OSError as error:
            raise UserError(f"'{error.filename}': {error.strerror}; {self._afresh}") from None
        except UserError as error:
            raise UserError(f"{error}; {self._afresh}") from None

    def resumable(self) -> bool:
        """Return whether an interrupted run of the same output left its state."""
        stored = self._stored()
        return stored is not None and stored.provenance.same_output(self.state.provenance)

    def _stored(self) -> State | None:
        path = self._folder / "state.json"
        return checked(State, path.read_bytes(), path, self._afresh) if path.is_file() else None

    @property
    def size(self) -> ChunkSize:
        """The size of all finished chunks."""
        return sum((chunk.size for chunk in self.state.chunks), ChunkSize())

    def adopt(self, chunks: Sequence[Chunk]) -> None:
        """Use finished data sets as the chunks."""
        self.state.chunks = list(chunks)
        self._save_state()

    def write(self, batches: Iterator[EncodedBatch]) -> Iterator[ChunkSize]:
        """Write all batches, chunk by chunk, and yield the size of each batch."""
        while True:
            stem = f"{len(self.state.chunks):05d}"
            size, left_out, unread = ChunkSize(), Counter[str](), Counter[str]()
            with self._builder(stem) as builder:
                for batch in batches:
                    left_out.update(batch.left_out)
                    unread.update(batch.unread)
                    tokens = sum(len(document.tokens) for document in batch.documents)
                    for document in batch.documents:
                        builder.add_document(*document)
                    written = ChunkSize(documents=batch.inputs, tokens=tokens, bytes=batch.text_bytes)
                    size += written
                    yield written
                    if size.bytes >= CHUNK_BYTES:
                        break
            if not size.documents:
                return
            self.state.chunks.append(Chunk(stem=stem, size=size, left_out=left_out, unread=unread))
            self._save_state()

    def publish(self) -> Manifest:
        """Join the chunks, move the result into place and remove the chunks."""
        joined = str(self._folder / "joined")
        with self._builder("joined") as builder:
            for chunk in self.state.chunks:
                builder.add_index(str(self._folder / chunk.stem))
        provenance = self.state.provenance
        counts = count_tokens(Path(f"{joined}.bin"), self._dtype, provenance.tokenizer.vocab_size)
        np.save(f"{joined}.counts.npy", counts)
        manifest = Manifest(
            **dict(provenance),
            **dict(self.size),
            dtype=cast(TokenType, self._dtype.name),
            bin_sha256=sha256_of(Path(f"{joined}.bin")),
            idx_sha256=sha256_of(Path(f"{joined}.idx")),
        )
        Path(f"{joined}.json").write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        Path(f"{self._prefix}.json").unlink(missing_ok=True)  # it describes the files about to be replaced
        for suffix in SUFFIXES:
            replace_atomic(Path(joined + suffix), Path(self._prefix + suffix))
        self.discard()
        return manifest

    def discard(self) -> None:
        """Remove the chunks."""
        shutil.rmtree(self._folder)

    @contextmanager
    def _builder(self, stem: str) -> Iterator["IndexedDatasetBuilder"]:
        """Yield what writes a ``.bin`` and its ``.idx``; at the end of the context both are on the disk."""
        from nemodiff_train.data.indexed import IndexedDatasetBuilder

        builder = IndexedDatasetBuilder(f"{self._folder / stem}.bin", dtype=self._dtype.type)
        yield builder
        builder.finalize(f"{self._folder / stem}.idx")
        for suffix in (".bin", ".idx"):
            sync(self._folder / f"{stem}{suffix}")

    def _save_state(self) -> None:
        write_atomic(self._folder / "state.json", self.state.model_dump_json())
