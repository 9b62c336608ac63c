"""Generated arithmetic word problems with worked answers: the demo's training text and a built-in task.

Train and test are disjoint by construction.  Every answer adds or subtracts two two-digit numbers; in each
story, one such sum in ten belongs to the test split (`split_of`, a fixed hash) and is never asked in training,
whatever the names and objects.  The same sum may be trained on in another story.

All numbers have two digits, no sum carries or borrows, and the wording of an answer follows from its
question: a reader who can do the sum knows every word of the answer in advance.  That is what lets a draft
run far ahead; real worked answers allow it too, only less strictly.
"""

import itertools
import json
import operator
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from nemodiff_train.errors import UserError

Split = Literal["train", "test"]
Sign = Literal["+", "-"]

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack")
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
GOODS = ("bag", "ball", "book", "chair", "clock", "lamp", "shirt", "table")

TEST_SHARE = 10
"""One sum in so many is held out."""
_MOST = 100_000
"""Problems of a split that are drawn without meeting the same ones again and again."""


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer; `prompt + solution` is the whole text, without an end token."""

    prompt: str
    solution: str
    answer: str

    @property
    def question(self) -> str:
        """Return the question without the words around it."""
        return self.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")


@dataclass(frozen=True)
class Sum:
    """`left sign right = result`, all of two digits."""

    left: int
    sign: Sign
    right: int

    @property
    def result(self) -> int:
        """Return the value of the sum."""
        return self.left + self.right if self.sign == "+" else self.left - self.right

    def worked(self) -> str:
        """Write the sum digit by digit, then whole: ``3 + 2 = 5 and 4 + 5 = 9, so 34 + 25 = 59``."""
        pairs = zip(str(self.left), str(self.right), str(self.result), strict=True)
        tens, ones = (f"{left} {self.sign} {right} = {result}" for left, right, result in pairs)
        return f"{tens} and {ones}, so {self.left} {self.sign} {self.right} = {self.result}"


def split_of(sum_: Sum, story: str) -> Split:
    """Return the split that owns a sum in a story; `a + b` and `b + a` go together."""
    left, right = sum_.left, sum_.right
    if sum_.sign == "+":
        left, right = min(left, right), max(left, right)
    return "test" if zlib.crc32(f"{story} {left}{sum_.sign}{right}".encode()) % TEST_SHARE == 0 else "train"


@cache
def sums(split: Split, sign: Sign, story: str) -> tuple[Sum, ...]:
    """Return every sum of a split in a story: no zero among the operands' digits, no carry and no borrow."""
    numbers = [number for number in range(11, 100) if number % 10]
    combine = operator.add if sign == "+" else operator.sub
    owned = []
    for left, right in itertools.product(numbers, numbers):
        tens, ones = combine(left // 10, right // 10), combine(left % 10, right % 10)
        if 1 <= tens <= 9 and 0 <= ones <= 9 and split_of(Sum(left, sign, right), story) == split:
            owned.append(Sum(left, sign, right))
    return tuple(owned)


def make_problem(question: str, worked: str, answer: int) -> Problem:
    """Return a problem in the words around its question and its worked answer."""
    return Problem(f"Question: {question}\nAnswer:", f" {worked} The answer is {answer}.", str(answer))


def _gift(draw: random.Random, split: Split) -> Problem:
    s, (name, friend), things = draw.choice(sums(split, "+", "gift")), draw.sample(NAMES, 2), draw.choice(THINGS)
    return make_problem(
        f"{name} has {s.left} {things}. {friend} gives {name} {s.right} more {things}. "
        f"How many {things} does {name} have now?",
        f"{name} has {s.left} {things} and gets {s.right} more from {friend}. {s.worked()}. "
        f"So {name} has {s.result} {things} now.",
        s.result,
    )


def _shelves(draw: random.Random, split: Split) -> Problem:
    s, things = draw.choice(sums(split, "+", "shelves")), draw.choice(THINGS)
    return make_problem(
        f"There are {s.left} {things} in one box and {s.right} {things} in another box. "
        f"How many {things} are there in both boxes?",
        f"One box holds {s.left} {things} and the other box holds {s.right} {things}. {s.worked()}. "
        f"So both boxes hold {s.result} {things}.",
        s.result,
    )


def _prices(draw: random.Random, split: Split) -> Problem:
    s, name, (first, second) = draw.choice(sums(split, "+", "prices")), draw.choice(NAMES), draw.sample(GOODS, 2)
    return make_problem(
        f"{name} buys a {first} for ${s.left} and a {second} for ${s.right}. How much does {name} pay?",
        f"The {first} costs ${s.left} and the {second} costs ${s.right}. {s.worked()}. So {name} pays ${s.result}.",
        s.result,
    )


def _giving(draw: random.Random, split: Split) -> Problem:
    s, (name, friend), things = draw.choice(sums(split, "-", "giving")), draw.sample(NAMES, 2), draw.choice(THINGS)
    return make_problem(
        f"{name} has {s.left} {things} and gives {s.right} of them to {friend}. "
        f"How many {things} does {name} have left?",
        f"{name} starts with {s.left} {things} and gives away {s.right}. {s.worked()}. "
        f"So {name} has {s.result} {things} left.",
        s.result,
    )


_STORIES = (_gift, _shelves, _prices, _giving)


def problems(split: Split, count: int, seed: int) -> list[Problem]:
    """Draw `count` different problems of one split; the same arguments always give the same list.

    Raises:
        UserError: There are not as many.
    """
    return different_problems(lambda draw: draw.choice(_STORIES)(draw, split), count, f"{split} {seed}")


def different_problems(make: Callable[[random.Random], Problem], count: int, seed: str) -> list[Problem]:
    """Draw `count` different problems with a function; see :func:`problems`."""
    if count > _MOST:
        raise UserError(f"{count:,} arithmetic problems are too many to be different; ask for {_MOST:,} or fewer")
    draw = random.Random(seed)
    drawn: dict[Problem, None] = {}
    while len(drawn) < count:
        drawn[make(draw)] = None
    return list(drawn)


def write_conversations(file: Path, count: int) -> None:
    """Write training problems as conversations of one or two questions, for fine-tuning."""
    drawn = problems("train", count, seed=1)
    with file.open("w") as lines:
        while drawn:
            messages = []
            for problem in [drawn.pop() for _ in range(min(len(drawn), 1 + len(drawn) % 2))]:
                messages.append({"role": "user", "content": problem.question})
                messages.append({"role": "assistant", "content": problem.solution.strip()})
            print(json.dumps({"messages": messages}), file=lines)
