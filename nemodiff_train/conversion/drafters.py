"""``nemodiff convert export`` of a drafter: write its adapters as a PEFT directory."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from nemodiff_train.console import quiet, say
from nemodiff_train.conversion.formats import FORMATS, own_format
from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.config_json import read_config
from nemodiff_train.model.draft_adapter import DraftLoRA, open_drafter
from nemodiff_train.model.families import ar_settings, architecture, stored_name
from nemodiff_train.model.loading import start_model_parallel
from nemodiff_train.model.pretrained import config_from, model_from
from nemodiff_train.model.provider import TriModeModelProvider

PEFT_NAMES = {"linear_in": "lora_A", "linear_out": "lora_B"}
"""PEFT's names of the two factors by those of Megatron Bridge."""

_STORED = "decoder.layers.self_attention.linear_proj.adapter.{}.weight"

DRAFTER_FOLDER = "linear_spec_lora"
"""Folder of the drafter in a model's directory, as in the released models."""

SCALE = 4.0
"""``lora_alpha / r`` of every exported drafter: that of the released ones, and what mlx-vlm has in its code."""


def export_drafter(source: Checkpoint, output: str, format: str | None = None) -> None:
    """Write a drafter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors`` in fp32.

    Its tensors are named after those of the directory that the model itself is exported to, as in the
    ``linear_spec_lora`` folder of the released models.

    Args:
        source: A drafter's, saved under any layout.
        output: Directory to create; inside a model's directory, the names are those of that model.
        format: Name in ``FORMATS`` of the model's own directory; None for that of the directory around the output,
            or for the format that the model came in.

    Raises:
        UserError: It is not a drafter, the output exists, the format cannot hold its model, or the directory around
            the output is another model's.
    """
    provider = model_from(source)
    lora = open_drafter(source, provider)
    kind = _kind_around(Path(output), provider)
    if format or kind is None:
        named = architecture(FORMATS[format or own_format(provider)].settings(provider))
        if kind not in (None, named):
            raise UserError(f"--format {format} does not fit '{Path(output).parent}', a {kind}; leave it out")
        kind = named
    start_model_parallel(1)  # Megatron reads by collectives, even in a world of one
    with atomic_directory(Path(output)) as partial, quiet():
        write_drafter(source, lora, provider.num_layers, kind, partial)
    say(f"exported the drafter {source.path} to {output}")


def write_drafter(source: Checkpoint, lora: DraftLoRA, layers: int, kind: str, directory: Path) -> None:
    """Write the two files of a drafter; called on all ranks, which read together.

    Args:
        source: The drafter's checkpoint.
        lora: Its settings.
        layers: Layers of its model.
        kind: Architecture of the directory whose names the tensors get.
        directory: Where they go.
    """
    with torch.no_grad():
        adapters = _adapters(source.iteration, layers, scale=lora.alpha / lora.dim / SCALE)
    if is_main_process():
        directory.mkdir(exist_ok=True)
        tensors = {f"base_model.model.{stored_name(kind, name)}": values for name, values in adapters.items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        alpha = int(SCALE * lora.dim)
        config = LoraConfig(r=lora.dim, lora_alpha=alpha, target_modules=["o_proj"], inference_mode=True)
        config.save_pretrained(str(directory))


def _kind_around(output: Path, provider: TriModeModelProvider) -> str | None:
    """Return the architecture of the model in whose directory an output lies, or None where there is none.

    Raises:
        UserError: The model has another shape than the drafter's.
    """
    file = output.parent / "config.json"
    if not file.is_file():
        return None
    settings = read_config(output.parent)
    config = config_from(ar_settings(settings))
    for name, expected in (
        ("num_hidden_layers", provider.num_layers),
        ("hidden_size", provider.hidden_size),
        ("num_attention_heads", provider.num_attention_heads),
    ):
        if (found := getattr(config, name)) != expected:
            raise UserError(f"the drafter is for a model with {name}={expected}; '{file}' has {found}")
    return architecture(settings)


def _adapters(iteration: Path, layers: int, scale: float) -> dict[str, Tensor]:
    """Return both factors of every layer by their names in an AR model's directory.

    ``lora_A`` is [rank, heads * head_dim], ``lora_B`` [hidden, rank], times the scale.
    """
    folder = str(iteration.absolute())
    stored = dist_checkpointing.load_tensors_metadata(folder)
    names = {_STORED.format(part): PEFT_NAMES[part] for part in PEFT_NAMES}
    # Every rank reads both in full, which Core would take for a mistake in the layout.
    factors = dist_checkpointing.load({n: stored[n] for n in names}, folder, validate_access_integrity=False)
    factors = {name: factors[name].float() for name in names}
    factors[_STORED.format("linear_out")] *= scale
    return {
        f"model.layers.{layer}.self_attn.o_proj.{part}.weight": values
        for name, part in names.items()
        for layer, values in zip(range(layers), factors[name], strict=True)
    }
