"""The demo's problems: right answers, disjoint splits, the same on every machine."""

import re
import zlib
from collections.abc import Iterable
from typing import Literal

import pytest

from nemodiff_train.evaluation.arithmetic import Problem, Sum, problems, split_of
from tools.support.chained import chained_problems

# What a problem's question asks for, as signs between its numbers in order; found by its wording alone.
WORDING = {
    r"gives \w+ \d+ more": "+",
    r"in one box and": "+",
    r"How much does": "+",
    r"of them to": "-",
}
SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def asked(problem: Problem) -> tuple[list[int], str]:
    """The numbers of the question and the signs between them."""
    signs = [signs for wording, signs in WORDING.items() if re.search(wording, problem.prompt)]
    assert len(signs) == 1, problem.prompt
    return [int(number) for number in re.findall(r"\d+", problem.prompt)], signs[0]


def whole_sums(drawn: Iterable[Problem]) -> set[tuple[str, str, tuple[int, ...]]]:
    """Every two-digit sum that the answers work out, with its story; the operands of `+` in sorted order."""
    sums = set()
    for problem in drawn:
        story = next(wording for wording in WORDING if re.search(wording, problem.prompt))
        for left, sign, right, _ in SUM.findall(problem.solution):
            if len(left) == 2:
                operands = (int(left), int(right))
                sums.add((story, sign, tuple(sorted(operands)) if sign == "+" else operands))
    return sums


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split: Literal["train", "test"]) -> None:
    for problem in problems(split, 3000, seed=5):
        numbers, signs = asked(problem)
        result = numbers[0]
        for sign, number in zip(signs, numbers[1:], strict=True):
            result = result + number if sign == "+" else result - number
        assert problem.answer == str(result)
        assert re.findall(r"\d+", problem.solution)[-1] == problem.answer


def test_every_worked_step_is_right() -> None:
    for problem in problems("train", 3000, seed=6):
        steps = SUM.findall(problem.solution)
        assert len(steps) == 3
        for left, sign, right, result in steps:
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))


def test_chained_problems_compose_what_is_trained_on() -> None:
    """Both sums of each are right and trained on alone; no pair of them is in both splits."""
    pairs: dict[str, set[tuple[str, ...]]] = {"train": set(), "test": set()}
    for split in ("train", "test"):
        for problem in chained_problems(split, 1000, seed=0):
            first, second = (part for part in SUM.findall(problem.solution) if len(part[0]) == 2)
            assert first[3] == second[0] and second[3] == problem.answer
            assert int(first[0]) + int(first[2]) == int(first[3])
            assert int(second[0]) - int(second[2]) == int(second[3])
            left, right = sorted((int(first[0]), int(first[2])))
            assert split_of(Sum(left, "+", right), "gift") == "train"
            assert split_of(Sum(int(second[0]), "-", int(second[2])), "giving") == "train"
            pairs[split].add((str(left), str(right), second[2]))
    assert len(pairs["test"]) > 200
    assert not pairs["train"] & pairs["test"]


def test_splits_share_no_sum_of_a_story() -> None:
    train, test = whole_sums(problems("train", 30_000, seed=1)), whole_sums(problems("test", 10_000, seed=2))
    assert train and test
    assert not train & test
    assert len(test) > 200  # many different sums are held out


def test_test_problems_are_all_different() -> None:
    drawn = problems("test", 5000, seed=3)
    assert len({problem.prompt for problem in drawn}) == len(drawn)


def test_draws_are_repeatable() -> None:
    assert problems("train", 200, seed=4) == problems("train", 200, seed=4)
    assert problems("train", 200, seed=4) != problems("train", 200, seed=5)
    assert problems("train", 300, seed=4)[:200] == problems("train", 200, seed=4)


def test_draws_are_pinned() -> None:
    """Another Python, or a change to the templates, would make other data and other scores."""
    texts = "".join(problem.prompt + problem.solution for problem in problems("test", 100, seed=0))
    assert zlib.crc32(texts.encode()) == 4040995974
