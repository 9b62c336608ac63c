"""What the benches share: clocks, peaks of memory, configurations of models, and JSON.

Import it before anything of Megatron: it starts the runtime.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nemodiff_train.runtime import init_runtime

GPU = init_runtime().cuda

import torch

from nemodiff_train.planning.workload import Workload
from tools.support import small

DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
MIB = 2**20

Ways = Mapping[str, Callable[[], Any]]


def parser(page: str | None, runs: int) -> argparse.ArgumentParser:
    """Return a parser with ``--runs`` and ``--json``; ``page`` is the script's documentation."""
    options = argparse.ArgumentParser(description=(page or "").splitlines()[0])
    options.add_argument("--runs", type=int, default=runs, help=f"runs of which figures are medians (default {runs})")
    options.add_argument("--json", metavar="FILE", help="write the figures here too")
    return options


def numbers(text: str) -> list[int]:
    """Parse ``1024,4096`` as the value of an option."""
    return [int(word) for word in text.split(",")]


def write(figures: Any, file: str | None) -> None:
    """Write the figures as JSON, if a file is named."""
    if file:
        Path(file).write_text(json.dumps(figures, indent=2) + "\n")


def now() -> float:
    """Return the clock in seconds, after the GPU has finished its work."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = now()
    work()
    return now() - started


def medians(ways: Ways, runs: int, before: Callable[[], Any] | None = None) -> dict[str, float]:
    """Return the median seconds of each way; every run calls all of them in turn.

    Args:
        ways: Calls by name.
        runs: Number of runs.
        before: Called before each call, not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            if before is not None:
                before()
            times[name].append(seconds(way))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def give_memory_back(above: int = 2**20) -> None:
    """Have the C library return freed blocks above a size at once, so that a peak is the memory in use.

    Args:
        above: Size in bytes.
    """
    ctypes.CDLL(None).mallopt(-3, above)  # M_MMAP_THRESHOLD


def held() -> int:
    """Return the bytes that the process holds; on a GPU, those of tensors."""
    return torch.cuda.memory_allocated() if GPU else _status("VmRSS")


def highest(work: Callable[[], Any]) -> int:
    """Return the most bytes that the process holds during a call; on a GPU, those of tensors."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    work()
    return torch.cuda.max_memory_allocated() if GPU else _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def qwen3(layers: int, hidden: int, vocabulary: int, dtype: torch.dtype = DTYPE) -> Any:
    """Return a Qwen 3 with heads of 64, half as many for keys, and a feed-forward three times the hidden size."""
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"], vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
        tie_word_embeddings=True, max_position_embeddings=2**15, dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def ministral3(
    layers: int = 26, hidden: int = 3072, heads: int = 32, vocabulary: int = 131072, dtype: torch.dtype = DTYPE
) -> Any:
    """Return a Ministral 3, by default in the shape of the 3B."""
    from transformers import Ministral3Config

    rope = {**small.YARN, "original_max_position_embeddings": 16384}
    return Ministral3Config(
        architectures=["Ministral3ForCausalLM"], vocab_size=vocabulary,
        hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 4, head_dim=128,
        tie_word_embeddings=True, max_position_embeddings=2**18, rope_parameters=rope,
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def workload(model: Any, length: int) -> Workload:
    """Return the work of a joint step on one sample of ``length`` clean tokens, with a model of ``small.build``."""
    config = model.config
    return Workload(
        layers=config.num_layers, hidden=config.hidden_size,
        query_channels=config.kv_channels * config.num_attention_heads,
        key_channels=config.kv_channels * config.num_query_groups, feed_forward=config.ffn_hidden_size, gated=True,
        head_norms=config.qk_layernorm, vocabulary=config.vocab_size, tied=True, length=length, views=1,
        block=config.block_size, micro_batch=1, global_batch=1, mixed=False, sharded=False,
    )  # fmt: skip
