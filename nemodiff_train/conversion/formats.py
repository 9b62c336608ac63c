"""Formats of the Hugging Face directories that a checkpoint can be exported to."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemodiff_train.conversion.automodel.directory import add_code, tri_mode_settings
from nemodiff_train.errors import UserError
from nemodiff_train.model.families import NEMOTRON, ar_settings, architecture
from nemodiff_train.model.pretrained import config_from
from nemodiff_train.model.provider import TriModeModelProvider

REMOTE_CODE = {
    "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
    "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
}
"""Classes that load a NemotronLabsDiffusion directory; their files are NVIDIA's and not part of this project."""


@dataclass(frozen=True)
class Format:
    """One format: its ``config.json``, and with it the names of its tensors."""

    settings: Callable[[TriModeModelProvider], dict[str, Any]]
    """Returns the ``config.json`` of a model; refuses a model that the format cannot hold."""
    needs_code: bool = False
    """Whether the directory is loaded by Python files of its publisher."""
    finish: Callable[[Path, dict[str, Any]], None] | None = None
    """Adds what else belongs into the directory, given the folder and its ``config.json``."""


def ar_format(provider: TriModeModelProvider) -> dict[str, Any]:
    """Return the ``config.json`` of the AR family itself, for any server of the family."""
    return _in_dtype(ar_settings(provider.hf_config), provider.params_dtype)


def nemotron_format(provider: TriModeModelProvider) -> dict[str, Any]:
    """Return the ``config.json`` of a NemotronLabsDiffusion model, with the keys of the published ones.

    Raises:
        UserError: The model is not a Ministral 3, has no mask token, or decodes in another way.
    """
    settings = ar_settings(provider.hf_config)
    if architecture(settings) != "Ministral3ForCausalLM":
        raise UserError(
            f"--format nemotron holds Ministral 3 models, but this is {architecture(settings)}; use --format ar"
        )
    if provider.mask_token_id is None:
        raise UserError(
            "--format nemotron needs a mask token, but this checkpoint has none; train it jointly, or import it with "
            "--mask-token"
        )
    if provider.shift or provider.clean_attention != "causal":
        raise UserError(
            "--format nemotron is decoded without shift and with causal attention on clean text, but this model has "
            f"shift={str(provider.shift).lower()} and clean_attention={provider.clean_attention}; use --format ar"
        )
    diffusion = {
        "mask_token_id": provider.mask_token_id,
        "block_size": provider.block_size,
        "tie_word_embeddings": False,  # the head is always written
    }
    if architecture(provider.hf_config) == NEMOTRON:
        published = provider.hf_config
        known = config_from(published)  # with the defaults of keys that are left out
        changed = {key: value for key, value in diffusion.items() if getattr(known, key) != value}
        return _in_dtype({**published, **changed}, provider.params_dtype)
    return _in_dtype(
        {
            **settings,
            "architectures": [NEMOTRON],
            "auto_map": REMOTE_CODE,
            "model_type": "nemotron_labs_diffusion",
            "attention_bias": False,
            "mlp_bias": False,
            "dlm_paradigm": "bidirectional",  # how the published models are decoded
            "ar_loss_weight": 1.0,
            "dlm_loss_weight": None,
            "dp_varying_mask_ratio": False,
            **diffusion,
        },
        provider.params_dtype,
    )


def tri_mode_format(provider: TriModeModelProvider) -> dict[str, Any]:
    """Return the ``config.json`` of a directory whose own code decodes in every mode.

    Raises:
        UserError: The model has no mask token.
    """
    return tri_mode_settings(provider, ar_format(provider))


FORMATS = {
    "ar": Format(ar_format),
    "nemotron": Format(nemotron_format, needs_code=True),
    "tri-mode": Format(tri_mode_format, finish=add_code),
}
"""Formats by their names in ``--format``."""


def own_format(provider: TriModeModelProvider) -> str:
    """Return the name of the format that a model came in, which is the default of an export."""
    return "nemotron" if architecture(provider.hf_config) == NEMOTRON else "ar"


def code_files(settings: dict[str, Any], directory: str) -> list[Path]:
    """Return the Python files of a directory, which must have those that a ``config.json`` names.

    Raises:
        UserError: One of them is missing.
    """
    for target in settings["auto_map"].values():
        file = Path(directory) / f"{target.split('.')[0]}.py"
        if not file.is_file():
            raise UserError(f"--remote-code '{directory}' lacks {file.name}, which config.json names")
    return sorted(Path(directory).glob("*.py"))


def copy_code(files: list[Path], directory: Path) -> None:
    """Copy Python files to a directory; they are never run here."""
    for file in files:
        shutil.copy2(file, directory / file.name)


def _in_dtype(settings: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return settings that name the dtype of the weights, under the key that is there."""
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    return {**settings, key: str(dtype).removeprefix("torch.")}
