"""Text that every machine already has: the source of Python's standard library."""

import hashlib
import json
import sysconfig
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
    root = Path(sysconfig.get_path("stdlib"))
    written = 0
    with path.open("w", encoding="utf-8") as output:
        for module in _modules(root):
            text = module.read_bytes().decode("utf-8", errors="replace")
            size = len(text.encode())
            if 0 < size <= max_bytes - written:
                output.write(json.dumps({"name": module.relative_to(root).as_posix(), "text": text}) + "\n")
                written += size
    return written


def _modules(root: Path) -> list[Path]:
    """Return the modules in the order of a hash of their names, so that a small limit samples the whole library."""
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [name for name in names if not _LEFT_OUT.intersection(name.parts)]
    kept.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
    return [root / name for name in kept]
