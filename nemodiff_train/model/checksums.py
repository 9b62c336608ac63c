"""Completeness of a checkpoint: the mark beside an unfinished one, and the checksums in a finished one."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from pydantic import TypeAdapter

from nemodiff_train.files import sha256_of, sync, write_atomic

CHECKSUMS = "checksums.json"
"""Name of the file, in an ``iter_*`` folder, with the digest of every other file there."""

_READERS = 4  # hashing lets go of the interpreter, so threads share the work


class Digest(TypedDict):
    """Recorded size and digest of a file."""

    bytes: int
    sha256: str
    """In hexadecimal."""


_ENTRIES = TypeAdapter(dict[str, Digest])


def iterations(folder: Path) -> list[Path]:
    """Return the ``iter_*`` folders of a folder of checkpoints, the newest first, complete or not."""
    numbered = (path for path in folder.glob("iter_*") if path.name[5:].isdigit() and path.is_dir())
    return sorted(numbered, reverse=True)


def step_of(iteration: Path) -> int:
    """Return the step of an ``iter_*`` folder."""
    return int(iteration.name.removeprefix("iter_"))


def mark_of(iteration: Path) -> Path:
    """Return the path, beside an ``iter_*`` folder, of the file that marks it as unfinished."""
    return iteration.with_name(f".{iteration.name}.unfinished")


def files_of(iteration: Path) -> list[str]:
    """Return the names of a checkpoint's files relative to its folder, the largest first, without the checksums."""
    files = [file for file in iteration.rglob("*") if file.is_file() and file.name != CHECKSUMS]
    return [str(file.relative_to(iteration)) for file in sorted(files, key=lambda file: (-file.stat().st_size, file))]


def digests(iteration: Path, names: Iterable[str], durable: bool = False) -> dict[str, Digest]:
    """Return the digests of some of a checkpoint's files by name.

    Args:
        iteration: The checkpoint.
        names: As :func:`files_of` returns them.
        durable: Wait until each file is on the disk.
    """

    def digest(name: str) -> tuple[str, Digest]:
        file = iteration / name
        if durable:
            sync(file)
        return name, {"bytes": file.stat().st_size, "sha256": sha256_of(file)}

    with ThreadPoolExecutor(_READERS) as readers:
        return dict(readers.map(digest, names))


def write_checksums(iteration: Path, entries: dict[str, Digest] | None = None) -> None:
    """Record the digests of a finished checkpoint's files in it.

    Args:
        iteration: The checkpoint.
        entries: The digests, where they are known.
    """
    entries = digests(iteration, files_of(iteration)) if entries is None else entries
    write_atomic(iteration / CHECKSUMS, json.dumps(entries, indent=1, sort_keys=True) + "\n")
    sync(iteration)


def recorded(iteration: Path) -> dict[str, Digest]:
    """Return the digests that a checkpoint was published with; none if it was made elsewhere.

    Raises:
        ValueError: They cannot be read.
    """
    file = iteration / CHECKSUMS
    if not file.is_file():
        return {}
    entries = _ENTRIES.validate_json(file.read_bytes())
    for name in entries:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"'{name}' lies outside of the checkpoint")
    return entries


def identity(iteration: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a checkpoint's recorded digests, or of its files where it has none."""
    entries = recorded(iteration) or digests(iteration, files_of(iteration))
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def structure_damage(iteration: Path) -> str | None:
    """Return what is wrong with the names and sizes of a checkpoint's files, naming the file, or None."""
    if mark_of(iteration).exists():
        return "it is unfinished: its saving was interrupted"
    if not (iteration / "run_config.yaml").is_file():
        return "'run_config.yaml' is missing"
    try:
        expected = recorded(iteration)
    except ValueError:
        return f"'{CHECKSUMS}' cannot be read"
    for name, entry in expected.items():
        file = iteration / name
        if not file.is_file():
            return f"'{name}' is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"'{name}' has {file.stat().st_size:,} of {entry['bytes']:,} bytes"
    return content_damage(iteration, {"run_config.yaml"} & expected.keys())  # read before the weights are looked at


def content_damage(iteration: Path, names: Iterable[str]) -> str | None:
    """Return which of some recorded files is not what was saved, or None."""
    expected = recorded(iteration)
    for name, entry in digests(iteration, names).items():
        if entry != expected[name]:
            return f"'{name}' has changed since it was saved"
    return None


def damage(iteration: Path) -> str | None:
    """Read every byte of a checkpoint and return what is wrong with it, naming the file, or None."""
    return structure_damage(iteration) or content_damage(iteration, recorded(iteration))
