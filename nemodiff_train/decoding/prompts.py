"""A prompt as token ids."""

from typing import Any

from nemodiff_train.data.chat import render


def prompt_tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Encode a prompt.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: The prompt.
        chat: Put it into the tokenizer's chat template, as what a user says.

    Raises:
        UserError: The tokenizer has no chat template, or one that does not take the prompt.
    """
    if chat:
        text = render(tokenizer, [{"role": "user", "content": text}], True, "the prompt")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
