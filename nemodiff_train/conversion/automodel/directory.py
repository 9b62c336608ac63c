"""Make a Hugging Face directory of an AR family decode in every mode, by code of its own."""

import shutil
from pathlib import Path

from nemodiff_train.errors import UserError
from nemodiff_train.model.families import TRI_MODE, HFConfig
from nemodiff_train.model.provider import TriModeModelProvider

_FOLDER = Path(__file__).parent
_CODE = ("configuration_tri_mode.py", "modeling_tri_mode.py")
_MODEL = f"modeling_tri_mode.{TRI_MODE}"
_AUTO_MAP = {
    "AutoConfig": "configuration_tri_mode.TriModeConfig",
    "AutoModel": _MODEL,
    "AutoModelForCausalLM": _MODEL,
}


def tri_mode_settings(provider: TriModeModelProvider, family: HFConfig) -> HFConfig:
    """Return the ``config.json`` of such a directory.

    Args:
        provider: The model.
        family: The ``config.json`` of its AR family, whose names and shapes of the weights are kept.

    Raises:
        UserError: The model has no mask token.
    """
    if provider.mask_token_id is None:
        raise UserError(
            "--format tri-mode needs a mask token, and this checkpoint has had no joint stage; use --format ar"
        )
    return {
        "architectures": [TRI_MODE],
        "auto_map": _AUTO_MAP,
        "model_type": "tri_mode",
        "dtype": family.get("dtype"),
        "mask_token_id": provider.mask_token_id,
        "block_size": provider.block_size,
        "shift": provider.shift,
        "clean_attention": provider.clean_attention,
        "text_config": family,
    }


def add_sdar_configuration(directory: Path, settings: HFConfig) -> None:
    """Add the class that ``config.json`` names, without which ``rope_theta`` would be lost; see the file."""
    name = "configuration_sdar.py"
    shutil.copyfile(_FOLDER / name, directory / name)


def add_code(directory: Path, settings: HFConfig) -> None:
    """Add the code to weights, tokenizer and configuration; see :func:`tri_mode_settings`."""
    for name in _CODE:
        shutil.copyfile(_FOLDER / name, directory / name)
