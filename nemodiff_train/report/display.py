"""Names of modes and formats of figures, the same on the terminal and in the report."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nemodiff_train.evaluation.metrics import ModeMetrics

NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class ModeStyle:
    """Name and colours of a mode, for a light and for a dark page."""

    title: str
    light: str
    dark: str


MODE_STYLES = {
    "ar": ModeStyle("Autoregressive", "#5a6572", "#9ba7b5"),
    "diffusion": ModeStyle("Block diffusion", "#1c62c4", "#71aaff"),
    "linear": ModeStyle("Linear self-speculation", "#b8480b", "#ff9a5a"),
    "tree": ModeStyle("Tree self-speculation", "#a3195b", "#ff85b3"),
    "quadratic": ModeStyle("Quadratic self-speculation", "#7a3fb0", "#c79bff"),
    "oracle": ModeStyle("Oracle (speed of light)", "#8a6a00", "#e0bb4f"),
}
OTHER = ModeStyle("Other", "#0b7468", "#4fd1bf")

COUNTING_RULE = (
    "TPF = new tokens / model forwards, summed over prompts before dividing. "
    "'All' counts the prefill, so autoregressive decoding is 1.00 by rule; 'no prefill' leaves it out."
)


def title(mode: str) -> str:
    """Return the mode's name in words; an unknown mode goes by its own name."""
    return MODE_STYLES[mode].title if mode in MODE_STYLES else mode


def mode_class(mode: str) -> str:
    """Return the CSS class that gives a mode its colour."""
    return f"mode-{mode if mode in MODE_STYLES else 'other'}"


def mode_colours(dark: bool) -> str:
    """Return the style sheet's rules for the classes of `mode_class`."""
    styles = {**MODE_STYLES, "other": OTHER}
    return "\n".join(f".mode-{name} {{ --c: {s.dark if dark else s.light}; }}" for name, s in styles.items())


def percent(share: float | None) -> str:
    """Return a share of 0 to 1 as a percentage with one decimal."""
    return NONE if share is None else f"{100 * share:.1f}%"


def decimal(value: float | None) -> str:
    """Return two decimals, as papers print TPF and acceptance length."""
    return NONE if value is None else f"{value:.2f}"


def span(values: Iterable[float], decimals: int = 2) -> str:
    """Return the lowest and the highest value, or the one value that they all are."""
    written = [f"{value:.{decimals}f}" for value in sorted(values)]
    return written[0] if written[0] == written[-1] else f"{written[0]}{NONE}{written[-1]}"


def setting(value: object) -> str:
    """Return a decoding setting, such as a block size or a threshold, as text."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def rate(value: float | None) -> str:
    """Return tokens per second, with three significant digits or as a whole number."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    heading: str
    """In two lines, where room is short."""
    text: Callable[[ModeMetrics], str]
    rule: str
    """Field of `ModeMetrics` whose description is the counting rule."""


COLUMNS = (
    Column("Accuracy", lambda m: percent(m.accuracy), "accuracy"),
    Column("TPF\n(all)", lambda m: decimal(m.tpf_all), "tpf_all"),
    Column("TPF\n(no prefill)", lambda m: decimal(m.tpf_no_prefill), "tpf_no_prefill"),
    Column("Acceptance\nlength", lambda m: decimal(m.acceptance_length), "acceptance_length"),
    Column("Tokens/s", lambda m: rate(m.tokens_per_second), "tokens_per_second"),
    Column("Identical\nto AR", lambda m: percent(m.identical_to_ar), "identical_to_ar"),
)
