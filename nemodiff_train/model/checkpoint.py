"""What a folder on disk is, told without importing anything large."""

import json
from pathlib import Path
from typing import Any

import yaml

from nemodiff_train.errors import UserError
from nemodiff_train.model.checksums import damage, structure_damage


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a Megatron checkpoint or a folder of them."""
    return (path / "run_config.yaml").is_file() or any(path.glob("iter_*/run_config.yaml"))


def iterations(path: Path) -> list[Path]:
    """The ``iter_*`` folders of a Megatron checkpoint folder, the newest first, whole or not."""
    return sorted(
        (found for found in path.glob("iter_*") if found.name[5:].isdigit() and found.is_dir()), reverse=True
    )


def newest_iteration(path: Path, *, read: bool = False) -> Path:
    """The newest whole ``iter_*`` folder of a Megatron checkpoint folder (or ``path``, if it is one itself).

    Args:
        path: The folder.
        read: Compare every byte with the recorded checksums; otherwise the names and sizes of the files.

    Raises:
        UserError: It is no Megatron checkpoint, or none in it is whole; the damaged file is named.
    """
    look = damage if read else structure_damage
    if (path / "run_config.yaml").is_file():
        if read and (wrong := look(path)):
            raise UserError(f"the checkpoint '{path}' is damaged: {wrong}; take another one")
        return path
    wrong = ""
    for iteration in iterations(path):
        if not (found := look(iteration)):
            return iteration
        wrong = wrong or f"'{iteration.name}': {found}"
    if not wrong:
        raise UserError(f"'{path}' is no Megatron checkpoint: it has no iter_*/run_config.yaml")
    raise UserError(
        f"no checkpoint in '{path}' is whole ({wrong}); resume the run that makes it, or take another one"
    )


def run_config(path: Path) -> dict[str, Any]:
    """The recipe that a Megatron checkpoint was saved with, as plain values.

    Raises:
        UserError: As :func:`newest_iteration`, or the file is damaged.
    """
    file = newest_iteration(path) / "run_config.yaml"
    try:
        found = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{file}' is damaged ({reason}); take another iteration") from None
    if not isinstance(found, dict) or not isinstance(found.get("model"), dict):
        raise UserError(f"'{file}' describes no model; take another iteration")
    return found


def is_drafter(path: Path) -> bool:
    """Whether a Megatron checkpoint holds a drafter's adapters instead of a model."""
    return is_megatron_checkpoint(path) and run_config(path).get("drafter") is not None


def is_lora(path: Path) -> bool:
    """Whether a Megatron checkpoint holds adapters that belong into a model's weights."""
    described = run_config(path) if is_megatron_checkpoint(path) else {}
    return described.get("peft") is not None and described.get("drafter") is None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: The file holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{file}' is no JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"'{file}' holds no settings; fetch it again")
    return found
