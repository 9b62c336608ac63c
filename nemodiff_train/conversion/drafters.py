"""``nemodiff convert export`` of a drafter: write its adapters as a PEFT directory."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from nemodiff_train.console import quiet, say, warn
from nemodiff_train.conversion.formats import FORMATS, default_format
from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.config_json import read_config
from nemodiff_train.model.draft_adapter import PROJECTIONS, REMEDY, Drafter, DraftLoRA, open_drafter
from nemodiff_train.model.families import NEMOTRON, TRI_MODE, ar_settings, architecture, stored_name
from nemodiff_train.model.loading import start_model_parallel
from nemodiff_train.model.pretrained import config_from, model_from
from nemodiff_train.model.provider import TriModeModelProvider

PEFT_NAMES = {"linear_in": "lora_A", "linear_out": "lora_B"}
"""PEFT's names of the two factors by those of Megatron Bridge."""

_STORED = {
    "linear_q": "self_attention.linear_qkv.adapter.adapter_q",
    "linear_k": "self_attention.linear_qkv.adapter.adapter_k",
    "linear_v": "self_attention.linear_qkv.adapter.adapter_v",
    "linear_proj": "self_attention.linear_proj.adapter",
    "linear_fc1_gate": "mlp.linear_fc1.adapter.adapter_gate",
    "linear_fc1_up": "mlp.linear_fc1.adapter.adapter_up",
    "linear_fc2": "mlp.linear_fc2.adapter",
}
"""Where a checkpoint has the adapter of each projection, stacked over the layers."""

_HF_NAMES = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "num_attention_heads": "num_attention_heads",
    "kv_channels": "head_dim", "num_query_groups": "num_key_value_heads", "ffn_hidden_size": "intermediate_size",
}  # fmt: skip
"""Names in a ``config.json`` of the settings that a drafter's sizes follow from."""

DRAFTER_FOLDER = "linear_spec_lora"
"""Folder of the drafter in a model's directory, as in the released models."""

SCALE = 4.0
"""``lora_alpha / r`` of every exported ``nemotron`` drafter: that of the released ones, which mlx-vlm has in its
code.  For ``uno``, engines read it from the file."""


def export_drafter(source: Checkpoint, output: str, format: str | None = None) -> None:
    """Write a drafter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors`` in fp32.

    Its tensors are named after those of the directory that the model itself is exported to, as in the
    ``linear_spec_lora`` folder of the released models.

    Args:
        source: A drafter's, saved under any layout. Every byte is verified; where it is damaged, the newest older
            one that is intact is written.
        output: Directory to create; inside a model's directory, the names are those of that model.
        format: Name in ``FORMATS`` of the model's own directory; None for that of the directory around the output,
            or for the format that the model came in.

    Raises:
        UserError: It is not a drafter, no iteration is intact, the output exists, the format cannot hold its model,
            or the directory around the output is another model's.
    """
    source = source.require_drafter().verify_contents()
    provider = model_from(source)
    drafter = open_drafter(source, provider)
    kind = _kind_around(Path(output), provider, drafter)
    if format or kind is None:
        named = architecture(FORMATS[format or default_format(provider)].settings(provider))
        if kind not in (None, named):
            raise UserError(f"--format {format} does not fit '{Path(output).parent}', a {kind}; leave it out")
        kind = named
    check_engine(source, drafter, kind, Path(output).name == DRAFTER_FOLDER)
    start_model_parallel(1)  # Megatron reads by collectives, even in a world of one
    with atomic_directory(Path(output)) as partial, quiet():
        write_drafter(source, drafter, provider.num_layers, kind, partial)
    say(f"exported the drafter {source.path} to {output}")


def check_engine(source: Checkpoint, drafter: Drafter, kind: str, in_folder: bool) -> None:
    """Refuse to write a drafter where engines would take it for another kind; warn of what they do not support.

    Args:
        source: Its checkpoint.
        drafter: Its kind and settings.
        kind: Architecture of the model's directory.
        in_folder: Whether it is to be the ``linear_spec_lora`` of that directory.

    Raises:
        UserError: It is a ``uno``, which engines load beside an AR model's directory, or has no adapters.
    """
    if not drafter.lora.target_modules:
        raise UserError(
            f"'{source.path}' is a path selector alone, which no engine supports: there is nothing to export"
        )
    if drafter.kind.uniform_noise and (in_folder or kind in (NEMOTRON, TRI_MODE)):
        raise UserError(
            f"the drafter '{source.path}' is of kind uno, for a plain AR model's directory (--format ar) and a "
            f"folder of its own; {kind}'s {DRAFTER_FOLDER} holds drafters of kind nemotron"
        )
    if drafter.lora.selector_rank:
        warn(f"engines do not support path selectors: that of '{source.path}' is left out")


def write_drafter(source: Checkpoint, drafter: Drafter, layers: int, kind: str, directory: Path) -> None:
    """Write the two files of a drafter; called on all ranks, which read together.

    Args:
        source: The drafter's checkpoint.
        drafter: Its kind and settings.
        layers: Layers of its model.
        kind: Architecture of the directory whose names the tensors get.
        directory: Folder to write them to.
    """
    lora = drafter.lora
    alpha = lora.alpha if drafter.kind.uniform_noise else SCALE * lora.dim
    with torch.no_grad():
        adapters = _adapters(source.iteration, layers, lora, scale=lora.alpha / alpha)
    if is_main_process():
        directory.mkdir(exist_ok=True)
        tensors = {f"base_model.model.{stored_name(kind, name)}": values for name, values in adapters.items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = [PROJECTIONS[name] for name in lora.target_modules]
        config = LoraConfig(r=lora.dim, lora_alpha=int(alpha), target_modules=targets, inference_mode=True)
        config.save_pretrained(str(directory))


def _kind_around(output: Path, provider: TriModeModelProvider, drafter: Drafter) -> str | None:
    """Return the architecture of the model in whose directory an output lies, or None where there is none.

    Raises:
        UserError: The model has another shape than the drafter's.
    """
    file = output.parent / "config.json"
    if not file.is_file():
        return None
    settings = read_config(output.parent)
    config = config_from(ar_settings(settings))
    for setting in drafter.lora.shape:
        name, expected = _HF_NAMES[setting], getattr(provider, setting)
        actual = getattr(config, name, None)  # a size of heads may follow from the others
        if None not in (actual, expected) and actual != expected:
            raise UserError(f"the drafter is for a model with {name}={expected}; '{file}' has {actual}; {REMEDY}")
    return architecture(settings)


def _adapters(iteration: Path, layers: int, lora: DraftLoRA, scale: float) -> dict[str, Tensor]:
    """Return both factors of every layer by their names in an AR model's directory.

    ``lora_A`` is [rank, inputs], ``lora_B`` [outputs, rank], times the scale.
    """
    folder = str(iteration.absolute())
    stored = dist_checkpointing.load_tensors_metadata(folder)
    names = {
        f"decoder.layers.{_STORED[target]}.{part}.weight": (target, part)
        for target in lora.target_modules
        for part in PEFT_NAMES
    }
    # Every rank reads all in full, which Core would take for a mistake in the layout.
    factors = dist_checkpointing.load({n: stored[n] for n in names}, folder, validate_access_integrity=False)
    adapters = {}
    for name, (target, part) in names.items():
        block = "self_attn" if _STORED[target].startswith("self_attention") else "mlp"
        values = factors[name].float() * (scale if part == "linear_out" else 1.0)
        for layer, matrix in zip(range(layers), values, strict=True):
            key = f"model.layers.{layer}.{block}.{PROJECTIONS[target]}.{PEFT_NAMES[part]}.weight"
            adapters[key] = matrix.contiguous()
    return adapters
