"""``nemodiff convert import|export SOURCE OUTPUT``."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "direction",
        choices=("import", "export"),
        help="import: Hugging Face to Megatron; export: Megatron to Hugging Face",
    )
    parser.add_argument("source", help="Hugging Face directory or name (import), Megatron checkpoint (export)")
    parser.add_argument("output", help="directory to create; it must not exist yet")
    parser.add_argument(
        "--format",
        choices=("ar", "tri-mode"),
        default="ar",
        help="of an export: ar, the family's own; tri-mode, with code that decodes in every mode (default: ar)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert; the output directory appears complete or not at all."""
    from nemodiff_train.host import prepare

    prepare()
    from nemodiff_train.conversion.huggingface import export_checkpoint, import_checkpoint

    if arguments.direction == "import":
        import_checkpoint(arguments.source, arguments.output)
    else:
        export_checkpoint(arguments.source, arguments.output, arguments.format)
