"""The switches of the training objective."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class ObjectiveConfig:
    """Joint autoregressive (AR) + masked block diffusion; the defaults are Nemotron-Labs-Diffusion's.

    The loss of a global batch is::

        (ar_weight * sum of AR token losses + alpha * sum of w * masked-token losses / views) / maskable tokens

    Both sums run over the whole global batch and both are divided by the same number: the maskable tokens
    (the ``loss_mask`` of the data), each of which has one AR target and could have been masked.
    This is the paper's global averaging (arXiv 2607.05722, section 2.1), in which 1/t makes the second sum an
    estimate of a sum over all maskable tokens, so that ``alpha`` is the ratio of two per-token means.

    :data:`nemodiff_train.objective.presets.PRESETS` sets the switches together as published methods do.
    """

    stage: Literal["ar", "joint"] = "joint"
    """``ar``: plain next-token training at L positions. ``joint``: [noisy views | clean]."""

    mask_token: str | None = None
    """The tokenizer's token that stands for a masked position. It must never occur in the text. None for the
    checkpoint's mask token, and the tokenizer's own where the checkpoint has none."""

    seed: int = 1234
    """Noise is a pure function of this seed, the split, and the index of the sample."""

    # Weights of the losses

    alpha: float = 0.3
    """Weight of the diffusion loss (Nemotron-Labs-Diffusion, table 2)."""

    alpha_ramp_steps: int = 0
    """Steps over which ``alpha`` rises linearly from 0; 0 for constant."""

    ar_weight: float = 1.0
    """Weight of the AR loss. BD3-LM and Efficient-DLM train on the diffusion loss alone: 0."""

    weighting: str = "inverse"
    """Weight w of a masked position. ``inverse``: 1/t, the inverse of its inclusion probability. ``effective``: the
    inverse of the fraction that was in fact masked, in the sample or block that t belongs to (SDAR-VL). ``none``: 1
    (Set Block Decoding, TiDAR). Or one of a recipe's own (:data:`nemodiff_train.objective.noise.WEIGHTINGS`)."""

    reduction: Literal["global", "automodel", "bridge"] = "global"
    """What the sums are divided by. ``global``: the maskable tokens. ``automodel``: the AR sum by its tokens and
    the diffusion sum by the masked ones, both over the global batch. ``bridge``: each micro-batch by its masked +
    maskable tokens, then the mean over micro-batches. The last two reproduce runs of NeMo AutoModel and of
    Megatron Bridge's example."""

    # Blocks

    block_size: int = 32
    """Positions per diffusion block; also what decoding starts from. The released models use 32."""

    block_schedule: Literal["fixed", "random", "curriculum"] = "fixed"
    """``fixed``: ``block_size``. ``random``: drawn per step between the first and the last of
    ``block_sizes`` (Set Block Decoding, arXiv 2509.04185). ``curriculum``: ``block_sizes`` one after another
    (LLaDA2.0, arXiv 2512.15745), each for ``block_steps`` steps, the last to the end."""

    block_sizes: list[int] = field(default_factory=list)
    """For ``random``: lowest and highest size. For ``curriculum``: the sizes in order."""

    block_steps: int = 0
    """Steps per size of the curriculum."""

    clean_attention: Literal["causal", "block_causal"] = "causal"
    """What a clean position sees: itself and the positions before it, or its whole block too (BD3-LM). Where it
    sees the block, only a block's last position can carry an AR loss, and only ``shift`` has a use for it."""

    shift: bool = False
    """Whether position i of a noisy view predicts token i + 1 (Dream; Fast-dLLM v2, arXiv 2509.26328) instead of
    token i. A short training then reuses what the AR model has learned; the paper does not shift."""

    # Noise

    views: int = 1
    """Noisy copies of each sample, drawn independently, that share one clean half."""

    complementary: bool = False
    """The second view of each pair masks exactly what the first shows (Fast-dLLM v2)."""

    noise_granularity: Literal["sequence", "block"] = "sequence"
    """What a noise level t is drawn for. ``block``: BD3-LM (arXiv 2503.09573), Efficient-DLM (arXiv 2512.14067)."""

    min_noise_level: float = 1e-3
    """Lower end of the noise level t ~ U(min, max); bounds the weight 1/t."""

    max_noise_level: float = 1.0
    """Upper end of the noise level. BD3-LM clips both ends, dFactory trains on U(0.3, 0.8)."""

    noise_level_sampling: Literal["independent", "antithetic", "stratified", "shared"] = "independent"
    """How levels of different samples relate. ``antithetic``: samples 2k and 2k + 1 mirror each other.
    ``stratified``: the levels of a global batch cover the range evenly (BD3-LM calls this antithetic).
    ``shared``: a global batch has one level, which gradients of different batches then vary with."""

    mask_sampling: str = "bernoulli"
    """``bernoulli``: each position independently with probability t. ``exact``: t times the maskable positions,
    rounded up or down at random so that the mean is exact. Or one of a recipe's own
    (:data:`nemodiff_train.objective.noise.MASK_SAMPLINGS`)."""

    position_bias_half_life: float | None = None
    """Position-dependent masking (Efficient-DLM, section 3.3; 0.1 is its best): later positions of a block are
    masked more often. The fraction of a block over which the preference halves at t = 0."""

    fully_masked_fraction: float = 0.0
    """Fraction of samples at noise level 1, every position masked. TiDAR (arXiv 2511.08923, section 3) trains on
    nothing else: it is the state a one-shot draft of self-speculation starts from. Nemotron-Labs-Diffusion: 0."""

    # The mask token's embedding

    mask_embedding_noise: float = 0.0
    """Standard deviation of Gaussian noise on the embedding's output at masked positions, for a mask token whose
    row AR pretraining let decay (LLaDA2.0), as a multiple of the other rows' root mean square. 0 for none."""

    mask_embedding_noise_steps: int = 1000
    """Steps over which that noise falls linearly to 0."""

    @property
    def noisy_views(self) -> int:
        """Number of noisy views in a training sample: 0 in the AR stage."""
        return self.views if self.stage == "joint" else 0

    @property
    def largest_block(self) -> int:
        """Largest block size that any step may have."""
        return self.block_size if self.block_schedule == "fixed" else max([self.block_size, *self.block_sizes])
