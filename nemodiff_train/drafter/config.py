"""The switches of the drafter's training."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class DrafterConfig:
    """The drafter's loss; the defaults are Nemotron-Labs-Diffusion's (section 3.3).

    A slot is a drafted place of a block.  The verifier's logits p of a slot are those of the clean half, the draft's
    q those of the noisy half with the adapters.
    """

    loss: Literal["lk_hybrid", "cross_entropy"] = "lk_hybrid"
    """``lk_hybrid``: lambda KL(p || q) + (1 - lambda) TV(p, q) + cross-entropy to the verifier's choice.
    ``cross_entropy``: the last term alone."""

    temperature: float = 3.0
    """Of both distributions in the divergences; the cross-entropy is at 1."""

    support: int = 200
    """Tokens of each distribution that the loss looks at: the most probable of p and those of q."""

    slots: Literal["visited", "all"] = "visited"
    """``visited``: the accepted prefix of a draft and the first rejected slot, as decoding does not reach the rest.
    ``all``: every slot."""

    sampled_share: float = 0.9
    """Share of slots whose draft is drawn at temperature 1 to find the accepted prefix; the others are greedy."""

    position_decay: float = 0.0
    """Slot k weighs exp(-(k - 1) / this) (DFlash, which takes 7, 5 and 4 for blocks of 16, 10 and 8); 0 for 1."""
