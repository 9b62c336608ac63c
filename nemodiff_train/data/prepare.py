"""Prepare one indexed data set from documents, continuing where an interrupted run stopped."""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from nemodiff_train.console import console, progress_bar
from nemodiff_train.data.chat import ChatEncoder, end_of_turn_id
from nemodiff_train.data.columns import Columns, Document
from nemodiff_train.data.encode import Encoder, TextEncoder, encode_in_order
from nemodiff_train.data.inputs import InputOptions
from nemodiff_train.data.manifest import Manifest, Provenance, TokenizerInfo
from nemodiff_train.data.notes import LEFT_OUT, UNREAD_KEYS
from nemodiff_train.data.partial_output import SUFFIXES, ChunkSize, PartialOutput
from nemodiff_train.data.sources import Source, documents
from nemodiff_train.data.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from nemodiff_train.errors import UserError
from nemodiff_train.processes import check_processes


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(InputOptions):
    """The arguments of ``nemodiff data prepare``, which describes them in its help."""

    tokenizer: str
    output: str
    eod_token: str | None = None
    workers: int = 1
    overwrite: bool = False

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UserError: Names the option.
        """
        check_processes("--workers", self.workers)
        super().check()
        if self.prompt_field is not None and not self.chat:
            raise UserError("--prompt-field goes with --chat and --answer-field")
        check_output(self.output)


def prepare(options: PrepareOptions) -> Manifest:
    """Prepare the data set, continuing an interrupted run; do nothing if it is there already.

    Returns:
        The manifest of the finished data set.

    Raises:
        UserError: An input, the tokenizer or the output cannot be used, and nothing is left behind; or the disk
            fails, and the same command continues from there.
    """
    options.check()
    tokenizer = load_tokenizer(options.tokenizer)
    encoder: Encoder[Any]
    if not options.chat:
        encoder = TextEncoder(tokenizer, end_of_document_id(tokenizer, options.eod_token))
        columns, template_digest = options.columns(None), None
    elif not tokenizer.is_fast:
        raise UserError(f"{options.tokenizer}: conversations need a tokenizer with a tokenizer.json; convert it")
    else:
        encoder = ChatEncoder(tokenizer, end_of_turn_id(tokenizer, options.eod_token))
        columns = options.columns(encoder.template.source)
        template_digest = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    sources = options.sources(columns)
    provenance = Provenance(
        tokenizer=TokenizerInfo(
            name=options.tokenizer,
            vocab_size=vocabulary_size(tokenizer),
            fingerprint=tokenizer_fingerprint(tokenizer),
        ),
        eod_token_id=encoder.eod_token_id,
        text_field=" ".join(columns.names),
        chat_template=template_digest,
        inputs=[source.info for source in sources],
    )
    partial = PartialOutput(options.output, provenance)
    if not options.overwrite and (finished := existing(options.output, provenance, partial)):
        return finished
    with partial.locked():
        return _continue(options, sources, encoder, partial, columns)


def check_output(prefix: str) -> None:
    """Refuse a directory in place of the prefix of files.

    Raises:
        UserError: It is a directory.
    """
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise UserError(f"--output {prefix}: a directory; give the files' prefix, as in DIR/NAME")


def existing(prefix: str, provenance: Provenance, partial: PartialOutput) -> Manifest | None:
    """Return the manifest of the data set if it is finished already, None where it has to be made.

    Raises:
        UserError: Another data set is there.
    """
    if not (present := [prefix + suffix for suffix in SUFFIXES if Path(prefix + suffix).exists()]):
        return None
    manifest = Manifest.read(prefix)
    if manifest is None:
        if partial.resumable():  # interrupted while moving the files into place
            return None
        raise UserError(f"{present[0]}: exists and has no manifest; replace it with --overwrite")
    if not manifest.same_tokens(provenance):
        raise UserError(
            f"{prefix}: prepared with another tokenizer ('{manifest.tokenizer.name}'), end-of-document token or "
            "chat template; refusing to mix tokenizers; choose another --output, or replace it with --overwrite"
        )
    if not manifest.same_output(provenance):
        raise UserError(
            f"{prefix}: already holds a data set of other inputs; choose another --output, "
            "or replace it with --overwrite"
        )
    if len(present) < len(SUFFIXES):  # a file was deleted since: prepare it again
        return None
    if partial.resumable():  # interrupted between moving the files and removing the chunks
        partial.discard()
    console.print(f"{prefix}: already complete, nothing to do", soft_wrap=True)
    return manifest


def _continue(
    options: PrepareOptions,
    sources: Sequence[Source[Document]],
    encoder: Encoder[Any],
    partial: PartialOutput,
    columns: Columns[Document],
) -> Manifest:
    """Write the chunks that are missing, then publish and print what was not used."""
    done = partial.restore(options.overwrite)
    if done.documents:
        console.print(f"continuing after {done.documents:,} documents")
    # One date for all conversations, also of a run that is continued.
    dated: Encoder[Any] = replace(encoder, now=partial.state.started) if isinstance(encoder, ChatEncoder) else encoder
    remaining = islice(documents(sources), done.documents, None)
    rates = "{task.fields[tokens]:,.0f} tokens/s", "{task.fields[megabytes]:.2f} MB/s"
    started, written = time.monotonic(), ChunkSize()
    try:
        # A log file would get one last frame of the bar between its lines.
        with progress_bar(*rates, shown=console.is_terminal) as bar:
            task = bar.add_task("prepare", total=None, completed=done.documents, tokens=0.0, megabytes=0.0)
            for size in partial.write(encode_in_order(remaining, dated, options.workers)):
                written += size
                seconds = time.monotonic() - started
                tokens, megabytes = written.tokens / seconds, written.bytes / seconds / 1e6
                bar.update(task, advance=size.documents, tokens=tokens, megabytes=megabytes)
        for chunk in partial.state.chunks:
            for kind, counts in ((LEFT_OUT, chunk.left_out), (UNREAD_KEYS, chunk.unread)):
                for what, count in counts.items():
                    columns.notes.add(kind, what, ", ".join(options.inputs), count)
        columns.notes.print()
        if partial.size.tokens == 0:
            inputs = ", ".join(options.inputs)
            raise UserError(f"{inputs}: all records are empty or left out; check {columns.option}")
        return partial.publish()
    except UserError:
        partial.discard()  # correcting the input changes it, so the chunks would not fit it any more
        raise
    except (OSError, BrokenProcessPool) as error:
        raise UserError(f"{options.output}: {error}; the same command continues from there") from error
