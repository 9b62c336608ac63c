"""Conversations as a model's chat template writes them, rendered at arm's length.

A chat template is a program that comes with a model.  Jinja's sandbox keeps it from files and from Python, but not
from running for ever or filling the memory; a process of its own, with limits, does.
"""

import multiprocessing
import resource
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from nemodiff_train.errors import UserError

SECONDS = 10.0
"""For one conversation."""
MEMORY = 1 << 30
"""Bytes that rendering may take."""
CHARACTERS = 1 << 24
"""Of one rendered conversation."""

_START_SECONDS = 300.0  # a busy machine imports slowly


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Raises:
        UserError: It has no chat template, or several and none of them is the default.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in '{tokenizer.name_or_path}' has no chat template; do without one, or put a "
                "chat_template.jinja beside it"
            )
        try:
            self._template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(f"the tokenizer in '{tokenizer.name_or_path}': {str(error).splitlines()[0]}") from None
        named = tokenizer.special_tokens_map.items()
        self._tokens = {name: token if isinstance(token, list) else str(token) for name, token in named}
        self._where = tokenizer.name_or_path
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """One conversation as text.

        Args:
            messages: Each with ``role`` and ``content``.
            add_generation_prompt: End where the model is to answer.

        Raises:
            UserError: The template is malformed, refuses the conversation, or takes too much time or memory.
        """
        if self._process is None:
            self._start()
        self._connection.send((list(messages), add_generation_prompt))
        good, text = self._receive(SECONDS)
        if not good:
            raise self._refusal(text)
        return text

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks that Megatron's threads hold
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._template, self._tokens), daemon=True)
        self._process.start()
        theirs.close()
        self._receive(_START_SECONDS)

    def _receive(self, seconds: float) -> tuple[bool, str]:
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            problem = f"it took more than {seconds:.0f} seconds"
        except (EOFError, OSError):
            problem = "it took more memory than there is"
        self.close()
        raise self._refusal(problem)

    def _refusal(self, problem: str) -> UserError:
        return UserError(f"the chat template in '{self._where}' cannot be used: {problem}")


def _serve(connection: Connection, template: str, tokens: dict[str, Any]) -> None:
    """Answer every conversation with (True, text) or (False, what is wrong)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    connection.send((True, ""))
    while True:
        try:
            messages, prompt = connection.recv()
        except EOFError:
            return
        try:
            texts, _ = render_jinja_template([messages], None, None, template, add_generation_prompt=prompt, **tokens)
            good, text = len(texts[0]) <= CHARACTERS, texts[0]
            answer = (good, text if good else f"its text has {len(text):,} characters")
        except MemoryError:
            answer = (False, "it took too much memory")
        except Exception as error:  # whatever a program can do wrong
            answer = (False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        connection.send(answer)
