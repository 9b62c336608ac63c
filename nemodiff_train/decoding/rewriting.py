"""The prompts of a record's answers, and the record with the answers that a model has written to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from nemodiff_train.data.chat import render_opening_prompt
from nemodiff_train.data.columns import Record
from nemodiff_train.data.messages import Conversation, Message
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.decoding.answers import GeneratedAnswer
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.errors import UserError

Row = Mapping[str, object]


@dataclass(frozen=True)
class Request[Item]:
    """A record whose next answer is due."""

    number: int
    record: Record[Item]
    answers: Sequence[GeneratedAnswer]
    """The record's answers before it."""
    prompt: list[int]
    """Token ids after which it is written."""


class Rewriter[Item](Protocol):
    """Turns a record into prompts, and answers into a record."""

    def count(self, record: Record[Item]) -> int:
        """Return the number of answers that the record takes.

        Raises:
            UserError: The template cannot ask for them.
        """

    def prompt(self, record: Record[Item], answers: Sequence[GeneratedAnswer]) -> list[int]:
        """Return the token ids after which the next answer is written, given those before it."""

    def text(self, request: Request[Item], tokens: Sequence[int], settings: DecodingSettings) -> str:
        """Return the text that new tokens stand for in the record; empty for no answer."""

    def rewritten(self, record: Record[Item], answers: Sequence[GeneratedAnswer]) -> Row | None:
        """Return the fields of the record with its answers, None where it is left out."""


@dataclass(frozen=True)
class TextRewriter:
    """Texts whose beginnings the model goes on from; what the limit has cut stays, up to whole characters, marked."""

    tokenizer: PreTrainedTokenizerBase
    field: str
    """Name of the field that gets the text."""
    prompt_tokens: int | None
    """Number of tokens of a text that are the prompt; None for all."""

    def count(self, record: Record[str]) -> int:
        """Return 1."""
        return 1

    def prompt(self, record: Record[str], answers: Sequence[GeneratedAnswer]) -> list[int]:
        """Return the token ids of the beginning."""
        ids: list[int] = self.tokenizer(record.document, add_special_tokens=False)["input_ids"]
        return ids[: self.prompt_tokens]

    def text(self, request: Request[str], tokens: Sequence[int], settings: DecodingSettings) -> str:
        """Return the text from its beginning on: tokens that divide a character or a space are not cut apart."""
        return _text_with_special(settings, request.prompt, tokens)

    def rewritten(self, record: Record[str], answers: Sequence[GeneratedAnswer]) -> Row | None:
        """Return the record with the whole text, and ``finish_reason``."""
        if not answers:
            return None
        (answer,) = answers
        text = answer.text.rstrip("\N{REPLACEMENT CHARACTER}") if answer.end == "length" else answer.text
        return {**record.fields, self.field: text, "finish_reason": answer.end}


@dataclass(frozen=True)
class ChatRewriter:
    """Conversations, each answer of which the model writes after its own earlier ones.

    Answers that call tools stay as they are, as the tools' replies belong to them; they and those that were marked so
    are not learned. A conversation ends before an answer that is cut or empty.
    """

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    messages_field: str
    """Name of the field that gets the messages."""
    answer_field: str | None
    """Name of the field that gets the only answer instead, if any."""

    def count(self, record: Record[Conversation]) -> int:
        """Return the number of answers; the template must ask for the last of them, and take it."""
        indices = _rewritten_indices(record.document)
        if indices and indices[-1]:
            self._render(record.document, record.document.messages[: indices[-1]])
            self._render(record.document, record.document.messages[: indices[-1] + 1], add_generation_prompt=False)
        return len(indices)

    def prompt(self, record: Record[Conversation], answers: Sequence[GeneratedAnswer]) -> list[int]:
        """Return the token ids of the template's text that asks for the next answer; none where it cannot ask."""
        before = self._before(record, answers)
        text = (
            self._render(record.document, before)
            if before
            else render_opening_prompt(self.template, record.document) or ""
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text(self, request: Request[Conversation], tokens: Sequence[int], settings: DecodingSettings) -> str:
        """Return the content that the template writes as what the model has written, empty if it is white space.

        Some templates put a space before an answer themselves, or drop white space around it.
        """
        written, conversation = _text_with_special(settings, [], tokens), request.record.document
        if written == written.strip():
            return written
        before = self._before(request.record, request.answers)
        text = self._render(conversation, before) + written
        for content in (written, written.removeprefix(" ")) if written.strip() else ():
            messages: list[Message] = [*before, {"role": "assistant", "content": content}]
            if self._render(conversation, messages, add_generation_prompt=False).startswith(text):
                return content
        return written.strip()

    def rewritten(self, record: Record[Conversation], answers: Sequence[GeneratedAnswer]) -> Row | None:
        """Return the record with the messages up to the last complete answer."""
        complete_answers = [answer for answer in answers if answer.end == "stop"]
        if not complete_answers:
            return None
        if self.answer_field is not None:
            return {**record.fields, self.answer_field: complete_answers[0].text}
        indices = _rewritten_indices(record.document)
        messages = [
            message if message["role"] != "assistant" or index in indices else {**message, "weight": 0}
            for index, message in enumerate(_with_answers(record.document, complete_answers))
        ]
        end = None if len(complete_answers) == len(indices) else indices[len(complete_answers) - 1] + 1
        return {**record.fields, self.messages_field: messages[:end]}

    def _before(self, record: Record[Conversation], answers: Sequence[GeneratedAnswer]) -> list[Message]:
        """Return the messages before the next answer."""
        return _with_answers(record.document, answers)[: _rewritten_indices(record.document)[len(answers)]]

    def _render(
        self, conversation: Conversation, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        try:
            return self.template(messages, add_generation_prompt, conversation.tools)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from None


def _rewritten_indices(conversation: Conversation) -> list[int]:
    """Return the indices of the messages that the model writes."""
    return [index for index in conversation.answers if not conversation.messages[index].get("tool_calls")]


def _with_answers(conversation: Conversation, answers: Sequence[GeneratedAnswer]) -> list[Message]:
    """Return the messages, with as many answers in their places as there are."""
    messages = list(conversation.messages)
    for index, answer in zip(_rewritten_indices(conversation), answers, strict=False):
        messages[index] = {"role": "assistant", "content": answer.text}
    return messages


def _text_with_special(settings: DecodingSettings, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return prompt and answer as text, special tokens written out, up to the token or text that ended the answer."""
    written = tokens[:-1] if tokens[-1] in settings.stop_token_ids else tokens
    text, start = settings.text_with_special([*prompt, *written]), len(settings.text_with_special(prompt))
    return text[: min((at for stop in settings.stop_strings if (at := text.find(stop, start)) >= 0), default=None)]
