"""A trained sampler on disk: ``sampler.json`` and ``sampler.safetensors`` in a folder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.files import atomic_directory
from nemodiff_train.sampler.description import DESCRIPTION, REMEDY, Description, describe
from nemodiff_train.sampler.features import FEATURES
from nemodiff_train.sampler.network import SlotNetwork

WEIGHTS = "sampler.safetensors"


@dataclass(frozen=True)
class TrainedSampler:
    """A sampler in memory."""

    network: SlotNetwork
    description: Description

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """Return the probability [rows, block] that each slot's token is right.

        Args:
            features: [rows, block, features], as :class:`~nemodiff_train.sampler.features.SlotHistory` makes them.
        """
        return self.network(features).sigmoid()

    def check_block_size(self, block_size: int) -> None:
        """Refuse blocks of another size than it was trained on.

        Raises:
            UserError: Names both sizes.
        """
        if block_size != self.description.block_size:
            raise UserError(
                f"the sampler was trained on blocks of {self.description.block_size}, not of {block_size}; train one "
                f"with 'nemodiff sampler --block-size {block_size}'"
            )


def write_sampler(output: Path, sampler: TrainedSampler) -> None:
    """Write a folder that appears complete or not at all; all ranks call it.

    Raises:
        UserError: It exists, or cannot be written.
    """
    with atomic_directory(output) as folder:
        if not is_main_process():
            return
        weights = {name: tensor.cpu().contiguous() for name, tensor in sampler.network.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(sampler.description.model_dump_json(indent=2) + "\n")


def read_sampler(folder: Path) -> TrainedSampler:
    """Read a sampler into the host's memory.

    Raises:
        UserError: It holds no sampler, or its weights are missing, damaged, not numbers, or of another shape.
    """
    description = describe(folder)
    if description.features != list(FEATURES):
        raise UserError(f"'{folder}' sees other features than this version computes; {REMEDY}")
    with torch.device("meta"):
        network = SlotNetwork(description.block_size, description.layers, description.width)
    try:
        weights = load_file(folder / WEIGHTS)
        network.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"'{folder / WEIGHTS}' is damaged ({str(error).splitlines()[0]}); {REMEDY}") from None
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"'{folder / WEIGHTS}' holds values that are not numbers; {REMEDY}")
    return TrainedSampler(network.float().eval(), description)
