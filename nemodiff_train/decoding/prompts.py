"""Prompts as token ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from nemodiff_train.data.template import ChatTemplate


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool) -> list[list[int]]:
    """Encode prompts.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: The prompts.
        chat: Put each into the tokenizer's chat template, as a user's message.

    Returns:
        Token ids of each prompt, without special tokens of the tokenizer's own.

    Raises:
        UserError: The tokenizer has no chat template, or one that cannot be used.
    """
    if chat:
        template = ChatTemplate(tokenizer)
        texts = [template([{"role": "user", "content": text}]) for text in texts]
        template.close()
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
