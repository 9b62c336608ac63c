"""Read documents from text files, directories, JSONL, Parquet and Hugging Face data sets."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from nemodiff_train.data.columns import Columns, Document, TextColumn, require
from nemodiff_train.data.manifest import InputInfo
from nemodiff_train.errors import UserError, nearest

_HUB_NAME = re.compile(r"(?P<owner>[\w.-]+)/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One INPUT."""

    info: InputInfo
    read: Callable[[], Iterator[Document | None]]
    """Yields the documents in a fixed order, None for an empty record; raises UserError, naming file and line, at a
    record that is not a document."""


def resolve(inputs: Sequence[str], columns: Columns, split: str, glob: str) -> list[Source]:
    """Find every INPUT, without reading documents.

    Raises:
        UserError: One is missing, empty or unreadable.
    """
    return [_resolve_one(name, columns, split, glob) for name in inputs]


def documents(sources: Iterable[Source]) -> Iterator[Document]:
    """Return the documents that are not empty, in order."""
    return filter(None, chain.from_iterable(source.read() for source in sources))


def _resolve_one(name: str, columns: Columns, split: str, glob: str) -> Source:
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
            return _saved(path, columns, split)
        return _local(name, _walk(path, glob), columns)
    if path.is_file():
        return _local(name, [path], columns)
    hub = _HUB_NAME.fullmatch(name)
    # Beside a directory called like the owner, the name is more likely a mistyped path.
    if hub and not Path(hub["owner"]).exists():
        return _hub(name, columns, split)
    raise UserError(f"{name}: no such file or directory, nor a Hugging Face name (owner/name[:config])")


def _walk(root: Path, glob: str) -> list[Path]:
    files = [
        path
        for path in root.rglob(glob)
        if path.is_file() and not any(name.startswith(".") for name in path.relative_to(root).parts)
    ]
    if not files:
        raise UserError(f"{root}: no file in this directory matches '{glob}' (hidden files are left out)")
    return sorted(files, key=lambda path: path.relative_to(root).parts)


def _info(name: str, files: Sequence[Path], split: str | None = None) -> InputInfo:
    """Describe files by size and modification time, which show a change without reading, as in rsync."""
    stats = [path.stat() for path in files]
    total = sum(stat.st_size for stat in stats)
    if total == 0:
        raise UserError(f"{name}: empty, so there is nothing to prepare")
    listing = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in zip(files, stats, strict=True)]
    version = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return InputInfo(path=name, split=split, files=len(files), bytes=total, version=version)


def _local(name: str, files: Sequence[Path], columns: Columns) -> Source:
    return Source(_info(name, files), partial(_read_files, files, columns))


def _read_files(files: Sequence[Path], columns: Columns) -> Iterator[Document | None]:
    for path in files:
        match path.suffix.lower():
            case ".jsonl":
                yield from _read_jsonl(path, columns)
            case ".parquet":
                yield from _read_parquet(path, columns)
            case _ if isinstance(columns, TextColumn):
                yield _read_text(path)
            case _:
                raise UserError(f"{path}: conversations are read from .jsonl and .parquet; choose files with --glob")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text at byte {error.start}; convert it, or choose files with --glob"
        ) from error


def _read_jsonl(path: Path, columns: Columns) -> Iterator[Document | None]:
    # Not through `datasets`: it infers one schema per file, so it rejects records that differ in unused
    # fields, and it cannot name the line that is malformed.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_record(line, columns, f"{path}:{number}")


def _parse_record(line: bytes, columns: Columns, where: str) -> Document | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({error}); correct or remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with the field '{columns.names[0]}'")
    require(columns, list(record), where)
    return columns.document(record, where)


def _read_parquet(path: Path, columns: Columns) -> Iterator[Document | None]:
    import pyarrow.parquet
    from pyarrow import ArrowInvalid

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file, or a damaged one") from error
    with table:
        require(columns, table.schema_arrow.names, str(path))
        for batch in table.iter_batches(columns=list(columns.names)):
            for row in batch.to_pylist():
                yield columns.document(row, str(path))


def _saved(path: Path, columns: Columns, split: str) -> Source:
    """Open a directory written by ``save_to_disk`` of the `datasets` library."""
    from datasets import DatasetDict, load_from_disk

    info = _info(str(path), _walk(path, "*"), split)
    rows = load_from_disk(str(path))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(f"{path}: no split '{split}'; it has: {', '.join(rows)}.{nearest(split, rows)}")
        rows = rows[split]
    return Source(info, partial(_read_rows, rows, columns, str(path)))


def _hub(name: str, columns: Columns, split: str) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from httpx import HTTPError
    from huggingface_hub import HfApi

    repository, _, config = name.partition(":")
    try:
        # Pinned, so that a resumed run reads what the interrupted one did.
        revision = str(HfApi().dataset_info(repository).sha)
        rows = load_dataset(repository, config or None, split=split, revision=revision, streaming=True)
    except (OSError, ValueError, HTTPError, DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: neither a local path nor a readable hub data set: {reason}") from error
    info = InputInfo(path=name, split=split, files=0, bytes=0, version=revision)
    return Source(info, partial(_read_rows, rows, columns, name))


def _read_rows(rows: Iterable[dict[str, object]], columns: Columns, where: str) -> Iterator[Document | None]:
    for number, row in enumerate(rows):
        require(columns, list(row), where)
        yield columns.document(row, f"{where} row {number}")
