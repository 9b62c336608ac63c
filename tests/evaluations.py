"""Evaluations made up at random, with every kind of record that decoding leaves behind."""

import random

from nemodiff_train.decoding.generation import Cycle
from nemodiff_train.evaluation.evaluation import Evaluation, Run, assemble, by_category
from nemodiff_train.evaluation.prompts import Prompt, Task
from nemodiff_train.evaluation.records import DecodeRecord, LoggedRecord, Settings
from nemodiff_train.evaluation.scorers import Scorer, make_scorer

PROMPTS = 12
CATEGORIES = ("coding", "math", "</script><b>writing")
RIGHT, WRONG = 90, 91
"""Tokens that end an answer: the one that is asked for, and another one."""


def text(tokens: list[int]) -> str:
    """One word a token."""
    return "".join(f" w{token}" for token in tokens)


def evaluation(seed: int = 0, prompts: int = PROMPTS) -> Evaluation:
    """AR, diffusion over a grid, linear over block sizes, and a mode that the report does not know."""
    draw = random.Random(seed)
    grid = [(size, threshold) for size in (4, 8) for threshold in (0.5, 0.9)]
    diffusion = [_run(draw, "diffusion", prompts, block_size=size, threshold=at) for size, at in grid]
    linear = [_run(draw, "linear", prompts, block_size=size) for size in (4, 8)]
    runs = [_run(draw, "ar", prompts), diffusion[-1], linear[-1], _run(draw, "unheard", prompts, block_size=8)]
    task = Task("made-up", [Prompt(prompt=f"What is {i}?", answer=f"w{RIGHT}") for i in range(prompts)], _scorer())
    made = assemble("made/up", task, runs, text, settings={"seed": seed}, sweep=[*diffusion, *linear])
    return _with_categories(made)


def is_headline(evaluation: Evaluation, record: LoggedRecord) -> bool:
    """Whether a record belongs to its mode's main settings."""
    return record.settings == evaluation.modes[record.mode].settings


def _scorer() -> Scorer:
    return make_scorer("regex", r"(w9\d)")


def _with_categories(made: Evaluation) -> Evaluation:
    records = [
        row.model_copy(update={"category": CATEGORIES[row.decoded.prompt_index % len(CATEGORIES)]})
        for row in made.records
    ]
    categories = by_category([row for row in records if is_headline(made, row)])
    return made.model_copy(update={"records": records, "categories": categories})


def _run(draw: random.Random, mode: str, prompts: int, **settings: float) -> Run:
    make = {"ar": _ar, "diffusion": _diffusion}.get(mode, _cycles)
    named: Settings = dict(settings)
    return Run(mode, named, [make(draw, index, named) for index in range(prompts)])


def _tokens(draw: random.Random) -> list[int]:
    return [*(draw.randrange(10, 80) for _ in range(draw.randrange(12, 40))), draw.choice([RIGHT, RIGHT, WRONG])]


def _ar(draw: random.Random, index: int, settings: Settings) -> DecodeRecord:
    tokens = _tokens(draw)
    return DecodeRecord(
        index,
        tokens,
        {"prefill": 1, "decode": len(tokens) - 1},
        seconds=draw.random(),
        steps=[*range(1, len(tokens) + 1)],
    )


def _diffusion(draw: random.Random, index: int, settings: Settings) -> DecodeRecord:
    tokens = _tokens(draw)
    rounds = draw.randrange(2, 9)
    steps = [1, *(draw.randrange(2, rounds + 2) for _ in tokens[1:])]
    return DecodeRecord(
        index, tokens, {"prefill": 1, "denoise": rounds, "commit": 1}, seconds=draw.random(), steps=steps
    )


def _cycles(draw: random.Random, index: int, settings: Settings) -> DecodeRecord:
    """Draft and verify as decoding records it: the draft tokens that are accepted are those that are committed."""
    tokens, drafted = _tokens(draw), int(str(settings["block_size"])) - 1
    cycles: list[Cycle] = []
    start = 1
    while start < len(tokens):
        mask = [draw.random() < 0.7 for _ in range(drafted)]
        passed = [*mask, False].index(False)
        draft = [*tokens[start : start + passed], *(draw.randrange(10, 80) for _ in range(drafted))][:drafted]
        accepted = min(passed, len(tokens) - start)
        extra, whole = start + accepted < len(tokens), all(mask)
        cycles.append(Cycle(accepted, extra and not whole, extra and whole, draft, mask))
        start += cycles[-1].committed
    steps = [1, *(3 + 2 * number for number, cycle in enumerate(cycles) for _ in range(cycle.committed))]
    forwards = {"prefill": 1, "draft": len(cycles), "verify": len(cycles)}
    return DecodeRecord(index, tokens, forwards, cycles, seconds=draw.random(), steps=steps)
