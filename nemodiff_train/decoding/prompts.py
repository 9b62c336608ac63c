"""Prompts as token ids, and what ends the answers to them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nemodiff_train.data.chat import template_end_of_turn
from nemodiff_train.data.template import ChatTemplate


@dataclass(frozen=True)
class Prompts:
    """Prompts of a task."""

    tokens: list[list[int]]
    """Token ids of each prompt, without special tokens of the tokenizer's own."""
    end_of_turn: int | None = None
    """Token that ends an answer besides the model's own: what the chat template ends a turn with."""


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool) -> Prompts:
    """Encode prompts.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The prompts.
        chat: Put each into the tokenizer's chat template, as a user's message.

    Raises:
        UserError: The tokenizer has no chat template, or one that cannot be used.
    """
    end = None
    if chat:
        template = ChatTemplate(tokenizer)
        texts = [template([{"role": "user", "content": text}]) for text in texts]
        end = template_end_of_turn(tokenizer, template)
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Prompts(tokens, end)
