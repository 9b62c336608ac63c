"""The options that name inputs, and what is read of them, the same for every verb that takes records."""

import argparse


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`~nemodiff_train.data.inputs.InputOptions` to a verb."""
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="text file (one document), .jsonl, .json, .parquet, a directory of these, or a Hugging Face data set "
        "(owner/name or owner/name:config)",
    )
    parser.add_argument("--text-field", metavar="NAME", help="field with the text (default text)")
    parser.add_argument("--chat", action="store_true", help="records are conversations, for fine-tuning")
    parser.add_argument("--messages-field", metavar="NAME", help="with --chat (default messages)")
    parser.add_argument("--prompt-field", metavar="NAME", help="field with a single prompt")
    parser.add_argument("--answer-field", metavar="NAME", help="with --prompt-field: the field with its answer")
    parser.add_argument("--split", help="split of a Hugging Face data set (default train)")
    parser.add_argument("--glob", metavar="PATTERN", help="files to take from directories (default all)")
