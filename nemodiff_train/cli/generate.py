"""``nemodiff generate CHECKPOINT PROMPT``."""

import argparse
import sys
from typing import TYPE_CHECKING

from nemodiff_train.cli.options import add_decoding_arguments, check_options, decoding_options
from nemodiff_train.console import console
from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import UserError, escape_controls
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime import init_runtime

if TYPE_CHECKING:
    from nemodiff_train.decoding.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--mode", default="linear", help="ar, diffusion, linear, tree or quadratic (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument(
        "--infill", action="store_true", help="fill the mask tokens in the prompt instead of continuing it"
    )
    parser.add_argument(
        "--revise", type=float, metavar="P", help="decode again the tokens whose AR probability is below P"
    )
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation, and what it cost."""
    if arguments.infill and arguments.revise is not None:
        raise UserError("--infill and --revise are two things to do with a text; give one of them")
    if arguments.revise is not None and not 0 < arguments.revise <= 1:
        raise UserError(f"--revise is {arguments.revise}; it must be above 0 and at most 1")
    check_options(arguments)
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    init_runtime()
    from nemodiff_train.decoding.decode import decode, fill
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.decoding.prompts import encode_prompts

    mode = "diffusion" if arguments.infill else arguments.mode
    modes = (mode, "diffusion") if arguments.revise is not None else (mode,)
    loaded = load_decoding_model(checkpoint, modes=modes, **decoding_options(arguments))
    prompts = encode_prompts(loaded.tokenizer, [arguments.prompt], arguments.chat)
    (prompt,), settings = prompts.tokens, loaded.settings.stopping_at(prompts.end_of_turn)
    if arguments.infill:
        filled, session = fill(loaded.model, prompt, settings)
        _print(str(loaded.tokenizer.decode(filled.tokens)), len(filled.positions), session)
        return
    (generation,), session = decode(loaded.model, [prompt], mode, settings)
    _print(settings.text(generation.tokens), len(generation.tokens), session)
    if arguments.revise is not None:
        text = [*prompt, *generation.tokens]
        revised, session = fill(loaded.model, text, settings, len(prompt), arguments.revise)
        _print(settings.text(revised.tokens[len(prompt) :]), len(revised.positions), session)


def _print(text: str, tokens: int, session: "Session") -> None:
    if not is_main_process():
        return
    print(escape_controls(text) if sys.stdout.isatty() else text)
    forwards = session.calls(0)
    kinds = ", ".join(f"{count} {kind}" for kind, count in session.forwards[0].items())
    console.print(
        f"{tokens} tokens in {forwards} forwards ({kinds}): {tokens / forwards:.2f} tokens per forward",
        style="dim",
    )
