"""Encode conversations through the tokenizer's own chat template.

The sequences of a document alternate between prompt and answer. A conversation is rendered and tokenized as one text
and then cut, so that no turn begins with a space that a tokenizer puts before texts. A prompt is always what decoding
reads when an answer is asked for: where a token crosses the border between both, the two are tokenized apart.
"""

import contextlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nemodiff_train.data.encode import EncodedBatch, EncodedDocument, Encoder
from nemodiff_train.data.messages import Conversation, names
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import end_of_document_id
from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TRIES = 20
"""Number of messages in which a part changes nothing before it counts as unread without another comparison."""


class AnswerSpan(NamedTuple):
    """Start and end of an answer in a text."""

    start: int
    """Characters before it: the prompt."""
    end: int
    """Characters up to its end, with the token that ends the turn."""


@dataclass(frozen=True)
class Rendered:
    """A document as text, from its first prompt to the end of its last answer."""

    text: str
    answers: list[AnswerSpan]


@dataclass
class ChatEncoder(Encoder[Conversation]):
    """Turn conversations into documents of turns; every answer ends with ``eod_token_id``, the end of a turn."""

    now: datetime | None = None
    """Date for a template that asks for it; None for the time of each conversation."""

    def __post_init__(self) -> None:
        self.template = ChatTemplate(self.tokenizer, self.now)
        self._end_of_turn = str(self.tokenizer.decode([self.eod_token_id]))
        self._added_ids = frozenset(self.tokenizer.added_tokens_decoder)
        self._effective_parts: set[tuple[str, str, bool]] = set()
        """Parts of messages (role, key, whether of the first message) that are known to change the text."""
        self._misses: Counter[tuple[str, str, bool]] = Counter()

    def __call__(self, conversations: tuple[Conversation, ...]) -> EncodedBatch:
        left_out: Counter[str] = Counter()
        unread: Counter[str] = Counter()
        rendered: list[Rendered] = []
        for conversation in conversations:
            begins = conversation.answers[0] > 0 or render_opening_prompt(self.template, conversation) is not None
            documents = list(self._documents(conversation)) if begins else []
            if not documents or not documents[0].answers[0].start:
                left_out["an answer with nothing before it"] += 1
            elif not all(self._has_content(document) for document in documents):
                left_out["an answer that the chat template leaves empty"] += 1
            else:
                rendered += documents
                unread.update(self._unread(conversation))
        encoded = [document for part in rendered for document in self._encode(part)]
        return EncodedBatch(
            len(conversations), encoded, sum(len(part.text.encode()) for part in rendered), left_out, unread
        )

    def _documents(self, conversation: Conversation) -> Iterator[Rendered]:
        """Yield one document if the template only ever appends to what it has rendered, else one per answer.

        Templates that drop the reasoning of earlier turns are of the second kind: each answer was given to a history
        without it.
        """
        # For each answer: the text that asks for it, and the text that includes it.
        pairs = [
            (self._render(conversation, index, True), self._render(conversation, index + 1, False))
            for index in conversation.answers
        ]
        rendered = []
        for prompt, answered in pairs:
            if not answered.startswith(prompt):
                raise UserError(
                    f"{conversation.where}: the chat template's generation prompt is not what it writes before an "
                    "answer; correct its add_generation_prompt"
                )
            # What stands after the end of the turn belongs to the next prompt, or ends the whole text.
            end = answered.rfind(self._end_of_turn, len(prompt))
            answered = answered if end < 0 else answered[: end + len(self._end_of_turn)]
            rendered.append(Rendered(answered, [AnswerSpan(len(prompt), len(answered))]))
        if all(
            later.text[: later.answers[0].start].startswith(earlier.text) for earlier, later in pairwise(rendered)
        ):
            yield Rendered(rendered[-1].text, [answer for part in rendered for answer in part.answers])
        else:
            yield from rendered

    def _has_content(self, document: Rendered) -> bool:
        texts = (document.text[answer.start : answer.end] for answer in document.answers)
        return all(text.removesuffix(self._end_of_turn).strip() for text in texts)

    def _unread(self, conversation: Conversation) -> Iterator[str]:
        """Yield the parts of messages that leave the text as it is, though the template names their keys.

        Examples are the content of a role that it does not know, and a ``name`` where it reads that of a tool.
        """
        for index, message in enumerate(conversation.messages):
            for key, value in message.items():
                part = (str(message["role"]), key, index == 0)
                if (
                    key == "role"
                    or not value
                    or part in self._effective_parts
                    or not names(self.template.source, key)
                ):
                    continue
                if self._misses[part] < _TRIES and self._changes_text(conversation, index, key):
                    self._effective_parts.add(part)
                else:
                    self._misses[part] += 1
                    yield f"{key} of role '{part[0]}'"

    def _changes_text(self, conversation: Conversation, index: int, key: str) -> bool:
        """Return whether the text changes with a part of a message, where an answer is the last one."""
        messages = list(conversation.messages)
        messages[index] = {name: value for name, value in messages[index].items() if name != key}
        if key == "content":
            messages[index]["content"] = ""
        count = index + 1 if messages[index]["role"] == "assistant" else len(messages)
        try:
            before = self._render(conversation, count, False)
            return before != self._render(replace(conversation, messages=messages), count, False)
        except UserError:  # the template asks for it
            return True

    def _render(self, conversation: Conversation, count: int, add_generation_prompt: bool) -> str:
        """Render the first ``count`` messages."""
        try:
            return self.template(conversation.messages[:count], add_generation_prompt, conversation.tools)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from None

    def _encode(self, document: Rendered) -> Iterator[EncodedDocument]:
        """Tokenize a document and cut it; one per answer where a border is inside a token."""
        ids, starts = self._tokens(document.text)
        borders = [self._border(document.text, ids, starts, answer.start) for answer in document.answers]
        if None not in borders:
            cuts = [border for border in borders if border is not None]
            yield self._cut(ids, cuts, [bisect_left(starts, answer.end) for answer in document.answers])
        elif len(document.answers) > 1:
            for answer in document.answers:
                yield from self._encode(Rendered(document.text[: answer.end], [answer]))
        else:
            (answer,) = document.answers
            prompt, _ = self._tokens(document.text[: answer.start])
            ids = prompt + self._continuation(document.text[answer.start :])
            yield self._cut(ids, [len(prompt)], [len(ids)])

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and the character that each begins with."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]

    def _border(self, text: str, ids: list[int], starts: list[int], end: int) -> int | None:
        """Return the number of tokens before a character, or None if they are not what the text before it has alone.

        Only what follows the last added token can differ: nothing is merged across one.
        """
        count = bisect_left(starts, end)
        first = next((index for index in range(count - 1, 0, -1) if ids[index] in self._added_ids), 0)
        return count if self._tokens(text[starts[first] : end])[0] == ids[first:count] else None

    def _continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another one, without a space that a tokenizer puts before texts."""
        for before in ("\n", "a", "0", "."):
            ids, starts = self._tokens(before + text)
            border = self._border(before + text, ids, starts, len(before))
            if border is not None:
                return ids[border:]
        return self._tokens(text)[0]

    def _cut(self, ids: list[int], borders: list[int], ends: list[int]) -> EncodedDocument:
        """Cut ids into prompts and answers, and end each answer that lacks it with the end of a turn."""
        tokens: list[int] = []
        lengths: list[int] = []
        start = 0
        for border, end in zip(borders, ends, strict=True):
            answer = ids[border:end]
            if answer[-1:] != [self.eod_token_id]:
                answer = [*answer, self.eod_token_id]
            tokens += ids[start:border] + answer
            lengths += [border - start, len(answer)]
            start = end
        return EncodedDocument(np.array(tokens, dtype=np.int32), lengths)


def render_opening_prompt(template: ChatTemplate, conversation: Conversation) -> str | None:
    """Render the prompt of an answer that opens a conversation; None where the template needs a message first."""
    try:
        return template([], tools=conversation.tools)
    except UserError:
        return None


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase", token: str | None) -> int:
    """Return the id that ends every answer.

    Args:
        tokenizer: A tokenizer with a chat template.
        token: Its text; None for what the template ends a turn with, or else for the tokenizer's end-of-sequence
            token.

    Raises:
        UserError: ``token`` is not in the vocabulary, or there is no template, or no token that could end an answer.
    """
    end = template_end_of_turn(tokenizer, ChatTemplate(tokenizer)) if token is None else None
    if end is None:
        end = end_of_document_id(tokenizer, token)
    if (added := tokenizer.added_tokens_decoder.get(end)) and added.single_word:
        raise UserError(
            f"'{added.content}' ends an answer, but the tokenizer in '{tokenizer.name_or_path}' does not read it "
            "after a letter; remove its single_word"
        )
    return end


def template_end_of_turn(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> int | None:
    """Return the added token that a template ends an answer with, None where it writes none or takes no answers.

    It follows an answer whether or not another turn does; a token that only ends the whole text does not count.
    """
    said = "An answer."
    talk = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": said}]
    try:
        followed = last = template(talk, add_generation_prompt=False)
    except UserError:
        return None
    with contextlib.suppress(UserError):  # a template of one question and one answer
        followed = template([*talk, {"role": "user", "content": "Another one?"}], add_generation_prompt=False)
    common = takewhile(lambda pair: pair[0] == pair[1], zip(last, followed, strict=False))
    _, answer, after = "".join(character for character, _ in common).rpartition(said)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if answer else []
    ends = [int(id) for id in ids if id in tokenizer.added_tokens_decoder]
    return ends[-1] if ends else None
