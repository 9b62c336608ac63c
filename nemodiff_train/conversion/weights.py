"""Whether a Hugging Face directory's weights can be read at all."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nemodiff_train.errors import UserError


def check_weights(directory: Path) -> None:
    """Refuse weights that are missing, damaged or incomplete, before anything is built.

    A hub name is left to Transformers, which verifies what it downloads; so is a Megatron checkpoint
    to Megatron.

    Raises:
        UserError: Names the file.
    """
    if not (directory / "config.json").is_file():
        return
    files = _named_by_index(directory) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"'{directory}' has no *.safetensors; only safetensors weights are read")
    for file in files:
        if not file.is_file():
            raise UserError(f"'{file}' is missing, but the index of '{directory}' names it; fetch it again")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"'{file}' is damaged or incomplete ({error}); fetch it again") from None


def _named_by_index(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        raise UserError(f"'{index}' is no index of safetensors; fetch it again") from None
    return [directory / str(name) for name in sorted(names)]
