"""The page of a run while it runs: figures over its steps, its configuration, and what it decodes."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.report import charts, page
from nemodiff_train.report.display import decimal, mode_class, percent, rate
from nemodiff_train.report.page import Chart, PromptOutputs
from nemodiff_train.report.trace import Detokenize

POINTS = 300
"""Maximum number of points of a curve, an even number; where there are more, neighbours are averaged."""

_DRAWN = 1e30
"""Values from here on have no point."""

_LOSSES = {"ar_loss": ("AR", "ar"), "diffusion_loss": ("diffusion", "diffusion"), "draft_loss": ("draft", "linear")}
"""Losses of ``metrics.jsonl``: their names, and the modes whose colours they have."""


@dataclass
class Series:
    """The means of a figure over equally long stretches of steps."""

    points: list[tuple[float, float]] = field(default_factory=list)
    """(last step, mean) of each complete stretch."""
    _length: int = 1
    _open: list[tuple[float, float]] = field(default_factory=list)

    def add(self, step: float, value: float) -> None:
        """Add the value of a step."""
        self._open.append((step, value))
        if len(self._open) < self._length:
            return
        self.points.append(_mean(self._open))
        self._open = []
        if len(self.points) == POINTS:
            self._length *= 2
            self.points = [_mean(self.points[index : index + 2]) for index in range(0, POINTS, 2)]

    @property
    def shown(self) -> list[tuple[float, float]]:
        """All points, with that of the stretch that has begun."""
        return [*self.points, *([_mean(self._open)] if self._open else [])]


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return points[-1][0], sum(value for _, value in points) / len(points)


@dataclass
class RunPage:
    """The page of a run.

    Args:
        name: Name of the run.
        stage: What it trains.
        steps: Number of steps of the run.
        configuration: All its settings, as YAML.
    """

    name: str
    stage: str
    steps: int
    configuration: str
    series: defaultdict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    last: dict[str, float] = field(default_factory=dict)
    """Newest value of each figure."""
    evaluation: Evaluation | None = None
    samples: list[PromptOutputs] = field(default_factory=list)

    def add(self, record: Mapping[str, float | None]) -> None:
        """Add a line of ``metrics.jsonl``, without what no curve can show, such as a loss that is not a number."""
        figures = {
            name: value for name, value in record.items() if isinstance(value, int | float) and abs(value) < _DRAWN
        }
        self.last |= figures
        for name, value in figures.items():
            self.series[name].add(figures["step"], value)

    def show(self, evaluation: Evaluation, detokenize: Detokenize) -> None:
        """Show what an evaluation in the loop has decoded."""
        self.evaluation, self.samples = evaluation, page.samples_of(evaluation, detokenize)

    def render(self) -> str:
        """Return the page. It needs no other file and no network."""
        return page.render(
            "run.html.j2",
            self.samples,
            self.evaluation.modes if self.evaluation else {},
            run=self,
            heroes=list(self._heroes()),
            charts=list(self._charts()),
            written=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _heroes(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Yield the main figures: colour, heading, figure, unit, and a line below."""
        for key, (name, mode) in _LOSSES.items():
            if key in self.last:
                first = self.series[key].shown[0][1]
                yield mode_class(mode), f"{name} loss", f"{self.last[key]:.3f}", "nats per token", f"from {first:.3f}"
        for key, mode in self._of_modes("eval/tpf/"):
            correct = f"{percent(self.last.get(f'eval/accuracy/{mode}'))} correct"
            yield mode_class(mode), mode, decimal(self.last[key]), "tokens per forward", correct
        if "tokens_per_second" in self.last:
            mfu = f"MFU {percent(self.last['mfu'])}" if "mfu" in self.last else ""
            yield mode_class(""), "throughput", rate(self.last["tokens_per_second"]), "tokens per second", mfu

    def _of_modes(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, key.removeprefix(prefix)) for key in self.series if key.startswith(prefix)]

    def _charts(self) -> Iterator[Chart]:
        losses = [self._line(key, name, mode) for key, (name, mode) in _LOSSES.items() if key in self.series]
        if losses:
            yield Chart("Losses", "Nats per counted token of the global batch.", charts.over_steps(losses, "loss"))
        for prefix, heading, share in (
            ("eval/tpf/", "Tokens per forward", False),
            ("eval/accuracy/", "Accuracy", True),
            ("eval/acceptance_length/", "Acceptance length", False),
        ):
            if lines := [self._line(key, mode, mode) for key, mode in self._of_modes(prefix)]:
                caption = "Decoded in the loop, on the weights of the step."
                yield Chart(heading, caption, charts.over_steps(lines, heading.lower(), share))
        for key, heading, caption, share in (
            ("expected_tpf", "Expected TPF", "Tokens per forward that drafts of training samples promise.", False),
            ("learning_rate", "Learning rate", "Of the step.", False),
            ("grad_norm", "Gradient norm", "Before clipping; skipped updates have none.", False),
            ("tokens_per_second", "Throughput", "Clean tokens per second, all ranks together.", False),
            ("mfu", "MFU", "Model operations per second over the peak of the GPUs.", True),
        ):
            if key in self.series:
                yield Chart(heading, caption, charts.over_steps([self._line(key, "", "")], heading.lower(), share))

    def _line(self, key: str, name: str, mode: str) -> charts.Line:
        return charts.Line(name, mode_class(mode), self.series[key].shown)
