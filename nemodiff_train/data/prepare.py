"""``nemodiff data prepare``: documents in, one indexed data set out."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nemodiff_train.console import console, progress_bar
from nemodiff_train.data.chat import ChatEncoder, end_of_turn_id, template_digest
from nemodiff_train.data.columns import AnswerColumns, Columns, MessagesColumn, TextColumn
from nemodiff_train.data.encode import Encoder, TextEncoder, encode_in_order
from nemodiff_train.data.manifest import Manifest, Plan, TokenizerInfo
from nemodiff_train.data.partial_output import SUFFIXES, Parts, Totals
from nemodiff_train.data.sources import Source, documents, resolve
from nemodiff_train.data.tokenizer import (
    end_of_document_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from nemodiff_train.errors import UserError


@dataclass(frozen=True)
class Options:
    """The command's arguments; see its help."""

    inputs: list[str]
    tokenizer: str
    output: str
    text_field: str
    split: str
    glob: str
    eod_token: str | None
    workers: int
    overwrite: bool
    chat: bool = False
    messages_field: str = "messages"
    prompt_field: str | None = None
    answer_field: str | None = None

    @property
    def columns(self) -> Columns:
        """The fields to take from a record."""
        if not self.chat:
            return TextColumn(self.text_field)
        if self.prompt_field and self.answer_field:
            return AnswerColumns(self.prompt_field, self.answer_field)
        return MessagesColumn(self.messages_field)


def prepare(options: Options) -> Manifest:
    """Prepare the data set, continuing an interrupted run; does nothing when it is there already.

    Returns:
        The manifest of the finished data set.

    Raises:
        UserError: An input, the tokenizer or the output cannot be used.  Nothing is left behind then.
    """
    _check_options(options)
    sources = resolve(options.inputs, options.columns, options.split, options.glob)
    tokenizer = load_tokenizer(options.tokenizer)
    encoder: Encoder
    if options.chat:
        encoder = ChatEncoder(tokenizer, end_of_turn_id(tokenizer, options.eod_token))
    else:
        encoder = TextEncoder(tokenizer, end_of_document_id(tokenizer, options.eod_token))
    plan = Plan(
        tokenizer=TokenizerInfo(
            name=options.tokenizer,
            vocab_size=vocabulary_size(tokenizer),
            fingerprint=tokenizer_fingerprint(tokenizer),
        ),
        eod_token_id=encoder.eod_token_id,
        text_field=" ".join(options.columns.names),
        chat_template=template_digest(tokenizer) if options.chat else None,
        inputs=[source.info for source in sources],
    )
    unfinished = Parts(options.output, plan)
    if not options.overwrite and (finished := existing(options.output, plan, unfinished)):
        return finished
    with unfinished.locked():
        return _continue(options, sources, encoder, unfinished)


def _check_options(options: Options) -> None:
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least 1 is needed")
    if (options.prompt_field is None) != (options.answer_field is None):
        raise UserError("--prompt-field and --answer-field go together")
    if options.prompt_field is not None and not options.chat:
        raise UserError("--prompt-field and --answer-field go with --chat")
    check_output(options.output)


def check_output(prefix: str) -> None:
    """Refuse a directory where the prefix of files is meant.

    Raises:
        UserError: It is one.
    """
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise UserError(f"--output {prefix}: a directory; give the files' prefix, as in DIR/NAME")


def existing(prefix: str, plan: Plan, unfinished: Parts) -> Manifest | None:
    """The data set that is there already, if it is the one planned; ``None`` where there is none.

    Raises:
        UserError: Another one is there.
    """
    if not (present := [prefix + suffix for suffix in SUFFIXES if Path(prefix + suffix).exists()]):
        return None
    manifest = Manifest.read(prefix)
    if manifest is None:
        if unfinished.resumable():  # interrupted while moving the files into place
            return None
        raise UserError(f"{present[0]}: exists and has no manifest; replace it with --overwrite")
    if not manifest.same_tokens(plan):
        raise UserError(
            f"{prefix}: prepared with another tokenizer ('{manifest.tokenizer.name}'), end-of-document token or "
            "chat template; refusing to mix tokenizers; choose another --output, or replace it with --overwrite"
        )
    if not manifest.same_output(plan):
        raise UserError(
            f"{prefix}: already holds a data set of other inputs; choose another --output, "
            "or replace it with --overwrite"
        )
    if len(present) < len(SUFFIXES):  # a file was deleted since: prepare it again
        return None
    if unfinished.resumable():  # interrupted between moving the files and removing the parts
        unfinished.discard()
    console.print(f"{prefix}: already complete, nothing to do", soft_wrap=True)
    return manifest


def _continue(options: Options, sources: list[Source], encoder: Encoder, unfinished: Parts) -> Manifest:
    """Write the parts that are missing, then publish."""
    dtype = _token_type(encoder)
    done = unfinished.restore(options.overwrite)
    if done.documents:
        console.print(f"continuing after {done.documents:,} documents")
    try:
        texts = islice(documents(sources), done.documents, None)
        with _progress(done) as advance:
            unfinished.write(encode_in_order(texts, encoder, options.workers), dtype, advance)
        if unfinished.totals.documents == 0:
            raise UserError(f"{', '.join(options.inputs)}: no documents in there that hold anything")
        return unfinished.publish(dtype)
    except UserError:
        unfinished.discard()  # correcting the input changes it, so the parts would not fit it any more
        raise
    except (OSError, BrokenProcessPool) as error:
        raise UserError(f"{options.output}: {error}; the same command continues from there") from error


def _token_type(encoder: Encoder) -> type[np.integer[Any]]:
    """The smallest type that Megatron keeps this vocabulary in."""
    from nemodiff_train.data.indexed import DType

    return DType.optimal_dtype(vocabulary_size(encoder.tokenizer))


@contextmanager
def _progress(done: Totals) -> Iterator[Callable[[Totals], None]]:
    """A count of documents, tokens a second and megabytes a second; the total is not known beforehand."""
    columns = "{task.fields[tokens]:,.0f} tokens/s", "{task.fields[megabytes]:.2f} MB/s"
    start = time.monotonic()
    written = Totals()
    # A log file would get one last frame of the bar between its lines.
    with progress_bar(*columns, shown=console.is_terminal) as bar:
        task = bar.add_task("prepare", total=None, completed=done.documents, tokens=0.0, megabytes=0.0)

        def advance(batch: Totals) -> None:
            nonlocal written
            written = written.add(batch)
            seconds = time.monotonic() - start
            bar.update(
                task,
                advance=batch.documents,
                tokens=written.tokens / seconds,
                megabytes=written.bytes / seconds / 1e6,
            )

        yield advance
