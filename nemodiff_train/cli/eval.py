"""``nemodiff eval CHECKPOINT --task TASK --output DIRECTORY``."""

import argparse
from collections.abc import Callable
from pathlib import Path

from nemodiff_train.cli.options import add_decoding_arguments, check_options, decoding_options
from nemodiff_train.cli.ranks import at_least_1
from nemodiff_train.console import say
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.settings import EvaluationSettings
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.files import check_can_be_made, locked
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import identity
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    parser.add_argument("--task", default="arithmetic", help="a built-in task, or a JSONL file of prompt and answer")
    parser.add_argument("--scorer", default="numeric", help="for a file: numeric, exact or regex")
    parser.add_argument("--pattern", help="the regular expression of --scorer regex")
    parser.add_argument("--count", type=int, help="prompts to take (a built-in task: 200)")
    parser.add_argument("--data", help="a benchmark's rows: a JSONL or Parquet file, a folder, or a hub name")
    parser.add_argument("--run-code", action="store_true", help="run the programs that the model writes")
    parser.add_argument("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    parser.add_argument("--modes", default="ar,diffusion,linear", help="comma-separated (default: %(default)s)")
    parser.add_argument("--thresholds", default="", help="further diffusion thresholds, comma-separated")
    parser.add_argument("--block-sizes", default="", help="further block sizes, each at each threshold")
    parser.add_argument("--batch-size", type=at_least_1, default=32, help="prompts decoded together (%(default)s)")
    parser.add_argument("--output", required=True, help="folder for the report")
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate a checkpoint, print the table and write the report."""
    task = load_task(
        arguments.task,
        scorer=arguments.scorer,
        pattern=arguments.pattern,
        count=arguments.count,
        source=arguments.data,
        run_code=arguments.run_code,
    )
    thresholds = _numbers("--thresholds", arguments.thresholds, float, "0.5,0.7,0.9")
    block_sizes = _numbers("--block-sizes", arguments.block_sizes, int, "8,16,32")
    modes = tuple(dict.fromkeys(arguments.modes.split(",")))
    check_options(arguments)
    for threshold in thresholds:
        DecodingSettings(threshold=threshold)  # refuses what is not a probability
    for block_size in block_sizes:
        DecodingSettings(block_size=block_size)
    output = Path(arguments.output)
    check_can_be_made(output)
    if (output / "report.html").exists():
        raise UserError(f"'{output}' has a report already; name another --output, or remove it")
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    init_runtime()
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.evaluation.decode_task import evaluate
    from nemodiff_train.evaluation.unfinished import UnfinishedRecords
    from nemodiff_train.report.report import print_table, write_report

    options = decoding_options(arguments)
    loaded = load_decoding_model(checkpoint, modes=modes, **options)
    settings = EvaluationSettings(
        modes=modes,
        thresholds=thresholds,
        block_sizes=block_sizes,
        batch_size=arguments.batch_size,
        chat=arguments.chat,
    )
    decides = [part.iteration for part in (checkpoint, options["drafter"]) if part]
    decides += [Path(arguments.sampler)] if arguments.sampler else []
    weights = "\n".join(map(identity, decides))
    with locked(output), UnfinishedRecords(output, loaded, task, settings, weights) as unfinished:
        evaluation = evaluate(loaded, task, settings, arguments.checkpoint, unfinished=unfinished)
        if is_main_process():
            report = write_report(output, evaluation, loaded.settings.text)
            unfinished.remove()
            print_table(evaluation)
            say(f"report: {report}")


def _numbers[Number: (int, float)](
    option: str, text: str, kind: Callable[[str], Number], example: str
) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        raise UserError(f"{option} '{text}' is not a list of numbers such as {example}") from None
