"""Compile the kernels of FlexAttention for a GPU that is not there, and read what they take of it.

Forward and backward are traced on the CPU, and their graphs moved to tensors without values on a GPU whose properties
torch is told.  Inductor lowers them as it would there, and Triton compiles the kernels to machine code.

Use it in a process of its own: torch believes in that GPU afterwards.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.async_compile as async_compile
import torch.nn.attention.flex_attention as flex
import triton
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemodiff_train.attention import kernels
from nemodiff_train.attention.plan import AttentionPlan

GPU = torch.device("cuda", 0)
SHARED_MEMORY = {90: 232_448, 100: 232_448}
"""Bytes of shared memory that a block may take, by compute capability times ten."""
_NAMES = {90: "NVIDIA H100 80GB HBM3", 100: "NVIDIA B200"}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel."""

    name: str
    """``forward`` or ``backward``."""
    shared: int
    """Bytes of shared memory per block."""
    registers: int
    """Registers per thread."""
    stack: int
    """Bytes of stack per thread, to which registers are spilled."""


def compiled(plan: AttentionPlan, rows: int, heads: int, kv_heads: int, width: int, capability: int) -> list[Kernel]:
    """Compile attention over a plan, forward and backward, in bf16.

    Args:
        plan: Who attends to whom, on the CPU.
        rows: Samples of the micro-batch.
        heads: Query heads of a rank.
        kv_heads: Key heads of a rank.
        width: Channels of a head.
        capability: Compute capability of the GPU times ten.
    """
    _pretend(capability)
    graphs = _graphs(plan, rows, heads, kv_heads, width)
    return [
        kernel
        for direction, (graph, inputs) in graphs.items()
        for name, source in _lower(graph, inputs, direction == "backward")
        if name.startswith("triton_tem")  # from FlexAttention's template; others are sums beside it
        for kernel in [_compile(direction, name, source, capability)]
    ]


def compilations(micro_batches: Sequence[tuple[AttentionPlan, bool]], rows: int) -> int:
    """Return how often a run compiles attention; nothing is lowered, and plain torch computes it.

    Args:
        micro_batches: Plans of a run, and whether each is trained on, or validated.
        rows: Samples of a micro-batch.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compile_, validate = torch.compile, flex._validate_device
    setattr(torch, "compile", partial(compile_, backend=counter))  # noqa: B010  (what training calls)
    flex._validate_device = _returning(None)  # there is no backward pass on a CPU
    kernels._flex.cache_clear()
    try:
        attend = kernels._flex(True)
        for plan, trained in micro_batches:
            kernel = kernels.select_kernel(GPU, plan.causal)
            query, key, value = (
                torch.zeros(rows, heads, len(positions.view), 16, requires_grad=True)
                for heads, positions in ((4, plan.queries), (2, plan.keys), (2, plan.keys))
            )
            options: Any = dict(kernel.options)
            with torch.set_grad_enabled(trained):
                mask = plan.block_mask(kernel.tile)
                attend(query, key, value, block_mask=mask, scale=None, enable_gqa=True, kernel_options=options)
    finally:
        setattr(torch, "compile", compile_)  # noqa: B010
        flex._validate_device = validate
        kernels._flex.cache_clear()
    return int(counter.frame_count)


def _graphs(
    plan: AttentionPlan, rows: int, heads: int, kv_heads: int, width: int
) -> dict[str, tuple[Any, list[Any]]]:
    """Trace attention as training calls it; return the graph and the inputs of each direction."""
    graphs: dict[str, tuple[Any, list[Any]]] = {}

    def keep(direction: str) -> Callable[..., Any]:
        def compiler(graph: Any, inputs: list[Any]) -> Any:
            graphs[direction] = graph, inputs
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    kernel = kernels.select_kernel(GPU, plan.causal)
    attend = torch.compile(flex.flex_attention, dynamic=False, fullgraph=True, backend=backend)
    # Megatron's layout is [positions, batch, heads, head_dim].
    shapes = ((len(plan.queries.view), heads), (len(plan.keys.view), kv_heads), (len(plan.keys.view), kv_heads))
    states = [torch.randn(n, rows, h, width, dtype=torch.bfloat16, requires_grad=True) for n, h in shapes]
    query, key, value = (state.permute(1, 2, 0, 3) for state in states)
    mask = plan.block_mask(kernel.tile)
    options: Any = dict(kernel.options)
    out = attend(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=options)
    out.permute(2, 0, 1, 3).flatten(2).sum().backward()
    return graphs


def _lower(graph: torch.fx.GraphModule, inputs: list[Any], is_backward: bool) -> Iterator[tuple[str, str]]:
    """Lower a graph for the GPU; yield the name and the Triton source of every kernel."""
    sources: list[tuple[str, str]] = []

    def capture(self: object, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
        sources.append((kernel_name, source_code))
        return SimpleNamespace(run=lambda *arguments, **named: None)

    compiler: Any = async_compile.AsyncCompile
    compiler.triton = capture
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for part in graph.modules():
        if isinstance(part, torch.fx.GraphModule):
            _move(part, mode)
    moved = [_on_gpu(value, mode) for value in inputs]
    with tracing(TracingContext(mode)), V.set_fake_mode(mode):
        compile_fx_inner(graph, moved, is_backward=is_backward)
    yield from sources


def _move(graph: torch.fx.GraphModule, mode: FakeTensorMode) -> None:
    """Put everything that a graph makes on the GPU."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") == torch.device("cpu"):
            node.kwargs = {**node.kwargs, "device": GPU}
        value = node.meta.get("val")
        if isinstance(value, tuple | list):
            node.meta["val"] = type(value)(_on_gpu(part, mode) for part in value)
        elif isinstance(value, Tensor):
            node.meta["val"] = _on_gpu(value, mode)
        node.meta.pop("tensor_meta", None)
    graph.recompile()


def _on_gpu(value: Any, mode: FakeTensorMode) -> Any:
    """Return a tensor without values on the GPU, of the layout of another one; what is not a tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=GPU)


def _compile(direction: str, name: str, source: str, capability: int) -> Kernel:
    """Compile one kernel, and read its resources from the machine code."""
    target = GPUTarget("cuda", capability, 32)
    tuner = getattr(PyCodeCache.load(source), name)
    (config, *_) = tuner.configs
    meta = tuner._create_compile_meta(config)
    content = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    built = triton.compile(content, target=target, options=tuner._create_compile_options(config, meta))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    used = dict(re.findall(r"(REG|STACK):(\d+)", printed.stdout))
    return Kernel(direction, built.metadata.shared, int(used["REG"]), int(used["STACK"]))


def _pretend(capability: int) -> None:
    """Let torch, Inductor and Triton see a GPU."""
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        name=_NAMES[capability], major=major, minor=minor, multi_processor_count=132, total_memory=80 << 30,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        gcnArchName="", shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_MEMORY[capability],
        shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, is_integrated=False,
        is_multi_gpu_board=False,
    )  # fmt: skip
    answers: dict[str, object] = {
        "is_available": False,  # tensors without values would start CUDA
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (major, minor),
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "is_initialized": True,
        "synchronize": None,
        "_lazy_init": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _returning(answer))
    interface: Any = device_interface.CudaInterface
    for name, answer in {
        "is_available": True, "get_compute_capability": capability, "get_raw_stream": 0, "is_bf16_supported": True,
        "is_triton_capable": True, "raise_if_triton_unavailable": None, "get_device_properties": properties,
    }.items():  # fmt: skip
        setattr(interface, name, staticmethod(_returning(answer)))
    interface.Worker.get_device_properties = staticmethod(_returning(properties))
    interface.Worker.current_device = staticmethod(_returning(0))
    flex._validate_device = _returning(None)
    triton_helpers.set_driver_to_gpu = _returning(None)
    triton.runtime.driver.set_active(_Driver(capability))
    inductor_config.compile_threads, inductor_config.fx_graph_cache = 1, False
    functorch_config.enable_autograd_cache = False
    functorch_config.force_non_lazy_backward_lowering = True


def _returning(answer: object) -> Callable[..., Any]:
    return lambda *arguments, **named: answer


class _Driver:
    """Triton's driver of a GPU that nothing is run on."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        limits = {
            "max_shared_mem": SHARED_MEMORY[capability], "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": 32,
        }  # fmt: skip
        self.utils = SimpleNamespace(get_device_properties=_returning(limits))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return GPU

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_benchmarker(self) -> None:
        return None

    def set_current_device(self, device: object) -> None: ...
