"""Charts of the report, drawn as inline SVG; colours come from the page's style sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nemodiff_train.evaluation.metrics import ModeMetrics, PositionAgreement
from nemodiff_train.evaluation.pareto import FRONT, Point, curves, front, varied_settings
from nemodiff_train.report.display import decimal, mode_class, percent, setting, title
from nemodiff_train.report.svg import (
    Labels,
    Scale,
    dot,
    drawing,
    element,
    line,
    path,
    spread,
    text,
    ticks,
    tooltip,
)

WIDTH, HEIGHT = 460.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 444.0, 30.0, 256.0
ROW = 62.0
FEW = 20
"""Number of cycles below which a share is drawn hollow, because chance plays a large part in it."""


def tpf_bars(modes: dict[str, ModeMetrics]) -> Markup:
    """Draw tokens per forward by mode: all forwards solid, without the prefill as a lighter tip."""
    longest = max(max(m.tpf_all, m.tpf_no_prefill or 0) for m in modes.values())
    scale = Scale(0, max(longest, 1) * 1.04, 0, WIDTH)
    rows = [_tpf_row(mode, metrics, ROW * index, scale) for index, (mode, metrics) in enumerate(modes.items())]
    bottom = ROW * len(modes)
    marks = [line(scale(1), top, scale(1), top + 22, "mark") for top in (ROW * i + 25 for i in range(len(modes)))]
    name = text(scale(1), bottom + 18, "1 token per forward", "small", "start" if scale(1) < 300 else "end")
    return drawing(WIDTH, bottom + 26, "Tokens per forward by mode", *rows, *marks, name)


def _tpf_row(mode: str, m: ModeMetrics, top: float, scale: Scale) -> Markup:
    words = f"{title(mode)}: {decimal(m.tpf_all)} tokens per forward, {decimal(m.tpf_no_prefill)} without prefill"
    bar = {"x": 0, "y": top + 26, "height": 18, "rx": 3}
    return element(
        "g",
        tooltip(words),
        text(0, top + 17, title(mode), "label"),
        text(WIDTH, top + 17, decimal(m.tpf_all), "value", "end"),
        element("rect", width=scale(m.tpf_no_prefill or 0), class_="bar faint", **bar),
        element("rect", width=scale(m.tpf_all), class_="bar", **bar),
        class_=mode_class(mode),
    )


def forwards_bars(modes: dict[str, ModeMetrics]) -> Markup:
    """Draw the forwards spent on 100 tokens, split by kind; an oracle's search is named, not drawn."""
    scale = Scale(0, max(100 / m.tpf_all for m in modes.values()), 0, WIDTH)
    rows = [_forwards_row(mode, m, (ROW + 14) * index, scale) for index, (mode, m) in enumerate(modes.items())]
    return drawing(WIDTH, (ROW + 14) * len(modes), "Forwards per 100 tokens, by kind", *rows)


def _forwards_row(mode: str, m: ModeMetrics, top: float, scale: Scale) -> Markup:
    kinds = {kind: 100 * count / m.tokens for kind, count in m.forwards.items() if count}
    search = kinds.pop("search", None)
    largest_first = sorted(kinds.items(), key=lambda item: -item[1])
    bars, start = [], 0.0
    for index, (kind, count) in enumerate(largest_first):
        bars.append(
            element(
                "rect",
                tooltip(f"{title(mode)}, {kind}: {count:.1f} forwards per 100 tokens"),
                x=scale(start),
                y=top + 26,
                width=max(scale(count) - 1.5, 0.5),
                height=18,
                class_=f"bar shade-{min(index, 2)}",
            )
        )
        start += count
    split = " · ".join(f"{kind} {count:.1f}" for kind, count in largest_first)
    if search is not None:
        split += f" (found by {search:.0f} of search)"
    return element(
        "g",
        text(0, top + 17, title(mode), "label"),
        text(WIDTH, top + 17, f"{start:.1f}", "value", "end"),
        *bars,
        text(0, top + 61, split, "small"),
        class_=mode_class(mode),
    )


def speed_curves(points: Sequence[Point]) -> Markup:
    """Draw accuracy against tokens per forward: the curves of each mode, and the front of all of them."""
    x, y = _tpf_scale(points), _accuracy_scale(points)
    best = front(points)
    labels = Labels(RIGHT + 12)
    for point in points:
        labels.block(x(point.tpf), y(point.accuracy / 100), 7)
    modes = dict.fromkeys(point.mode for point in points)
    return drawing(
        WIDTH,
        HEIGHT,
        "Accuracy against tokens per forward, by mode and setting",
        _axes(x, y, "tokens per forward (all)", "accuracy"),
        path([(x(point.tpf), y(point.accuracy / 100)) for point in best], "front"),
        *(_mode_curves([p for p in points if p.mode == mode], best, x, y, labels) for mode in modes),
    )


def _mode_curves(points: Sequence[Point], best: Sequence[Point], x: Scale, y: Scale, labels: Labels) -> Markup:
    """Draw the points of one mode, joined along the setting that varies."""
    varied = varied_settings(points)
    joined = [curve for name, curve in curves(points) if name != FRONT]
    parts = [path([(x(p.tpf), y(p.accuracy / 100)) for p in curve], "curve thin") for curve in joined]
    for curve in joined:
        # The labels of the front come first; where room is short, or in a grid, the others are left out.
        for point in sorted(curve, key=lambda point: point not in best):
            beaten = "" if point in best else " beaten"
            at = x(point.tpf), y(point.accuracy / 100)
            parts.append(dot(*at, 5, _point_words(point, varied), f"dot{beaten}"))
            if point in best or len(varied) < 2:
                parts.append(labels.put(*at, _point_label(point, varied), "label", optional=point not in best))
    return element("g", *parts, class_=mode_class(points[0].mode))


def _point_label(point: Point, varied: Sequence[str]) -> str:
    settings = point.metrics.settings
    return " \N{MULTIPLICATION SIGN} ".join(setting(settings.get(name)) for name in varied)


def _point_words(point: Point, varied: Sequence[str]) -> str:
    settings = [f", {name.replace('_', ' ')} {setting(point.metrics.settings.get(name))}" for name in varied]
    m = point.metrics
    return (
        f"{title(point.mode)}{''.join(settings)}: {decimal(m.tpf_all)} tokens per forward, "
        f"accuracy {percent(m.accuracy)} (95%: {percent(m.accuracy_low)} to {percent(m.accuracy_high)})"
    )


def _tpf_scale(points: Sequence[Point]) -> Scale:
    """Return a scale from 1 (or below) to a little beyond the largest TPF."""
    low, high = min(1.0, *(point.tpf for point in points)), max(point.tpf for point in points)
    margin = max((high - low) * 0.08, 0.1)
    return Scale(low - margin, high + margin, LEFT, RIGHT)


def _accuracy_scale(points: Sequence[Point]) -> Scale:
    """Return a scale that zooms in on the accuracies shown, but never beyond a span of 10 points."""
    low, high = (bound(point.accuracy / 100 for point in points) for bound in (min, max))
    margin = max((high - low) * 0.2, 0.05)
    return Scale(max(low - margin, -0.02), min(high + margin, 1.02), BOTTOM, TOP)


def acceptance_curve(mode: str, agreement: Sequence[PositionAgreement]) -> Markup:
    """Draw the share of cycles in which the verifier agrees with the draft, by position in the draft."""
    width = max(len(agreement), 2)
    x, y = Scale(0.5, width + 0.5, LEFT, RIGHT - 84), Scale(0, 1, BOTTOM, TOP)
    reached = [(x(a.position), y(a.reached / a.drafted)) for a in agreement]
    area = path([(reached[0][0], BOTTOM), *reached, (reached[-1][0], BOTTOM)], "area")
    series = [
        [(a.position, a.conditional, a.reached) for a in agreement if a.conditional is not None],
        [(a.position, a.unconditional, a.drafted) for a in agreement],
    ]
    lines = [_acceptance_line(points, index, x, y) for index, points in enumerate(series)]
    # Each curve is named at its right end.
    ends = spread([*(y(points[-1][1]) for points in series), reached[-1][1]], 17, TOP, BOTTOM - 4)
    names = [
        text(reached[-1][0] + 10, end + 4, name, f"label series-{index}")
        for index, (name, end) in enumerate(zip(("if reached", "every cycle", "reached"), ends, strict=True))
    ]
    integers = [tick for tick in ticks(1, width, 8) if tick == int(tick)]
    axes = _axes(x, y, "position in the draft", "acceptance", integers)
    drawn = element("g", area, *lines, *names, class_=mode_class(mode))
    return drawing(WIDTH, HEIGHT, f"Acceptance by position, {title(mode)}", axes, drawn)


def _acceptance_line(points: Sequence[tuple[int, float, int]], index: int, x: Scale, y: Scale) -> Markup:
    """Draw one curve of (position, share, cycles)."""
    dots = [
        dot(
            x(position),
            y(share),
            3,
            f"Position {position}: agreed in {percent(share)} of {cycles:,} cycles",
            "dot" if cycles >= FEW else "dot few",
        )
        for position, share, cycles in points
    ]
    curve = path([(x(position), y(share)) for position, share, _ in points], "curve")
    return element("g", curve, *dots, class_=f"series-{index}")


@dataclass(frozen=True)
class Line:
    """A figure over the steps of a run."""

    name: str
    colour: str
    """Class that gives it its colour."""
    points: Sequence[tuple[float, float]]
    """(step, value), at least one."""


def over_steps(lines: Sequence[Line], above: str, share: bool = False) -> Markup:
    """Draw figures over the steps of a run, each named at its right end.

    Args:
        lines: At least one.
        above: What they are.
        share: Whether they are shares of 0 to 1.
    """
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    margin = 0.06 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 1.0
    x = Scale(min(steps), max(*steps, min(steps) + 1), LEFT, RIGHT - (84 if any(line.name for line in lines) else 0))
    y = Scale(min(values) - margin, max(values) + margin, BOTTOM, TOP)
    ends = spread([y(line.points[-1][1]) for line in lines], 17, TOP, BOTTOM - 4)
    drawn = [_over_steps(line, end, x, y) for line, end in zip(lines, ends, strict=True)]
    whole = [tick for tick in ticks(x.low, x.high, 6) if tick == int(tick)]
    axes = _axes(x, y, "step", above, whole, share)
    return drawing(WIDTH, HEIGHT, f"{above} over the steps", axes, *drawn)


def _over_steps(line: Line, end: float, x: Scale, y: Scale) -> Markup:
    at = [(x(step), y(value)) for step, value in line.points]
    few = [
        dot(*place, 3, f"{line.name}, step {step:g}: {value:.4g}")
        for place, (step, value) in zip(at, line.points, strict=True)
        if len(at) <= FEW
    ]
    name = text(at[-1][0] + 10, end + 4, line.name, "label")
    return element("g", path(at, "curve"), *few, name, class_=line.colour)


def _axes(
    x: Scale, y: Scale, below: str, above: str, x_ticks: Sequence[float] | None = None, share: bool = True
) -> Markup:
    """Draw both axes; a vertical one that is a share of 0 to 1 is written in percent."""
    parts = [text(2, 9, above, "small"), text(x.end, BOTTOM + 38, below, "small", "end")]
    for tick in ticks(max(y.low, 0), min(y.high, 1), 5) if share else ticks(y.low, y.high, 5):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        written = f"{100 * tick:.4g}%" if share else _short(tick)
        parts.append(text(x.start - 8, y(tick) + 4, written, "small", "end"))
    for tick in x_ticks or ticks(x.low, x.high, 6):
        parts.append(text(x(tick), BOTTOM + 18, _short(tick), "small", "middle"))
    return element("g", *parts)


def _short(value: float) -> str:
    """Return a number as an axis has room for: ``250``, ``12k``, ``1.5M``, ``5e-06``."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"
