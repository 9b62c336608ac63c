"""What trajectories record: blocks on their way from masks to text, one state per forward."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class States:
    """States of blocks, each as one forward met it."""

    features: Tensor
    """[states, block, features] fp32."""
    masked: Tensor
    """[states, block] boolean."""
    right: Tensor
    """[states, block] boolean: the token that the forward gives is the reference's."""

    def __len__(self) -> int:
        return len(self.masked)

    def __getitem__(self, index: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return all states of several records."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))
