"""``nemodiff chat CHECKPOINT``: a conversation in the terminal, its tokens coloured by their forwards."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.text import Text

from nemodiff_train.cli.options import add_decoding_arguments, check_options, decoding_options
from nemodiff_train.console import PlainConsole, console
from nemodiff_train.distributed import world_size
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime import init_runtime

if TYPE_CHECKING:
    from nemodiff_train.data.template import ChatTemplate
    from nemodiff_train.decoding.generation import DecodingSettings, Generation
    from nemodiff_train.decoding.loading import DecodingModel

COMMANDS = "/mode NAME, /reset, /exit; Ctrl-C ends an answer, Ctrl-D the conversation"
COLOURS = ("cyan", "yellow", "magenta", "green", "bright_blue", "bright_red")
"""Tokens of one forward have one of these, those of the next forward the next one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project, whose tokenizer has a chat template")
    parser.add_argument("--mode", default="linear", help="ar, diffusion, linear, tree or quadratic (%(default)s)")
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Answer each line of standard input, until it ends.

    Raises:
        UserError: The checkpoint cannot be talked to, or several processes were started.
    """
    check_options(arguments)
    if world_size() > 1 or arguments.tensor_parallel * arguments.pipeline_parallel > 1:
        raise UserError("a conversation runs in one process; use 'nemodiff generate' to decode with several")
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    init_runtime()
    from nemodiff_train.data.chat import template_end_of_turn
    from nemodiff_train.data.template import ChatTemplate
    from nemodiff_train.data.tokenizer import load_tokenizer
    from nemodiff_train.decoding.loading import load_decoding_model

    tokenizer = load_tokenizer(str(checkpoint.tokenizer_directory))
    template = ChatTemplate(tokenizer)  # refused before any weight is read
    end = template_end_of_turn(tokenizer, template)
    later = ["linear"] if arguments.drafter and arguments.mode != "tree" else []  # what '/mode' may ask for
    later += ["diffusion"] if arguments.sampler else []
    modes = tuple(dict.fromkeys((arguments.mode, *later)))
    loaded = load_decoding_model(checkpoint, modes=modes, **decoding_options(arguments))
    chat = Chat(replace(loaded, settings=loaded.settings.stopping_at(end)), template)
    chat.set_mode(arguments.mode)
    if PlainConsole().is_terminal:
        legend = " ".join(f"[{colour}]one[/{colour}]" for colour in COLOURS)
        console.print(Text.from_markup(f"tokens of one colour came with one forward: {legend}"))
    console.print(COMMANDS)
    _converse(chat)


def _converse(chat: "Chat") -> None:
    """Read lines until the input ends or ``/exit``."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (lets input() edit a line and bring back earlier ones)
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a TextIO here, whatever it is declared as
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print(f"\n{COMMANDS}")
            continue
        if line == "/exit":
            return
        try:
            words = line.split()
            if words == ["/reset"]:
                chat.messages.clear()
            elif words[:1] == ["/mode"] and len(words) == 2:
                chat.set_mode(words[1])
            elif line.startswith("/"):
                raise UserError(f"'{line}' is not a command; use {COMMANDS}")
            elif line:
                chat.answer(line)
        except UserError as error:
            console.print(str(error), style="red", soft_wrap=True)


@dataclass
class Chat:
    """A conversation."""

    loaded: "DecodingModel"
    template: "ChatTemplate"
    mode: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def set_mode(self, mode: str) -> None:
        """Answer in another mode from now on.

        Raises:
            UserError: There is no such mode, or the model cannot decode in it.
        """
        from nemodiff_train.decoding.decode import check_mode
        from nemodiff_train.decoding.pipeline import PipelineRunner

        runner = PipelineRunner(self.loaded.model)
        check_mode(runner.config, mode, runner.draft_kind)
        if mode == "oracle":
            raise UserError("mode 'oracle' decodes an answer before it looks for the way to it; use another one")
        self.mode = mode

    def answer(self, question: str) -> None:
        """Print the answer while it is decoded, and what it cost; Ctrl-C ends it.

        Raises:
            UserError: The conversation has become too long, or the template refuses it; the question is forgotten.
        """
        from nemodiff_train.decoding.decode import decode

        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.loaded.tokenizer(self.template(messages), add_special_tokens=False)["input_ids"]
        answer = AnswerPrinter(self.loaded.settings)
        settings = replace(self.loaded.settings, on_commit=answer)
        try:
            _, session = decode(self.loaded.model, [prompt], self.mode, settings)
        except KeyboardInterrupt:
            cost = f"ended after {len(answer.tokens)} tokens"
        else:
            forwards = session.calls(0)
            rate = len(answer.tokens) / forwards
            cost = f"{len(answer.tokens)} tokens in {forwards} forwards: {rate:.2f} tokens per forward"
        answer.end()
        console.print(f"{self.mode} \N{MIDDLE DOT} {cost}", style="dim")
        if answer.tokens:
            text = self.loaded.settings.text(answer.tokens).strip()
            self.messages = [*messages, {"role": "assistant", "content": text}]


class AnswerPrinter:
    """Prints the text of one answer as its tokens come, in the colours of their forwards where there is a terminal.

    Args:
        settings: Turn tokens into text.
    """

    def __init__(self, settings: "DecodingSettings") -> None:
        self.settings = settings
        self.tokens: Sequence[int] = ()
        self._printed, self._colour, self._step = "", -1, 0
        self._console = PlainConsole()

    def __call__(self, generation: "Generation") -> None:
        """Print what has been committed since the last call."""
        before, self.tokens = len(self.tokens), tuple(generation.tokens)
        for count in range(before, len(self.tokens)):
            if generation.steps[count] != self._step:
                self._step, self._colour = generation.steps[count], (self._colour + 1) % len(COLOURS)
            text = self.settings.text(self.tokens[: count + 1])
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else in the middle of a character
                self._print(text)

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._print(self.settings.text(self.tokens))
        self._console.print()

    def _print(self, text: str) -> None:
        new, self._printed = text[len(self._printed) :], text
        self._console.print(Text(new, style=COLOURS[self._colour]), end="", soft_wrap=True)
        self._console.file.flush()
