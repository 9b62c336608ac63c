"""The trained sampler's network: bidirectional attention over the slots of a block."""

import torch
from torch import Tensor, nn

from nemodiff_train.sampler.description import HEAD_SIZE
from nemodiff_train.sampler.features import FEATURES

_LOG_ODDS = list(FEATURES).index("log_odds")


class SlotNetwork(nn.Module):
    """A transformer encoder that corrects the log-odds with which the model itself says that a slot's token is right.

    Before training the correction is 0: the sampler is the policy ``threshold``.  With 4 layers of width 384 it has
    the 4.8M parameters of Nemotron-Labs-Diffusion's (arXiv 2607.05722).

    Args:
        block_size: Maximum number of slots.
        layers: Layers of the encoder.
        width: Size of its states, a multiple of that of a head; the feed-forward layers have twice as many.
    """

    def __init__(self, block_size: int, layers: int, width: int) -> None:
        super().__init__()
        self.block_size, self.layers, self.width = block_size, layers, width
        self.input = nn.Linear(len(FEATURES), width)
        self.slots = nn.Parameter(0.02 * torch.randn(block_size, width))
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD_SIZE, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.correction = nn.Linear(width, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return the log-odds [rows, block] that each slot's token is right.

        Args:
            features: [rows, block, len(FEATURES)] fp32; a block may be shorter than ``block_size``.
        """
        # Final states [rows, block, width], and a correction [rows, block] of the model's log-odds from them.
        states = self.encoder(self.input(features) + self.slots[: features.shape[1]])
        corrected: Tensor = 8 * features[..., _LOG_ODDS] + self.correction(states)[..., 0]
        return corrected
