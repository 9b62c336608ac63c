"""How modes and figures are named and written, the same on the terminal and in the report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nemodiff_train.evaluation.metrics import ModeMetrics

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class ModeStyle:
    """How a mode is named and coloured; the colours are for a light and for a dark page."""

    title: str
    light: str
    dark: str


TITLES = {
    "ar": ModeStyle("Autoregressive", "#5a6572", "#9ba7b5"),
    "diffusion": ModeStyle("Block diffusion", "#1c62c4", "#71aaff"),
    "linear": ModeStyle("Linear self-speculation", "#b8480b", "#ff9a5a"),
    "quadratic": ModeStyle("Quadratic self-speculation", "#7a3fb0", "#c79bff"),
    "oracle": ModeStyle("Oracle (speed of light)", "#8a6a00", "#e0bb4f"),
}
OTHER = ModeStyle("Other", "#0b7468", "#4fd1bf")

COUNTING_RULE = (
    "TPF = new tokens / model forwards, summed over prompts before dividing. "
    "'All' counts the prefill, so autoregressive decoding is 1.00 by rule; 'no prefill' leaves it out."
)


def title(mode: str) -> str:
    """The mode's name in words; an unknown mode goes by its own name."""
    return TITLES[mode].title if mode in TITLES else mode


def mode_class(mode: str) -> str:
    """The CSS class that gives a mode its colour."""
    return f"mode-{mode if mode in TITLES else 'other'}"


def mode_colours(dark: bool) -> str:
    """The style sheet's rules for the classes of `mode_class`."""
    looks = {**TITLES, "other": OTHER}
    return "\n".join(f".mode-{name} {{ --c: {look.dark if dark else look.light}; }}" for name, look in looks.items())


def percent(share: float | None) -> str:
    """A share of 0 to 1 as a percentage with one decimal."""
    return NONE if share is None else f"{100 * share:.1f}%"


def decimal(value: float | None) -> str:
    """Two decimals, as TPF and acceptance length are printed in the papers."""
    return NONE if value is None else f"{value:.2f}"


def span(values: Iterable[float], decimals: int = 2) -> str:
    """The lowest and the highest of some figures, or the one that they all are."""
    written = [f"{value:.{decimals}f}" for value in sorted(values)]
    return written[0] if written[0] == written[-1] else f"{written[0]}{NONE}{written[-1]}"


def setting(value: object) -> str:
    """A decoding setting: a block size, a threshold."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def rate(value: float | None) -> str:
    """Tokens a second: three significant digits or whole numbers."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    first: str
    second: str
    """Second line of the heading, where room is short."""
    text: Callable[[ModeMetrics], str]
    rule: str
    """Name of the field of `ModeMetrics` whose description is the rule."""

    @property
    def heading(self) -> str:
        """On one line."""
        return f"{self.first} {self.second}".strip()


COLUMNS = (
    Column("Accuracy", "", lambda m: percent(m.accuracy), "accuracy"),
    Column("TPF", "(all)", lambda m: decimal(m.tpf_all), "tpf_all"),
    Column("TPF", "(no prefill)", lambda m: decimal(m.tpf_no_prefill), "tpf_no_prefill"),
    Column("Acceptance", "length", lambda m: decimal(m.acceptance_length), "acceptance_length"),
    Column("Tokens/s", "", lambda m: rate(m.tokens_per_second), "tokens_per_second"),
    Column("Identical", "to AR", lambda m: percent(m.identical_to_ar), "identical_to_ar"),
)


@dataclass(frozen=True)
class Figure:
    """One figure of a comparison."""

    name: str
    of: Callable[[ModeMetrics], float | None]
    text: Callable[[float | None], str]
    change: Callable[[float], str]
    """How a difference is written; the sign is part of it."""


FIGURES = (
    Figure("Accuracy", lambda m: m.accuracy, percent, lambda value: f"{100 * value:+.1f}"),
    Figure("TPF (all)", lambda m: m.tpf_all, decimal, lambda value: f"{value:+.2f}"),
    Figure("Acceptance", lambda m: m.acceptance_length, decimal, lambda value: f"{value:+.2f}"),
    Figure("Tokens/s", lambda m: m.tokens_per_second, rate, lambda value: f"{value:+,.0f}"),
)


def difference(a: ModeMetrics, b: ModeMetrics, figure: Figure) -> tuple[str, str]:
    """B - A in words, and whether that is ``better``, ``worse`` or neither; more is better in all figures."""
    first, second = figure.of(a), figure.of(b)
    if first is None or second is None:
        return NONE, ""
    written = figure.change(second - first).replace("-", "\N{MINUS SIGN}")
    if not any(digit in written for digit in "123456789"):
        return written.lstrip("+\N{MINUS SIGN}"), ""
    return written, "better" if second > first else "worse"
