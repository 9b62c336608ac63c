"""Whether a checkpoint is whole: the mark of an unfinished one, and the checksums of a finished one."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
_READERS = 4  # hashing lets go of the interpreter, so threads share the work


def mark_of(iteration: Path) -> Path:
    """The file beside an ``iter_*`` folder that says: not complete yet."""
    return iteration.with_name(f".{iteration.name}.unfinished")


def iterations(folder: Path) -> list[Path]:
    """Return the ``iter_*`` folders of a folder of checkpoints, the newest first, complete or not."""
    numbered = (path for path in folder.glob("iter_*") if path.name[5:].isdigit() and path.is_dir())
    return sorted(numbered, reverse=True)


def files_of(iteration: Path) -> list[str]:
    """Names of a checkpoint's files relative to its folder, the largest first, without the checksums."""
    files = [file for file in iteration.rglob("*") if file.is_file() and file.name != CHECKSUMS]
    return [str(file.relative_to(iteration)) for file in sorted(files, key=lambda file: (-file.stat().st_size, file))]


def digests(iteration: Path, names: Iterable[str], durable: bool = False) -> dict[str, dict[str, Any]]:
    """``{"bytes": size, "sha256": hex}`` of some of a checkpoint's files.

    Args:
        iteration: The checkpoint.
        names: As :func:`files_of` gives them.
        durable: Wait until each file is on the disk.
    """

    def digest(name: str) -> tuple[str, dict[str, Any]]:
        with (iteration / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if durable:
                os.fsync(file.fileno())
            return name, {"bytes": file.tell(), "sha256": found}

    with ThreadPoolExecutor(_READERS) as readers:
        return dict(readers.map(digest, names))


def recorded(iteration: Path) -> dict[str, dict[str, Any]]:
    """The digests that a checkpoint was published with; empty if it was made elsewhere.

    Raises:
        ValueError: They cannot be read.
    """
    file = iteration / CHECKSUMS
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    if not isinstance(found, dict):
        raise ValueError
    return found


def structure_damage(iteration: Path) -> str | None:
    """What can be seen to be wrong with a checkpoint without reading its weights, or None; the file is named."""
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
    """Which of some recorded files is not what was saved, or None."""
    expected = recorded(iteration)
    for name, entry in digests(iteration, names).items():
        if entry != expected[name]:
            return f"'{name}' has changed since it was saved"
    return None


def damage(iteration: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of it read, or None; the file is named."""
    return structure_damage(iteration) or content_damage(iteration, recorded(iteration))
