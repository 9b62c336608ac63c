"""Write the answers of a data set again, in a model's own words."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from nemodiff_train.console import LoopProgress, console, progress_bar, say
from nemodiff_train.data.chat import template_end_of_turn
from nemodiff_train.data.columns import Document, Record, WholeRecords
from nemodiff_train.data.sources import Source, documents
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.answers import Answer, AnswerIndex, End, Settings, UnfinishedAnswers
from nemodiff_train.decoding.decode import decode, position_limit
from nemodiff_train.decoding.loading import DecodingModel, choose_mode, load_decoding_model
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.rewriting import Asked, RewriteOptions, Rewriter
from nemodiff_train.distributed import barrier, is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import identity

_WAITING_BATCHES = 32
"""Batches of prompts from which those of similar length are taken together."""
_TURN_BITS = 16
"""A record's number and its answer's share the number that draws depend on."""


@dataclass(frozen=True, kw_only=True)
class RegenerateOptions(RewriteOptions):
    """The arguments of ``nemodiff data regenerate`` that are not about a single answer."""

    output: str
    overwrite: bool = False
    mode: str | None = None
    batch_size: int = 32


def regenerate(checkpoint: Checkpoint, options: RegenerateOptions, decoding: dict[str, Any]) -> None:
    """Write the output, continuing an interrupted command; every rank calls this.

    Args:
        checkpoint: A model's.
        options: What is read and written.
        decoding: Further arguments of :func:`~nemodiff_train.decoding.loading.load_decoding_model`.

    Raises:
        UserError: An input, the checkpoint, a setting or the output cannot be used.
    """
    options.check()
    output = Path(options.output)
    unfinished = UnfinishedAnswers(output)
    if output.exists() and not options.overwrite and not unfinished.joined:
        raise UserError(f"{output}: exists already; name another --output, or replace it with --overwrite")
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_directory))
    template = ChatTemplate(tokenizer) if options.chat else None
    columns = options.columns(template.source if template else None)
    sources = options.sources(WholeRecords(columns))
    if output.exists() and any(file.samefile(output) for source in sources for file in source.files):
        raise UserError(f"{output}: is one of the inputs; name another --output, or choose files with --glob")
    mode = choose_mode(checkpoint, decoding["drafter"], options.mode)
    settings = _settings(checkpoint, options, mode, decoding, sources)
    if unfinished.is_complete(settings):  # interrupted while moving the output into place
        if is_main_process():
            unfinished.move()
        say(f"{output}: complete")
        return
    unfinished.check(settings, options.overwrite)
    counts = _count_answers(sources, options.rewriter(tokenizer, template), ", ".join(options.inputs))
    if is_main_process():
        columns.notes.print()
    loaded = load_decoding_model(checkpoint, modes=(mode,), **decoding)
    started = unfinished.begin(settings)
    if template is not None:
        end = template_end_of_turn(tokenizer, template)
        template = ChatTemplate(tokenizer, started)  # one date for all conversations, as 'data prepare' has it
        loaded = replace(loaded, settings=loaded.settings.stopping_at(end))
    work = Regeneration(sources, options.rewriter(tokenizer, template), counts, unfinished)
    work.write(loaded, mode, options.batch_size)
    if is_main_process():
        say(f"{options.output}: {work.publish().line(loaded.settings.max_new_tokens)}")


def _settings(
    checkpoint: Checkpoint,
    options: RegenerateOptions,
    mode: str,
    decoding: dict[str, Any],
    sources: Sequence[Source[Record[Document]]],
) -> Settings:
    """Return all that the answers depend on."""
    drafter: Checkpoint | None = decoding["drafter"]
    free = ("drafter", "sampler", "tensor_parallel", "pipeline_parallel")
    read = {name: value for name, value in vars(options).items() if name in RewriteOptions.__dataclass_fields__}
    settings = {
        "checkpoint": identity(checkpoint.iteration),
        "drafter": identity(drafter.iteration) if drafter else None,
        "sampler": identity(Path(decoding["sampler"])) if decoding["sampler"] else None,
        "decoding": {"mode": mode, **{name: value for name, value in decoding.items() if name not in free}},
        "read": {**read, "inputs": [source.info.model_dump() for source in sources]},
    }
    written: Settings = json.loads(json.dumps(settings))
    return written


def _count_answers(sources: Sequence[Source[Record[Any]]], rewriter: Rewriter[Any], inputs: str) -> list[int]:
    """Return the number of answers that each record takes; no record is refused after this.

    Raises:
        UserError: A record is malformed, or there is none.
    """
    counts = []
    with progress_bar(shown=is_main_process() and console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        for record in documents(sources):
            counts.append(rewriter.count(record))
            bar.advance(task)
    if not any(counts):
        raise UserError(f"{inputs}: no prompt in there")
    return counts


@dataclass
class Summary:
    """What a regeneration has written."""

    records: int = 0
    left_out: int = 0
    unfit: int = 0
    """Records with a prompt that has no tokens, a token without a row in the model, or no room for the new ones."""
    tokens: int = 0
    """New tokens, of answers that were not kept as well."""
    ends: Counter[End] = field(default_factory=Counter)
    """Number of answers by how they end."""

    def line(self, max_new_tokens: int) -> str:
        """Return it in words."""
        counts = {
            f"answers cut after {max_new_tokens:,} tokens": self.ends["length"],
            "empty answers": self.ends["empty"],
            "records with a prompt that is empty, too long, or of tokens that the model lacks": self.unfit,
            "records left out": self.left_out,
        }
        first = f"{self.records:,} records, {self.ends.total():,} answers of {self.tokens:,} tokens"
        return "; ".join([first, *(f"{count:,} {what}" for what, count in counts.items() if count)])


@dataclass(frozen=True)
class Regeneration[Item]:
    """A data set, and what writes its answers again."""

    sources: Sequence[Source[Record[Item]]]
    rewriter: Rewriter[Item]
    counts: Sequence[int]
    """Number of answers that each record takes."""
    unfinished: UnfinishedAnswers

    def write(self, loaded: DecodingModel, mode: str, batch_size: int) -> None:
        """Write all answers that are not there yet; every rank calls this.

        Data-parallel replicas take records in turn. At temperature 0 the answers depend neither on their number nor
        on the batch size, and above it the draws of each answer are its own.

        Args:
            loaded: The model, whose parallel groups exist.
            mode: How to decode.
            batch_size: Answers written together.
        """
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        there = AnswerIndex(self.unfinished.logs())
        if len(there):
            say(f"continuing after {len(there):,} answers")
        records = islice(enumerate(documents(self.sources)), replica, None, replicas)
        writer = _Writer(loaded, self.rewriter, self.counts, mode, batch_size)
        total, shown = len(range(replica, len(self.counts), replicas)), 0
        name = f"answering, records of process 1 of {replicas}" if replicas > 1 else "answering, records"
        with (
            self.unfinished.log(replica if ranks == (0, 0) else None) as log,
            LoopProgress(name, total, "tokens") as progress,
        ):
            for answers in writer.write((number, record, there.of(number)) for number, record in records):
                log.write(answer.model_dump_json() for answer in answers)
                tokens = sum(answer.tokens for answer in answers)
                progress.advance(writer.finished - shown, tokens, before=writer.complete_before)
                shown = writer.finished
        barrier()

    def publish(self) -> Summary:
        """Put the answers into their records, in the order of the inputs, and the output into its place."""
        index, summary = AnswerIndex(self.unfinished.logs()), Summary()

        def lines() -> Iterator[str]:
            for number, record in enumerate(documents(self.sources)):
                answers = index.of(number)
                summary.ends.update(answer.end for answer in answers)
                summary.tokens += sum(answer.tokens for answer in answers)
                summary.unfit += len(answers) < self.counts[number] and _may_go_on(answers)
                if (row := self.rewriter.rewritten(record, answers)) is None:
                    summary.left_out += 1
                else:
                    summary.records += 1
                    yield _line(row)

        self.unfinished.publish(lines())
        return summary


def _line(row: Mapping[str, object]) -> str:
    """Return a record as JSON that UTF-8 can hold: half a surrogate pair, of a field that nothing reads, escaped."""
    line = json.dumps(row, ensure_ascii=False, default=str)  # columns of Arrow hold dates
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=str)
    return line


def _may_go_on(answers: Sequence[Answer]) -> bool:
    """Return whether another answer can follow these."""
    return all(answer.end == "stop" for answer in answers)


@dataclass
class _Writer[Item]:
    """Writes answers in batches of prompts of similar length."""

    loaded: DecodingModel
    rewriter: Rewriter[Item]
    counts: Sequence[int]
    mode: str
    batch_size: int
    finished: int = 0
    """Number of records to which nothing is added any more."""
    complete_before: int = 0
    """Number of them that were so from the start."""

    def write(self, records: Iterator[tuple[int, Record[Item], list[Answer]]]) -> Iterator[list[Answer]]:
        """Yield new answers, each record's in their order.

        Args:
            records: Number, record, and the answers that are there already.
        """
        waiting: list[Asked[Item]] = []
        while True:
            for record in islice(records, self.batch_size * _WAITING_BATCHES - len(waiting)):
                due = self._ask(*record)
                self.complete_before += not due
                waiting += due
            if not waiting:
                return
            waiting.sort(key=lambda asked: len(asked.prompt))
            batch, waiting = waiting[-self.batch_size :], waiting[: -self.batch_size]
            answers = self._answer(batch)
            for asked, answer in zip(batch, answers, strict=True):
                waiting += self._ask(asked.number, asked.record, [*asked.answers, answer])
            yield answers

    def _ask(self, number: int, record: Record[Item], answers: list[Answer]) -> list[Asked[Item]]:
        """Return the record if another answer of it is due, and its prompt can be decoded."""
        if len(answers) < self.counts[number] and _may_go_on(answers):
            prompt = self.rewriter.prompt(record, answers)
            config = PipelineRunner(self.loaded.model).config
            limit = position_limit(config) or float("inf")
            fits = len(prompt) + self.loaded.settings.max_new_tokens <= limit
            if prompt and fits and max(prompt) < config.vocab_size:
                return [Asked(number, record, answers, prompt)]
        self.finished += 1
        return []

    def _answer(self, batch: Sequence[Asked[Item]]) -> list[Answer]:
        """Return the next answer of each record."""
        settings = self.loaded.settings
        numbers = [asked.number << _TURN_BITS | len(asked.answers) for asked in batch]
        generations, _ = decode(self.loaded.model, [asked.prompt for asked in batch], self.mode, settings, numbers)
        answers = []
        for asked, generation in zip(batch, generations, strict=True):
            tokens = generation.tokens
            text = self.rewriter.text(asked, tokens, settings)
            stopped = tokens[-1] in settings.stop_token_ids or settings.holds_stop(tokens)
            end: End = "length" if not stopped else "stop" if text else "empty"
            turn = len(asked.answers)
            answers.append(Answer(record=asked.number, turn=turn, text=text, tokens=len(tokens), end=end))
        return answers
