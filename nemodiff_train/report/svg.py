"""Draw SVG: elements, a linear scale, round ticks, and labels that do not collide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Value = str | float
Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

CHARACTER_WIDTH = 8.4
"""Average width of a label's character, in the units of the drawing."""


def element(name: str, *children: str, **attributes: Value) -> Markup:
    """Return one SVG element. Children and attributes are escaped unless they are `Markup`.

    ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(map(escape, children)))


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> Markup:
    """Return text with its baseline at ``y``."""
    return element("text", words, x=x, y=y, class_=css, text_anchor=anchor)


def tooltip(words: str) -> Markup:
    """Return the words that a browser shows while the pointer rests on the parent."""
    return element("title", words)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)


def path(points: Sequence[Point], css: str) -> Markup:
    """Return a line through the points."""
    return element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=css)


def dot(x: float, y: float, radius: float, words: str, css: str = "dot") -> Markup:
    """Return a point with a tooltip, and a larger invisible disc that makes it easy to hit."""
    visible = element("circle", cx=x, cy=y, r=radius, class_=css)
    return element("g", tooltip(words), visible, element("circle", cx=x, cy=y, r=radius + 8, class_="hit"))


def drawing(width: float, height: float, label: str, *children: str) -> Markup:
    """Return the whole drawing, which scales to the width that it is given."""
    return element("svg", *children, viewBox=f"0 0 {_number(width)} {_number(height)}", role="img", aria_label=label)


@dataclass(frozen=True)
class Scale:
    """Map ``low``..``high`` of the data to ``start``..``end`` of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return roughly ``about`` round numbers (1, 2 or 5 times a power of ten apart) within ``low``..``high``."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label heights apart to at least ``gap``, in their order, within ``low``..``high``."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    moved = list(heights)
    floor = low
    for index in order:
        moved[index] = floor = max(moved[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        moved[index] = ceiling = min(moved[index], ceiling)
        ceiling -= gap
    return moved


@dataclass
class Labels:
    """Put each label beside its point where it covers nothing drawn before."""

    right: float
    occupied: list[Box] = field(default_factory=list)

    def block(self, x: float, y: float, radius: float) -> None:
        """Keep labels off a point."""
        self.occupied.append((x - radius, y - radius, x + radius, y + radius))

    def put(self, x: float, y: float, words: str, css: str, optional: bool = False) -> Markup:
        """Return the label above right of (x, y), or else above, right, below or left: the first that is free.

        Where none is free, an optional label is left out.
        """
        width = CHARACTER_WIDTH * len(words)
        options = [  # x, baseline, anchor, left edge
            (x + 7, y - 7, "start", x + 7),
            (x, y - 11, "middle", x - width / 2),
            (x + 11, y + 4, "start", x + 11),
            (x, y + 21, "middle", x - width / 2),
            (x - 11, y + 4, "end", x - 11 - width),
        ]
        boxes = [(left, baseline - 11, left + width, baseline + 3) for _, baseline, _, left in options]
        free = [index for index, box in enumerate(boxes) if self._is_free(box)]
        if not words or (optional and not free):
            return Markup("")
        best = free[0] if free else 0
        self.occupied.append(boxes[best])
        return text(options[best][0], options[best][1], words, css, options[best][2])

    def _is_free(self, box: Box) -> bool:
        left, top, right, bottom = box
        return right <= self.right and all(
            right <= a or left >= c or bottom <= b or top >= d for a, b, c, d in self.occupied
        )


def _number(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
