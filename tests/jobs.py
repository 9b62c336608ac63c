"""Functions that tests run on several ranks."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.support import small
from tools.support.layouts import resume, train, train_plainly

__all__ = ["ar_logits", "convert", "decode", "exchange", "loggers", "resume", "train", "train_plainly", "warnings"]


def ar_logits(source: str, tensor: int, pipeline: int) -> dict[str, float]:
    """Return how far fp32 AR logits of a model split over ranks are from Transformers' at most, over 200 positions.

    ``without_scale`` is the same with Ministral's query scale turned off: it must matter.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ids = torch.randint(20, 220, (2, 200))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
    result = {"difference": _difference(source, tensor, pipeline, ids, expected, keep_scale=True)}
    result["without_scale"] = _difference(source, tensor, pipeline, ids, expected, keep_scale=False)
    return result


def _difference(
    source: str, tensor: int, pipeline: int, ids: torch.Tensor, expected: torch.Tensor, keep_scale: bool
) -> float:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemodiff_train.model.bridges import auto_bridge
    from nemodiff_train.model.loading import set_dtype, set_parallelism
    from nemodiff_train.model.pretrained import config_from, model_from, stored_settings

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        model_parallel_cuda_manual_seed(1)
    provider: Any = model_from(source)
    set_parallelism(provider, tensor)
    set_dtype(provider, torch.float32)
    provider.pipeline_model_parallel_size = pipeline
    if not keep_scale:
        provider.query_scale_beta = 0.0
    provider.finalize()
    models = provider.provide_distributed_model(wrap_with_ddp=False)
    auto_bridge(config_from(stored_settings(source))).load_hf_weights(models, hf_path=source)

    def step(batch: Any, model: Any) -> tuple[torch.Tensor, Any]:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        logits = model(ids, positions, attention_mask=None, runtime_gather_output=True)
        return logits, lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=models,
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=len(ids),
            forward_only=True,
            collect_non_loss_data=True,
        )
    largest = torch.zeros(1)
    if parallel_state.is_pipeline_last_stage():
        largest += (outputs[0] - expected).abs().max()
    dist.broadcast(largest, dist.get_world_size() - 1)
    return float(largest)


def decode(checkpoint: str, tensor: int = 1, pipeline: int = 1) -> dict[str, Any]:
    """Return the tokens of every mode for three prompts, and those that a trained sampler's decisions give."""
    from nemodiff_train.decoding.decode import MODES, decode
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.model.checkpoint import Checkpoint

    settings: dict[str, Any] = {"max_new_tokens": 24, "block_size": 8, "threshold": 0.05}
    model = Checkpoint.open(checkpoint)
    loaded = load_decoding_model(model, tensor_parallel=tensor, pipeline_parallel=pipeline, **settings)
    prompts = [[20, 21, 22, 23], [50, 51], [30, 33, 36, 39, 41, 44, 47]]
    trained = replace(loaded.settings, policy="trained", trained_sampler=small.sampler(8, 0.3))
    runs = {mode: (mode, loaded.settings) for mode in MODES} | {"trained": ("diffusion", trained)}
    return {
        name: [generation.tokens for generation in decode(loaded.model, prompts, *run)[0]]
        for name, run in runs.items()
    }


def drafts(models: list[str], tensor: int, pipeline: int) -> dict[str, Any]:
    """Return the drafts of a model with a drafter that has a path selector, and the text.

    Args:
        models: Checkpoints of the model and of the drafter.
        tensor: Tensor-parallel ranks.
        pipeline: Pipeline ranks.

    Returns:
        Drafts of ``linear`` and ``tree`` by row, and ``unselected``, of ``linear`` without the selector; ``tokens``,
        the text of ``linear``; and that of ``ar``.
    """
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.model.checkpoint import Checkpoint

    model, drafter = (Checkpoint.open(path) for path in models)
    options: dict[str, Any] = {"tensor_parallel": tensor, "pipeline_parallel": pipeline, "max_new_tokens": 24}
    loaded = load_decoding_model(model, drafter=drafter, block_size=8, **options)
    prompts = [[20, 21, 22, 23], [50, 51], [30, 33, 36, 39, 41, 44, 47]]
    rows = {mode: decode(loaded.model, prompts, mode, loaded.settings)[0] for mode in ("ar", "linear", "tree")}
    for chunk in loaded.model:
        chunk.selector_tables = None
    rows["unselected"] = decode(loaded.model, prompts, "linear", loaded.settings)[0]
    found: dict[str, Any] = {
        mode: [[cycle.draft_tokens for cycle in row.cycles] for row in rows[mode]]
        for mode in ("linear", "tree", "unselected")
    }
    return found | {"tokens": [row.tokens for row in rows["linear"]], "ar": [row.tokens for row in rows["ar"]]}


def warnings(**arguments: Any) -> dict[str, Any]:
    """Train; return what the console printed."""
    from nemodiff_train.console import console

    with console.capture() as captured:
        train(**arguments)
    return {"console": captured.get()}


def loggers(output: str, settings: list[str], **arguments: Any) -> dict[str, Any]:
    """Train with TensorBoard and W&B; return TensorBoard's tags and the number of W&B's offline runs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = {"wandb_project": "test", "wandb_exp_name": "run", "wandb_save_dir": f"{output}/wandb"}
    logged = [f"logger.{key}={value}" for key, value in names.items()]
    printed = warnings(
        output=output,
        settings=[
            *settings, *logged, f"logger.tensorboard_dir={output}/tensorboard", "logger.log_params_norm=true",
            "train.train_iters=2",
        ],
        **arguments,
    )  # fmt: skip
    events = EventAccumulator(f"{output}/tensorboard").Reload()
    return {
        **printed,
        "tags": events.Tags()["scalars"],
        "wandb": len(list(Path(output, "wandb").rglob("offline-run-*"))),
    }


def barriers(**arguments: Any) -> dict[str, list[int]]:
    """Train; return the steps after which saves were asked for, and those at which ranks waited for one another."""
    from nemodiff_train.resilience import checkpoints

    manager, barrier = checkpoints.AtomicCheckpointManager, checkpoints.barrier
    finalize = manager.finalize_async_saves
    asked, waited = [0], []

    def count(self: Any, state: Any, *rest: Any, **more: Any) -> None:
        asked.append(int(state.train_state.step))
        finalize(self, state, *rest, **more)

    def wait() -> None:
        waited.append(asked[-1])
        barrier()

    manager.finalize_async_saves, checkpoints.barrier = count, wait
    train(**arguments)
    return {"asked": asked, "waited": waited}


def exchange(size: int) -> dict[str, Any]:
    """Count what one attention layer exchanges at L = 4096 over ``size`` context-parallel ranks.

    Returns:
        ``received``, the bytes that a rank receives from the others in a forward; ``clean``, the bytes of the keys
        and values of all clean positions; ``collectives``; and ``difference`` from one rank.
    """
    from types import SimpleNamespace

    from megatron.core import parallel_state

    from nemodiff_train.attention.context_parallel import ContextParallelShard
    from nemodiff_train.attention.modules import TriModeAttention
    from nemodiff_train.attention.state import AttentionState

    length, heads, kv_heads, width = 4096, 2, 1, 8
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=size)
    group = parallel_state.get_context_parallel_group()
    config: Any = SimpleNamespace(
        noisy_views=1, block_size=32, largest_block=32, clean_attention="causal", query_scale_beta=0.0,
        causal_noise=False, attention_kernel="auto", attention_tile=0, attention_options={},
    )  # fmt: skip
    attention = TriModeAttention(config, layer_number=1)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2 * length, 1, n, width, generator=draw) for n in (heads, kv_heads, kv_heads))
    attention.state = AttentionState()
    expected = attention(query, key, value)
    shard = ContextParallelShard(group.rank(), group.size())
    attention.state = AttentionState(shard=shard, context_group=group)
    mine = torch.cat([segment * length + shard.positions(length) for segment in (0, 1)])
    sent: list[int] = []
    plain: Any = dist.all_gather_into_tensor

    def counted(output: torch.Tensor, own: torch.Tensor, **options: Any) -> Any:
        sent.append(own.numel() * own.element_size())
        return plain(output, own, **options)

    import megatron.core.tensor_parallel.mappings as mappings

    dist.all_gather_into_tensor = mappings.dist_all_gather_func = counted
    try:
        found = attention(query[mine], key[mine], value[mine])
    finally:
        dist.all_gather_into_tensor = mappings.dist_all_gather_func = plain
    return {
        "collectives": len(sent),
        "received": sum(sent) * (size - 1),
        "clean": 2 * length * kv_heads * width * key.element_size(),
        "difference": float((found - expected[mine]).abs().max()),
    }


def convert(commands: list[list[str]]) -> dict[str, Any]:
    """Run ``nemodiff convert`` commands one after another on all ranks; return their exit codes."""
    from nemodiff_train.cli import main

    return {"codes": [main(["convert", *words]) for words in commands]}


def train_as_told(folder: str, words: list[str], environment: dict[str, str]) -> int:
    """Run ``nemodiff train`` in a folder and an environment; return its exit code."""
    from nemodiff_train.cli import main

    os.chdir(folder)
    os.environ.update(environment)
    return main(["train", *words])


def evaluate_until_the_disk_is_full(folder: str) -> dict[str, Any]:
    """Evaluate undisturbed; then with a disk that is full after a few prompts; then again, as a user would.

    In between the checkpoint is moved, and another model takes its place.

    Returns:
        Exit codes, what the second left in its folder, and the prompts that the third decoded; ``other``, those that
        the other model decoded where the second had been interrupted.
    """
    from nemodiff_train.cli import main
    from nemodiff_train.evaluation import decode_task

    root = Path(folder)
    small.qwen3(root / "model")
    checkpoint = str(root / "checkpoint")
    codes = [main(["convert", "import", str(root / "model"), checkpoint, "--mask-token", small.MASK])]
    words = ["eval", checkpoint, "--count", "6", "--max-new-tokens", "4", "--block-size", "4", "--batch-size", "2"]
    words += ["--modes", "ar,diffusion,ar,linear"]
    codes.append(main([*words, "--output", str(root / "undisturbed")]))
    decoded: list[int] = []
    decode_batch = decode_task._decode_batch

    def count(*arguments: Any) -> Any:
        decoded.extend(arguments[2])
        return decode_batch(*arguments)

    def fill_up(*arguments: Any) -> Any:
        if len(decoded) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records")
        return count(*arguments)

    decode_task._decode_batch = fill_up
    codes.append(main([*words, "--output", str(root / "out")]))
    left = sorted(path.name for path in (root / "out").iterdir())
    shutil.copytree(root / "out", root / "other")
    (root / "checkpoint").rename(root / "moved")
    small.qwen3(root / "model", mask_row=2.0)
    codes.append(main(["convert", "import", str(root / "model"), checkpoint, "--mask-token", small.MASK]))
    decoded.clear()
    decode_task._decode_batch = count
    codes.append(main([*words, "--output", str(root / "other")]))
    other = decoded.copy()
    decoded.clear()
    words[1] = str(root / "moved")
    codes.append(main([*words, "--output", str(root / "out")]))
    codes.append(main([*words, "--output", str(root / "out")]))
    return {"codes": codes, "left": left, "decoded": decoded, "other": other}
