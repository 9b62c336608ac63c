"""The unfinished output: parts that survive an interruption, then merged and moved into place.

``PREFIX.parts/`` holds ``00000.{bin,idx}``, ``00001...`` and ``state.json``, which lists the finished
ones; a part that it does not list is written again.  The merge needs the size of the output once more.
Where prepared data sets are merged, those are the parts, and they stay where they are.
"""

import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError

from nemodiff_train.data.encode import EncodedBatch
from nemodiff_train.data.manifest import Manifest, Plan, count_tokens, sha256_of
from nemodiff_train.errors import UserError
from nemodiff_train.files import replace_atomic, sync, write_atomic

PART_BYTES = 128 << 20  # of text: a minute or so of one worker's time is lost at most
SUFFIXES = (".bin", ".idx", ".counts.npy", ".json")  # the manifest last: it vouches for the others


class Totals(BaseModel):
    """Number of documents, of tokens, and of UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: "Totals") -> "Totals":
        return Totals(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


class _State(BaseModel):
    plan: Plan
    parts: list[Totals] = []
    shards: list[str] = []

    def same(self, other: "_State") -> bool:
        return self.plan.same_output(other.plan) and self.shards == other.shards


class Parts:
    """The parts of one output, written by one process at a time (see `locked`)."""

    def __init__(self, prefix: str, plan: Plan, shards: Sequence[str] = ()) -> None:
        self._prefix = prefix
        self._folder = Path(f"{prefix}.parts")
        self._state = _State(plan=plan, shards=list(shards))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep other processes out of it.

        Raises:
            UserError: The folder cannot be created, or another process is at work in it.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise UserError(f"--output {self._prefix}: cannot write there ({error.strerror})") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self._folder}: another process is preparing this output") from error
            yield

    def restore(self, overwrite: bool) -> Totals:
        """Take over the finished parts of an interrupted run.

        Args:
            overwrite: Drop parts that do not fit the plan instead of refusing them.

        Returns:
            What they hold together.

        Raises:
            UserError: They were made from other inputs or with another tokenizer.
        """
        stored = self._stored()
        if stored is not None and stored.same(self._state):
            self._state.parts = stored.parts
        elif stored is not None and not overwrite:
            raise UserError(
                f"{self._folder}: left by an interrupted run with other inputs, tokenizer or options; "
                "repeat that command, or start afresh with --overwrite"
            )
        return self.totals

    def resumable(self) -> bool:
        """Whether an interrupted run of the same plan left finished parts."""
        stored = self._stored()
        return stored is not None and stored.same(self._state)

    def _stored(self) -> _State | None:
        path = self._folder / "state.json"
        try:
            return _State.model_validate_json(path.read_bytes()) if path.is_file() else None
        except ValidationError as error:
            raise UserError(f"{path}: damaged; remove the directory {self._folder} to start afresh") from error

    def adopt(self, totals: Sequence[Totals]) -> None:
        """Take the shards for the parts; ``totals`` says what each holds."""
        self._state.parts = list(totals)
        self._save_state()

    @property
    def totals(self) -> Totals:
        """What the finished parts hold together."""
        total = Totals()
        for part in self._state.parts:
            total = total.add(part)
        return total

    def write(
        self,
        batches: Iterator[EncodedBatch],
        dtype: type[np.integer[Any]],
        progress: Callable[[Totals], None],
    ) -> None:
        """Write every batch, part by part; ``progress`` hears of each batch."""
        while (part := self._write_part(batches, dtype, progress)).documents:
            self._state.parts.append(part)
            self._save_state()

    def _write_part(
        self,
        batches: Iterator[EncodedBatch],
        dtype: type[np.integer[Any]],
        progress: Callable[[Totals], None],
    ) -> Totals:
        from nemodiff_train.data.indexed import IndexedDatasetBuilder

        stem = self._stem(len(self._state.parts))
        builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=dtype)
        part = Totals()
        for batch in batches:
            for document in batch.documents:
                builder.add_document(*document)
            written = Totals(documents=batch.inputs, tokens=batch.tokens, bytes=batch.text_bytes)
            part = part.add(written)
            progress(written)
            if part.bytes >= PART_BYTES:
                break
        _finalize(builder, stem)
        return part

    def publish(self, dtype: type[np.integer[Any]]) -> Manifest:
        """Merge the parts, move the result to its place and remove the parts."""
        from nemodiff_train.data.indexed import IndexedDatasetBuilder

        merged = str(self._folder / "merged")
        builder = IndexedDatasetBuilder(f"{merged}.bin", dtype=dtype)
        for number in range(len(self._state.parts)):
            builder.add_index(self._stem(number))
        _finalize(builder, merged)
        manifest = self._describe(merged, dtype)
        Path(f"{self._prefix}.json").unlink(missing_ok=True)  # it describes the files about to be replaced
        for suffix in SUFFIXES:
            replace_atomic(Path(merged + suffix), Path(self._prefix + suffix))
        self.discard()
        return manifest

    def _describe(self, merged: str, dtype: type[np.integer[Any]]) -> Manifest:
        """Write the counts and the manifest of the merged files beside them."""
        plan = self._state.plan
        counts = count_tokens(Path(f"{merged}.bin"), dtype, plan.tokenizer.vocab_size)
        np.save(f"{merged}.counts.npy", counts)
        manifest = Manifest(
            **dict(plan),
            **dict(self.totals),
            dtype=np.dtype(dtype).name,
            bin_sha256=sha256_of(Path(f"{merged}.bin")),
            idx_sha256=sha256_of(Path(f"{merged}.idx")),
        )
        manifest.write(merged)
        return manifest

    def discard(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self._folder)

    def _stem(self, number: int) -> str:
        if self._state.shards:
            return self._state.shards[number]
        return str(self._folder / f"{number:05d}")

    def _save_state(self) -> None:
        write_atomic(self._folder / "state.json", self._state.model_dump_json())


def _finalize(builder: Any, stem: str) -> None:
    builder.finalize(f"{stem}.idx")
    for suffix in (".bin", ".idx"):
        sync(Path(stem + suffix))
