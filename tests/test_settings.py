"""Settings that take effect, and those that are refused because something else decides them."""

import ast
import copy
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import megatron.core
import pytest

from nemodiff_train.config.defaults import schedule
from nemodiff_train.config.overrides import _WITHOUT_EFFECT, override, without_effect
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


ROOT = Path(megatron.core.__file__).parents[1]
READERS = (
    ROOT / "core",
    ROOT / "training",
    *(ROOT / "bridge" / name for name in ("training", "peft", "data", "utils")),
    *(ROOT / "bridge" / "models" / name for name in ("gpt_provider.py", "model_provider.py")),
    Path(__file__).parents[1] / "nemodiff_train",
)
"""What may read a setting in a run: all code but the converters of other families."""

EMERGING = ("optimizer.muon_", "optimizer.soap_", "optimizer.adaptive_muon_")


def names_read(path: Path) -> Iterator[str]:
    """Yield the attributes that a file, or the files of a folder, ask for."""
    for file in [path] if path.is_file() else path.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                yield node.attr
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                yield from (part.value for part in node.args[1:2] if isinstance(part, ast.Constant))


def test_every_setting_is_read_or_refused(config: Any) -> None:
    """All fields of all sections: none is accepted that no code asks for."""
    read = {name for path in READERS for name in names_read(path)}
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    keys = {
        f"{name}.{field.name}": field.name
        for name, section in sections.items()
        if is_dataclass(section)
        for field in fields(section)
    }
    assert len(keys) > 700
    inert = [key for key, name in keys.items() if name not in read and without_effect(key) is None]
    # Core composes the names of these from that of the optimizer, which has to be installed.
    assert [key for key in inert if not key.startswith(EMERGING)] == []


HOSTILE = ("0", "-1", "1000000000000000", "1e308", "nan", "inf", "''", "nonsense", "[]", "{}", "null", "true")


def test_hostile_values_of_all_settings(config: Any) -> None:
    """Values generated for every field: refused in one line, or at least a number that can be.

    Every run tries the same part; ``NEMODIFF_HOSTILE=1`` tries all, and takes minutes.
    """
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    settings = [(f"{n}.{f.name}", n, f.name) for n, s in sections.items() if is_dataclass(s) for f in fields(s)]
    every = 1 if os.environ.get("NEMODIFF_HOSTILE") else 131
    for (key, section, name), value in islice(product(settings, HOSTILE), 0, None, every):
        changed = copy.deepcopy(config)
        try:
            override(changed, {key: value})
            changed.fit_schedule()
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            continue
        taken = getattr(getattr(changed, section), name)
        if isinstance(taken, int | float) and not isinstance(taken, bool):
            assert -1 <= taken <= 1e12 or key == "optimizer.grad_norm_skip_threshold", (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.train_iters", "100000000000000"),
        ("train.global_batch_size", "99999999"),
        ("objective.views", "1000000000"),
        ("ddp.bucket_size", "-5"),
        ("optimizer.clip_grad", "-1"),
        ("logger.log_interval", "inf"),
    ],
)
def test_absurd_values_are_refused(config: Any, key: str, value: str) -> None:
    from nemodiff_train.validation import size
    from nemodiff_train.validation.settings import check_sizes

    with pytest.raises(UserError, match=key.rpartition(".")[2]):
        check_sizes(override(config, {key: value}))
        raise UserError("; ".join(size.problems(config, 1)))


@pytest.mark.parametrize("key", ["model.moe_router_topk", "model.mtp_num_layers"])
def test_settings_of_other_kinds_are_refused(config: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} has no effect here: "):
        override(config, {key: "1"})


@pytest.mark.parametrize("text", ["98,1,1", "17", "true", "it's \\ 'so'", "a b=c", "end\\"])
def test_text_is_taken_as_it_is_typed(config: Any, text: str) -> None:
    """Hydra would read numbers, truth values and choices; what the user puts in quotes is text as well."""
    assert override(config, {"dataset.split": text}).dataset.split == text
    assert override(config, {"logger.wandb_project": '"17"'}).logger.wandb_project == "17"
