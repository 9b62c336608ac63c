"""``nemodiff eval CHECKPOINT --task TASK --output DIRECTORY``."""

import argparse
from pathlib import Path

from nemodiff_train.console import console, is_main_process
from nemodiff_train.decoding.options import add_decoding_arguments, check_options, decoding_options
from nemodiff_train.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    parser.add_argument("--task", default="arithmetic", help="a built-in task, or a JSONL file of prompt and answer")
    parser.add_argument("--scorer", default="numeric", help="for a file: numeric, exact or regex")
    parser.add_argument("--pattern", help="the regular expression of --scorer regex")
    parser.add_argument("--count", type=int, help="prompts to take (a built-in task: 200)")
    parser.add_argument("--modes", default="ar,diffusion,linear", help="comma-separated (default: %(default)s)")
    parser.add_argument("--thresholds", default="", help="further diffusion thresholds, comma-separated")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts decoded together (%(default)s)")
    parser.add_argument(
        "--output", required=True, help="folder for report.html, metrics.json, metrics.csv and records.jsonl"
    )
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table, write the report."""
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.evaluation.files import usable_directory
    from nemodiff_train.evaluation.tasks import load_task
    from nemodiff_train.host import prepare

    task = load_task(arguments.task, scorer=arguments.scorer, pattern=arguments.pattern, count=arguments.count)
    thresholds = _numbers(arguments.thresholds)
    modes = tuple(arguments.modes.split(","))
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; it must be at least 1")
    check_options(arguments)
    for threshold in thresholds:
        DecodingSettings(threshold=threshold)  # refuses what is no probability
    prepare()
    from nemodiff_train.decoding.loading import open_checkpoint, open_model
    from nemodiff_train.evaluation.report import write_report
    from nemodiff_train.evaluation.run import Plan, evaluate
    from nemodiff_train.evaluation.table import print_table

    open_checkpoint(arguments.checkpoint)  # refused before the output folder is made
    usable_directory(Path(arguments.output))
    opened = open_model(arguments.checkpoint, modes=modes, **decoding_options(arguments))
    plan = Plan(modes=modes, thresholds=thresholds, batch_size=arguments.batch_size)
    evaluation = evaluate(opened, task, plan, arguments.checkpoint)
    if is_main_process():
        report = write_report(Path(arguments.output), evaluation)
        print_table(evaluation)
        console.print(f"report: [bold]{report}[/bold]")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise UserError(f"--thresholds '{text}' is not a list of numbers such as 0.5,0.7,0.9") from None
