"""How modes and figures are named and written, the same on the terminal and in the report."""

from collections.abc import Callable
from dataclasses import dataclass

from nemodiff_train.evaluation.metrics import ModeMetrics

NONE = "\N{EN DASH}"

TITLES = {
    "ar": "Autoregressive",
    "diffusion": "Block diffusion",
    "linear": "Linear self-speculation",
    "quadratic": "Quadratic self-speculation",
    "oracle": "Oracle (speed of light)",
}

COUNTING_RULE = (
    "TPF = new tokens / model forwards, summed over prompts before dividing. "
    "'All' counts the prefill, so autoregressive decoding is 1.00 by rule; 'no prefill' leaves it out."
)


def title(mode: str) -> str:
    """The mode's name in words; an unknown mode goes by its own name."""
    return TITLES.get(mode, mode)


def percent(share: float | None) -> str:
    """A share of 0 to 1 as a percentage with one decimal."""
    return NONE if share is None else f"{100 * share:.1f}%"


def decimal(value: float | None) -> str:
    """Two decimals, as TPF and acceptance length are printed in the papers."""
    return NONE if value is None else f"{value:.2f}"


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
