"""The doubled sample: L tokens become 2L positions, ``[noisy | clean]``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from nemodiff_train.objective.config import ObjectiveConfig
from nemodiff_train.objective.noise import draw_noise

Sample = dict[str, torch.Tensor]


def double(
    sample: Mapping[str, torch.Tensor], key: tuple[int, int, int], mask_id: int, objective: ObjectiveConfig
) -> Sample:
    """Turn an AR sample of L tokens into a joint sample of 2L positions.

    ========== ============================================ ==========================
    field      noisy half                                   clean half
    ========== ============================================ ==========================
    tokens     the tokens, masked places set to ``mask_id`` the tokens
    labels     the tokens (the next ones if shifted)        the next tokens
    loss_mask  1/t where masked, else 0                     1 where the token counts
    position   0 .. L-1                                     0 .. L-1
    ========== ============================================ ==========================

    ``alpha`` is not in the weights: the loss applies it, so that both parts can be reported apart.

    Args:
        sample: ``tokens``, ``labels``, ``loss_mask`` and ``position_ids``, each [L].
        key: What the noise is a function of; see :func:`~nemodiff_train.objective.noise.draw_noise`.
        mask_id: Id of the mask token.
        objective: Gives the range of the noise level.
    """
    tokens, counts = sample["tokens"], sample["loss_mask"]
    noise = draw_noise(key, counts.numpy() > 0, objective.min_noise_level, objective.all_masked_share)
    masked, weight = torch.from_numpy(noise.masked), torch.from_numpy(noise.weight)
    targets = tokens
    if objective.shift:
        # A block's first place would be predicted from a block it cannot see; decoding has it from the AR seed.
        place = torch.arange(1, len(tokens) + 1)
        targets = sample["labels"]
        weight = weight.roll(-1).masked_fill(place % objective.block_size == 0, 0.0)
    return {
        "tokens": torch.cat([tokens.masked_fill(masked, mask_id), tokens]),
        "labels": torch.cat([targets, sample["labels"]]),
        "loss_mask": torch.cat([weight, counts.float()]),
        "position_ids": sample["position_ids"].repeat(2),
    }


class JointDataset(Dataset[Sample]):
    """Doubles the samples of an AR data set; noise is drawn here, in the loader's workers."""

    def __init__(self, samples: Any, objective: ObjectiveConfig, mask_token_id: int, split: int) -> None:
        self.samples = samples
        self.objective = objective
        self.mask_token_id = mask_token_id
        self.split = split

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        key = (self.objective.seed, self.split, int(index))
        return double(self.samples[index], key, self.mask_token_id, self.objective)
