"""The report's pictures, drawn as inline SVG; colours come from the page's style sheet."""

from collections.abc import Sequence

from markupsafe import Markup

from nemodiff_train.evaluation.display import TITLES, decimal, percent, title
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.metrics import ModeMetrics, PlaceAgreement
from nemodiff_train.evaluation.svg import (
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


def mode_class(mode: str) -> str:
    """The CSS class that gives a mode its colour."""
    return f"mode-{mode if mode in TITLES else 'other'}"


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
    """Forwards spent on 100 tokens, split by kind."""
    totals = [100 / m.tpf_all for m in modes.values()]
    scale = Scale(0, max(totals), 0, WIDTH)
    rows = [_forwards_row(mode, m, (ROW + 14) * index, scale) for index, (mode, m) in enumerate(modes.items())]
    return drawing(WIDTH, (ROW + 14) * len(modes), "Forwards per 100 tokens, by kind", *rows)


def _forwards_row(mode: str, m: ModeMetrics, top: float, scale: Scale) -> Markup:
    kinds = {kind: 100 * count / m.tokens for kind, count in m.forwards.items() if count}
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
    return element(
        "g",
        text(0, top + 17, title(mode), "label"),
        text(WIDTH, top + 17, f"{start:.1f}", "value", "end"),
        *bars,
        text(0, top + 61, split, "small"),
        class_=mode_class(mode),
    )


def sweep_curve(evaluation: Evaluation) -> Markup:
    """Accuracy against tokens per forward over diffusion thresholds; AR accuracy as a dashed line."""
    others = {mode: m for mode, m in evaluation.modes.items() if mode not in ("ar", "diffusion")}
    shown = [m for _, m in evaluation.sweep] + list(evaluation.modes.values())
    x, y = _tpf_scale(shown), _accuracy_scale(shown)
    labels = Labels(RIGHT + 12)
    parts = [_axes(x, y, "tokens per forward (all)", "accuracy")]
    for m in [m for _, m in evaluation.sweep] + list(others.values()):
        labels.block(x(m.tpf_all), y(m.accuracy), 7)
    if "ar" in evaluation.modes:
        parts.append(_ar_line(evaluation.modes["ar"], y, labels))
    parts += [_mode_point(mode, m, x, y, labels) for mode, m in others.items()]
    parts.append(_threshold_line(evaluation.sweep, x, y, labels))
    return drawing(WIDTH, HEIGHT, "Accuracy against tokens per forward over diffusion thresholds", *parts)


def _ar_line(m: ModeMetrics, y: Scale, labels: Labels) -> Markup:
    at = y(m.accuracy)
    words = f"Autoregressive: accuracy {percent(m.accuracy)}"
    labels.taken.append((LEFT, at - 2, RIGHT, at + 2))
    return element(
        "g",
        tooltip(words),
        line(LEFT, at, RIGHT, at, "dashed"),
        labels.place(LEFT + 62, at + 4, "AR accuracy", "label"),
        class_="mode-ar",
    )


def _mode_point(mode: str, m: ModeMetrics, x: Scale, y: Scale, labels: Labels) -> Markup:
    at = x(m.tpf_all), y(m.accuracy)
    words = f"{title(mode)}: {decimal(m.tpf_all)} tokens per forward, accuracy {percent(m.accuracy)}"
    return element("g", dot(*at, 5.5, words), labels.place(*at, mode, "label"), class_=mode_class(mode))


def _threshold_line(sweep: Sequence[tuple[float, ModeMetrics]], x: Scale, y: Scale, labels: Labels) -> Markup:
    points = [(x(m.tpf_all), y(m.accuracy)) for _, m in sweep]
    parts = [path(points, "curve")]
    for (threshold, m), at in zip(sweep, points, strict=True):
        words = (
            f"Diffusion, threshold {threshold:g}: {decimal(m.tpf_all)} tokens per forward, "
            f"accuracy {percent(m.accuracy)} (95%: {percent(m.accuracy_low)} to {percent(m.accuracy_high)})"
        )
        parts += [dot(*at, 4.5, words), labels.place(*at, f"{threshold:g}", "label")]
    return element("g", *parts, class_=mode_class("diffusion"))


def _tpf_scale(shown: Sequence[ModeMetrics]) -> Scale:
    """From 1 (or below) to a little beyond the largest."""
    high = max(m.tpf_all for m in shown)
    low = min(1.0, min(m.tpf_all for m in shown))
    room = max((high - low) * 0.08, 0.1)
    return Scale(low - room, high + room, LEFT, RIGHT)


def _accuracy_scale(shown: Sequence[ModeMetrics]) -> Scale:
    """Zooms in on the accuracies shown, but never further than a span of 10 points."""
    low, high = min(m.accuracy for m in shown), max(m.accuracy for m in shown)
    room = max((high - low) * 0.2, 0.05)
    return Scale(max(low - room, -0.02), min(high + room, 1.02), BOTTOM, TOP)


def agreement_curve(mode: str, agreement: Sequence[PlaceAgreement]) -> Markup:
    """Share of cycles in which verifier and draft agree, by place in the block."""
    places = max(len(agreement), 2)
    x, y = Scale(0.5, places + 0.5, LEFT, RIGHT - 84), Scale(0, 1, BOTTOM, TOP)
    reached = [(x(a.place), y(a.reached / a.drafted)) for a in agreement]
    area = path([(reached[0][0], BOTTOM), *reached, (reached[-1][0], BOTTOM)], "area")
    series = [
        [(a.place, a.conditional, a.reached) for a in agreement if a.conditional is not None],
        [(a.place, a.unconditional, a.drafted) for a in agreement],
    ]
    curves = [_agreement_line(points, index, x, y) for index, points in enumerate(series)]
    ends = spread([*(y(points[-1][1]) for points in series), reached[-1][1]], 17, TOP, BOTTOM - 4)
    names = [
        text(reached[-1][0] + 10, end + 4, name, f"label series-{index}")
        for index, (name, end) in enumerate(zip(("if reached", "every cycle", "reached"), ends, strict=True))
    ]
    whole = [tick for tick in ticks(1, places, 8) if tick == int(tick)]
    axes = _axes(x, y, "place in the drafted block", "agreement", whole)
    drawn = element("g", area, *curves, *names, class_=mode_class(mode))
    return drawing(WIDTH, HEIGHT, f"Agreement by place, {title(mode)}", axes, drawn)


def _agreement_line(points: Sequence[tuple[int, float, int]], index: int, x: Scale, y: Scale) -> Markup:
    dots = [
        dot(x(place), y(share), 3, f"Place {place}: agreed in {percent(share)} of {cycles:,} cycles")
        for place, share, cycles in points
    ]
    curve = path([(x(place), y(share)) for place, share, _ in points], "curve")
    return element("g", curve, *dots, class_=f"series-{index}")


def _axes(x: Scale, y: Scale, below: str, above: str, steps: Sequence[float] | None = None) -> Markup:
    parts = [text(2, 9, above, "small"), text(x.end, BOTTOM + 38, below, "small", "end")]
    for tick in ticks(max(y.low, 0), min(y.high, 1), 5):
        parts.append(line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(text(x.start - 8, y(tick) + 4, f"{100 * tick:.4g}%", "small", "end"))
    for tick in steps or ticks(x.low, x.high, 6):
        parts.append(text(x(tick), BOTTOM + 18, f"{tick:.4g}", "small", "middle"))
    return element("g", *parts)
