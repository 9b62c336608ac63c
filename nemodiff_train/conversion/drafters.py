"""``nemodiff convert export`` of a drafter: its adapters as a PEFT directory."""

from pathlib import Path

import torch
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

PARTS = {"linear_in": "lora_A", "linear_out": "lora_B"}
"""Megatron Bridge's names of the two factors, and PEFT's."""


def export_drafter(source: Checkpoint, output: str, format: str | None = None) -> None:
    """Write a drafter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``, fp32.

    Its tensors are named after those of the directory that the model itself is exported to, as in the
    ``linear_spec_lora`` folder of the released models.

    Args:
        source: A drafter's, saved under any layout.
        output: Directory to create.
        format: A key of ``FORMATS``, the model's directory; None for the format that the model came in.

    Raises:
        UserError: No drafter, existing output, or a format that cannot hold its model.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    provider = model_from(source)
    lora = open_drafter(source, provider)
    kind = architecture(FORMATS[format or own_format(provider)].settings(provider))
    start_model_parallel(1)  # reading is a collective, of one process too
    with atomic_directory(Path(output)) as partial, quiet(), torch.no_grad():
        adapters = _adapters(source.iteration, provider.num_layers)
        if is_main_process():
            named = {f"base_model.model.{stored_name(kind, name)}": values for name, values in adapters.items()}
            save_file(named, partial / "adapter_model.safetensors", metadata={"format": "pt"})
            LoraConfig(
                r=lora.dim, lora_alpha=lora.alpha, target_modules=["o_proj"], inference_mode=True
            ).save_pretrained(str(partial))
    if is_main_process():
        console.print(f"exported the drafter [bold]{source.path}[/bold] to [bold]{output}[/bold]")


def _adapters(iteration: Path, layers: int) -> dict[str, Tensor]:
    """Both factors of every layer, whole, by their names in an AR model's directory."""
    from megatron.core import dist_checkpointing

    folder = str(iteration.absolute())
    stored = dist_checkpointing.load_tensors_metadata(folder)
    names = {f"decoder.layers.self_attention.linear_proj.adapter.{part}.weight": PARTS[part] for part in PARTS}
    # Every rank reads all of both, which Core would take for a mistake in the layout.
    found = dist_checkpointing.load({n: stored[n] for n in names}, folder, validate_access_integrity=False)
    return {
        f"model.layers.{layer}.self_attn.o_proj.{part}.weight": values
        for name, part in names.items()
        for layer, values in zip(range(layers), found[name].float(), strict=True)
    }
