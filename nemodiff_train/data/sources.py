"""Read documents from text files, directories, JSON, Parquet and Hugging Face data sets."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO

import fsspec

from nemodiff_train.data.columns import Columns, read_record, require
from nemodiff_train.data.manifest import InputInfo
from nemodiff_train.data.notes import UNREAD_FIELDS
from nemodiff_train.errors import UserError, nearest

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")
_NOT_READ = (".arrow", ".avro", ".csv", ".feather", ".orc", ".tar", ".tgz", ".tsv", ".xlsx", ".zip")
"""Records and archives that would be one text of separators, were they read as text."""
_HUB_NAME = re.compile(r"(?P<owner>[\w.-]+)/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Source[Item]:
    """One INPUT."""

    info: InputInfo
    read: Callable[[], Iterator[Item | None]]
    """Yields the documents in a fixed order, None for an empty record; raises UserError, naming file and line, at a
    record that is not a document."""
    has_records: bool
    """Whether fields of records are read at all."""
    files: Sequence[Path] = ()
    """Local files that documents are read from."""


def resolve[Item](inputs: Sequence[str], columns: Columns[Item], split: str, glob: str) -> list[Source[Item]]:
    """Find every INPUT, without reading documents.

    Raises:
        UserError: One is missing, empty or unreadable.
    """
    return [_source(name, columns, split, glob) for name in inputs]


def documents[Item](sources: Iterable[Source[Item]]) -> Iterator[Item]:
    """Return the documents that are not empty, in order."""
    return filter(None, chain.from_iterable(source.read() for source in sources))


def _source[Item](name: str, columns: Columns[Item], split: str, glob: str) -> Source[Item]:
    path = Path(name)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _saved(path, columns, split)
    if path.is_dir() or path.is_file():
        files = _walk(path, glob) if path.is_dir() else [path]
        has_records = any(_suffix(file) in _RECORDS for file in files)
        return Source(_info(name, files), partial(_read_files, files, columns), has_records, files)
    hub = _HUB_NAME.fullmatch(name)
    # Where a directory is called like the owner, the name is more likely a mistyped path.
    if hub and not Path(hub["owner"]).exists():
        return _hub(name, columns, split)
    raise UserError(f"{name}: no such file or directory, nor a Hugging Face name (owner/name[:config])")


def _walk(root: Path, glob: str) -> list[Path]:
    """Return the files below a folder that match, through links as well, in the order of their names.

    Raises:
        UserError: There is none, or a link leads nowhere or back to a folder that it is in.
    """
    pattern = glob.removeprefix("**/")
    if "**" in pattern:
        raise UserError(f"--glob '{glob}': '**' may only stand at the beginning, where it changes nothing")
    files = []
    for folder, folders, names in root.walk(follow_symlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        above = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
        for linked in (folder / name for name in folders if (folder / name).is_symlink()):
            if any(linked.samefile(parent) for parent in above):
                raise UserError(f"{linked}: a link to a folder that it is in; remove it, or choose files with --glob")
        for path in (folder / name for name in names if not name.startswith(".")):
            if not path.relative_to(root).match(pattern):
                continue
            if not path.is_file():
                raise UserError(f"{path}: a link that leads nowhere, or no regular file; remove it")
            files.append(path)
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


def _suffix(path: Path) -> str:
    """Return what a file holds by its name, whether or not it is compressed."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


def _read_files[Item](files: Sequence[Path], columns: Columns[Item]) -> Iterator[Item | None]:
    for path in files:
        match _suffix(path):
            case ".jsonl" | ".ndjson":
                yield from _read_jsonl(path, columns)
            case ".json":
                yield from _read_json(path, columns)
            case ".parquet":
                yield from _read_parquet(path, columns)
            case suffix if suffix in _NOT_READ or not columns.of_texts:
                readable = f"{', '.join(_RECORDS)}, also compressed ({', '.join(_COMPRESSED)})"
                raise UserError(f"{path}: records are read from {readable}; convert it, or choose files with --glob")
            case _:
                yield read_record(columns, {columns.names[0]: _read_text(path)}, str(path))


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed."""
    compression = "infer" if path.suffix.lower() in _COMPRESSED else None
    try:
        with fsspec.open(str(path.absolute()), "rb", compression=compression) as file:
            yield file
    except Exception as error:  # each library has its own
        if compression is None or isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be decompressed ({error}); decompress it, or fetch it again") from error


def _read_text(path: Path) -> str:
    with _unpacked(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text at byte {error.start}; convert it, or choose files with --glob"
        ) from error
    first = [line for line in islice(text.splitlines(), 20) if line.strip()][:2]
    if len(first) == 2 and all(isinstance(_json(line), dict) for line in first):
        raise UserError(f"{path}: a JSON object per line, not text; rename it to .jsonl")
    return text


def _read_jsonl[Item](path: Path, columns: Columns[Item]) -> Iterator[Item | None]:
    # Not through `datasets`: it infers one schema per file, so it rejects records that differ in unused
    # fields, and it cannot name the line that is malformed.
    with _unpacked(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: malformed JSON ({error}); correct or remove the line") from error
            yield read_record(columns, record, f"{path}:{number}")


def _read_json[Item](path: Path, columns: Columns[Item]) -> Iterator[Item | None]:
    """Read a list of records, or a record per line as in .jsonl."""
    with _unpacked(path) as file:
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
        if isinstance(_json(first), dict):
            yield from _read_jsonl(path, columns)
            return
        file.seek(0)
        try:
            records = json.loads(file.read(), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: malformed JSON ({error}); correct it, or choose files with --glob") from error
    for number, record in enumerate(records if isinstance(records, list) else [records], start=1):
        yield read_record(columns, record, f"{path}, record {number}")


def _object(entries: list[tuple[str, object]]) -> dict[str, object]:
    """Make an object of JSON; Python itself would keep the last of two values under one key."""
    record = dict(entries)
    if len(record) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' occurs twice")
    return record


def _json(text: str | bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_parquet[Item](path: Path, columns: Columns[Item]) -> Iterator[Item | None]:
    import pyarrow.parquet
    from pyarrow import ArrowInvalid

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file, or a damaged one; fetch or convert it again") from error
    with table:
        existing = table.schema_arrow.names
        require(columns, existing, str(path))
        read = [name for name in existing if columns.reads(name)]
        for name in existing:
            if name not in read:
                columns.notes.add(UNREAD_FIELDS, name, str(path), table.metadata.num_rows)
        rows = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(columns=read))
        for number, row in enumerate(rows):
            yield read_record(columns, row, f"{path} row {number}")


def _saved[Item](path: Path, columns: Columns[Item], split: str) -> Source[Item]:
    """Open a directory written by ``save_to_disk`` of the `datasets` library."""
    from datasets import DatasetDict, load_from_disk

    info = _info(str(path), _walk(path, "*"), split)
    rows = load_from_disk(str(path))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(f"{path}: no split '{split}'; it has: {', '.join(rows)}.{nearest(split, rows)}")
        rows = rows[split]
    return Source(info, partial(_read_rows, rows, columns, str(path)), True)


def _hub[Item](name: str, columns: Columns[Item], split: str) -> Source[Item]:
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
    return Source(info, partial(_read_rows, rows, columns, name), True)


def _read_rows[Item](rows: Iterable[dict[str, object]], columns: Columns[Item], where: str) -> Iterator[Item | None]:
    for number, row in enumerate(rows):
        yield read_record(columns, row, f"{where} row {number}")
