"""``nemodiff convert export``: make a Hugging Face directory of a Megatron checkpoint."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from rich.text import Text
from torch import Tensor

from nemodiff_train.console import bytes_bar, console, quiet, say, warn
from nemodiff_train.conversion import automodel
from nemodiff_train.conversion.automodel.card import read_results, write_card
from nemodiff_train.conversion.drafters import DRAFTER_FOLDER, check_engine, write_drafter
from nemodiff_train.conversion.formats import FORMATS, code_files, default_format
from nemodiff_train.conversion.importing import check_stages
from nemodiff_train.conversion.shards import ShardWriter
from nemodiff_train.data.tokenizer import files_of_tokenizer
from nemodiff_train.data.tokenizer_files import copy_tokenizer, rename_for_transformers_4
from nemodiff_train.distributed import all_gather_object, barrier, global_rank, is_main_process, world_size
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory
from nemodiff_train.model.bridges import auto_bridge
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.draft_adapter import open_drafter
from nemodiff_train.model.families import VOCABULARY_TENSORS, HFConfig, ar_settings, architecture, stored_name
from nemodiff_train.model.hf_directory import expected_shapes
from nemodiff_train.model.loading import load_model
from nemodiff_train.model.pretrained import config_from, model_from


def export_checkpoint(
    source: Checkpoint,
    output: str,
    *,
    format: str | None = None,
    remote_code: str | None = None,
    drafter: Checkpoint | None = None,
    results: str | None = None,
    max_shard_size: str = "5GB",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> None:
    """Make a Hugging Face directory of a Megatron checkpoint.

    Args:
        source: A model's, or one of LoRA, which is merged. Every byte is verified; where it is damaged, the newest
            older one that is intact is written.
        output: Directory to create.
        format: Name in ``FORMATS``; None for the format that the model came in.
        remote_code: Directory with the Python files that load the format.
        drafter: A drafter of the model, which goes into the folder ``linear_spec_lora`` of the directory.
        results: Output of an evaluation, whose figures go into the model card of ``tri-mode``.
        max_shard_size: Largest weight file.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out.

    Raises:
        UserError: The checkpoint is a drafter's, no iteration is intact, the output exists, the format cannot hold
            the model, or the drafter is another model's.
    """
    provider = model_from(source.require_model())
    check_stages(provider, pipeline_parallel)
    name = format or default_format(provider)
    chosen = FORMATS[name]
    settings = chosen.settings(provider)
    _check_options(name, remote_code, results)
    code = code_files(settings, remote_code) if remote_code else []
    if chosen.needs_code and not code:
        settings.pop("auto_map")  # Transformers would stop at the first file that is not there
    drafter = drafter.require_drafter().verify_contents() if drafter else None
    drafter_settings = open_drafter(drafter, provider) if drafter else None
    if drafter and drafter_settings:
        check_engine(drafter, drafter_settings, architecture(settings), in_folder=True)
    figures = read_results(results) if results else None
    tokenizer = source.tokenizer_directory
    files_of_tokenizer(tokenizer)
    writer = ShardWriter(Path(output), expected_shapes(settings), provider.params_dtype, max_shard_size)
    with console.status(Text(f"verifying {source.path}")):
        verified = source.verify_contents()
    layout: dict[str, Any] = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    if verified is not source:  # all of the above once more, of the older iteration
        options = {"remote_code": remote_code, "drafter": drafter, "results": results, **layout}
        return export_checkpoint(verified, output, format=format, max_shard_size=max_shard_size, **options)
    with atomic_directory(Path(output)) as partial, quiet(), torch.no_grad():
        loaded = load_model(source, provider=provider, **layout)
        writer.directory = partial
        _write_weights(loaded.chunks, settings, writer, f"exporting {source.path}")
        if drafter and drafter_settings:
            folder, layers = partial / DRAFTER_FOLDER, provider.num_layers
            write_drafter(drafter, drafter_settings, layers, architecture(settings), folder)
        if is_main_process():
            _write_companions(partial, settings, provider.hf_generation_config, tokenizer)
            for file in (*code, *(Path(automodel.__path__[0]) / file for file in chosen.includes)):
                shutil.copyfile(file, partial / file.name)  # never run here
            if name == "tri-mode":
                write_card(partial, settings, provider.origin, figures)
    say(f"exported {source.path} to {output}")
    if chosen.needs_code and not code:
        warn(
            "the directory is loaded by Python files of its publisher, which are not part of it; copy them to it, or "
            "export with --remote-code"
        )


def _check_options(name: str, remote_code: str | None, results: str | None) -> None:
    """Refuse what a format has no use for."""
    if remote_code and not FORMATS[name].needs_code:
        raise UserError(f"--remote-code belongs to --format nemotron; --format {name} needs no code")
    if results and name != "tri-mode":
        raise UserError(f"--results go into the model card of --format tri-mode; --format {name} has none")


def full_tensors(models: list[GPTModel], settings: HFConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights with their names in a directory with this ``config.json``, gathered on every rank.

    Args:
        models: This rank's chunks.
        settings: The ``config.json``.

    Yields:
        Names and tensors on the CPU, without a tied output layer.
    """
    ar_config, kind = ar_settings(settings), architecture(settings)
    embedding, head = (stored_name(kind, name) for name in VOCABULARY_TENSORS)
    is_tied, rows = config_from(ar_config).tie_word_embeddings, ar_config["vocab_size"]
    for name, values in auto_bridge(config_from(settings)).export_hf_weights(models, cpu=True, show_progress=False):
        if name != head or not is_tied:
            # The vocabulary is padded to a multiple of the tensor-parallel size; the padding is cut off.
            yield name, values[:rows] if name in (embedding, head) else values


def _write_weights(models: list[GPTModel], settings: HFConfig, writer: ShardWriter, description: str) -> None:
    if is_main_process():
        writer.create_files()
    barrier()
    with bytes_bar() as bar:
        task = bar.add_task(description, total=writer.total)
        for name, values in full_tensors(models, settings):
            if writer.owner(name, world_size()) == global_rank():
                writer.write(name, values)
            bar.advance(task, values.nbytes)
    checksums = {name: value for part in all_gather_object(writer.checksums) for name, value in part.items()}
    if is_main_process():
        writer.close(checksums)


def _write_companions(directory: Path, settings: HFConfig, generation: HFConfig, tokenizer: Path) -> None:
    for name, content in (("config.json", settings), ("generation_config.json", generation)):
        if content:
            (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    copy_tokenizer(tokenizer, directory)
    rename_for_transformers_4(directory)
