"""Settings of a run beside the training step: its diagnostics, evaluation in the loop, and reactions to faults."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True)
class DiagnosticsConfig:
    """Figures that a run records besides its losses, in TensorBoard, W&B and ``metrics.jsonl``."""

    loss_interval: int = 10
    """Steps between reports of the diffusion loss by noise level and by position in the block; 0 for none."""
    line_interval: int = 10
    """Steps between lines of the log where the console is not a terminal; 0 for none."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Decoding in the training loop; see :mod:`nemodiff_train.training.callbacks.loop_evaluation`."""

    interval: int = 0
    """Steps between evaluations; 0 for none."""
    task: str = "arithmetic"
    """A built-in task, or a JSONL file of prompts and answers."""
    scorer: str = "numeric"
    """Scorer of a file's answers: numeric or exact."""
    count: int = 16
    """Number of prompts, taken from the start of the task, so that they are always the same."""
    modes: list[str] = field(default_factory=lambda: ["ar", "diffusion", "linear"])
    """Decoding modes; the AR stage uses ``ar`` alone."""
    max_new_tokens: int = 128
    """Maximum number of new tokens per prompt."""
    threshold: float = 0.9
    """Confidence threshold of block diffusion."""
    chat: bool = False
    """Whether prompts are put into the tokenizer's chat template."""


GradientPolicy = Literal["stop", "skip", "rollback"]


@dataclass(kw_only=True)
class ResilienceConfig:
    """Reactions of a run to faults; see docs/training.md, "When it stops".

    ``checkpoint.most_recent_k`` sets how many checkpoints are kept; the other settings are these.
    """

    keep_every: int = 0
    """Keep checkpoints whose step is a multiple of this, whatever ``checkpoint.most_recent_k`` is; 0 for none."""
    on_non_finite: GradientPolicy = "stop"
    """After a gradient that is not finite: stop, skip the update, or return to the last checkpoint's weights."""
    on_spike: GradientPolicy = "skip"
    """After a gradient norm above ``spike_factor`` times the median of the last ``spike_window`` updates."""
    spike_factor: float = 0.0
    """Multiple of the median norm above which a step is a spike; 0 for no limit."""
    spike_window: int = 50
    """Updates whose median is taken; no step counts as a spike before half of them are recorded."""
    max_consecutive_skips: int = 5
    """Maximum number of consecutive steps without an update; one more stops the run."""
    replica_check_interval: int = 1000
    """Steps between comparisons of the replicas' weights; 0 for none."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which every rank writes its stacks and exits; 0 for no limit."""
    setup_timeout: float = 3600.0
    """The same for the time before the first step, which reads the model and builds the data's index."""
    exit_grace: float = 240.0
    """Seconds after SIGTERM, SIGUSR1 or Ctrl-C in which a run must save and exit; after them the process is ended."""
    straggler_interval: int = 10
    """Steps between reports of slow ranks and slow data in ``status.json``; 0 for none."""
    restarts: int = 3
    """Maximum number of consecutive starts that end without a new checkpoint; 0 for no limit."""


@dataclass(frozen=True)
class AdapterBase:
    """The checkpoint that adapters are trained on; recorded by the run, and compared wherever they are loaded."""

    iteration: str
    """Name of its ``iter_*`` folder."""
    checksum: str
    """See :func:`nemodiff_train.model.checksums.identity`."""
