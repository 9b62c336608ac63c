"""``nemodiff generate CHECKPOINT PROMPT``."""

import argparse

from nemodiff_train.decoding.options import add_decoding_arguments, check_options, decoding_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--mode", default="linear", help="ar, diffusion, linear or quadratic (%(default)s)")
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation, and what it cost."""
    from nemodiff_train.host import prepare

    check_options(arguments)
    prepare()
    from nemodiff_train.console import console, is_main_process
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.loading import open_model

    opened = open_model(arguments.checkpoint, modes=(arguments.mode,), **decoding_options(arguments))
    prompt = opened.tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"]
    (generation,), session = decode(opened.model, [prompt], arguments.mode, opened.settings)
    if is_main_process():
        print(opened.settings.text(generation.tokens))
        forwards = session.calls(0)
        console.print(
            f"[dim]{len(generation.tokens)} tokens in {forwards} forwards "
            f"({dict(session.forwards[0])}): {len(generation.tokens) / forwards:.2f} tokens per forward[/dim]"
        )
