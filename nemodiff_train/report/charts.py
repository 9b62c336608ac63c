"""The report's pictures, drawn as inline SVG; colours come from the page's style sheet."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from nemodiff_train.evaluation.categories import CategoryMetrics
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
LABELS = 132.0
FEW = 20
"""Cycles below which a share is drawn hollow: chance plays a large part in it."""


def tpf_bars(modes: dict[str, ModeMetrics]) -> Markup:
    """Tokens per forward by mode: all forwards solid, without the prefill as a lighter tip."""
    longest = max(max(m.tpf_all, m.tpf_no_prefill or 0) for m in modes.values())
    scale = Scale(0, max(longest, 1) * 1.04, 0, WIDTH)
    rows = [_tpf_row(mode, metrics, ROW * index, scale) for index, (mode, metrics) in enumerate(modes.items())]
    bottom = ROW * len(modes)
    marks = [ROW * index + 25 for index in range(len(modes))]
    one = [
        *(line(scale(1), top, scale(1), top + 22, "mark") for top in marks),
        text(scale(1), bottom + 18, "1 token per forward", "small", "start" if scale(1) < 300 else "end"),
    ]
    return drawing(WIDTH, bottom + 26, "Tokens per forward by mode", *rows, *one)


def _tpf_row(mode: str, m: ModeMetrics, top: float, scale: Scale) -> Markup:
    words = f"{title(mode)}: {decimal(m.tpf_all)} tokens per forward, {decimal(m.tpf_no_prefill)} without prefill"
    bar = {"x": 0, "y": top + 26, "height": 18, "rx": 3}
    return element(
        "g",
        tooltip(words),
        text(0, top + 17, title(mode), "label"),
        text(WIDTH, top + 17, f"{decimal(m.tpf_all)}", "value", "end"),
        element("rect", width=scale(m.tpf_no_prefill or 0), class_="bar faint", **bar),
        element("rect", width=scale(m.tpf_all), class_="bar", **bar),
        class_=mode_class(mode),
    )


def forwards_bars(modes: dict[str, ModeMetrics]) -> Markup:
    """Forwards spent on 100 tokens, split by kind; an oracle's search is told, not drawn."""
    totals = [100 / m.tpf_all for m in modes.values()]
    scale = Scale(0, max(totals), 0, WIDTH)
    rows = [_forwards_row(mode, m, (ROW + 14) * index, scale) for index, (mode, m) in enumerate(modes.items())]
    return drawing(WIDTH, (ROW + 14) * len(modes), "Forwards per 100 tokens, by kind", *rows)


def _forwards_row(mode: str, m: ModeMetrics, top: float, scale: Scale) -> Markup:
    kinds = {kind: 100 * count / m.tokens for kind, count in m.forwards.items() if count}
    search = kinds.pop("search", None)
    bars, start = [], 0.0
    for index, (kind, count) in enumerate(sorted(kinds.items(), key=lambda item: -item[1])):
        words = f"{title(mode)}, {kind}: {count:.1f} forwards per 100 tokens"
        bar = element(
            "rect",
            tooltip(words),
            x=scale(start),
            y=top + 26,
            width=max(scale(count) - 1.5, 0.5),
            height=18,
            class_=f"bar shade-{min(index, 2)}",
        )
        bars.append(bar)
        start += count
    split = " · ".join(f"{kind} {kinds[kind]:.1f}" for kind in sorted(kinds, key=lambda kind: -kinds[kind]))
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
    """Accuracy against tokens per forward: the curves of each mode, and the front over all of them."""
    shown = [point.metrics for point in points]
    x, y = _tpf_scale(shown), _accuracy_scale(shown)
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
    """The points of one mode, joined along the setting that varies."""
    varied = varied_settings(points)
    joined = [curve for name, curve in curves(points) if name != FRONT]
    parts = [path([(x(p.tpf), y(p.accuracy / 100)) for p in curve], "curve thin") for curve in joined]
    for curve in joined:
        # Labels of the front come first; where room is short, or in a grid, the others stay away.
        for point in sorted(curve, key=lambda point: point not in best):
            beaten = "" if point in best else " beaten"
            at = x(point.tpf), y(point.accuracy / 100)
            parts.append(dot(*at, 5, _point_words(point, varied), f"dot{beaten}"))
            if point in best or len(varied) < 2:
                parts.append(labels.place(*at, _short(point, varied), "label", optional=point not in best))
    return element("g", *parts, class_=mode_class(points[0].mode))


def _short(point: Point, varied: Sequence[str]) -> str:
    """What tells a point from the others of its mode."""
    settings = point.metrics.settings
    return " \N{MULTIPLICATION SIGN} ".join(setting(settings.get(name)) for name in varied)


def _point_words(point: Point, varied: Sequence[str]) -> str:
    settings = [f", {name.replace('_', ' ')} {setting(point.metrics.settings.get(name))}" for name in varied]
    m = point.metrics
    return (
        f"{title(point.mode)}{''.join(settings)}: {decimal(m.tpf_all)} tokens per forward, "
        f"accuracy {percent(m.accuracy)} (95%: {percent(m.accuracy_low)} to {percent(m.accuracy_high)})"
    )


def category_dots(categories: Sequence[CategoryMetrics]) -> Markup:
    """Tokens per forward of each category, one dot a mode."""
    names = list(dict.fromkeys(row.category for row in categories))
    low, high = min(1.0, *(row.tpf_all for row in categories)), max(row.tpf_all for row in categories)
    x = Scale(low - 0.02, max(high, low + 0.5) * 1.03, LABELS, RIGHT)
    room = min(max((BOTTOM - TOP) / len(names), 32), 56)
    bottom = TOP + room * len(names)
    grid = [
        part
        for tick in ticks(x.low, x.high, 5)
        for part in (
            line(x(tick), TOP - 8, x(tick), bottom, "grid"),
            text(x(tick), bottom + 18, f"{tick:.4g}", "small", "middle"),
        )
    ]
    rows = [
        _category_row([row for row in categories if row.category == name], TOP + room * (index + 0.5), x)
        for index, name in enumerate(names)
    ]
    below = text(RIGHT, bottom + 38, "tokens per forward (all)", "small", "end")
    return drawing(WIDTH, bottom + 44, "Tokens per forward by category", *grid, below, *rows)


def _category_row(rows: Sequence[CategoryMetrics], at: float, x: Scale) -> Markup:
    name = rows[0].category
    short = name if len(name) <= 14 else f"{name[:13]}\N{HORIZONTAL ELLIPSIS}"
    reached = [x(row.tpf_all) for row in rows]
    dots = [
        element("g", dot(x(row.tpf_all), at, 5.5, _category_words(row)), class_=mode_class(row.mode)) for row in rows
    ]
    label = element("g", tooltip(name), text(0, at + 5, short))
    return element("g", label, line(min(reached), at, max(reached), at, "span"), *dots)


def _category_words(row: CategoryMetrics) -> str:
    return (
        f"{row.category}, {title(row.mode)}: {decimal(row.tpf_all)} tokens per forward, accuracy "
        f"{percent(row.accuracy)}, {row.prompts} prompts"
    )


def _tpf_scale(shown: Sequence[ModeMetrics]) -> Scale:
    """From 1 (or below) to a little beyond the largest."""
    high = max(m.tpf_all for m in shown)
    low = min(1.0, min(m.tpf_all for m in shown))
    room = max((high - low) * 0.08, 0.1)
    return Scale(low - room, high + room, LEFT, RIGHT)


def _accuracy_scale(shown: Sequence[ModeMetrics]) -> Scale:
    """Zooms in on the accuracies shown, but never further than a span of 10 points."""
    low, high = min(m.accuracy or 0.0 for m in shown), max(m.accuracy or 0.0 for m in shown)
    room = max((high - low) * 0.2, 0.05)
    return Scale(max(low - room, -0.02), min(high + room, 1.02), BOTTOM, TOP)


def agreement_curve(mode: str, agreement: Sequence[PositionAgreement]) -> Markup:
    """Draw the share of cycles in which verifier and draft agree, by position in the block."""
    positions = max(len(agreement), 2)
    x, y = Scale(0.5, positions + 0.5, LEFT, RIGHT - 84), Scale(0, 1, BOTTOM, TOP)
    reached = [(x(a.position), y(a.reached / a.drafted)) for a in agreement]
    area = path([(reached[0][0], BOTTOM), *reached, (reached[-1][0], BOTTOM)], "area")
    series = [
        [(a.position, a.conditional, a.reached) for a in agreement if a.conditional is not None],
        [(a.position, a.unconditional, a.drafted) for a in agreement],
    ]
    curves = [_agreement_line(points, index, x, y) for index, points in enumerate(series)]
    ends = spread([*(y(points[-1][1]) for points in series), reached[-1][1]], 17, TOP, BOTTOM - 4)
    names = [
        text(reached[-1][0] + 10, end + 4, name, f"label series-{index}")
        for index, (name, end) in enumerate(zip(("if reached", "every cycle", "reached"), ends, strict=True))
    ]
    whole = [tick for tick in ticks(1, positions, 8) if tick == int(tick)]
    axes = _axes(x, y, "position in the drafted block", "agreement", whole)
    drawn = element("g", area, *curves, *names, class_=mode_class(mode))
    return drawing(WIDTH, HEIGHT, f"Agreement by position, {title(mode)}", axes, drawn)


def _agreement_line(points: Sequence[tuple[int, float, int]], index: int, x: Scale, y: Scale) -> Markup:
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


def arrows(before: dict[str, ModeMetrics], after: dict[str, ModeMetrics]) -> Markup:
    """Accuracy against tokens per forward, an arrow a mode from one evaluation to the other."""
    shown = [*before.values(), *after.values()]
    x, y = _tpf_scale(shown), _accuracy_scale(shown)
    labels = Labels(RIGHT + 12)
    for metrics in shown:
        labels.block(x(metrics.tpf_all), y(metrics.accuracy or 0.0), 7)
    parts = [_axes(x, y, "tokens per forward (all)", "accuracy")]
    for mode, first in before.items():
        start, end = ((x(m.tpf_all), y(m.accuracy or 0.0)) for m in (first, after[mode]))
        words = [
            f"{title(mode)}, {name}: {decimal(m.tpf_all)} tokens per forward, accuracy {percent(m.accuracy)}"
            for name, m in (("A", first), ("B", after[mode]))
        ]
        drawn = [
            line(*start, *end, "curve thin"),
            dot(*start, 5, words[0], "dot beaten"),
            dot(*end, 5.5, words[1]),
            *(labels.place(*at, name, "label", optional=True) for name, at in _ends(start, end)),
        ]
        parts.append(element("g", *drawn, class_=mode_class(mode)))
    return drawing(WIDTH, HEIGHT, "Accuracy against tokens per forward of both evaluations", *parts)


def _ends(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[str, tuple[float, float]]]:
    """What the ends of an arrow are called; a very short one has one name."""
    return [("B", end), ("A", start)] if math.dist(start, end) > 16 else [("A, B", end)]


def _axes(x: Scale, y: Scale, below: str, above: str, steps: Sequence[float] | None = None) -> Markup:
    parts = [text(2, 9, above, "small"), text(x.end, BOTTOM + 38, below, "small", "end")]
    for tick in ticks(max(y.low, 0), min(y.high, 1), 5):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(text(x.start - 8, y(tick) + 4, f"{100 * tick:.4g}%", "small", "end"))
    for tick in steps or ticks(x.low, x.high, 6):
        parts.append(text(x(tick), BOTTOM + 18, f"{tick:.4g}", "small", "middle"))
    return element("g", *parts)
