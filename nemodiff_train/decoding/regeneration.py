"""Regenerate the answers of a data set with a model."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from transformers import PreTrainedTokenizerBase

from nemodiff_train.console import LoopProgress, console, progress_bar, say
from nemodiff_train.data.chat import template_end_of_turn
from nemodiff_train.data.columns import AnswerColumns, Columns, Document, Record, RecordsWithDocuments, TextColumn
from nemodiff_train.data.inputs import InputOptions
from nemodiff_train.data.sources import Source, documents
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.answers import AnswerIndex, End, GeneratedAnswer, Settings, UnfinishedAnswers
from nemodiff_train.decoding.decode import decode, position_limit
from nemodiff_train.decoding.loading import DecodingModel, load_decoding_model, select_mode
from nemodiff_train.decoding.rewriting import ChatRewriter, Request, Rewriter, TextRewriter
from nemodiff_train.distributed import barrier, is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import identity

_WAITING_BATCHES = 32
"""Batches of prompts from which those of similar length are taken together."""
_TURN_BITS = 16
"""A record's number and its answer's share the number that draws depend on."""


@dataclass(frozen=True, kw_only=True)
class RegenerateOptions(InputOptions):
    """The arguments of ``nemodiff data regenerate`` that are not about a single answer."""

    prompt_tokens: int | None = None
    output: str
    overwrite: bool = False
    mode: str | None = None
    batch_size: int = 32

    def check(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UserError: Names the option.
        """
        super().check()
        if self.chat and self.prompt_tokens is not None:
            raise UserError("--prompt-tokens goes without --chat")
        if not self.chat and (self.prompt_tokens is None) == (self.prompt_field is None):
            raise UserError(
                "say which part of a record is the prompt: --prompt-tokens N for the beginnings of texts, "
                "--prompt-field NAME for a field, or --chat for conversations"
            )

    def columns(self, template: str | None) -> Columns[Document]:
        """Return the fields to take from a record; an answer beside its prompt need not be there."""
        if self.prompt_field and self.answer_field:
            return AnswerColumns(self.prompt_field, self.answer_field, template, unwritten=True)
        if self.prompt_field:
            return TextColumn(self.prompt_field, option="--prompt-field")
        return super().columns(template)

    def rewriter(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> Rewriter[Any]:
        """Return what rewrites records.

        Args:
            tokenizer: The model's.
            template: Its chat template; None for texts.
        """
        if template is None:
            return TextRewriter(tokenizer, self.text_field or "text", self.prompt_tokens)
        return ChatRewriter(tokenizer, template, self.messages_field or "messages", self.answer_field)


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
    sources = options.sources(RecordsWithDocuments(columns))
    if output.exists() and any(file.samefile(output) for source in sources for file in source.files):
        raise UserError(f"{output}: is one of the inputs; name another --output, or choose files with --glob")
    mode = select_mode(checkpoint, decoding["drafter"], options.mode)
    settings = _settings(checkpoint, options, mode, decoding, sources)
    if unfinished.is_complete(settings):  # interrupted while moving the output into place
        if is_main_process():
            unfinished.move()
        say(f"{output}: complete")
        return
    unfinished.check(settings, options.overwrite)
    counts = _count_answers(sources, options.rewriter(tokenizer, template))
    if not any(counts):
        raise UserError(f"{', '.join(options.inputs)}: no record has a prompt; check {columns.option}")
    if is_main_process():
        columns.notes.print()
    loaded = load_decoding_model(checkpoint, modes=(mode,), **decoding)
    started = unfinished.begin(settings)
    if template is not None:
        end = template_end_of_turn(tokenizer, template)
        template = ChatTemplate(tokenizer, started)  # one date for all conversations, as 'data prepare' has it
        loaded = replace(loaded, settings=loaded.settings.stopping_at(end))
    rewriter = options.rewriter(tokenizer, template)
    work = _Regeneration(sources, rewriter, counts, unfinished, loaded, mode, options.batch_size)
    work.write()
    if is_main_process():
        say(f"{options.output}: {work.publish()}")


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
    about_the_output = ("output", "overwrite", "mode", "batch_size")
    read = {name: value for name, value in vars(options).items() if name not in about_the_output}
    settings = {
        "checkpoint": identity(checkpoint.iteration),
        "drafter": identity(drafter.iteration) if drafter else None,
        "sampler": identity(Path(decoding["sampler"])) if decoding["sampler"] else None,
        "decoding": {"mode": mode, **{name: value for name, value in decoding.items() if name not in free}},
        "read": {**read, "inputs": [source.info.model_dump() for source in sources]},
    }
    written: Settings = json.loads(json.dumps(settings))
    return written


def _count_answers(sources: Sequence[Source[Record[Any]]], rewriter: Rewriter[Any]) -> list[int]:
    """Return the number of answers that each record takes; refuse a malformed one."""
    counts = []
    with progress_bar(shown=is_main_process() and console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        for record in documents(sources):
            counts.append(rewriter.count(record))
            bar.advance(task)
    return counts


@dataclass
class _Regeneration[Item]:
    """A data set, and what writes its answers again, in batches of prompts of similar length."""

    sources: Sequence[Source[Record[Item]]]
    rewriter: Rewriter[Item]
    counts: Sequence[int]
    """Number of answers that each record takes."""
    unfinished: UnfinishedAnswers
    loaded: DecodingModel
    """The model, whose parallel groups exist."""
    mode: str
    batch_size: int
    """Answers written together."""
    finished: int = 0
    """Number of this replica's records to which nothing is added any more."""
    complete_before: int = 0
    """Number of them that were so from the start."""

    def write(self) -> None:
        """Write all answers that are not there yet; every rank calls this.

        Data-parallel replicas take records in turn. At temperature 0 the answers depend neither on their number nor
        on the batch size, and above it the draws of each answer are its own.
        """
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        existing = AnswerIndex(self.unfinished.logs())
        if len(existing):
            say(f"continuing after {len(existing):,} answers")
        records = islice(enumerate(documents(self.sources)), replica, None, replicas)
        total, shown = len(range(replica, len(self.counts), replicas)), 0
        name = f"answering, records of process 1 of {replicas}" if replicas > 1 else "answering, records"
        with self.unfinished.log() as log, LoopProgress(name, total, "tokens") as progress:
            for answers in self._batches(
                (number, record, existing.answers_of_record(number)) for number, record in records
            ):
                log.write(answer.model_dump_json() for answer in answers)
                new_tokens = sum(answer.tokens for answer in answers)
                progress.advance(self.finished - shown, new_tokens, before=self.complete_before)
                shown = self.finished
        barrier()

    def publish(self) -> str:
        """Put the answers into their records, in the order of the inputs, and the output into its place.

        Returns:
            What was written, in words.
        """
        index, counts, ends = AnswerIndex(self.unfinished.logs()), Counter[str](), Counter[End]()

        def lines() -> Iterator[str]:
            for number, record in enumerate(documents(self.sources)):
                answers = index.answers_of_record(number)
                ends.update(answer.end for answer in answers)
                counts["tokens"] += sum(answer.tokens for answer in answers)  # of answers that are not kept as well
                counts["unfit"] += len(answers) < self.counts[number] and _may_go_on(answers)
                row = self.rewriter.rewritten(record, answers)
                counts["left out" if row is None else "records"] += 1
                if row is not None:
                    yield _line(row)

        self.unfinished.publish(lines())
        remarks = {
            f"answers cut after {self.loaded.settings.max_new_tokens:,} tokens": ends["length"],
            "empty answers": ends["empty"],
            "records with a prompt that is empty, too long, or of tokens that the model lacks": counts["unfit"],
            "records left out": counts["left out"],
        }
        first = f"{counts['records']:,} records, {ends.total():,} answers of {counts['tokens']:,} tokens"
        return "; ".join([first, *(f"{count:,} {what}" for what, count in remarks.items() if count)])

    def _batches(
        self, records: Iterator[tuple[int, Record[Item], list[GeneratedAnswer]]]
    ) -> Iterator[list[GeneratedAnswer]]:
        """Yield new answers, each record's in their order, to records with the answers that are there already."""
        waiting: list[Request[Item]] = []
        while True:
            for record in islice(records, self.batch_size * _WAITING_BATCHES - len(waiting)):
                requests = self._next_request(*record)
                self.complete_before += not requests
                waiting += requests
            if not waiting:
                return
            waiting.sort(key=lambda request: len(request.prompt))
            batch, waiting = waiting[-self.batch_size :], waiting[: -self.batch_size]
            answers = self._answer(batch)
            for request, answer in zip(batch, answers, strict=True):
                waiting += self._next_request(request.number, request.record, [*request.answers, answer])
            yield answers

    def _next_request(self, number: int, record: Record[Item], answers: list[GeneratedAnswer]) -> list[Request[Item]]:
        """Return the record's next request, if an answer is due and its prompt can be decoded."""
        if len(answers) < self.counts[number] and _may_go_on(answers):
            prompt = self.rewriter.prompt(record, answers)
            config = self.loaded.config
            limit = position_limit(config) or float("inf")
            fits = len(prompt) + self.loaded.settings.max_new_tokens <= limit
            if prompt and fits and max(prompt) < config.vocab_size:
                return [Request(number, record, answers, prompt)]
        self.finished += 1
        return []

    def _answer(self, batch: Sequence[Request[Item]]) -> list[GeneratedAnswer]:
        """Return the answers to a batch of requests."""
        settings = self.loaded.settings
        numbers = [request.number << _TURN_BITS | len(request.answers) for request in batch]
        generations, _ = decode(
            self.loaded.model, [request.prompt for request in batch], self.mode, settings, numbers
        )
        answers = []
        for request, generation in zip(batch, generations, strict=True):
            tokens, turn = generation.tokens, len(request.answers)
            text = self.rewriter.text(request, tokens, settings)
            stopped = tokens[-1] in settings.stop_token_ids or settings.holds_stop(tokens)
            end: End = "length" if not stopped else "stop" if text else "empty"
            answers.append(GeneratedAnswer(record=request.number, turn=turn, text=text, tokens=len(tokens), end=end))
        return answers


def _line(row: Mapping[str, object]) -> str:
    """Return a record as JSON that UTF-8 can hold: half a surrogate pair, of a field that nothing reads, escaped."""
    line = json.dumps(row, ensure_ascii=False, default=str)  # columns of Arrow hold dates
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=str)
    return line


def _may_go_on(answers: Sequence[GeneratedAnswer]) -> bool:
    """Return whether another answer can follow these."""
    return all(answer.end == "stop" for answer in answers)
