"""``nemodiff convert export``: a Megatron checkpoint becomes a Hugging Face directory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemodiff_train.console import bytes_bar, console, quiet
from nemodiff_train.conversion.formats import FORMATS, code_files, copy_code, own_format
from nemodiff_train.conversion.importing import check_stages
from nemodiff_train.conversion.shards import ShardWriter
from nemodiff_train.conversion.weights import expected_shapes
from nemodiff_train.distributed import all_gather_object, barrier, global_rank, is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory, check_free
from nemodiff_train.model.bridges import auto_bridge
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.families import VOCABULARY_TENSORS, ar_settings, architecture, stored_name
from nemodiff_train.model.loading import load_for_decoding, model_of
from nemodiff_train.model.pretrained import config_from


def export_checkpoint(
    source: Checkpoint,
    output: str,
    *,
    format: str | None = None,
    remote_code: str | None = None,
    max_shard_size: str = "5GB",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> None:
    """Make a Hugging Face directory of a Megatron checkpoint.

    Args:
        source: A model's.
        output: Directory to create.
        format: A key of ``FORMATS``; None for the format that the model came in.
        remote_code: Directory with the Python files that the format is loaded by.
        max_shard_size: Largest weight file.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out.

    Raises:
        UserError: No checkpoint, existing output, or a format that cannot hold the model.
    """
    check_free(Path(output))
    provider = model_of(source)
    check_stages(provider, pipeline_parallel)
    name = format or own_format(provider)
    settings = FORMATS[name].settings(provider)
    if remote_code and not FORMATS[name].needs_code:
        raise UserError(f"--remote-code belongs to --format nemotron; --format {name} needs no code")
    code = code_files(settings, remote_code) if remote_code else []
    tokenizer = source.tokenizer_directory
    writer = _writer(settings, provider, Path(output), max_shard_size)
    with atomic_directory(Path(output)) as partial, quiet(), torch.no_grad():
        with console.status(f"loading {source.path}"):
            models = load_for_decoding(source, tensor_parallel, pipeline_parallel)
        writer.directory = partial
        _write_weights(models, settings, writer, f"exporting {source.path}")
        if is_main_process():
            _write_companions(partial, settings, provider.hf_generation_config, tokenizer)
            copy_code(code, partial)
            if finish := FORMATS[name].finish:
                finish(partial, settings)
    if is_main_process():
        console.print(f"exported [bold]{source.path}[/bold] to [bold]{output}[/bold]")
        if FORMATS[name].needs_code and not code:
            console.print(
                "[yellow]the directory is loaded by Python files of its publisher, which are not part of it; "
                "copy them beside the weights, or export with --remote-code[/yellow]"
            )


def _writer(settings: dict[str, Any], provider: Any, directory: Path, max_shard_size: str) -> ShardWriter:
    return ShardWriter(directory, expected_shapes(settings), provider.params_dtype, max_shard_size)


def tensors(models: list[Any], settings: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All weights by their names in a directory with this ``config.json``, each whole, on every rank.

    Args:
        models: This rank's chunks of a Megatron model.
        settings: The ``config.json``.

    Yields:
        Names and tensors on the CPU; also a tied output layer.
    """
    rows = ar_settings(settings)["vocab_size"]
    with_rows = {stored_name(architecture(settings), name) for name in VOCABULARY_TENSORS}
    for name, values in auto_bridge(config_from(settings)).export_hf_weights(models, cpu=True, show_progress=False):
        # Tensor-parallel ranks have equal shares of the vocabulary, so that there may be rows of no token.
        yield name, values[:rows] if name in with_rows else values


def _write_weights(models: list[Any], settings: dict[str, Any], writer: ShardWriter, description: str) -> None:
    if is_main_process():
        writer.set_parallelism()
    barrier()
    ranks = len(all_gather_object(None))
    with bytes_bar() as bar:
        task = bar.add_task(description, total=writer.total)
        for name, values in tensors(models, settings):
            if name not in writer.shapes:  # a tied output layer
                continue
            if writer.owner(name, ranks) == global_rank():
                writer.write(name, values)
            bar.advance(task, values.nbytes)
    checksums = {name: value for own in all_gather_object(writer.checksums) for name, value in own.items()}
    if is_main_process():
        writer.close(checksums)


def _write_companions(directory: Path, settings: dict[str, Any], generation: dict[str, Any], tokenizer: Path) -> None:
    for name, content in (("config.json", settings), ("generation_config.json", generation)):
        if content:
            (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    for file in sorted(tokenizer.iterdir()):
        shutil.copy2(file, directory / file.name)
