"""Render conversations through a model's chat template, in a process with limits.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and from Python, but not
from running without end or filling the memory; the limits of the process do.
"""

import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from nemodiff_train.errors import UserError

SECONDS = 10.0
"""Maximum time for one conversation."""
MEMORY = 1 << 30
"""Maximum bytes that rendering may take."""
CHARACTERS = 1 << 24
"""Maximum length of one rendered conversation."""

_START_SECONDS = 300.0  # a busy machine imports slowly
_MEMORY_PROBLEM = "it took too much memory"
_ORPHAN_SECONDS = 5.0  # after the limit; only a process whose parent has died reaches them


class ChatTemplate:
    """The chat template of a tokenizer, rendered in a process of its own.

    Args:
        tokenizer: A Hugging Face tokenizer.
        now: What the template's ``strftime_now`` writes; None for the time of each call.

    Raises:
        UserError: It has no chat template, or several without a default.
    """

    def __init__(self, tokenizer: Any, now: datetime | None = None) -> None:
        self._where = tokenizer.name_or_path
        self._now = now and now.isoformat()
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer in '{self._where}' has no chat template; do without one, or put a "
                "chat_template.jinja beside it"
            )
        try:
            template = tokenizer.get_chat_template()
            with_tools = tokenizer.get_chat_template(tools=[{}])  # another one, where there are several
        except ValueError as error:
            raise self._refusal(str(error).partition("\n")[0]) from None
        self.source = template if with_tools == template else f"{template}\n{with_tools}"
        """Text of the template, with that for conversations with tools."""
        self._templates = {False: template, True: with_tools}
        named = tokenizer.special_tokens_map.items()
        self._tokens = {name: token if isinstance(token, list) else str(token) for name, token in named}

    def __call__(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[object] | None = None,
    ) -> str:
        """Return one conversation as text.

        Args:
            messages: Each has ``role`` and ``content``.
            add_generation_prompt: Whether to end where the model is to answer.
            tools: Definitions of the tools that the model may call, as JSON schemas.

        Raises:
            UserError: The template is malformed, refuses the conversation, or takes too much time or memory.
        """
        request = {
            "template": self._templates[bool(tools)],
            "tokens": self._tokens,
            "now": self._now,
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        response = _renderer(os.getpid()).ask(request)
        if "text" not in response:
            raise self._refusal(response["problem"])
        return response["text"]

    def _refusal(self, problem: str) -> UserError:
        return UserError(
            f"the chat template in '{self._where}' cannot be used: {problem}; fix it, or do without a template"
        )


class _Renderer:
    """The process that renders all templates: begun with the first request, and anew after one that has ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, object]) -> dict[str, str]:
        """Return the ``text`` of a request, or the ``problem`` that it has."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            if "problem" in self._exchange({}, _START_SECONDS):
                raise UserError("the process that renders chat templates does not start here; see that it has memory")
        return self._exchange({**request, "seconds": SECONDS}, SECONDS)

    def _exchange(self, request: Mapping[str, object], seconds: float) -> dict[str, str]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        response = {"problem": "it ended the process"}
        try:
            process.stdin.write(json.dumps(request, default=str) + "\n")  # columns of Arrow hold dates
            process.stdin.flush()
            if not select.select([process.stdout], [], [], seconds)[0]:
                response = {"problem": f"it took more than {seconds:.0f} seconds"}
            elif line := process.stdout.readline():
                response = json.loads(line)
                if response.get("problem") != _MEMORY_PROBLEM:  # what it took is not given back
                    return response
        except BrokenPipeError:
            pass
        except KeyboardInterrupt:  # an answer to nobody would be taken for that to the next request
            self._stop(process)
            raise
        self._stop(process)
        return response

    def _stop(self, process: "subprocess.Popen[str]") -> None:
        self._process = None
        process.kill()
        process.communicate()


@functools.cache
def _renderer(process: int) -> _Renderer:
    """Return the renderer of a process, which its forks cannot share."""
    return _Renderer()


def _serve() -> None:
    """Answer each line of standard input; the first request is empty, and its answer says that the limits are set."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    while line := sys.stdin.readline():
        request = json.loads(line)
        response = _render(render_jinja_template, request) if request else {"text": ""}
        print(json.dumps(response), flush=True)


def _end_with_parent() -> None:
    """Wait until the parent's end of the pipe is closed, and end whatever is being rendered."""
    parent = select.poll()
    parent.register(sys.stdin, 0)  # a hang-up is reported without being asked for
    parent.poll()
    os._exit(1)


def _render(render: Callable[..., Any], request: dict[str, Any]) -> dict[str, str]:
    # The alarm is not caught, so it ends the process even inside one endless operation of a killed parent.
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _ORPHAN_SECONDS)
    clock = {"strftime_now": datetime.fromisoformat(request["now"]).strftime} if request["now"] else {}
    try:
        texts, _ = render(
            [request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            **request["tokens"],
            **clock,
        )
    except MemoryError:
        return {"problem": _MEMORY_PROBLEM}
    except Exception as error:  # a program can raise anything
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(texts[0]) > CHARACTERS:
        return {"problem": f"its text has {len(texts[0]):,} characters"}
    return {"text": texts[0]}


if __name__ == "__main__":
    _serve()
