"""Ranges of the settings, by what a name says they are: a count, an interval, a fraction, a rate, a seed, a time."""

import math
import re
from dataclasses import dataclass

from nemodiff_train.errors import UserError

_HIGHEST = 1e12
"""More steps, samples or bytes than there will be."""


@dataclass(frozen=True)
class _Range:
    names: str
    """Regular expression of whole names."""
    lowest: float
    highest: float = _HIGHEST
    ends: bool = True
    """Whether the lowest and the highest number are possible themselves, where they are not counts."""
    unlimited: bool = False
    """Whether infinity is possible as well, for no limit."""

    def holds(self, value: float) -> bool:
        """Return whether a value is in the range; NaN never is."""
        if self.unlimited and value == math.inf:
            return True
        if self.ends:
            return self.lowest <= value <= self.highest
        return self.lowest < value < self.highest

    def __str__(self) -> str:
        lowest, highest = (
            f"{int(end):,}" if end == int(end) else f"{end:.9g}" for end in (self.lowest, self.highest)
        )
        if self.highest == _HIGHEST:
            return f"{lowest} or more" if self.ends else f"a number above {lowest}"
        return f"a number from {lowest} to {highest}" if self.ends else f"a number between {lowest} and {highest}"


_SECTIONS_OF_OURS = "objective|drafter|diagnostics|evaluation|resilience"
_RANGES = (
    # What differs from its kind: -1 for none, 0 for never, infinity for no limit.
    _Range(r"checkpoint\.most_recent_k|tokenizer\.null_tokenizer_pad_id", -1),
    _Range(r"optimizer\.grad_norm_skip_threshold", 0, unlimited=True),
    _Range(rf"train\.(exit|manual_gc)_interval|checkpoint\.save_interval|({_SECTIONS_OF_OURS})\..*_?interval", 0),
    _Range(r"checkpoint\.async_ckpt_cpu_priority", 0, 19),
    _Range(r"checkpoint\.async_ckpt_io_priority", 0, 3),
    _Range(r"logger\.logging_level", 0, 100),
    _Range(r"evaluation\.(count|max_new_tokens)", 1, 1e7),
    _Range(r"resilience\.spike_window", 2, 1e7),
    _Range(r"train\.train_iters|dataset\.seq_length|model\.num_layers|objective\.views", 1),
    _Range(r"rng\.seed", 1, 2**31 - 1),
    _Range(r"objective\.seed", 0, 2**32 - 1),
    _Range(r"objective\.position_bias_half_life|drafter\.temperature", 0, ends=False),
    _Range(r"resilience\.exit_grace", 0, ends=False, unlimited=True),
    # By kind.
    _Range(r".*seed", 0, 2**31 - 1),
    _Range(r".*(_workers|_per_rank)", 0, 1024),
    _Range(r".*(dropout|momentum|beta[12]?)", 0, 1 - 1e-9),
    _Range(r".*(fraction|percent|error_injection_rate)", 0, 1),
    _Range(r".*(_eps|_epsilon)", 0, 1, ends=False),
    _Range(r".*[._]lr|.*weight_decay|.*lr_warmup_init", 0, 100),
    _Range(r".*(_timeout|_grace|timeout_minutes.*|timeout_seconds.*|_in_mins)", 0, 1e8),
    _Range(r".*(_buffer_size|_queue_size|_window_size)", 1, 1e8),
    _Range(r".*(_sizes?|_interval|_freq|_frequency|_by|_len|_dim|_heads|_groups|_channels|_buckets|_instances)", 1),
    _Range(r".*(_shards|_n_ranks|_iters_per_.*|_num_layers|_chunks_for_.*)", 0),
    _Range(r".*", 0),
)
"""The first that matches a setting counts."""


def check_range(key: str, value: object) -> None:
    """Refuse a number, or a number in a list, that a setting cannot have.

    Args:
        key: ``section.field``.
        value: Of any type; what is not a number is left to the declared type.

    Raises:
        UserError: Names the setting, the value and the range.
    """
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        limits = next(kind for kind in _RANGES if re.fullmatch(kind.names, key))
        if not limits.holds(number):
            raise UserError(f"{key} is {number}; use {limits}")
