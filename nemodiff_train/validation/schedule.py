"""The learning-rate schedule: what does not fit the steps of the run."""

from collections.abc import Iterator

from nemodiff_train.config.config import TriModeConfig


def problems(config: TriModeConfig) -> Iterator[str]:
    """Yield what keeps the learning rate from its peak or its end, one line each."""
    schedule, steps = config.scheduler, config.train.train_iters
    if not steps:
        return
    length = schedule.max_steps or schedule.lr_decay_iters or steps
    run = f"train.train_iters={steps}" if length == steps else f"a schedule of {length} steps"
    if schedule.lr_decay_iters and schedule.lr_decay_iters > steps and not schedule.max_steps:
        yield (
            f"scheduler.lr_decay_iters={schedule.lr_decay_iters} does not fit train.train_iters={steps}: the rate "
            "would not come down; leave it out"
        )
    warmup = schedule.lr_warmup_iters or round((schedule.lr_warmup_fraction or 0) * length)
    if warmup >= length:
        yield (
            f"scheduler.lr_warmup_iters={warmup} does not fit {run}: the learning rate would not reach its peak; use "
            "fewer steps, or a share of the run with scheduler.lr_warmup_fraction"
        )
    elif schedule.lr_decay_style == "WSD" and warmup + (decay := schedule.lr_wsd_decay_iters or length) > length:
        yield (
            f"scheduler.lr_wsd_decay_iters={decay} and {warmup} steps of warm-up do not fit {run}: the learning rate "
            "would jump; use fewer steps, or a share of the run with scheduler.lr_wsd_decay_fraction"
        )
