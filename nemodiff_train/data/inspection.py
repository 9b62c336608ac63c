"""``nemodiff data inspect``: what a prepared data set holds, and whether it is intact."""

from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemodiff_train.console import console
from nemodiff_train.data.manifest import Manifest, verify_checksums
from nemodiff_train.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nemodiff_train.errors import UserError

_SHOWN_DOCUMENTS = 3
_SHOWN_CHARACTERS = 200


def inspect(prefix: str, verify: bool) -> None:
    """Print the manifest and the beginnings of the first documents to standard output.

    Args:
        prefix: Of the data set's files.
        verify: Compare the checksums too, which reads all of ``.bin`` and ``.idx``.

    Raises:
        UserError: There is no prepared data set, or a checksum differs.
    """
    manifest = Manifest.read(prefix)
    if manifest is None:
        raise UserError(f"{prefix}.json: no such manifest; make the data set with 'nemodiff data prepare'")
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise UserError(f"{prefix}{suffix}: no such file, although the manifest is there; prepare it again")
    if verify:
        verify_checksums(prefix, manifest)
    output = Console(highlight=False)
    output.print(_table(prefix, manifest, verify))
    try:
        texts = _first_texts(prefix, manifest)
    except UserError as error:  # the tokenizer may be on another machine; the rest is still of use
        console.print(Text(f"documents not shown: {error}"), soft_wrap=True)
        return
    for name, text in texts:
        output.print(Text(f"{name}: {text!r}"), soft_wrap=True)


def _table(prefix: str, manifest: Manifest, verified: bool) -> Table:
    table = Table(title=Text(prefix), show_header=False)
    tokenizer = manifest.tokenizer
    rows = {
        "documents": f"{manifest.documents:,}",
        "tokens": f"{manifest.tokens:,} ({manifest.dtype})",
        "text": f"{manifest.bytes:,} bytes ({manifest.bytes / manifest.tokens:.2f} a token)",
        "tokenizer": f"{tokenizer.name} ({tokenizer.vocab_size:,} ids, {tokenizer.fingerprint[:12]})",
        "end of turn" if manifest.chat_template else "end of document": str(manifest.eod_token_id),
        "checksums": "verified" if verified else "not checked (--verify)",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    for source in manifest.inputs:
        split = f", split {source.split}" if source.split else ""
        table.add_row("input", Text(f"{source.path} ({source.files:,} files, {source.bytes:,} bytes{split})"))
    return table


def _first_texts(prefix: str, manifest: Manifest) -> list[tuple[str, str]]:
    """Names and beginnings of what the first documents consist of."""
    from nemodiff_train.data.indexed import IndexedDataset

    tokenizer = load_tokenizer(manifest.tokenizer.name)
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer.fingerprint:
        raise UserError(f"{manifest.tokenizer.name} is not the tokenizer it once was")
    dataset = IndexedDataset(prefix)
    found = []
    for number, (start, end) in enumerate(pairwise(dataset.document_indices[: _SHOWN_DOCUMENTS + 1].tolist())):
        for sequence in range(start, end):
            # No token stands for less than a byte, so 4 tokens a character are enough.
            head = dataset[sequence][: 4 * _SHOWN_CHARACTERS].astype(np.int64).tolist()
            name = f"document {number}"
            if manifest.chat_template:
                name = f"conversation {number}, {'answer' if (sequence - start) % 2 else 'given'}"
            found.append((name, str(tokenizer.decode(head))[:_SHOWN_CHARACTERS]))
    return found
