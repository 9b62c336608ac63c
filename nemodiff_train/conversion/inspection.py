"""``nemodiff convert inspect``: print what a folder holds, from its headers alone."""

from pathlib import Path
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from nemodiff_train.console import PlainConsole
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint, Kind
from nemodiff_train.model.config_json import read_config
from nemodiff_train.model.families import ar_settings, architecture, diffusion_settings
from nemodiff_train.model.headers import read_headers

_SHAPE = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "key-value heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
}
"""Keys of a ``config.json`` by the words that are printed."""


def inspect(path: str) -> None:
    """Print a table on standard output.

    Raises:
        UserError: It is neither a Hugging Face directory nor a Megatron checkpoint, or its headers are damaged.
    """
    folder = Path(path)
    if checkpoint := Checkpoint.find(folder):
        rows = _describe_megatron(checkpoint)
    elif (folder / "config.json").is_file():
        rows = _describe_hugging_face(folder)
    else:
        raise UserError(
            f"'{path}' is not a checkpoint: it has neither config.json nor iter_* folders; give a Hugging Face "
            "directory, or a Megatron checkpoint"
        )
    table = Table(title=path, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    PlainConsole().print(table)


def _describe_hugging_face(folder: Path) -> dict[str, str]:
    settings = read_config(folder)
    stored = read_headers(folder)
    files = {tensor.file for tensor in stored.values()}
    return {
        "kind": "Hugging Face directory",
        "architecture": architecture(settings),
        "model": _shape(ar_settings(settings)),
        "weights": f"{_size(files)}, tensors: {len(stored)}",
        "dtype": ", ".join(sorted({tensor.dtype for tensor in stored.values()})),
        "mask token": _mask_token(diffusion_settings(settings)),
        "next": f"nemodiff convert import {folder} OUTPUT",
    }


def _describe_megatron(checkpoint: Checkpoint) -> dict[str, str]:
    model, folder = checkpoint.run_config["model"], checkpoint.path
    generate = f"MODEL PROMPT --drafter {folder}" if checkpoint.kind is Kind.DRAFTER else f"{folder} PROMPT"
    layout = " x ".join(
        f"{name} {model[f'{name}_model_parallel_size']}"
        for name in ("tensor", "pipeline")
        if f"{name}_model_parallel_size" in model
    )
    settings = model.get("hf_config") or {}
    kind = f", {checkpoint.run_config['drafter'].get('kind')}" if checkpoint.kind is Kind.DRAFTER else ""
    if (checkpoint.run_config.get("peft") or {}).get("selector_rank"):
        kind += ", with a path selector"
    return {
        "kind": f"Megatron checkpoint: {checkpoint.kind}{kind}",
        "architecture": architecture(settings),
        "model": _shape(ar_settings(settings)),
        "weights": _size(set(checkpoint.iteration.rglob("*.distcp"))),
        "saved by": f"{layout} (loads in any layout)",
        "dtype": "bf16" if model.get("bf16") else "fp16" if model.get("fp16") else "fp32",
        "mask token": _mask_token(model),
        "training step": str(checkpoint.step),
        "next": f"nemodiff generate {generate}\nnemodiff convert export {folder} OUTPUT",
    }


def _size(files: set[Path]) -> str:
    return f"{decimal(sum(file.stat().st_size for file in files))}, files: {len(files)}"


def _shape(settings: dict[str, Any]) -> str:
    return ", ".join(f"{settings[key]} {name}" for name, key in _SHAPE.items() if key in settings)


def _mask_token(settings: dict[str, Any]) -> str:
    token = settings.get("mask_token_id")
    return "none" if token is None else f"id {token}, blocks of {settings.get('block_size', 32)}"
