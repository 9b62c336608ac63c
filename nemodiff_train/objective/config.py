"""The switches of the training objective."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Joint autoregressive (AR) + masked block diffusion; the defaults are Nemotron-Labs-Diffusion's.

    The loss of a global batch is::

        (sum of AR token losses + alpha * sum of w(t) * masked-token losses) / counted tokens

    Both sums run over the whole global batch and both are divided by the same number: the tokens that
    count (the ``loss_mask`` of the data), each of which has one AR target and could have been masked.
    This is the paper's global averaging (section 2.1), in which 1/t makes the second sum an estimate
    of a sum over all counted tokens, so that ``alpha`` is the ratio of two per-token means.
    """

    stage: Literal["ar", "joint"] = "joint"
    """``ar``: plain next-token training at L positions. ``joint``: the doubled sequence, 2L positions."""

    block_size: int = 32
    """Places per diffusion block; divides the sequence length. The released models use 32."""

    mask_token: str = "<|mask|>"
    """The tokenizer's token that stands for a hidden place. It must never occur in the text."""

    alpha: float = 0.3
    """Weight of the diffusion loss beside the AR loss (paper, table 2)."""

    min_noise_level: float = 1e-3
    """Lower end of the noise level t ~ U(min, 1), drawn once a sample; bounds the weight 1/t."""

    all_masked_share: float = 0.0
    """Share of samples at noise level 1, every place hidden. TiDAR trains on nothing else (2511.08923,
    section 3): it is the state a one-shot draft of self-speculation starts from. The paper: 0."""

    shift: bool = False
    """Whether place i of the noisy half predicts token i + 1 (Dream; Fast-dLLM v2, 2509.26328) instead of
    token i. A short training then reuses what the AR model has learned; the paper does not shift."""

    seed: int = 1234
    """Noise is a pure function of this seed, the split, and the index of the sample."""

    def problems(self, sequence_length: int) -> list[str]:
        """What is wrong with these values, one line each.

        Args:
            sequence_length: L, the clean tokens in a sample.
        """
        found = []
        if self.stage not in ("ar", "joint"):
            found.append(f"objective.stage is '{self.stage}'; use 'ar' or 'joint'")
        if self.block_size < 1 or sequence_length % self.block_size:
            found.append(
                f"dataset.seq_length={sequence_length} is not a multiple of "
                f"objective.block_size={self.block_size}; change one of them"
            )
        if not 0 < self.min_noise_level < 1:
            found.append(f"objective.min_noise_level={self.min_noise_level} is not between 0 and 1")
        if not 0 <= self.all_masked_share <= 1:
            found.append(f"objective.all_masked_share={self.all_masked_share} is not a share between 0 and 1")
        if self.alpha < 0:
            found.append(f"objective.alpha={self.alpha} is negative; the paper uses 0.3")
        return found
