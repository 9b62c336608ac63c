"""Show what a prepared data set holds, and whether it is intact."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from rich.table import Table

from nemodiff_train.console import PlainConsole, say
from nemodiff_train.data.index_file import read_index
from nemodiff_train.data.manifest import Manifest
from nemodiff_train.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nemodiff_train.errors import UserError

_SHOWN_DOCUMENTS = 3
_SHOWN_CHARACTERS = 200


def inspect(prefix: str, verify: bool) -> None:
    """Print the manifest and the beginnings of the first documents to standard output.

    Args:
        prefix: Prefix of the data set.
        verify: Also compare the checksums, which reads all of ``.bin`` and ``.idx``.

    Raises:
        UserError: There is no complete data set, or a checksum differs.
    """
    manifest = Manifest.require(prefix)
    if verify:
        manifest.verify_checksums(prefix)
    output = PlainConsole()
    output.print(_table(prefix, manifest, verify))
    try:
        for name, text in _beginnings(prefix, manifest):
            output.print(f"{name}: {text!r}", soft_wrap=True)
    except UserError as error:  # the tokenizer may be on another machine; the rest is still of use
        say(f"documents not shown: {error}")


def _table(prefix: str, manifest: Manifest, verified: bool) -> Table:
    table = Table(title=prefix, show_header=False)
    tokenizer = manifest.tokenizer
    table.add_row("documents", f"{manifest.documents:,}")
    table.add_row("tokens", f"{manifest.tokens:,} ({manifest.dtype})")
    table.add_row("text", f"{manifest.bytes:,} bytes ({manifest.bytes / manifest.tokens:.2f} per token)")
    table.add_row("tokenizer", f"{tokenizer.name} ({tokenizer.vocab_size:,} ids, {tokenizer.fingerprint[:12]})")
    table.add_row("end of turn" if manifest.chat_template else "end of document", str(manifest.eod_token_id))
    table.add_row("checksums", "verified" if verified else "not checked (--verify)")
    for source in manifest.inputs:
        split = f", split {source.split}" if source.split else ""
        table.add_row("input", f"{source.path} ({source.files:,} files, {source.bytes:,} bytes{split})")
    return table


def _beginnings(prefix: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the name and the beginning of each sequence of the first documents."""
    tokenizer = load_tokenizer(manifest.tokenizer.name)
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer.fingerprint:
        raise UserError(f"{manifest.tokenizer.name} has changed since")
    index = read_index(prefix)
    tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    for number, (start, end) in enumerate(pairwise(index.document_ends[: _SHOWN_DOCUMENTS + 1].tolist())):
        for sequence in range(start, end):
            first = int(index.offsets[sequence]) // index.dtype.itemsize
            # No token stands for less than one byte, so 4 tokens per character are enough.
            length = min(int(index.lengths[sequence]), 4 * _SHOWN_CHARACTERS)
            text = str(tokenizer.decode(tokens[first : first + length].tolist()))
            role = "answer" if (sequence - start) % 2 else "prompt"
            name = f"conversation {number}, {role}" if manifest.chat_template else f"document {number}"
            yield name, text[:_SHOWN_CHARACTERS]
