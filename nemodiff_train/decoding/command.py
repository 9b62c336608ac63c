"""``nemodiff generate CHECKPOINT PROMPT``."""

import argparse
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    from nemodiff_train.evaluation.command import add_decoding_arguments

    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--mode", default="linear", help="ar, diffusion or linear (%(default)s)")
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation, and what it cost."""
    from nemodiff_train.console import console, is_main_process
    from nemodiff_train.decoding.decode import check_mode, decode

    model, tokenizer, settings = load(arguments, lambda model: check_mode(model, arguments.mode))
    prompt = tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"]
    (generation,), session = decode(model, [prompt], arguments.mode, settings)
    if is_main_process():
        print(tokenizer.decode(generation.tokens, skip_special_tokens=True))
        forwards = session.calls(0)
        console.print(
            f"[dim]{len(generation.tokens)} tokens in {forwards} forwards "
            f"({dict(session.forwards[0])}): {len(generation.tokens) / forwards:.2f} tokens per forward[/dim]"
        )


def load(arguments: argparse.Namespace, check: Callable[[Any], object]) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and how to decode, from the arguments of ``eval`` and ``generate``.

    Args:
        check: Called with the checkpoint's configuration before the weights are loaded; raises what is
            wrong with the arguments.

    Raises:
        UserError: No checkpoint, or settings that cannot be.
    """
    from nemodiff_train.host import prepare

    prepare()
    from nemodiff_train.console import console, quiet
    from nemodiff_train.conversion.huggingface import tokenizer_directory
    from nemodiff_train.data.tokenizer import load_tokenizer
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.decoding.loading import load_for_decoding, open_checkpoint

    provider = open_checkpoint(arguments.checkpoint)
    check(provider)
    tokenizer = load_tokenizer(str(tokenizer_directory(arguments.checkpoint)))
    settings = DecodingSettings(
        max_new_tokens=arguments.max_new_tokens,
        block_size=arguments.block_size or provider.block_size,
        threshold=arguments.threshold,
        stop_token_ids=stop_tokens(provider, tokenizer),
    )
    with quiet(), console.status(f"loading {arguments.checkpoint}"):
        model = load_for_decoding(arguments.checkpoint, arguments.tensor_parallel)
    return model, tokenizer, settings


def stop_tokens(provider: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those the model's configuration names."""
    found = {tokenizer.eos_token_id}
    for source in (provider.hf_config, provider.hf_generation_config):
        named = source.get("eos_token_id")
        found.update(named if isinstance(named, list) else [named])
    return frozenset(token for token in found if token is not None)
