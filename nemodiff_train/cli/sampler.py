"""``nemodiff sampler CHECKPOINT --task TASK --output DIR``."""

import argparse
from dataclasses import replace
from pathlib import Path

from nemodiff_train.cli.ranks import add_model_parallel, at_least_1, check_world
from nemodiff_train.console import say
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.prompts import Prompt
from nemodiff_train.evaluation.records import read_jsonl
from nemodiff_train.evaluation.tasks import BUILT_IN, built_in_prompts
from nemodiff_train.files import check_free
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime import init_runtime
from nemodiff_train.sampler.description import HEAD_SIZE, LARGEST

SEED = 2
"""Seed of the problems, drawn from the training split; the demo's text and conversations have seeds 0 and 1."""
COUNT = 500
"""Number of prompts of a built-in task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project that has had a joint stage")
    parser.add_argument("--task", default="arithmetic", help="arithmetic, questions, or a JSONL file of prompts")
    parser.add_argument("--count", type=at_least_1, help=f"prompts to take (a built-in task: {COUNT})")
    parser.add_argument("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    parser.add_argument("--output", required=True, help="folder for the sampler; must not exist")
    parser.add_argument("--block-size", type=at_least_1, help="positions of a block (default: as trained)")
    parser.add_argument("--max-new-tokens", type=at_least_1, default=512, help="limit of an answer (%(default)s)")
    parser.add_argument(
        "--trajectories", type=at_least_1, default=2000, help="blocks to decode for training (%(default)s)"
    )
    parser.add_argument("--steps", type=at_least_1, default=500, help="optimizer steps (%(default)s)")
    parser.add_argument("--layers", type=at_least_1, default=4, help="layers of the network (%(default)s)")
    parser.add_argument("--width", type=at_least_1, default=384, help="width of the network (%(default)s)")
    parser.add_argument("--batch-size", type=at_least_1, default=64, help="blocks decoded together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling and of the network (%(default)s)")
    add_model_parallel(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train a sampler, say what it does on held-out blocks, and write it."""
    output = Path(arguments.output)
    check_free(output)
    _check_sizes(arguments)
    check_world(arguments)
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    texts = training_prompts(arguments.task, arguments.count)
    init_runtime()
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.decoding.prompts import encode_prompts
    from nemodiff_train.decoding.sampler_training import SamplerOptions, train_sampler
    from nemodiff_train.sampler.storage import write_sampler

    loaded = load_decoding_model(
        checkpoint,
        modes=("diffusion",),
        block_size=arguments.block_size,
        tensor_parallel=arguments.tensor_parallel,
        pipeline_parallel=arguments.pipeline_parallel,
        max_new_tokens=arguments.max_new_tokens,
    )
    prompts = encode_prompts(loaded.tokenizer, texts, arguments.chat)
    loaded = replace(loaded, settings=loaded.settings.stopping_at(prompts.end_of_turn))
    names = ("trajectories", "steps", "layers", "width", "batch_size", "seed")
    options = SamplerOptions(**{name: getattr(arguments, name) for name in names})
    trained = train_sampler(loaded, prompts.tokens, options, checkpoint, arguments.task)
    write_sampler(output, trained)
    description = trained.description
    say("held-out blocks: tokens per denoise forward, share of wrong tokens")
    for name, points in (("trained", description.trained), ("threshold", description.threshold_policy)):
        for point in points:
            say(f"  {name:9} {point.threshold:<5g} {point.tokens_per_forward:6.2f} {point.wrong:8.3%}")
    say(f"  oracle          {description.oracle:6.2f} {0:8.3%}")
    say(f"sampler: {output}, unmasks from {description.threshold:g} on unless --threshold says otherwise")


def _check_sizes(arguments: argparse.Namespace) -> None:
    """Refuse what no sampler can be trained with, before hours of decoding for it."""
    DecodingSettings(seed=arguments.seed, **({"block_size": arguments.block_size} if arguments.block_size else {}))
    for name, largest in LARGEST.items():
        if (getattr(arguments, name) or 0) > largest:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at most {largest}")
    if arguments.width % HEAD_SIZE:
        raise UserError(
            f"--width is {arguments.width}; it must be a multiple of {HEAD_SIZE}, the width of an attention head"
        )


def training_prompts(task: str, count: int | None) -> list[str]:
    """Return texts to continue, each once; those of a built-in task are in no evaluation of it.

    Args:
        task: ``arithmetic``, ``questions``, or a JSONL file of objects with a ``prompt``.
        count: Number to take, from the first; None for all of a file.

    Raises:
        UserError: There is no such task or file, or a line of it has no prompt.
    """
    if Path(task).suffix == ".jsonl" or Path(task).is_file():
        # A prompt that comes again could be both learned from and held out.
        return list(dict.fromkeys(row.prompt for row in read_jsonl(Path(task), Prompt)))[:count]
    if task not in BUILT_IN:
        raise UserError(f"unknown task '{task}'; known: {', '.join(BUILT_IN)}, or a .jsonl file of prompts")
    return [row.prompt for row in built_in_prompts(task, "train", count or COUNT, SEED)]
