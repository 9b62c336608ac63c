"""Fixtures used by more than one module."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemodiff_train.runtime import init_runtime
from tests.prepared import TEXTS, run, save_tokenizer, write_jsonl
from tools.support.ranks import RankPool

GPU = torch.cuda.is_available()
"""Asked before the runtime starts, which answers yes for a CPU as well."""

init_runtime()  # test modules import what needs it


LONG = tuple(
    f"test_{name}.py"
    for name in (
        "slurm", "layouts", "survival", "drafter", "decoding", "walk", "hosts", "compile", "serving", "automodel",
        "chat", "demo",
    )
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take minutes begin first: no worker is left with one of them at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def end_process_groups() -> None:
    """End the process groups that a test of this process has begun."""
    if "megatron.core.parallel_state" in sys.modules:
        from megatron.core import parallel_state
        from torch import distributed

        parallel_state.destroy_model_parallel()
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.fixture(autouse=True, scope="module")
def no_groups_left() -> Iterator[None]:
    """Process groups end with the module that began them: the next one may need other ones."""
    gc.collect()
    gc.freeze()  # what earlier modules have imported is not looked through again
    yield
    end_process_groups()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """A process that has imported Bridge and forks the ranks of every job."""
    with RankPool(tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("input") / "a.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, jsonl: Path, tokenizer_dir: str) -> str:
    """An uninterrupted run of one worker."""
    prefix = str(tmp_path_factory.mktemp("output") / "data.v1")
    assert run(jsonl, tokenizer_dir, prefix) == 0
    return prefix
