"""Settings that take effect, and those that are refused because something else decides them."""

import ast
import copy
import math
import os
import re
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
from nemodiff_train.schema import declared_type
from nemodiff_train.validation.settings import problems, schedule_problems
from tests import small

ALL = bool(os.environ.get("NEMODIFF_HOSTILE"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    small.qwen3(folder / "model")
    small.data(folder / "data", documents=20)
    return folder


@pytest.fixture
def config(folder: Path) -> Any:
    made = small.recipe(str(folder / "model"), str(folder / "data"), str(folder / "out"))
    made.train.train_iters = 1000
    made.scheduler = schedule(0.01, decay=0.2)
    return made


def steps(config: Any, **overrides: str) -> tuple[int, int | None]:
    """Return the steps of warm-up and of the final decay."""
    override(config, {key.replace("__", "."): value for key, value in overrides.items()})
    config.resolve_fractions()
    return config.scheduler.lr_warmup_iters, config.scheduler.lr_wsd_decay_iters


def test_a_schedule_is_shares_of_the_run_unless_steps_are_given(config: Any) -> None:
    assert steps(config, train__train_iters="500") == (5, 100) and not list(schedule_problems(config))


def test_steps_go_before_shares(config: Any) -> None:
    given = {"scheduler__lr_warmup_iters": "50", "scheduler__lr_wsd_decay_iters": "300"}
    assert steps(config, **given) == (50, 300) and not list(schedule_problems(config))


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
    config.resolve_fractions()
    assert needle in " ".join(schedule_problems(config))


@pytest.mark.parametrize("key", [name.rstrip("*") for names in _WITHOUT_EFFECT.values() for name in names])
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


HOSTILE = (
    "0", "-1", "-0.5", "1", "7", "1000000", "1000000000000", "1000000000000000", "1e308", "nan", "inf", "''",
    "nonsense", "[]", "[x]", "[-1]", "{}", "null", "true",
)  # fmt: skip
NEVER = ("train.exit_interval", "train.manual_gc_interval", "checkpoint.save_interval")
"""Intervals of Bridge that may be 0."""
OURS = ("objective", "drafter", "diagnostics", "evaluation", "resilience")


def is_absurd(section: Any, key: str, taken: Any) -> bool:
    """Return whether a value is none of the declared type, or none that a setting of this name can have."""
    name, hint = key.rpartition(".")[2], str(declared_type(type(section), key.rpartition(".")[2]))
    default = next(field.default for field in fields(section) if field.name == name)
    if isinstance(taken, list):
        return any(is_absurd(section, key, part) for part in taken)
    if isinstance(taken, bool):
        return "bool" not in hint
    if not isinstance(taken, int | float):
        return taken == "" != default or (taken is None is not default and not re.search("None|Optional", hint))
    interval = "interval" in name and key.partition(".")[0] not in OURS and key not in NEVER
    share = re.search("fraction|dropout|momentum|beta|percent|_rate", name) and "float" in hint
    lowest = -1 if taken == default or "pad_id" in name or name == "most_recent_k" else 1 if interval else 0
    unlimited = key == "optimizer.grad_norm_skip_threshold" and taken == math.inf
    return not (lowest <= taken <= (1 if share else 1e12) or unlimited) or ("seed" in name and taken >= 2**32)


def test_hostile_values_of_all_settings(
    config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values generated for every field: refused in one line, or a possible value that a dry run judges.

    Every run tries the same part; ``NEMODIFF_HOSTILE=1`` tries all, and takes an hour.
    """
    from nemodiff_train.training.run import check_run

    monkeypatch.chdir(folder)
    before, defaults = sorted(folder.rglob("*")), config.settings()
    sections = {field.name: getattr(config, field.name) for field in fields(config)}
    settings = [(f"{n}.{f.name}", n, f.name) for n, s in sections.items() if is_dataclass(s) for f in fields(s)]
    wrong: list[str] = []
    for (key, section, name), value in islice(product(settings, HOSTILE), 0, None, 1 if ALL else 211):
        changed, case = copy.deepcopy(config), f"{key}={value}"
        try:
            override(changed, {key: value})
            changed.resolve_fractions()
            taken = getattr(getattr(changed, section), name)
            if is_absurd(sections[section], key, taken):
                wrong.append(f"{case} is accepted")
            elif taken != getattr(sections[section], name):
                check_run(changed, defaults, None, 80.0)
        except UserError as error:
            wrong += [case] if len(str(error).splitlines()) != 1 else []
        except Exception as error:
            wrong.append(f"{case}: {type(error).__name__}: {error}")
        if sorted(folder.rglob("*")) != before:
            wrong.append(f"{case} leaves something behind")
            before = sorted(folder.rglob("*"))
    assert wrong == []
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.train_iters", "100000000000000"),
        ("train.train_iters", "4000000000"),
        ("train.train_iters", "1000000000"),
        ("train.global_batch_size", "99999999"),
        ("train.global_batch_size", "1000000"),
        ("objective.views", "1000000000"),
        ("ddp.bucket_size", "-5"),
        ("optimizer.clip_grad", "-1"),
        ("optimizer.grad_norm_skip_threshold", "1e15"),
        ("logger.log_interval", "inf"),
        ("logger.tensorboard_log_interval", "0"),
        ("validation.eval_interval", "0"),
        ("rng.seed", "4294967296"),
        ("dataset.num_workers", "1000000"),
        ("model.hidden_dropout", "1.5"),
        ("optimizer.adam_beta2", "1"),
        ("optimizer.adam_eps", "0"),
        ("optimizer.lr", "1e6"),
        ("dist.distributed_timeout_minutes", "1000000000000"),
        ("profiling.profile_ranks", "[-1]"),
        ("dataset.split", "null"),
        ("checkpoint.save", "''"),
    ],
)
def test_absurd_values_are_refused(config: Any, key: str, value: str) -> None:
    from nemodiff_train.validation import size
    from nemodiff_train.validation.settings import check_sizes

    with pytest.raises(UserError, match=key.rpartition(".")[2]):
        check_sizes(override(config, {key: value}))
        raise UserError("; ".join(size.problems(config, 1)))


def test_the_optimizer_of_a_recipe_can_be_exchanged(config: Any) -> None:
    """Recipes set what Adam reads, which is none of the user's settings."""
    from nemodiff_train.config.defaults import adamw
    from nemodiff_train.validation import settings

    config.optimizer = adamw()
    config.resolve_fractions()
    assert not [*settings.problems(override(config, {"optimizer.optimizer": "sgd"}))]


def test_adapters_are_not_overridden(config: Any) -> None:
    with pytest.raises(UserError, match=r"peft\.dim cannot be overridden; the recipe's arguments"):
        override(config, {"peft.dim": "4"})


def test_a_dry_run_makes_no_folder_for_its_index(config: Any, folder: Path) -> None:
    from nemodiff_train.training.run import check_run

    changed = override(copy.deepcopy(config), {"dataset.path_to_cache": str(folder / "index")})
    changed.resolve_fractions()
    assert check_run(changed, config.settings(), None, 80.0) == 0
    assert not (folder / "index").exists()


@pytest.mark.parametrize("split", ["inf", "inf,1,1", "nan"])
def test_a_split_that_is_no_number_is_a_line(config: Any, split: str) -> None:
    from nemodiff_train.validation import data

    config.dataset.split = split
    assert [line for line in data.problems(config) if "dataset.split" in line]


@pytest.mark.parametrize("key", ["rerun_state_machine.error_injection_type", "rerun_state_machine.rerun_mode"])
def test_a_choice_cannot_be_unset(config: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} cannot be null"):
        override(config, {key: "null"})


@pytest.mark.parametrize(
    ("key", "value", "needle"),
    [
        ("objective.stage", None, "objective.stage"),
        ("objective.reduction", None, "objective.reduction"),
        ("resilience.on_spike", None, "resilience.on_spike"),
        ("resilience.on_spike", "skp", "Did you mean 'skip'?"),
        ("objective.alpha", -1.0, "use 0 or more"),
        ("objective.seed", -1, "from 0 to 4,294,967,295"),
        ("objective.fully_masked_fraction", 2.0, "from 0 to 1"),
        ("resilience.exit_grace", 0.0, "above 0"),
    ],
)
def test_a_recipe_is_checked_as_its_overrides_are(config: Any, key: str, value: object, needle: str) -> None:
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    (line,) = (line for line in problems(config) if line.startswith(key))
    assert needle in line


def test_a_recipe_may_say_what_a_command_line_cannot(config: Any) -> None:
    config.resilience.exit_grace, config.evaluation.task = math.inf, Path("problems.jsonl")
    assert not [line for line in problems(config) if line.startswith(("resilience", "evaluation"))]


@pytest.mark.parametrize("key", ["model.fp8_margin", "optimizer.initial_loss_scale", "ddp.grad_reduce_in_fp32"])
def test_what_the_precision_decides_is_refused(config: Any, key: str) -> None:
    """Bridge copies every field of the precision over its namesakes."""
    with pytest.raises(UserError, match=f"{key} has no effect here: set mixed_precision"):
        override(config, {key: "1"})


def test_settings_that_nothing_reads_while_another_is_off(config: Any) -> None:
    """Each group of them is refused by name without its switch, and taken with it."""
    from nemodiff_train.validation.settings import _ONLY_WITH, _switched_off

    assert list(_switched_off(config)) == []
    for start, switches in _ONLY_WITH.items():
        changed, section = copy.deepcopy(config), start.partition(".")[0]
        part = getattr(changed, section)
        key = next(
            f"{section}.{field.name}"
            for field in fields(part)
            if re.match(start, f"{section}.{field.name}") and f"{section}.{field.name}" not in switches
        )
        setattr(part, key.partition(".")[2], "changed")
        assert [line.partition(" has no effect")[0] for line in _switched_off(changed)] == [key], start
        owner, _, switch = switches[0].partition(".")
        setattr(getattr(changed, owner), switch, True)
        assert not any(line.startswith(f"{key} ") for line in _switched_off(changed))


@pytest.mark.parametrize("key", ["model.moe_router_topk", "model.mtp_num_layers", "tokenizer.vocab_file"])
def test_settings_of_other_kinds_are_refused(config: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"{key} has no effect here: "):
        override(config, {key: "1"})


@pytest.mark.parametrize("text", ["98,1,1", "17", "true", "it's \\ 'so'", "a b=c", "end\\"])
def test_text_is_taken_as_it_is_typed(config: Any, text: str) -> None:
    """Hydra would read numbers, truth values and choices; what the user puts in quotes is text as well."""
    assert override(config, {"dataset.split": text}).dataset.split == text
    assert override(config, {"logger.wandb_project": '"17"'}).logger.wandb_project == "17"
