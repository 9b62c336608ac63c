"""``nemodiff convert import|export|verify|inspect``."""

import argparse
from pathlib import Path

from nemodiff_train.cli.ranks import add_extend, add_model_parallel, check_world
from nemodiff_train.errors import UserError
from nemodiff_train.files import check_free
from nemodiff_train.model.checkpoint import Checkpoint, Kind
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    _add_import(actions.add_parser("import", help="Hugging Face model to Megatron checkpoint"))
    _add_export(actions.add_parser("export", help="Megatron checkpoint to Hugging Face directory"))
    _add_verify(actions.add_parser("verify", help="compare two checkpoints, tensor by tensor and by their logits"))
    inspect = actions.add_parser("inspect", help="say what a directory holds, and what would load it")
    inspect.add_argument("path", help="Hugging Face directory or Megatron checkpoint")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="Hugging Face directory or name")
    parser.add_argument("output", help="folder to create; it must not exist yet")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--mask-token", metavar="TOKEN|ID", help="token of the vocabulary that is to be the mask token")
    mask.add_argument("--add-mask-token", metavar="TOKEN", help="token to add to the vocabulary as the mask token")
    add_model_parallel(parser)
    add_extend(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="Megatron checkpoint, or a drafter's; the newest iteration is taken")
    parser.add_argument("output", help="directory to create; it must not exist yet")
    parser.add_argument(
        "--format",
        choices=("ar", "nemotron", "sdar", "tri-mode"),
        help="ar: the AR family's own; nemotron: NemotronLabsDiffusion; sdar: SDAR, of a block-causal Qwen 3; "
        "tri-mode: with code that decodes in every mode; by default nemotron for a model that came as one, else ar",
    )
    parser.add_argument("--drafter", metavar="CHECKPOINT", help="drafter to put into OUTPUT/linear_spec_lora")
    parser.add_argument("--results", metavar="DIR", help="evaluation whose figures go into the card of tri-mode")
    parser.add_argument("--remote-code", metavar="DIR", help="directory with the Python files of --format nemotron")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    add_model_parallel(parser)
    add_extend(parser)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="Hugging Face directory or Megatron checkpoint")
    parser.add_argument("b", help="the other one")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of a weight (default: 0, bit for bit)"
    )
    parser.add_argument("--prompt", help="text whose logits are compared")
    add_extend(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert, compare or describe; an output appears complete or not at all.

    Returns:
        0, or 1 where ``verify`` finds a difference.
    """
    if arguments.action == "verify":
        return _verify(arguments)
    if arguments.action == "import":
        _import(arguments)
    elif arguments.action == "export":
        _export(arguments)
    else:
        from nemodiff_train.conversion.inspection import inspect

        inspect(arguments.path)
    return 0


def _import(arguments: argparse.Namespace) -> None:
    check_world(arguments)
    check_free(Path(arguments.output))
    if Checkpoint.find(arguments.source):
        raise UserError(f"'{arguments.source}' is a Megatron checkpoint already; import takes a Hugging Face model")
    init_runtime()
    from nemodiff_train.conversion.importing import import_checkpoint
    from nemodiff_train.model.hf_directory import HFDirectory

    import_checkpoint(
        HFDirectory.open(arguments.source),
        arguments.output,
        tensor_parallel=arguments.tensor_parallel,
        pipeline_parallel=arguments.pipeline_parallel,
        mask_token=arguments.mask_token,
        add_mask_token=arguments.add_mask_token,
    )


def _export(arguments: argparse.Namespace) -> None:
    check_world(arguments)
    check_free(Path(arguments.output))
    source = Checkpoint.open(arguments.source)
    if source.kind is Kind.DRAFTER:
        for option in ("remote_code", "drafter", "results"):
            if getattr(arguments, option):
                name = option.replace("_", "-")
                raise UserError(f"--{name} belongs to a model; a drafter is exported as a PEFT directory")
        init_runtime()
        from nemodiff_train.conversion.drafters import export_drafter

        export_drafter(source, arguments.output, arguments.format)
        return
    drafter = Checkpoint.open(arguments.drafter) if arguments.drafter else None
    init_runtime()
    from nemodiff_train.conversion.exporting import export_checkpoint

    export_checkpoint(
        source,
        arguments.output,
        format=arguments.format,
        remote_code=arguments.remote_code,
        drafter=drafter,
        results=arguments.results,
        max_shard_size=arguments.max_shard_size,
        tensor_parallel=arguments.tensor_parallel,
        pipeline_parallel=arguments.pipeline_parallel,
    )


def _verify(arguments: argparse.Namespace) -> int:
    if not arguments.tolerance >= 0:
        raise UserError(f"--tolerance is {arguments.tolerance}; use 0 or more")
    init_runtime()
    from nemodiff_train.conversion.verify import PROMPT, verify

    prompt = PROMPT if arguments.prompt is None else arguments.prompt
    equal = verify(arguments.a, arguments.b, tolerance=arguments.tolerance, prompt=prompt)
    return 0 if equal else 1
