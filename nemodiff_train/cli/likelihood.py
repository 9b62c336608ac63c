"""``nemodiff likelihood CHECKPOINT TEXT ...``."""

import argparse
import json
from pathlib import Path

from nemodiff_train.cli.ranks import at_least_1
from nemodiff_train.console import console
from nemodiff_train.data.columns import TextColumn
from nemodiff_train.data.sources import documents, resolve
from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.settings import check_scoring
from nemodiff_train.files import check_can_be_made, usable_directory, write_atomic
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    parser.add_argument(
        "input", nargs="+", metavar="TEXT", help="text, JSONL or Parquet files, or directories of them"
    )
    parser.add_argument("--text-field", default="text", help="field of a record (%(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per sample (%(default)s)")
    parser.add_argument("--draws", type=int, default=8, help="noise draws per sample (%(default)s)")
    parser.add_argument("--batch-size", type=at_least_1, default=8, help="samples scored together (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument("--tensor-parallel", type=at_least_1, default=1, help="processes that share each layer")
    parser.add_argument("--output", help="JSON file for the figures")


def run(arguments: argparse.Namespace) -> None:
    """Print the figures, and write them where asked."""
    output = Path(arguments.output) if arguments.output else None
    if output:  # before the work, which takes hours on a large corpus
        if output.is_dir():
            raise UserError(f"--output {output}: a folder; name a JSON file")
        check_can_be_made(output.parent)
    sources = resolve(arguments.input, TextColumn(arguments.text_field), "train", "*")
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    check_scoring(checkpoint.run_config["model"], arguments.length, arguments.draws, arguments.seed)
    init_runtime()
    from nemodiff_train.evaluation.likelihood import likelihood
    from nemodiff_train.model.loading import computing_dtype, load_model

    loaded = load_model(checkpoint, tensor_parallel=arguments.tensor_parallel, dtype=computing_dtype())
    result = likelihood(
        loaded.chunks,
        (loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents(sources)),
        length=arguments.length,
        draws=arguments.draws,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    if not is_main_process():
        return
    if output:
        usable_directory(output.parent)
        write_atomic(output, json.dumps(result.figures(), indent=2) + "\n")
    if result.ar_loss is not None:
        console.print(f"AR          {result.ar_loss:.4f} nats per token, perplexity {result.ar_perplexity:.3f}")
    error = f" ± {result.diffusion_error:.4f}" if result.draws > 1 else ""
    draws = f"{result.draws} draw{'s' if result.draws > 1 else ''}"
    console.print(
        f"diffusion   {result.diffusion_loss:.4f}{error} nats per token at most ({draws}), "
        f"perplexity {result.diffusion_perplexity:.3f}"
    )
    console.print(f"{result.tokens} tokens", style="dim")
