"""What a model was made from: its name and its licence, for the card of what is exported."""

import re
from pathlib import Path

from huggingface_hub import metadata_load

from nemodiff_train.model.families import HFConfig

_CACHED = re.compile(r"models--(.+?)--(.+)")
"""Folder of a model in Hugging Face's cache."""


def origin_of(source: str, directory: Path) -> HFConfig:
    """Return the name of a Hugging Face model as ``base_model``, and what its own card says about the licence.

    Args:
        source: What the user wrote: a directory, or a name on the hub.
        directory: Where its files are.
    """
    cached = next((match for part in directory.absolute().parts if (match := _CACHED.fullmatch(part))), None)
    name = "/".join(cached.groups()) if cached else Path(source).resolve().name if Path(source).is_dir() else source
    try:
        card = metadata_load(directory / "README.md") or {}
    except (OSError, ValueError):  # there is none, or its head is not YAML
        card = {}
    return {"base_model": name} | {
        key: card[key] for key in ("license", "license_name", "license_link") if key in card
    }
