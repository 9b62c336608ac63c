"""``nemodiff convert inspect``: what a folder holds, from its headers alone."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from nemodiff_train.conversion.headers import read_headers
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint, Kind, read_json
from nemodiff_train.model.families import NEMOTRON, TRI_MODE, ar_settings, architecture


def inspect(path: str) -> None:
    """Print a table on standard output.

    Raises:
        UserError: It is neither a Hugging Face directory nor a Megatron checkpoint, or its headers are damaged.
    """
    folder = Path(path)
    if checkpoint := Checkpoint.find(folder):
        facts = _megatron(checkpoint)
    elif (folder / "config.json").is_file():
        facts = _hugging_face(folder)
    else:
        raise UserError(f"'{path}' is no checkpoint: it has neither config.json nor iter_* folders")
    table = Table(title=path, show_header=False, title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


def _hugging_face(folder: Path) -> dict[str, str]:
    settings = read_json(folder / "config.json")
    stored = read_headers(folder)
    files = {tensor.file for tensor in stored.values()}
    size = decimal(sum(file.stat().st_size for file in files))
    return {
        "kind": "Hugging Face directory",
        "architecture": architecture(settings),
        **_sizes(ar_settings(settings)),
        "weights": f"{size}, files: {len(files)}, tensors: {len(stored)}",
        "dtype": ", ".join(sorted({tensor.dtype for tensor in stored.values()})),
        "mask token": _mask_token(settings) if architecture(settings) in (NEMOTRON, TRI_MODE) else "none",
        "next": f"nemodiff convert import {folder} OUTPUT",
    }


def _megatron(checkpoint: Checkpoint) -> dict[str, str]:
    model, folder = checkpoint.run_config["model"], checkpoint.path
    generate = f"MODEL PROMPT --drafter {folder}" if checkpoint.kind is Kind.DRAFTER else f"{folder} PROMPT"
    files = list(checkpoint.iteration.rglob("*.distcp"))
    layout = " x ".join(
        f"{name} {model[f'{name}_model_parallel_size']}"
        for name in ("tensor", "pipeline")
        if f"{name}_model_parallel_size" in model
    )
    settings = model.get("hf_config") or {}
    return {
        "kind": f"Megatron checkpoint: {checkpoint.kind}",
        "architecture": architecture(settings),
        **_sizes(ar_settings(settings)),
        "weights": f"{decimal(sum(file.stat().st_size for file in files))}, files: {len(files)}",
        "saved by": f"{layout} (loads in any layout)",
        "dtype": "bf16" if model.get("bf16") else "fp16" if model.get("fp16") else "fp32",
        "mask token": _mask_token(model),
        "training step": str(checkpoint.step),
        "next": f"nemodiff generate {generate}\nnemodiff convert export {folder} OUTPUT",
    }


def _sizes(settings: dict[str, Any]) -> dict[str, str]:
    named = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "key-value heads": "num_key_value_heads",
        "vocabulary": "vocab_size",
    }
    return {"model": ", ".join(f"{settings[key]} {name}" for name, key in named.items() if key in settings)}


def _mask_token(settings: dict[str, Any]) -> str:
    identifier = settings.get("mask_token_id")
    if identifier is None or identifier < 0:
        return "none"
    return f"id {identifier}, blocks of {settings.get('block_size', 32)}"
