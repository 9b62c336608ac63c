"""Accuracy against parallelism: the Pareto front of the settings, and the area under the curve of each mode."""

import math
from collections import defaultdict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train.evaluation.metrics import ModeMetrics

DROP = 5.0
"""Maximum number of accuracy points below a curve's first point at which a point still counts."""

FRONT = "front of all settings"


class SweepPoint(BaseModel):
    """One mode at one setting."""

    model_config = ConfigDict(frozen=True)

    mode: str
    metrics: ModeMetrics

    @property
    def tpf(self) -> float:
        """Tokens per forward, counting all forwards."""
        return self.metrics.tpf_all

    @property
    def accuracy(self) -> float:
        """Accuracy in percent."""
        return 100 * (self.metrics.accuracy or 0.0)


class Area(BaseModel):
    """Accuracy under parallelism (AUP) of one curve."""

    model_config = ConfigDict(frozen=True)

    mode: str
    curve: str = Field(description="The settings on the curve: one, those of a block size, or a front.")
    points: list[tuple[float, float]] = Field(description="TPF (all) and accuracy in percent, by rising TPF.")
    dropped: int = Field(description="Points left out, more than 5 accuracy points below the first.")
    aup: float = Field(
        description="rho_1 y_1 + sum of (rho_i - rho_(i-1)) / 2 * (y_i W(y_i) + y_(i-1) W(y_(i-1))) over the points "
        "by rising TPF rho, y in percent, W(y) = min(exp(-3 (1 - y / y_max)), 1). Relative to y_max."
    )


class Areas(BaseModel):
    """The areas of all curves, and the accuracy that they are relative to."""

    model_config = ConfigDict(frozen=True)

    best: float = Field(description="y_max: the best accuracy of all modes and settings shown, in percent.")
    best_mode: str = Field(description="The mode that reaches y_max.")
    rows: list[Area]


def front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the points that no other beats in TPF without losing accuracy, or the reverse, by rising TPF."""
    kept: list[SweepPoint] = []
    for point in sorted(points, key=lambda point: (-point.tpf, -point.accuracy)):
        if not kept or point.accuracy > kept[-1].accuracy:
            kept.append(point)
    return kept[::-1]


def areas(points: Sequence[SweepPoint]) -> Areas:
    """Return the area under every curve that the points make up."""
    best = max(points, key=lambda point: point.accuracy)
    rows = []
    for mode in dict.fromkeys(point.mode for point in points):
        for name, curve in curves([point for point in points if point.mode == mode]):
            ordered = sorted(((point.tpf, point.accuracy) for point in curve), key=lambda at: (at[0], -at[1]))
            kept = [at for at in ordered if at[1] >= ordered[0][1] - DROP]
            area = aup(kept, best.accuracy)
            rows.append(Area(mode=mode, curve=name, points=kept, dropped=len(ordered) - len(kept), aup=area))
    return Areas(best=best.accuracy, best_mode=best.mode, rows=rows)


def curves(points: Sequence[SweepPoint]) -> list[tuple[str, list[SweepPoint]]]:
    """Cut the points of one mode into curves along which one setting varies, and name them.

    A grid has one curve per block size, and its front beside them.
    """
    varied = varied_settings(points)
    if len(varied) < 2:
        return [(f"by {varied[0].replace('_', ' ')}" if varied else "one setting", list(points))]
    by_size: dict[str, list[SweepPoint]] = defaultdict(list)
    for point in points:
        by_size[f"block size {point.metrics.settings.get('block_size')}"].append(point)
    return [*by_size.items(), (FRONT, front(points))]


def varied_settings(points: Sequence[SweepPoint]) -> list[str]:
    """Return the names of the settings in which the points differ."""
    names = dict.fromkeys(name for point in points for name in point.metrics.settings)
    return [name for name in names if len({str(point.metrics.settings.get(name)) for point in points}) > 1]


def aup(points: Sequence[tuple[float, float]], best: float) -> float:
    """Return the accuracy under parallelism, as the field ``Area.aup`` defines it.

    Args:
        points: TPF and accuracy in percent, by rising TPF.
        best: The best accuracy of any method it is to be compared with, in percent.
    """
    # y W(y) at each point, then trapezoids; left of the first point lies a rectangle of unweighted accuracy.
    weighted = []
    for _, accuracy in points:
        weighted.append(accuracy * (min(math.exp(-3 * (1 - accuracy / best)), 1.0) if best else 1.0))
    total = points[0][0] * points[0][1]
    for index in range(1, len(points)):
        step = points[index][0] - points[index - 1][0]
        total += step / 2 * (weighted[index] + weighted[index - 1])
    return total
