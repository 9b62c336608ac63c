"""Charts of the report, drawn as inline SVG; colours come from the page's style sheet."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from nemodiff_train.evaluation.metrics import ModeMetrics, PositionAcceptance
from nemodiff_train.evaluation.pareto import FRONT, SweepPoint, curves, front, varied_settings
from nemodiff_train.report.display import decimal, mode_class, percent, setting, title
from nemodiff_train.report.svg import Labels, Scale, dot, drawing, element, line, path, spread, text, ticks, tooltip

WIDTH, HEIGHT = 460.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 444.0, 30.0, 256.0
ROW = 62.0
FEW = 20
"""Number of cycles below which a share is drawn hollow, because chance plays a large part in it."""


def tpf_bars(modes: dict[str, ModeMetrics]) -> Markup:
    """Draw tokens per forward by mode: all forwards solid, without the prefill as a lighter tip."""
    longest = max(max(m.tpf_all, m.tpf_no_prefill or 0) for m in modes.values())
    scale = Scale(0, max(longest, 1) * 1.04, 0, WIDTH)
    rows, marks = [], []
    for index, (mode, m) in enumerate(modes.items()):
        top = ROW * index
        words = f"{title(mode)}: {decimal(m.tpf_all)} tokens per forward, {decimal(m.tpf_no_prefill)} without prefill"
        bar = {"x": 0, "y": top + 26, "height": 18, "rx": 3}
        parts = [
            tooltip(words),
            text(0, top + 17, title(mode), "label"),
            text(WIDTH, top + 17, decimal(m.tpf_all), "value", "end"),
            element("rect", **bar, width=scale(m.tpf_no_prefill or 0), class_="bar faint"),
            element("rect", **bar, width=scale(m.tpf_all), class_="bar"),
        ]
        rows.append(element("g", *parts, class_=mode_class(mode)))
        marks.append(line(scale(1), top + 25, scale(1), top + 47, "mark"))
    bottom = ROW * len(modes)
    name = text(scale(1), bottom + 18, "1 token per forward", "small", "start" if scale(1) < 300 else "end")
    return drawing(WIDTH, bottom + 26, "Tokens per forward by mode", *rows, *marks, name)


def forwards_bars(modes: dict[str, ModeMetrics]) -> Markup:
    """Draw the forwards spent on 100 tokens, split by kind; an oracle's search is named, not drawn."""
    scale = Scale(0, max(100 / m.tpf_all for m in modes.values()), 0, WIDTH)
    height = ROW + 14
    rows = []
    for row, (mode, m) in enumerate(modes.items()):
        top, start = height * row, 0.0
        kinds = {kind: 100 * count / m.tokens for kind, count in m.forwards.items() if count}
        search = kinds.pop("search", None)
        largest_first = sorted(kinds.items(), key=lambda item: -item[1])
        bars = []
        for index, (kind, count) in enumerate(largest_first):
            words = tooltip(f"{title(mode)}, {kind}: {count:.1f} forwards per 100 tokens")
            geometry = {"x": scale(start), "y": top + 26, "width": max(scale(count) - 1.5, 0.5), "height": 18}
            bars.append(element("rect", words, **geometry, class_=f"bar shade-{min(index, 2)}"))
            start += count
        split = " · ".join(f"{kind} {count:.1f}" for kind, count in largest_first)
        if search is not None:
            split += f" (found by {search:.0f} of search)"
        name = text(0, top + 17, title(mode), "label")
        total = text(WIDTH, top + 17, f"{start:.1f}", "value", "end")
        rows.append(element("g", name, total, *bars, text(0, top + 61, split, "small"), class_=mode_class(mode)))
    return drawing(WIDTH, height * len(modes), "Forwards per 100 tokens, by kind", *rows)


def speed_curves(points: Sequence[SweepPoint]) -> Markup:
    """Draw accuracy against tokens per forward: the curves of each mode, and the front of all of them."""
    # From 1 TPF (or below) to a little beyond the largest; accuracies zoomed in, to a span of 10 points at least.
    low, high = min(1.0, *(point.tpf for point in points)), max(point.tpf for point in points)
    margin = max((high - low) * 0.08, 0.1)
    x = Scale(low - margin, high + margin, LEFT, RIGHT)
    low, high = (bound(point.accuracy / 100 for point in points) for bound in (min, max))
    margin = max((high - low) * 0.2, 0.05)
    y = Scale(max(low - margin, -0.02), min(high + margin, 1.02), BOTTOM, TOP)

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


def _mode_curves(
    points: Sequence[SweepPoint], best: Sequence[SweepPoint], x: Scale, y: Scale, labels: Labels
) -> Markup:
    """Draw the points of one mode, joined along the setting that varies."""
    mode, varied = points[0].mode, varied_settings(points)
    joined = [curve for name, curve in curves(points) if name != FRONT]
    parts = [path([(x(p.tpf), y(p.accuracy / 100)) for p in curve], "curve thin") for curve in joined]
    for curve in joined:
        # The labels of the front come first; where room is short, or in a grid, the others are left out.
        for point in sorted(curve, key=lambda point: point not in best):
            m, on_front = point.metrics, point in best
            values = {name: setting(m.settings.get(name)) for name in varied}
            settings = "".join(f", {name.replace('_', ' ')} {value}" for name, value in values.items())
            words = (
                f"{title(mode)}{settings}: {decimal(m.tpf_all)} tokens per forward, accuracy {percent(m.accuracy)} "
                f"(95%: {percent(m.accuracy_low)} to {percent(m.accuracy_high)})"
            )
            at = x(point.tpf), y(point.accuracy / 100)
            parts.append(dot(*at, 5, words, "dot" if on_front else "dot beaten"))
            if on_front or len(varied) < 2:
                label = " \N{MULTIPLICATION SIGN} ".join(values.values())
                parts.append(labels.put(*at, label, "label", optional=not on_front))
    return element("g", *parts, class_=mode_class(mode))


def acceptance_curve(mode: str, acceptance: Sequence[PositionAcceptance]) -> Markup:
    """Draw the share of cycles in which the verifier accepts the draft token, by position in the draft."""
    width = max(len(acceptance), 2)
    x, y = Scale(0.5, width + 0.5, LEFT, RIGHT - 84), Scale(0, 1, BOTTOM, TOP)
    reached = [(x(a.position), y(a.reached / a.drafts)) for a in acceptance]
    parts = [path([(reached[0][0], BOTTOM), *reached, (reached[-1][0], BOTTOM)], "area")]
    # Two curves of (position, share, cycles).
    series = [
        [(a.position, a.conditional, a.reached) for a in acceptance if a.conditional is not None],
        [(a.position, a.unconditional, a.drafts) for a in acceptance],
    ]
    for index, points in enumerate(series):
        drawn = [path([(x(position), y(share)) for position, share, _ in points], "curve")]
        for position, share, cycles in points:
            words = f"Position {position}: accepted in {percent(share)} of {cycles:,} cycles"
            drawn.append(dot(x(position), y(share), 3, words, "dot" if cycles >= FEW else "dot few"))
        parts.append(element("g", *drawn, class_=f"series-{index}"))
    # Each curve is named at its right end.
    ends = spread([*(y(points[-1][1]) for points in series), reached[-1][1]], 17, TOP, BOTTOM - 4)
    for index, (name, end) in enumerate(zip(("if reached", "every cycle", "reached"), ends, strict=True)):
        parts.append(text(reached[-1][0] + 10, end + 4, name, f"label series-{index}"))
    integers = [tick for tick in ticks(1, width, 8) if tick == int(tick)]
    axes = _axes(x, y, "position in the draft", "acceptance", integers)
    label = f"Acceptance by position, {title(mode)}"
    return drawing(WIDTH, HEIGHT, label, axes, element("g", *parts, class_=mode_class(mode)))


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
    integers = [tick for tick in ticks(x.low, x.high, 6) if tick == int(tick)]
    parts = [_axes(x, y, "step", above, integers, share)]
    ends = spread([y(line.points[-1][1]) for line in lines], 17, TOP, BOTTOM - 4)
    for drawn, end in zip(lines, ends, strict=True):
        curve = [path([(x(step), y(value)) for step, value in drawn.points], "curve")]
        if len(drawn.points) <= FEW:
            for step, value in drawn.points:
                curve.append(dot(x(step), y(value), 3, f"{drawn.name}, step {step:g}: {value:.4g}"))
        name = text(x(drawn.points[-1][0]) + 10, end + 4, drawn.name, "label")
        parts.append(element("g", *curve, name, class_=drawn.colour))
    return drawing(WIDTH, HEIGHT, f"{above} over the steps", *parts)


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
