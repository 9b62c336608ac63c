"""Conversations as a model's chat template writes them, rendered at arm's length.

A chat template is a program that comes with a model.  Jinja's sandbox keeps it from files and from Python, but not
from running for ever or filling the memory; a process of its own, with limits, does.
"""

import json
import resource
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from nemodiff_train.errors import UserError

SECONDS = 10.0
"""For one conversation."""
MEMORY = 1 << 30
"""Bytes that rendering may take."""
CHARACTERS = 1 << 24
"""Of one rendered conversation."""

_START_SECONDS = 300.0  # a busy machine imports slowly
_ORPHAN_SECONDS = 5.0  # beyond the limit: only a process whose parent is gone lives to see them


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Raises:
        UserError: It has no chat template, or several and none of them is the default.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._where = tokenizer.name_or_path
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in '{self._where}' has no chat template; do without one, or put a "
                "chat_template.jinja beside it"
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise self._refusal(str(error).partition("\n")[0]) from None
        named = tokenizer.special_tokens_map.items()
        tokens = {name: token if isinstance(token, list) else str(token) for name, token in named}
        self._given = {"template": template, "tokens": tokens}
        self._process: subprocess.Popen[str] | None = None

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
        asked = {"messages": list(messages), "prompt": add_generation_prompt, "seconds": SECONDS}
        answer = self._ask({**self._given, **asked}, SECONDS)
        if "text" not in answer:
            raise self._refusal(answer["problem"])
        return answer["text"]

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._finish()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        # Python keeps a process that nobody has waited for, and its pipes, whatever becomes of this object.
        self._finish = weakref.finalize(self, _end, self._process)
        self._ask({}, _START_SECONDS)

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, str]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            in_time = bool(select.select([self._process.stdout], [], [], seconds)[0])
            line = self._process.stdout.readline() if in_time else ""
            problem = "it ended the process" if in_time else f"it took more than {seconds:.0f} seconds"
        except BrokenPipeError:
            problem = "it ended the process"
        if not line:
            self.close()
            raise self._refusal(problem)
        answer: dict[str, str] = json.loads(line)
        return answer

    def _refusal(self, problem: str) -> UserError:
        return UserError(f"the chat template in '{self._where}' cannot be used: {problem}")


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


def _serve() -> None:
    """Answer each line on standard input; the first is empty, and its answer says that the limits are set."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    while line := sys.stdin.readline():
        asked = json.loads(line)
        answer = _render(render_jinja_template, asked) if asked else {"text": ""}
        print(json.dumps(answer), flush=True)


def _render(render: Any, asked: dict[str, Any]) -> dict[str, str]:
    # The alarm is not caught, and so ends the process: nobody else would if the parent was killed meanwhile.
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"] + _ORPHAN_SECONDS)
    try:
        texts, _ = render(
            [asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=asked["prompt"],
            **asked["tokens"],
        )
    except MemoryError:
        return {"problem": "it took too much memory"}
    except Exception as error:  # whatever a program can do wrong
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(texts[0]) > CHARACTERS:
        return {"problem": f"its text has {len(texts[0]):,} characters"}
    return {"text": texts[0]}


if __name__ == "__main__":
    _serve()
