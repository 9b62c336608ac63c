"""Settings that take effect, and those that are refused because something else decides them."""

from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.config.defaults import schedule
from nemodiff_train.config.overrides import _WITHOUT_EFFECT, override
from nemodiff_train.errors import UserError
from nemodiff_train.validation.schedule import problems
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    small.qwen3(folder / "model")
    return folder


@pytest.fixture
def config(folder: Path) -> Any:
    made = small.recipe(str(folder / "model"), "data", str(folder / "out"))
    made.train.train_iters = 1000
    made.scheduler = schedule(0.01, decay=0.2)
    return made


def steps(config: Any, **overrides: str) -> tuple[int, int | None]:
    """Return the steps of warm-up and of the final decay."""
    override(config, {key.replace("__", "."): value for key, value in overrides.items()})
    config.fit_schedule()
    return config.scheduler.lr_warmup_iters, config.scheduler.lr_wsd_decay_iters


def test_a_schedule_is_shares_of_the_run_unless_steps_are_given(config: Any) -> None:
    assert steps(config, train__train_iters="500") == (5, 100) and problems(config) == []


def test_steps_go_before_shares(config: Any) -> None:
    given = {"scheduler__lr_warmup_iters": "50", "scheduler__lr_wsd_decay_iters": "300"}
    assert steps(config, **given) == (50, 300) and problems(config) == []


def test_other_shares(config: Any) -> None:
    assert steps(config, scheduler__lr_wsd_decay_fraction="0.5", scheduler__lr_warmup_fraction="0.1") == (100, 500)


@pytest.mark.parametrize(
    ("warmup", "decay", "changes", "needle"),
    [
        (600, 500, {}, "lr_wsd_decay_iters=500 and 600 steps of warm-up do not fit train.train_iters=1000"),
        (1000, 10, {}, "lr_warmup_iters=1000 does not fit train.train_iters=1000"),
        (10, None, {}, "lr_wsd_decay_iters=1000 and 10 steps"),
        (10, 100, {"lr_decay_iters": 2000}, "scheduler.lr_decay_iters=2000 does not fit"),
    ],
)
def test_what_does_not_fit(config: Any, warmup: int, decay: int | None, changes: dict[str, int], needle: str) -> None:
    config.scheduler = schedule(warmup, decay=decay)
    for name, value in changes.items():
        setattr(config.scheduler, name, value)
    config.fit_schedule()
    assert needle in " ".join(problems(config))


@pytest.mark.parametrize("key", _WITHOUT_EFFECT)
def test_what_something_else_decides_is_refused(config: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} has no effect here: "):
        override(config, {key: "1"})
