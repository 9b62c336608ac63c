"""The switches of a drafter's training."""

from dataclasses import dataclass
from typing import Literal

from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.drafts import DRAFT_KINDS, DraftKind

UNO_BLOCKS = [2, 4, 6, 8, 12, 16]
"""Block sizes that Uno (arXiv 2609.04010) trains on, one after another, for equally many steps."""


@dataclass(kw_only=True)
class DrafterConfig:
    """The drafter and its loss; the defaults are Nemotron-Labs-Diffusion's (arXiv 2607.05722, section 3.3).

    A slot is a drafted position of a block.  Its verifier's logits p come from the clean half, its draft's logits q
    from the noisy half with the adapters.
    """

    kind: Literal["nemotron", "uno"] = "nemotron"
    """Kind of the drafts; see :data:`~nemodiff_train.objective.drafts.DRAFT_KINDS`."""

    loss: Literal["lk_hybrid", "total_variation", "cross_entropy", "kl"] = "lk_hybrid"
    """``lk_hybrid``: lambda KL(p || q) + (1 - lambda) TV(p, q) + cross-entropy to the verifier's choice.
    ``total_variation``, ``kl`` and ``cross_entropy``: one of these terms alone, TV and KL without lambda."""

    temperature: float = 3.0
    """Temperature of both distributions in the divergences; the cross-entropy is at 1."""

    support: int = 200
    """Number of tokens of each distribution that the loss looks at: the most probable of p and those of q; 0 for the
    whole vocabulary."""

    slots: Literal["visited", "all"] = "visited"
    """Slots with a loss. ``visited``: the accepted prefix of a draft and the first rejected slot, since decoding
    does not reach the rest. ``all``: every slot."""

    sampled_fraction: float = 0.9
    """Fraction of slots whose draft is drawn at temperature 1 to find the accepted prefix; the others are greedy."""

    position_decay: float = 0.0
    """Decay length of the weight exp(-(k - 1) / length) of slot k (DFlash takes 7, 5 and 4 for blocks of 16, 10 and
    8); 0 for equal weights."""

    @property
    def draft_kind(self) -> DraftKind:
        """Return the choices that ``kind`` stands for; an unknown one is refused before anything is built."""
        return DRAFT_KINDS.get(self.kind, DRAFT_KINDS["nemotron"])


def selector(kind: Literal["nemotron", "uno"]) -> DrafterConfig:
    """Return the switches of a path selector's training: the drafter's loss, at the temperature of decoding.

    Args:
        kind: Kind of its drafter.
    """
    return DrafterConfig(kind=kind, temperature=1.0, support=0)


def uno() -> DrafterConfig:
    """Return the switches of Uno (arXiv 2609.04010): total variation of whole distributions, in every slot."""
    return DrafterConfig(kind="uno", loss="total_variation", temperature=1.0, support=0, slots="all")


def uno_objective(steps: int, shift: bool) -> ObjectiveConfig:
    """Return the objective of Uno: blocks grow to 16 tokens, each size for an equal share of the steps.

    Args:
        steps: Training steps.
        shift: Whether the model was trained with shifted targets.
    """
    return ObjectiveConfig(
        block_size=UNO_BLOCKS[-1],
        block_schedule="curriculum",
        block_sizes=UNO_BLOCKS,
        block_steps=-(-steps // len(UNO_BLOCKS)),
        shift=shift,
    )
