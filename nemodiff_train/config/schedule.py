"""The learning-rate schedule, in fractions of the run or in steps."""

from dataclasses import dataclass

from megatron.bridge.training.config import SchedulerConfig


@dataclass(kw_only=True)
class ScheduleConfig(SchedulerConfig):
    """Bridge's schedule, whose decay may be given as a fraction of the run as well."""

    lr_warmup_fraction: float | None = None
    lr_warmup_iters: int = 0
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_fraction: float | None = None
    """Fraction of the run's steps in the final decay of ``WSD``; ``lr_wsd_decay_iters`` is the same in steps."""

    def resolve_fractions(self, steps: int) -> None:
        """Turn fractions into whole steps of a run of ``steps``; what is given in steps stays."""
        length = self.max_steps or self.lr_decay_iters or steps
        if self.lr_warmup_fraction is not None and not self.lr_warmup_iters:
            self.lr_warmup_iters, self.lr_warmup_fraction = round(self.lr_warmup_fraction * length), None
        if self.lr_wsd_decay_fraction is not None and self.lr_wsd_decay_iters is None:
            self.lr_wsd_decay_iters, self.lr_wsd_decay_fraction = round(self.lr_wsd_decay_fraction * length), None


FRACTION_OF_STEPS = {"lr_warmup_iters": "lr_warmup_fraction", "lr_wsd_decay_iters": "lr_wsd_decay_fraction"}
"""Settings in steps, and the fractions that they take the place of."""
