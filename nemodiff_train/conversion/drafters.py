"""``nemodiff convert export`` of a drafter: write its adapters as a PEFT directory."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from nemodiff_train.console import console, quiet
from nemodiff_train.conversion.formats import FORMATS, own_format
from nemodiff_train.distributed import is_main_process
from nemodiff_train.files import atomic_directory
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.draft_adapter import open_drafter
from nemodiff_train.model.families import architecture, stored_name
from nemodiff_train.model.loading import start_model_parallel
from nemodiff_train.model.pretrained import model_from

PEFT_NAMES = {"linear_in": "lora_A", "linear_out": "lora_B"}
"""PEFT's names of the two factors by those of Megatron Bridge."""


def export_drafter(source: Checkpoint, output: str, format: str | None = None) -> None:
    """Write a drafter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors`` in fp32.

    Its tensors are named after those of the directory that the model itself is exported to, as in the
    ``linear_spec_lora`` folder of the released models.

    Args:
        source: A drafter's, saved under any layout.
        output: Directory to create.
        format: Name in ``FORMATS`` of the model's own directory; None for the format that the model came in.

    Raises:
        UserError: It is not a drafter, the output exists, or the format cannot hold its model.
    """
    provider = model_from(source)
    lora = open_drafter(source, provider)
    kind = architecture(FORMATS[format or own_format(provider)].settings(provider))
    start_model_parallel(1)  # Megatron reads by collectives, even in a world of one
    with atomic_directory(Path(output)) as partial, quiet(), torch.no_grad():
        adapters = _adapters(source.iteration, provider.num_layers)
        if is_main_process():
            tensors = {f"base_model.model.{stored_name(kind, name)}": values for name, values in adapters.items()}
            save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            config = LoraConfig(r=lora.dim, lora_alpha=lora.alpha, target_modules=["o_proj"], inference_mode=True)
            config.save_pretrained(str(partial))
    if is_main_process():
        console.print(f"exported the drafter [bold]{source.path}[/bold] to [bold]{output}[/bold]")


def _adapters(iteration: Path, layers: int) -> dict[str, Tensor]:
    """Return both factors of every layer by their names in an AR model's directory.

    ``lora_A`` is [rank, heads * head_dim], ``lora_B`` [hidden, rank].
    """
    folder = str(iteration.absolute())
    stored = dist_checkpointing.load_tensors_metadata(folder)
    names = {
        f"decoder.layers.self_attention.linear_proj.adapter.{part}.weight": PEFT_NAMES[part] for part in PEFT_NAMES
    }
    # Every rank reads both in full, which Core would take for a mistake in the layout.
    factors = dist_checkpointing.load({n: stored[n] for n in names}, folder, validate_access_integrity=False)
    return {
        f"model.layers.{layer}.self_attn.o_proj.{part}.weight": values
        for name, part in names.items()
        for layer, values in zip(range(layers), factors[name].float(), strict=True)
    }
