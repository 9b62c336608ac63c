"""Metrics of one decoding mode over one prompt set.

The rules follow the Nemotron-Labs-Diffusion paper (NLD, arXiv 2607.05722, section 4.2) and the counting
in its public ``evaluate.py``. The description of each field is the rule itself: the report prints it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from nemodiff_train.evaluation.records import DecodeRecord, Settings

Z_95 = 1.959964


class PositionAcceptance(BaseModel):
    """Counts and rates of draft tokens that the verifier kept at one position of the draft."""

    model_config = ConfigDict(frozen=True)

    position: int = Field(description="Drafted position, from 1; the block's first token is known, not drafted.")
    drafts: int = Field(description="Cycles that drafted this position.")
    verifier_matches: int = Field(
        description="Cycles of these in which the verifier kept this token, whatever came before it."
    )
    reached: int = Field(description="Cycles in which the verifier kept every earlier token.")
    accepted: int = Field(description="Cycles that reached this position and in which the verifier kept its token.")
    unconditional: float = Field(
        description="verifier_matches / drafts. After a rejection the verifier still reads the rejected draft."
    )
    conditional: float | None = Field(description="accepted / reached; none if no cycle reached the position.")


class ModeMetrics(BaseModel):
    """All metrics of one run. Averages are micro-averages: sums over prompts, divided once."""

    model_config = ConfigDict(frozen=True)

    settings: Settings = Field(description="The decoding settings of the run.")
    prompts: int = Field(description="Prompts decoded.")
    accuracy: float | None = Field(
        description="Share of prompts that the scorer accepts, 0 to 1. None for a task without answers."
    )
    accuracy_low: float | None = Field(description="Lower end of the 95% Wilson interval of accuracy.")
    accuracy_high: float | None = Field(description="Upper end of the 95% Wilson interval of accuracy.")
    tokens: int = Field(description="New tokens of all prompts, stop tokens included.")
    forwards: dict[str, int] = Field(
        description="Calls of the model by kind, counted as they happen. A batched call counts once for each "
        "row that is still decoding."
    )
    tpf_all: float = Field(
        description="Tokens per forward, all forwards: tokens / (prefill + all other forwards). An AR prompt "
        "of n tokens takes 1 prefill, which yields the first token, and n - 1 decode forwards: exactly 1.00. "
        "NLD's evaluate.py counts ar and linear this way."
    )
    tpf_no_prefill: float | None = Field(
        description="Tokens per forward, prefill not counted: tokens / (forwards - prefill). The token that "
        "the prefill yields stays in the numerator, so AR reads n / (n - 1), a little above 1. NLD's "
        "evaluate.py counts diffusion this way: denoising forwards + one cache forward per block. None if "
        "there was nothing but prefill."
    )
    acceptance_length: float | None = Field(
        description="Mean tokens committed per draft + verify cycle, the verifier's own included (NLD, "
        "section 4.2). A cycle is at least two forwards: half of this is NLD's real TPF. None in modes without them."
    )
    acceptance_by_position: list[PositionAcceptance] = Field(description="Acceptance by position of the draft.")
    seconds: float = Field(description="Wall-clock seconds spent decoding.")
    tokens_per_second: float | None = Field(description="tokens / seconds, at the batch size of the run.")
    forwards_per_second: float | None = Field(description="Forwards of all kinds / seconds.")
    introspective_acceptance: float | None = Field(
        description="Mean of min(1, p/q) over all drafted tokens, verifier over drafter, at temperature 1 (I-DLM). "
        "None in modes without drafts."
    )
    seconds_by_kind: dict[str, float] = Field(description="Seconds spent in the model by kind of forward.")
    identical_to_ar: float | None = Field(
        description="Share of prompts whose tokens all equal those of the ar run; none without an ar run."
    )


def summarise(
    records: Sequence[DecodeRecord],
    correct: Sequence[bool | None],
    settings: Mapping[str, JsonValue],
    ar: Sequence[DecodeRecord] | None = None,
) -> ModeMetrics:
    """Reduce one run to its metrics.

    Args:
        records: One per prompt, at least one.
        correct: Whether the scorer accepts each record's text, in the order of ``records``; None where the
            prompt has no answer.
        settings: The decoding settings, for the report.
        ar: The records of the ar run over the same prompts (any order), for ``identical_to_ar``.

    Raises:
        ValueError: No records, a score missing, or a prompt that the ar run lacks.
    """
    if not records or len(records) != len(correct):
        raise ValueError(f"{len(records)} records and {len(correct)} scores: need one score for each, at least one")
    tokens = sum(len(record.tokens) for record in records)
    forwards: Counter[str] = Counter()
    seconds_by_kind: Counter[str] = Counter()
    for record in records:
        forwards.update(record.forwards)
        seconds_by_kind.update(record.seconds_by_kind)
    counted = forwards.total() - forwards["search"]  # an oracle's search is not part of TPF
    cycles = [cycle for record in records for cycle in record.cycles]
    seconds = math.fsum(record.seconds for record in records)
    accept_probs = [probability for cycle in cycles for probability in cycle.accept_probs]
    scores = [score for score in correct if score is not None]
    low, high = wilson(sum(scores), len(scores)) if scores else (None, None)
    return ModeMetrics(
        settings=dict(settings),
        prompts=len(records),
        accuracy=_ratio(sum(scores), len(scores)),
        accuracy_low=low,
        accuracy_high=high,
        tokens=tokens,
        forwards=dict(forwards),
        tpf_all=tokens / counted,
        tpf_no_prefill=_ratio(tokens, counted - forwards["prefill"]),
        acceptance_length=_ratio(sum(cycle.committed for cycle in cycles), len(cycles)),
        acceptance_by_position=acceptance_by_position([cycle.accept_mask for cycle in cycles]),
        seconds=seconds,
        tokens_per_second=_ratio(tokens, seconds),
        forwards_per_second=_ratio(forwards.total(), seconds),
        introspective_acceptance=_ratio(math.fsum(accept_probs), len(accept_probs)),
        seconds_by_kind=dict(seconds_by_kind),
        identical_to_ar=None if ar is None else _identical(records, ar),
    )


def acceptance_by_position(accept_masks: Sequence[Sequence[bool]]) -> list[PositionAcceptance]:
    """Count matches and acceptances at each position of the drafts, which may differ in length."""
    positions = []
    for position in range(1, max(map(len, accept_masks), default=0) + 1):
        masks = [mask for mask in accept_masks if len(mask) >= position]
        verifier_matches = sum(mask[position - 1] for mask in masks)
        reached = sum(all(mask[: position - 1]) for mask in masks)
        accepted = sum(all(mask[:position]) for mask in masks)
        positions.append(
            PositionAcceptance(
                position=position,
                drafts=len(masks),
                verifier_matches=verifier_matches,
                reached=reached,
                accepted=accepted,
                unconditional=verifier_matches / len(masks),
                conditional=_ratio(accepted, reached),
            )
        )
    return positions


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share, within [0, 1]; sound for few trials and near 0 or 1."""
    # centre +- half, with z = 1.96: (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).
    share, spread = successes / trials, Z_95**2 / trials
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def _identical(records: Sequence[DecodeRecord], ar: Sequence[DecodeRecord]) -> float:
    reference = {record.prompt_index: record.tokens for record in ar}
    missing = [record.prompt_index for record in records if record.prompt_index not in reference]
    if missing:
        raise ValueError(f"the ar run lacks prompts {missing[:5]}")
    return sum(record.tokens == reference[record.prompt_index] for record in records) / len(records)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
