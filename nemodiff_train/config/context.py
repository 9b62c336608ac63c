"""State of a run shared by the forward step and the callbacks, typed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from megatron.bridge.training.state import GlobalState
from torch import Tensor

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.objective.breakdown import Breakdown
from nemodiff_train.report.trace import Detokenize


def config_of(state: GlobalState) -> TriModeConfig:
    """Return the configuration of a run from Bridge's state, as callbacks have it in ``context.state``."""
    return cast(TriModeConfig, state.cfg)


@dataclass
class StepContext:
    """State shared by the forward step and the callbacks of one process, which do not know each other."""

    output: Path
    """Folder of the run."""
    step: int = 0
    """Steps that have been done."""
    figures: dict[str, float] = field(default_factory=dict)
    """More figures of the step that has just run: any callback adds some, the log writes those of the last rank."""
    rank_figures: dict[str, float] = field(default_factory=dict)
    """Last figures of the straggler monitor, for ``status.json``."""
    breakdown: Breakdown = field(default_factory=Breakdown)
    """Diffusion losses since they were last reported; the forward step adds those of each micro-batch."""
    evaluated: tuple[Evaluation, Detokenize] | None = None
    """Result of the evaluation after the step, and its detokenizer."""
    data_wait: float = 0.0
    """Seconds spent waiting for the loader, since the straggler monitor last set this to 0."""
    sample_indices: Tensor | None = None
    """[batch] int64, on the host: indices of the samples that run forward; None on a stage that reads none."""

    @property
    def metrics_file(self) -> Path:
        """``metrics.jsonl``, one line per step."""
        return self.output / "metrics.jsonl"
