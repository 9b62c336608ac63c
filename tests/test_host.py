"""What only a machine with a GPU or Transformer Engine does, as far as one without can show it."""

import copy
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime
from tests import small

init_runtime()

from megatron.bridge.peft.lora_layers import LoRALinear  # noqa: E402

from nemodiff_train.attention.kernels import select_kernel  # noqa: E402
from nemodiff_train.cli import machine  # noqa: E402
from nemodiff_train.model import adapters, loading, provider, recompute  # noqa: E402
from nemodiff_train.model.norm import RMSNorm  # noqa: E402
from nemodiff_train.runtime import memory, start  # noqa: E402
from nemodiff_train.runtime.packages import without_stand_ins  # noqa: E402
from nemodiff_train.runtime.start import Host  # noqa: E402
from nemodiff_train.training import batch, run  # noqa: E402
from nemodiff_train.training.callbacks.fused_optimizer import fuse  # noqa: E402
from nemodiff_train.validation import kernels  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Any:
    return small.built(small.QWEN3)


def test_weights_are_loaded_whoever_has_saved_them(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with an extra state, as Transformer Engine's, neither save it nor miss it; a weight is missed."""
    without = {name: value for name, value in model.state_dict().items() if value is not None}
    monkeypatch.setattr(RMSNorm, "get_extra_state", lambda self: torch.zeros(1), raising=False)
    monkeypatch.setattr(RMSNorm, "set_extra_state", lambda self, state: None, raising=False)
    assert any(name.endswith("_extra_state") for name in model.state_dict())
    assert not any(name.endswith("_extra_state") for name in model.sharded_state_dict())
    model.load_state_dict(without)
    weight = next(iter(without))
    with pytest.raises(RuntimeError, match=weight.replace(".", r"\.")):
        model.load_state_dict({name: value for name, value in without.items() if name != weight})


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("apex", [True, False])
def test_fusions_are_those_of_this_machine(
    model: Any, engine: bool, apex: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = object() if apex else None
    monkeypatch.setattr(provider, "HAVE_TE", engine)
    monkeypatch.setattr(provider.importlib.util, "find_spec", lambda name: found)
    settings = copy.copy(model.config)
    settings.gradient_accumulation_fusion, settings.bias_activation_fusion = not apex, False  # of another machine
    provider.fit_to_host(settings)
    assert settings.gradient_accumulation_fusion is apex  # Core's output layer asks for Apex's extension alone
    assert settings.bias_activation_fusion is True  # SwiGLU keeps its input alone, on every machine
    assert settings.bias_dropout_fusion is engine and settings.apply_rope_fusion is engine
    settings.rope_parameters = {key: value for key, value in small.YARN.items() if not key.startswith("mscale")}
    provider.fit_to_host(settings)
    assert settings.apply_rope_fusion is False  # the kernel knows no factor of sine and cosine
    loading.set_parallelism(settings)
    assert settings.gradient_accumulation_fusion is False  # decoding has no buffers of gradients


def test_a_checkpoint_brings_no_settings_of_its_machine(model: Any) -> None:
    settings = copy.copy(model.config)
    settings.fp8, settings.recompute_granularity, settings.tp_comm_overlap = "hybrid", "full", True
    settings.use_cpu_initialization = True
    provider.reset_parallelism(settings)
    assert settings.fp8 is None and settings.recompute_granularity is None
    assert settings.tp_comm_overlap is False and settings.use_cpu_initialization is False


def test_fp8_is_off_in_decoding_and_excludes_it_in_the_loop(model: Any) -> None:
    settings = copy.copy(model.config)
    settings.fp8, settings.fp8_param = "hybrid", True
    loading.set_parallelism(settings)
    assert not settings.fp8 and not settings.fp8_param
    config = SimpleNamespace(
        mixed_precision="bf16_with_fp8_current_scaling_mixed", evaluation=SimpleNamespace(interval=5)
    )
    lines = list(kernels._precision_problems(config, cuda=False))  # type: ignore[arg-type]
    assert any("evaluation.interval=0" in line for line in lines)


def test_stages_exchange_what_they_compute_in(model: Any) -> None:
    settings = copy.copy(model.config)
    settings.pipeline_dtype, settings.params_dtype = None, torch.bfloat16
    settings.finalize()
    assert settings.pipeline_dtype is torch.bfloat16


def test_ranks_take_their_gpu_before_they_join(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    joined = False

    def join(backend: str, **options: Any) -> None:
        nonlocal joined
        joined = True
        calls.append((backend, options["timeout"].total_seconds() > 3600))

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(loading, "init_runtime", lambda: Host(cuda=True, missing_packages=()))
    monkeypatch.setattr(loading, "world_size", lambda: 2)
    monkeypatch.setattr(loading.torch.cuda, "set_device", lambda device: calls.append(("device", device)))
    monkeypatch.setattr(loading.dist, "is_initialized", lambda: joined)
    monkeypatch.setattr(loading.dist, "init_process_group", join)
    monkeypatch.setattr(loading, "model_parallel_cuda_manual_seed", lambda seed: None)
    states = loading.parallel_state
    monkeypatch.setattr(states, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(states, "initialize_model_parallel", lambda *sizes: calls.append(("groups", sizes)))
    loading.start_model_parallel(2)
    assert calls == [("device", 1), ("nccl", True), ("groups", (2, 1))]


def test_stacks_are_written_before_collectives_give_up() -> None:
    resilience = SimpleNamespace(setup_timeout=3600.0, hang_timeout=1800.0)
    config: Any = SimpleNamespace(
        train=SimpleNamespace(),
        checkpoint=SimpleNamespace(),
        scheduler=SimpleNamespace(use_checkpoint_opt_param_scheduler=False),
        rerun_state_machine=SimpleNamespace(),
        ddp=SimpleNamespace(),
        dist=SimpleNamespace(distributed_timeout_minutes=10),
        resilience=resilience,
    )
    run._protect(config)
    assert config.dist.distributed_timeout_minutes * 60 > max(vars(resilience).values())


def test_short_samples_take_the_kernel_that_is_compiled_for_tiles() -> None:
    assert select_kernel(torch.device("cuda"), causal=False).options["FORCE_USE_FLEX_ATTENTION"] is True


def test_adapters_leave_no_trace_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bridge makes Transformer Engine's layers return two tensors while an adapter needs both."""
    adapted = small.built(small.QWEN3)

    def loaded(models: list[Any], *unused: Any) -> None:
        for module in models[0].modules():
            if isinstance(module, LoRALinear):
                module.to_wrap.return_layernorm_output = True

    monkeypatch.setattr(adapters, "load_adapters", loaded)
    lora = {"_target_": "megatron.bridge.peft.lora.LoRA", "target_modules": ["linear_qkv"], "dim": 4, "alpha": 8}
    checkpoint: Any = SimpleNamespace(run_config={"peft": lora}, iteration="")
    adapters.merge_adapters([adapted], checkpoint)
    merged = [m for m in adapted.modules() if hasattr(m, "return_layernorm_output")]
    assert merged and not any(m.return_layernorm_output for m in merged)


def test_recomputation_reads_a_layer_that_returns_its_norm_too(model: Any) -> None:
    kept = object.__new__(recompute._RecomputedInput)
    kept.config, kept.from_output, kept.kept = model.config, True, None
    out = torch.ones(2, requires_grad=True)
    kept._after_source(nn.Identity(), (), ((out, torch.zeros(2)), None))  # type: ignore[arg-type]
    assert kept.kept is not None and torch.equal(kept.kept, out)


def test_a_gpu_updates_all_parameters_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's Adam goes on as a fused one, whatever a CPU's checkpoint says, and counts its steps on the device."""

    def updated(fused_after: int, steps: int = 6) -> tuple[torch.optim.AdamW, list[torch.Tensor]]:
        weights = [nn.Parameter(torch.ones(3, 5) * (n + 1)) for n in range(2)]
        adam = torch.optim.AdamW(weights, lr=0.01)
        for step in range(steps):
            if step == fused_after:
                with monkeypatch.context() as patch:
                    patch.setattr(torch.Tensor, "is_cuda", True)
                    fuse(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=adam)]))  # type: ignore[arg-type]
            for weight in weights:
                weight.grad = (weight.detach() * (step + 1)).sin()
            adam.step()
        return adam, weights

    (adam, mine), (_, expected) = updated(3), updated(99)
    assert adam.param_groups[0]["fused"] is True and adam.param_groups[0]["foreach"] is False
    assert [int(adam.state[weight]["step"]) for weight in mine] == [6, 6]
    torch.testing.assert_close(mine, expected)
    fuse(SimpleNamespace(optimizer=adam))  # type: ignore[arg-type]  # on a CPU
    assert adam.param_groups[0]["fused"] is False
    fuse(SimpleNamespace(optimizer=torch.optim.SGD(mine)))  # type: ignore[arg-type]


def test_a_norm_is_one_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = RMSNorm(8), torch.ones(2, 8, requires_grad=True)
    assert "_RMSNorm" in norm(x).grad_fn.name()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert "_RMSNorm" not in norm(x).grad_fn.name()


def test_indices_are_copied_from_pinned_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From other memory the copy would wait for the device."""
    copied: list[torch.Tensor] = []
    monkeypatch.setattr(batch, "copied_to", lambda device, values: copied.append(values) or values)
    made = small.batch(model, 64)
    assert len(copied) == 1 and torch.equal(copied[0], made["loss_indices"])

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(memory, "init_runtime", lambda: Host(cuda=True, missing_packages=()))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self if non_blocking else None)
    for device, times in (("cpu", 0), ("cuda", 1)):
        assert memory.copied_to(torch.device(device), copied[0]) is copied[0] and len(pinned) == times


def test_whole_layers_are_not_computed_twice(model: Any) -> None:
    settings = copy.copy(model.config)
    settings.recompute_granularity, settings.recompute_method = "full", "uniform"
    kept = object.__new__(recompute._RecomputedInput)
    kept.config, kept.from_output, kept.kept = settings, True, None
    kept._after_source(nn.Identity(), (), (torch.ones(2, requires_grad=True), None))  # type: ignore[arg-type]
    assert kept.kept is None


def test_what_cuda_and_transformer_engine_read_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core asserts values of variables for an attention that is not used, which a site may have set."""
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    start._prepare_cuda()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert not {"NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"} & set(os.environ)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    start._prepare_cuda()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


def test_a_transformer_engine_of_another_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    with without_stand_ins():
        start._refuse_broken_engine()  # there is none
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(
            UserError, match=r"OSError: undefined symbol: _ZN3c10\); install the one that was built for"
        ):
            start._refuse_broken_engine()


def test_a_gpu_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NEMODIFF_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match="CUDA does not work"):
        start._refuse_broken_cuda()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    start._refuse_broken_cuda()  # the user hides it
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("NEMODIFF_CPU", "1")
    start._refuse_broken_cuda()


def problems_on_a_gpu(config: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what a Hopper refuses."""
    monkeypatch.setattr(kernels, "init_runtime", lambda: Host(cuda=True, missing_packages=()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return "\n".join(kernels.problems(config))


def test_a_missing_compiler_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes no other than these two by itself, and wants Python's headers."""
    (tmp_path / "cc").symlink_to("/bin/true")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernels.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    config = machine._example()
    found = problems_on_a_gpu(config, monkeypatch)
    assert "C compiler" in found and f"'{tmp_path}/Python.h'" in found
    config.objective.stage = "ar"  # compiles no attention
    assert not problems_on_a_gpu(config, monkeypatch)
    (tmp_path / "gcc").symlink_to("/bin/true")
    (tmp_path / "Python.h").touch()
    config.objective.stage = "joint"
    assert not problems_on_a_gpu(config, monkeypatch)


def test_tiles_shorter_than_the_steps_of_a_kernel_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention would end the first step with a message of the compiler's."""
    config = machine._example()
    config.mixed_precision, config.model.kv_channels, config.model.attention_tile = "bf16_mixed", 128, 64
    assert "multiple of 128" in problems_on_a_gpu(config, monkeypatch)
    for tile, options, width, precision in (
        (256, {}, 128, "bf16_mixed"),
        (64, {"BLOCK_M": 64, "BLOCK_N": 64}, 128, "bf16_mixed"),
        (64, {}, 256, "bf16_mixed"),  # kernels of wide heads have shorter steps, as those in fp32
        (64, {}, 128, "fp32"),
    ):
        config.model.attention_tile, config.model.attention_options = tile, options
        config.model.kv_channels, config.mixed_precision = width, precision
        assert "multiple of 128" not in problems_on_a_gpu(config, monkeypatch)


def test_what_stands_in_for_transformer_engine_has_no_optimizer() -> None:
    """Core and Bridge then take Apex's operations or their own, not a placeholder that cannot be called."""
    if "transformer_engine" not in init_runtime().missing_packages:
        pytest.skip("Transformer Engine is installed")
    importlib.import_module("transformer_engine.pytorch")
    with pytest.raises(ModuleNotFoundError, match=r"transformer_engine\.pytorch\.optimizers"):
        importlib.import_module("transformer_engine.pytorch.optimizers")
