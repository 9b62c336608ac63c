"""Everything of Megatron-Core and Bridge that this project replaces: one function per patch.

Each patch says until when it is needed, and refuses a version whose function it was not written for.  What the CPU
backend replaces in torch is in :mod:`~nemodiff_train.runtime.cpu`.

Importing this module imports Megatron-Core, which looks for Transformer Engine at that moment: import it before a
stand-in for Transformer Engine can be found.
"""

import importlib
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import megatron.core.datasets.utils as dataset_utils
import megatron.core.models.common.embeddings.rope_utils as rope_utils
import megatron.core.tensor_parallel.random as tp_random
import megatron.core.utils as core_utils
import torch
import yaml
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.extensions.transformer_engine import HAVE_TE as HAVE_TE
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from packaging.version import Version
from torch import Tensor

from nemodiff_train.processes import exit_only_with_parent, signals_blocked, without_main_module
from nemodiff_train.runtime.cpu import get_random_state, set_random_state
from nemodiff_train.runtime.replace import REPLACED, replace, replace_in

if TYPE_CHECKING:  # imported only where there is a model
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer.attention import SelfAttention


def mark_te_as_missing() -> None:
    """Let Megatron-Core see that Transformer Engine is absent, before a stand-in misleads it.

    Core's modules compare its version while they are imported.  The one set here is the oldest that takes every
    branch of those comparisons without touching the package.

    Until: Core asks ``HAVE_TE`` before it compares versions (not in 0.19.2).
    """
    replace(core_utils, "_te_version", Version("2.12.0"), takes=None)
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")


def parse_yaml_in_c() -> None:
    """Let Bridge read the configurations of checkpoints by libyaml, in a seventh of the time; all ranks wait for it.

    Until: Bridge does so itself (not in 0.6.2).
    """
    replace(yaml, "safe_load", partial(yaml.load, Loader=yaml.CSafeLoader), takes="stream")


def load_torch_adam() -> None:
    """Let Core save and load a distributed optimizer of torch's Adam, which it uses without Transformer Engine.

    Core takes one step number for all parameters from the state of the new optimizer, and stops because there is
    none; it expects one of every parameter in the checkpoint; and it leaves one tensor to all parameters, which Adam,
    counting in place, would count up once for each of them.

    Until: Core loads a distributed optimizer of torch's Adam (not in 0.19.2).
    """

    def state_dict(self: Any) -> Any:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam) and not inner.state:  # new: what a checkpoint has overwrites this
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return original_state_dict(self)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        original_set(self, model_param, {**tensors, "step": None})  # what is not a tensor is left as it is

    original_state_dict = replace(DistributedOptimizer, "state_dict", state_dict, takes="self")
    original_load = replace(DistributedOptimizer, "load_state_dict", load_state_dict, takes="self, state_dict")
    name = "_set_main_param_and_optimizer_states"
    original_set = replace(DistributedOptimizer, name, set_states, takes="self, model_param, tensors")


def limit_fused_rope() -> None:
    """Rotate by Transformer Engine's kernel only where all rows of a batch have the same angles, as it requires.

    Rows differ in packed samples, and in decoding.

    Until: Core looks at the angles, as it does for angles of several axes (not in 0.19.2).
    """

    def rotate(t: Tensor, freqs: Tensor, transpose_output_memory: bool = False, interleaved: bool = False) -> Tensor:
        # Heads t [positions, rows, heads, width]; angles freqs [positions, rows or 1, 1, width].
        plain: Callable[..., Tensor] = rope_utils._apply_rotary_pos_emb_bshd
        if freqs.shape[1] > 1:
            return plain(t, freqs, rotary_interleaved=interleaved)
        rotated: Tensor = original(t, freqs, interleaved=interleaved)
        return rotated

    takes = "t, freqs, transpose_output_memory, interleaved"
    original = replace(rope_utils, "fused_apply_rotary_pos_emb", rotate, takes=takes)


def keep_compiled_dataset_helpers() -> None:
    """Use the data-set helpers that came compiled with Megatron-Core's wheel.

    Core compiles them anew at every start, from a Makefile that the wheel leaves out.

    Until: Core looks for the compiled module first, or its wheel has the Makefile (neither in 0.19.2).
    """
    directory = Path(dataset_utils.__file__).parent
    if not (directory / "Makefile").exists() and any(directory.glob("helpers_cpp*.so")):
        replace(dataset_utils, "compile_helpers", lambda: None, takes="")


def patch_peft_te_flag(peft_utils: ModuleType) -> None:
    """Set ``HAVE_TE`` of Bridge's adapters, which use Core's names for it; where it is absent, these are None.

    Args:
        peft_utils: ``megatron.bridge.peft.utils``, which is imported late.

    Until: ``megatron.bridge.peft.utils`` asks Core (not in 0.6.2).
    """
    replace(peft_utils, "HAVE_TE", HAVE_TE, takes=None)


def allow_larger_tokenizers(setup: ModuleType) -> None:
    """Train a model whose tokenizer has tokens without a row; data with such a token are refused before.

    Args:
        setup: ``megatron.bridge.training.setup``, which is imported late.

    Until: Bridge looks at the data's tokens instead of the tokenizer's size (not in 0.6.2).
    """
    takes = "model_vocab_size, tokenizer_vocab_size, use_tokenizer_vocab_size"
    size = "_validate_and_set_vocab_size"
    replace(setup, size, lambda model_vocab_size, **unused: (model_vocab_size, False), takes=takes)


_EXTRA_STATE = "_extra_state"


def leave_out_extra_state(model: "GPTModel") -> None:
    """Neither save nor ask for the scaling factors of Transformer Engine's layers, which only FP8 has.

    A checkpoint made without Transformer Engine has none, and would be refused where it is installed.  Every weight
    is still asked for.

    Until: Core loads checkpoints without extra states into Transformer Engine's layers (not in 0.19.2).
    """

    def forget_missing(module: torch.nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith(_EXTRA_STATE)]

    def sharded_state_dict(*arguments: Any, **named: Any) -> dict[str, Any]:
        return {key: value for key, value in state_of(*arguments, **named).items() if not key.endswith(_EXTRA_STATE)}

    takes = "prefix, sharded_offsets, metadata"
    state_of = replace_in(model, "sharded_state_dict", sharded_state_dict, takes)
    model.register_load_state_dict_post_hook(forget_missing)


def multiply_angles(attention: "SelfAttention", factor: float) -> None:
    """Set what Core multiplies the sine and cosine of a layer's angles by, which it computes for its own YaRN alone.

    Until: Core asks the rotary embedding for it (not in 0.19.2).
    """
    replace_in(attention, "_yarn_concentration_factor", factor, takes=None)


def decide_on_updates(optimizer: "MegatronOptimizer", leaves_out: Callable[[], bool]) -> Callable[[], bool]:
    """Let a function prepare the gradients and say whether the update is left out, and return Core's own.

    Until: Core or Bridge has a callback between gradients and update that can leave the update out (not in 0.19.2).
    """
    prepare: Callable[[], bool] = replace_in(optimizer, "prepare_grads", leaves_out, takes="")
    return prepare


def before_gradient_reduction(model: Sequence["DistributedDataParallel"], call: Callable[[], None]) -> None:
    """Call a function in each step between the last backward pass and the sum over replicas.

    With ``ddp.overlap_grad_reduce`` some of the sums have begun.  The configuration's finalize_model_grads_func would
    be saved with every checkpoint.

    Until: Bridge has a callback there (not in 0.6.2).
    """

    @wraps(model[0].finish_grad_sync)
    def finish(*arguments: Any, **named: Any) -> None:
        call()
        original(*arguments, **named)

    original = replace_in(model[0], "finish_grad_sync", finish, takes="force_all_reduce")


@contextmanager
def merge_gate_and_up_in_place() -> Iterator[None]:
    """Keep Core from copying what it has loaded in place, while the context is entered.

    Core reads the gate and the up projection into the two halves of their common weight, then joins copies of them,
    for all layers before the first is used: two fifths of a model, held twice.

    Until: Core joins parts that already lie together without a copy (not in 0.19.2).
    """

    def merge(loaded: Any, factories: Any, key: tuple[str, ...] = ()) -> Any:
        for factory in nested_values(factories):
            if isinstance(factory, ShardedTensorFactory):
                factory.merge_fn = partial(_joined, factory.merge_fn)
        return original(loaded, factories, key)

    original = replace(serialization, "apply_factory_merges", merge, takes="x1, x2, key")
    try:
        yield
    finally:
        setattr(serialization, "apply_factory_merges", original)  # noqa: B010  (it is not exported)


def _joined(join: Callable[[Any], Any], parts: Any) -> Any:
    """Return parts that lie one after the other as the tensor that they are; others as Megatron joins them."""
    if not isinstance(parts, list) or not all(isinstance(part, Tensor) and part.is_contiguous() for part in parts):
        return join(parts)
    storage, offset = parts[0].untyped_storage(), parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage.data_ptr() or part.storage_offset() != offset:
            return join(parts)
        offset += part.numel()
    # [sum of the parts' rows, ...], a view of the storage that all of them share.
    return parts[0].as_strided((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].stride())


def keep_random_states_on_cpu() -> None:
    """Let Core's random states of CUDA be those of the CPU.

    Until: no CPU backend is needed.
    """
    replace(tp_random, "_get_cuda_rng_state", get_random_state, takes="device, clone, graph_safe")
    replace(tp_random, "_set_cuda_rng_state", set_random_state, takes="new_state, device, graph_safe")


def end_save_helpers_with_rank(worker: Callable[..., None]) -> None:
    """Let the two processes that Core starts for saves end with the rank that has started them.

    One writes asynchronous saves, the other holds the queue of their results; both would wait for ever.

    Args:
        worker: What the first runs; given the parameters of the original.

    Until: Core's helpers look whether their rank is alive (not in 0.19.2).
    """

    def write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            with signals_blocked(), without_main_module():
                manager.start(initializer=exit_only_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    replace(filesystem_async, "get_write_results_queue", write_results_queue, takes="mp_mode")
    parameters = "rank, queue, preload_q, comp_q, log_level, cpu_priority, io_priority"
    replace(PersistentAsyncCaller, "async_loop", staticmethod(worker), takes=parameters)


def silence_signal_handlers(sig_utils: ModuleType) -> None:
    """Let Bridge's signal handlers print nothing: printing fails where the signal has interrupted printing.

    The watchdog says what a signal does.

    Args:
        sig_utils: ``megatron.bridge.training.utils.sig_utils``, which is imported late.

    Until: Bridge's handler only sets its flag (not in 0.6.2).
    """
    replace(sig_utils, "print_rank_0", lambda message: None, takes="message")


def start_writer_alone() -> None:
    """Start the process that writes saves without the program that started this one, and wait for it while it lives.

    A new process would run that program's file again, and a script may do anything there.  A save that waits until
    its writer has taken over the tensors goes on if the writer ends before; the next look at it stops the run.

    Until: Core's wait looks whether the writer is alive (not in 0.19.2).
    """

    def join_while_alive(join: Callable[[], None], process: BaseProcess) -> None:
        waiting = threading.Thread(target=join, daemon=True)
        waiting.start()
        while waiting.is_alive() and process.is_alive():
            waiting.join(0.2)

    def start(cls: type[PersistentAsyncCaller], *arguments: Any, **named: Any) -> Any:
        with without_main_module():
            process, queue = original(*arguments, **named), cls._persistent_preload_q
        if "join" not in vars(queue):
            queue.join = partial(join_while_alive, queue.join, process)
        return process

    takes = "rank, mp_mode, cpu_priority, io_priority"
    original = replace(PersistentAsyncCaller, "_get_process", classmethod(start), takes=takes)


def copy_tensors_before_save() -> None:
    """Copy the tensors of a save before training goes on; Core copies only those that are on a GPU.

    Until: no CPU backend is needed.
    """
    takes = "write_buckets, non_blocking"
    replace(FileSystemWriterAsync, "preload_tensors", staticmethod(_preload_copies), takes=takes)


def _preload_copies(*arguments: Any, **named: Any) -> Any:
    """Return Core's buckets with a copy of every tensor; at module level, since the save's process unpickles it."""
    original = REPLACED[f"{FileSystemWriterAsync.__module__}.FileSystemWriterAsync.preload_tensors"]
    return [
        (file, key, (content, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (content, tensors) in original(*arguments, **named)
    ]
