"""Text that every machine already has: the source of Python's standard library."""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Not ordinary source: tests, generated tables, installed packages and tools bundled with Python.
_LEFT_OUT = {
    "__pycache__",
    "_pyrepl",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def write_stdlib_text(path: Path, max_bytes: int) -> int:
    """Write modules of the running Python's standard library as JSONL records with ``name`` and ``text``.

    The choice and the order depend on the Python release and ``max_bytes`` alone.

    Args:
        path: The JSONL file to write.
        max_bytes: Maximum UTF-8 bytes of text; a module that does not fit any more is left out.

    Returns:
        Number of UTF-8 bytes of text written.
    """
    written = 0
    with path.open("w", encoding="utf-8") as output:
        for record in stdlib_modules():
            size = len(record["text"].encode())
            if size <= max_bytes - written:
                output.write(json.dumps(record) + "\n")
                written += size
    return written


def stdlib_modules() -> Iterator[dict[str, str]]:
    """Yield ``name`` and ``text`` of the library's modules that have text, in the order of a hash of their names.

    So a small part of them samples the whole library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        if _LEFT_OUT.intersection(name.parts):
            continue
        if text := (root / name).read_bytes().decode("utf-8", errors="replace"):
            yield {"name": name.as_posix(), "text": text}
