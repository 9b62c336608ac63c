"""The switches of a drafter's training."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class DrafterConfig:
    """The drafter's loss; the defaults are Nemotron-Labs-Diffusion's (arXiv 2607.05722, section 3.3).

    A slot is a drafted position of a block.  Its verifier's logits p come from the clean half, its draft's logits q
    from the noisy half with the adapters.
    """

    loss: Literal["lk_hybrid", "cross_entropy"] = "lk_hybrid"
    """``lk_hybrid``: lambda KL(p || q) + (1 - lambda) TV(p, q) + cross-entropy to the verifier's choice.
    ``cross_entropy``: the last term alone."""

    temperature: float = 3.0
    """Temperature of both distributions in the divergences; the cross-entropy is at 1."""

    support: int = 200
    """Number of tokens of each distribution that the loss looks at: the most probable of p and those of q."""

    slots: Literal["visited", "all"] = "visited"
    """Slots with a loss. ``visited``: the accepted prefix of a draft and the first rejected slot, since decoding
    does not reach the rest. ``all``: every slot."""

    sampled_share: float = 0.9
    """Fraction of slots whose draft is drawn at temperature 1 to find the accepted prefix; the others are greedy."""

    position_decay: float = 0.0
    """Decay length of the weight exp(-(k - 1) / length) of slot k (DFlash takes 7, 5 and 4 for blocks of 16, 10 and
    8); 0 for equal weights."""
