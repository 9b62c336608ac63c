"""Encode conversations through the tokenizer's own chat template.

The sequences of a document alternate between prompt and answer. A prompt is the template's text up to where an answer
is asked for, so that training reads exactly what decoding reads.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from nemodiff_train.data.columns import Conversation
from nemodiff_train.data.encode import EncodedBatch, EncodedDocument
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import end_of_document_id
from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[str]
"""Texts of a document's sequences: prompt, answer, prompt, answer, ..."""


@dataclass(frozen=True)
class ChatEncoder:
    """Turn conversations into documents of turns; every answer ends with ``eod_token_id``, the end of a turn."""

    tokenizer: "PreTrainedTokenizerBase"
    eod_token_id: int

    def __call__(self, conversations: tuple[Conversation, ...]) -> EncodedBatch:
        documents = [turns for conversation in conversations for turns in self._documents(conversation)]
        texts = [text for turns in documents for text in turns]
        ids = iter(
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        )
        encoded = [self._encode([next(ids) for _ in turns]) for turns in documents]
        return EncodedBatch(len(conversations), encoded, sum(len(text.encode()) for text in texts))

    def _documents(self, conversation: Conversation) -> Iterator[Turns]:
        """Yield one document if the template only ever appends to what it has rendered, else one per answer.

        Templates that drop the reasoning of earlier turns are of the second kind: each answer was given to a history
        without it.
        """
        # For each answer: the text that asks for it, and the text that includes it.
        rendered = [
            (self._render(conversation, index, True), self._render(conversation, index + 1, False))
            for index, message in enumerate(conversation.messages)
            if message["role"] == "assistant"
        ]
        for prompt, answered in rendered:
            if not answered.startswith(prompt):
                raise UserError(
                    f"{conversation.where}: the chat template asks for an answer with other words than it begins one "
                    "with; correct its add_generation_prompt"
                )
        if all(later[0].startswith(earlier[1]) for earlier, later in pairwise(rendered)):
            edges = [0, *(len(text) for pair in rendered for text in pair)]
            yield [rendered[-1][1][start:end] for start, end in pairwise(edges)]
        else:
            yield from ([prompt, answered[len(prompt) :]] for prompt, answered in rendered)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)  # has a process, so each worker needs one of its own

    def _render(self, conversation: Conversation, count: int, add_generation_prompt: bool) -> str:
        """Render the first ``count`` messages."""
        try:
            return self._template(conversation.messages[:count], add_generation_prompt)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from None

    def _encode(self, turns: list[list[int]]) -> EncodedDocument:
        """Cut every answer after its end of turn; the template's text after that belongs to the next prompt."""
        sequences: list[list[int]] = []
        rest: list[int] = []
        for number, ids in enumerate(turns):
            if number % 2 == 0:
                sequences.append(rest + ids)
                continue
            end = len(ids) - ids[::-1].index(self.eod_token_id) if self.eod_token_id in ids else None
            sequences.append(ids[:end] if end else [*ids, self.eod_token_id])
            rest = ids[end:] if end else []
        lengths = [len(sequence) for sequence in sequences]
        return EncodedDocument(np.array([i for ids in sequences for i in ids], dtype=np.int32), lengths)


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase", token: str | None) -> int:
    """Return the id that ends every answer.

    Args:
        tokenizer: A tokenizer with a chat template.
        token: Its text; None for the last special token that the template puts after an answer, or else for the
            tokenizer's end-of-sequence token.

    Raises:
        UserError: ``token`` is not in the vocabulary, there is no template, or no token that could end an answer.
    """
    if token is None:
        template, question = ChatTemplate(tokenizer), {"role": "user", "content": "a"}
        prompt = template([question])
        answered = template([question, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
        template.close()
        ids = tokenizer(answered[len(prompt) :], add_special_tokens=False)["input_ids"]
        special = {id for id, added in tokenizer.added_tokens_decoder.items() if added.special}
        if ends := [id for id in ids if id in special]:
            return int(ends[-1])
    return end_of_document_id(tokenizer, token)


def template_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 (hex) of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
