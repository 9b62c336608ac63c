"""Conversations to token ids, through the tokenizer's own chat template.

A document's sequences alternate: what the model is given, what it says, what it is given next ...  A prompt is what
the template renders when an answer is asked for, so that training reads what decoding reads.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nemodiff_train.data.columns import Conversation
from nemodiff_train.data.encode import EncodedBatch, EncodedDocument
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import end_of_document_id
from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[str]
"""Texts of a document's sequences: prompt, answer, prompt, answer ..."""


@dataclass(frozen=True)
class ChatEncoder:
    """Turns conversations into documents of turns; every answer ends with ``eod_token_id``, the end of a turn."""

    tokenizer: "PreTrainedTokenizerBase"
    eod_token_id: int

    def __call__(self, conversations: tuple[Conversation, ...]) -> EncodedBatch:
        documents = [turns for each in conversations for turns in self._documents(each)]
        texts = [text for turns in documents for text in turns]
        ids = iter(
            self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        )
        encoded = [self._encoded([next(ids) for _ in turns]) for turns in documents]
        return EncodedBatch(len(conversations), encoded, sum(len(text.encode()) for text in texts))

    def _documents(self, conversation: Conversation) -> Iterator[Turns]:
        """One document where the template only ever adds to what it has rendered; else one for each answer.

        Templates that leave out the reasoning of earlier turns are of the second kind: each answer was given to a
        history without it.
        """
        messages = conversation.messages
        said = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        rendered = [
            (self._render(conversation, end, True), self._render(conversation, end + 1, False)) for end in said
        ]
        for prompt, whole in rendered:
            if not whole.startswith(prompt):
                raise UserError(
                    f"{conversation.where}: the chat template asks for an answer with other words than it begins one "
                    "with; correct its add_generation_prompt"
                )
        if all(later[0].startswith(earlier[1]) for earlier, later in pairwise(rendered)):
            edges = [0, *(len(text) for pair in rendered for text in pair)]
            yield [rendered[-1][1][start:end] for start, end in pairwise(edges)]
        else:
            yield from ([prompt, whole[len(prompt) :]] for prompt, whole in rendered)

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)  # has a process, so that each worker needs one of its own

    def _render(self, conversation: Conversation, messages: int, opens: bool) -> str:
        try:
            return self._template(conversation.messages[:messages], opens)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from None

    def _encoded(self, turns: list[list[int]]) -> EncodedDocument:
        """Cut every answer behind its end of turn; what the template writes behind it is given, not said."""
        sequences: list[list[int]] = []
        rest: list[int] = []
        for place, ids in enumerate(turns):
            if place % 2 == 0:
                sequences.append(rest + ids)
                continue
            end = len(ids) - ids[::-1].index(self.eod_token_id) if self.eod_token_id in ids else None
            sequences.append(ids[:end] if end else [*ids, self.eod_token_id])
            rest = ids[end:] if end else []
        lengths = [len(sequence) for sequence in sequences]
        return EncodedDocument(np.array([i for each in sequences for i in each], dtype=np.int32), lengths)


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase", token: str | None) -> int:
    """The id that ends every answer: ``token``'s, else the last special token that the template puts behind one.

    A template that puts none there gets the tokenizer's end-of-sequence token.

    Raises:
        UserError: ``token`` is not in the vocabulary, there is no template, or nothing that could end an answer.
    """
    if token is None:
        template, asked = ChatTemplate(tokenizer), [{"role": "user", "content": "a"}]
        prompt, whole = template(asked), template([*asked, {"role": "assistant", "content": "b"}], False)
        template.close()
        ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        special = {id for id, added in tokenizer.added_tokens_decoder.items() if added.special}
        if found := [id for id in ids if id in special]:
            return int(found[-1])
    return end_of_document_id(tokenizer, token)


def template_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of the chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
