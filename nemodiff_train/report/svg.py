"""Just enough SVG: elements, a linear scale, round ticks, labels that do not collide."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

Value = str | float


def element(name: str, *children: str, **attributes: Value) -> Markup:
    """One SVG element. Children and attributes are escaped unless they are `Markup`.

    ``class_`` and ``stroke_width`` become ``class`` and ``stroke-width``.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(map(escape, children)))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> Markup:
    """Text with its baseline at ``y``."""
    return element("text", words, x=x, y=y, class_=kind, text_anchor=anchor)


def tooltip(words: str) -> Markup:
    """What a browser shows when the pointer rests on the parent."""
    return element("title", words)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line styled by its class."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """A line through the points, styled by its class."""
    return element("path", d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points), class_=kind)


def dot(x: float, y: float, radius: float, words: str, kind: str = "dot") -> Markup:
    """A point with a tooltip, and a larger invisible disc so that it is easy to hit."""
    seen = element("circle", cx=x, cy=y, r=radius, class_=kind)
    return element("g", tooltip(words), seen, element("circle", cx=x, cy=y, r=radius + 8, class_="hit"))


def drawing(width: float, height: float, label: str, *children: str) -> Markup:
    """The whole picture; scales to the width it is given."""
    return element("svg", *children, viewBox=f"0 0 {_number(width)} {_number(height)}", role="img", aria_label=label)


@dataclass(frozen=True)
class Scale:
    """Maps ``low``..``high`` of the data to ``start``..``end`` of the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside ``low``..``high``, roughly ``about`` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least ``gap``, in their order, within ``low``..``high``."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
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
    """Puts a label beside its point where it covers nothing drawn before."""

    right: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def block(self, x: float, y: float, radius: float) -> None:
        """Keep labels off a point."""
        self.taken.append((x - radius, y - radius, x + radius, y + radius))

    def place(self, x: float, y: float, words: str, kind: str, optional: bool = False) -> Markup:
        """Above right of (x, y), or else above, right, below or left: the first that is free.

        Where none is free, an optional label is left out.
        """
        width = 8.4 * len(words)
        options = [
            (x + 7, y - 7, "start", x + 7),
            (x, y - 11, "middle", x - width / 2),
            (x + 11, y + 4, "start", x + 11),
            (x, y + 21, "middle", x - width / 2),
            (x - 11, y + 4, "end", x - 11 - width),
        ]
        boxes = [(left, top - 11, left + width, top + 3) for _, top, _, left in options]
        free = [index for index, box in enumerate(boxes) if self._is_free(box)]
        if not words or (optional and not free):
            return Markup("")
        best = free[0] if free else 0
        self.taken.append(boxes[best])
        return text(options[best][0], options[best][1], words, kind, options[best][2])

    def _is_free(self, box: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = box
        return right <= self.right and all(
            right <= a or left >= c or bottom <= b or top >= d for a, b, c, d in self.taken
        )


def _number(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
