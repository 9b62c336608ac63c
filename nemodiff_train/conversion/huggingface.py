"""Import and export, on Bridge's own mappings."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from nemodiff_train.console import console, quiet
from nemodiff_train.conversion.automodel.directory import add_code, tri_mode_settings
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.errors import UserError
from nemodiff_train.model.pretrained import auto_bridge, hf_config, is_megatron_checkpoint, model_from


def import_checkpoint(source: str, output: str) -> None:
    """Make a Megatron checkpoint, complete with tokenizer and configuration, of a Hugging Face model.

    Args:
        source: Hugging Face directory or name.
        output: Folder to create; it gets one ``iter_0000000``.

    Raises:
        UserError: No such model, an unsupported architecture, damaged weights, or existing output.
    """
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
    from megatron.bridge.training.model_load_save import save_megatron_model

    from nemodiff_train.decoding.loading import lay_out, start_model_parallel

    if is_megatron_checkpoint(Path(source)):
        raise UserError(f"'{source}' is a Megatron checkpoint already; import takes a Hugging Face model")
    _check_alone()
    check_weights(Path(source))
    provider = model_from(source)
    with _complete_or_absent(Path(output)) as partial, quiet(), console.status(f"importing {source}"):
        start_model_parallel(1)
        lay_out(provider)
        provider.finalize()
        models = provider.provide_distributed_model(wrap_with_ddp=False)
        pretrained = PreTrainedCausalLM.from_pretrained(source)
        pretrained.config = hf_config(source)  # Bridge would run the code of a directory that has its own
        AutoBridge(pretrained).load_hf_weights(models)
        own_code = {"trust_remote_code": False}  # never run; without this, Transformers would ask
        save_megatron_model(models, str(partial), hf_tokenizer_path=source, hf_tokenizer_kwargs=own_code)
    console.print(f"imported [bold]{source}[/bold] to [bold]{output}[/bold]")


def export_checkpoint(source: str, output: str, format: str = "ar") -> None:
    """Make a Hugging Face directory of a Megatron checkpoint.

    Args:
        source: A Megatron checkpoint of this project (the newest iteration is taken).
        output: Directory to create.
        format: ``ar``, which any server of the model's family loads: the weights are the joint ones, decoded as
            an AR model. ``tri-mode``: the same weights with code that decodes in every mode.

    Raises:
        UserError: No checkpoint, existing output, or ``tri-mode`` of a model without a mask token.
    """
    from nemodiff_train.decoding.loading import load_for_decoding, open_checkpoint, tokenizer_directory

    _check_alone()
    provider = open_checkpoint(source)
    settings = tri_mode_settings(provider, provider.hf_config) if format == "tri-mode" else None
    with _complete_or_absent(Path(output)) as partial, quiet(), console.status(f"exporting {source}"):
        (model,) = load_for_decoding(source)
        write_hf_directory(model, tokenizer_directory(source), partial)
        if settings:
            add_code(partial, settings)
    console.print(f"exported [bold]{source}[/bold] to [bold]{output}[/bold]")


def write_hf_directory(model: Any, tokenizer: Path, directory: Path) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        model: A Megatron GPT model made by ``TriModeModelProvider``.
        tokenizer: Directory with the tokenizer's files.
        directory: Where to write; created when absent.
    """
    settings = dict(model.config.hf_config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto_bridge(config).save_hf_weights([model], directory, show_progress=False)
    config.save_pretrained(directory)
    for file in sorted(tokenizer.iterdir()):
        shutil.copy2(file, directory / file.name)
    if model.config.hf_generation_config:
        text = json.dumps(model.config.hf_generation_config, indent=2)
        (directory / "generation_config.json").write_text(text + "\n")


def _check_alone() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(f"{world} processes were started, but conversion takes one; run it without torchrun")


@contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``output`` on success and vanishes on failure."""
    if output.exists():
        raise UserError(f"'{output}' exists already; name a folder that does not, or remove it")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with torch.no_grad():
            yield partial
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
