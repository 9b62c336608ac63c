"""Tensors of the host and of the device never mix, and decoding waits for the device a stated number of times."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import small
from tests.two_devices import Mixed, TwoDevices, is_marked, mark, mark_model, two_devices

MASK = 1
PROMPTS = [[20, 21, 22, 23], [50, 51], [30, 33, 36, 39, 41, 44, 47]]

WAITS = {"ar": 2, "diffusion": 2.5, "linear": 1.6, "quadratic": 2.1, "tree": 2.1, "oracle": 2.3}
"""Maximum number of waits per forward: for logits that are not finite, and for what a mode has to know."""


@pytest.fixture(scope="module")
def model() -> Any:
    built = small.built({}).eval()
    mark_model(built)
    return built


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoDevices]:
    with two_devices(monkeypatch) as mode:
        yield mode


def decoded(model: Any, mode: str, **settings: Any) -> Any:
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.generation import DecodingSettings

    return decode(model, PROMPTS, mode, DecodingSettings(max_new_tokens=12, block_size=4, **settings))


def test_what_cuda_refuses_is_refused(devices: TwoDevices) -> None:
    host, device = torch.ones(3), torch.ones(3).cuda()
    assert device.device.type == "cuda" and host.device.type == "cpu" and (device + 1).device.type == "cuda"
    assert (device + torch.tensor(2.0)).tolist() == [3, 3, 3] and device[host.long()].device.type == "cuda"
    for mixed in (lambda: host + device, lambda: host[device.long()], lambda: torch.cat([host, device])):
        with pytest.raises(Mixed):
            mixed()
    before = devices.waits.total()
    device[device > 0].sum().item()
    host.sum().item()
    assert devices.waits.total() == before + 2


@pytest.mark.parametrize("mode", WAITS)
def test_decoding(model: Any, devices: TwoDevices, mode: str) -> None:
    _, session = decoded(model, mode, threshold=0.02)
    calls = session.calls(0) if mode != "oracle" else sum(map(session.calls, range(len(PROMPTS)))) / len(PROMPTS)
    assert devices.waits.total() <= WAITS[mode] * calls, devices.waits


def test_seconds_of_a_forward_are_its_own(model: Any, devices: TwoDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read after the device has been waited for: else the next forward would be charged with it."""
    from nemodiff_train.decoding import session

    waits: list[int] = []
    monkeypatch.setattr(
        session, "time", SimpleNamespace(perf_counter=lambda: waits.append(devices.waits.total()) or 0.0)
    )
    decoded(model, "linear")
    assert len(waits) > 4 and all(end > start for start, end in zip(waits[::2], waits[1::2], strict=True))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.8, "top_k": 5, "top_p": 0.9}, {"policy": "leftmost"}, {"policy": "entropy"},
     {"policy": "fixed", "steps": 2}],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["diffusion", "linear", "quadratic"])
def test_sampling_and_policies(model: Any, devices: TwoDevices, mode: str, settings: dict[str, Any]) -> None:
    if "policy" not in settings or mode == "diffusion":
        decoded(model, mode, **settings)


@pytest.mark.parametrize("changes", [{"clean_attention": "block_causal"}, {"shift": True}])
def test_blocks_on_a_grid_and_the_shift(
    model: Any, devices: TwoDevices, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(model.config, name, value)
    decoded(model, "diffusion")


def test_through_megatrons_modules(model: Any, devices: TwoDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemodiff_train.decoding import pipeline

    monkeypatch.setattr(pipeline, "can_fast_forward", lambda chunk: False)
    decoded(model, "linear")


def test_filling_and_revising(model: Any, devices: TwoDevices) -> None:
    from nemodiff_train.decoding.decode import fill
    from nemodiff_train.decoding.generation import DecodingSettings

    settings = DecodingSettings(max_new_tokens=12, block_size=4)
    fill(model, [5, 6, MASK, MASK, 8, 9], settings)
    fill(model, list(range(5, 13)), settings, start=4, min_probability=0.9)


def test_likelihood(model: Any, devices: TwoDevices) -> None:
    from nemodiff_train.evaluation.likelihood import likelihood

    likelihood([model], [list(range(20, 99))], length=32, draws=2)


def test_comparison_with_transformers(model: Any, devices: TwoDevices) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from nemodiff_train.conversion.comparison import logits_differ

    other = Qwen3ForCausalLM(Qwen3Config(**small.sizes(64)))  # compared on the host
    logits_differ(other, [model], 16)


def test_verification(model: Any, devices: TwoDevices) -> None:
    """What 'convert verify' computes of a Megatron model comes back to the host, where it is compared."""
    from nemodiff_train.conversion.verify import _Side
    from nemodiff_train.model.checkpoint import Checkpoint

    side = _Side(Checkpoint(Path(), Path()), model.config, torch.float32)
    vars(side)["chunks"], tokens = [model], torch.tensor(PROMPTS[2:])
    for logits in (side.ar_logits(tokens, torch.arange(7)[None]), side.diffusion_logits(tokens, model.config)):
        assert not is_marked(logits) and logits.shape[-1] == model.config.vocab_size


@pytest.mark.parametrize("kind", ["nemotron", "uno"])
def test_a_drafter(devices: TwoDevices, kind: Any) -> None:
    """Its loss, forward and backward, and drafts that are verified."""
    from nemodiff_train.drafter.config import DrafterConfig
    from nemodiff_train.drafter.step import DraftLoss, draft_tokens
    from nemodiff_train.model.draft_adapter import PROJECTIONS, DraftLoRA
    from nemodiff_train.model.head import output_processor

    config, built = DrafterConfig(kind=kind), small.built({})
    DraftLoRA(target_modules=list(PROJECTIONS), dim=4, alpha=16)(built)
    mark_model(built)
    state, batch = built.attention_state, small.batch(built, 64)
    state.draft_kind = config.draft_kind
    batch["tokens"] = draft_tokens(batch, built.config, config.draft_kind, 0, state.shard)
    for _ in range(2):  # the first one makes the plan
        before = devices.waits.copy()
        loss = DraftLoss(batch, config, built.config, 0, state)
        total = built(batch["tokens"], batch["position_ids"], None, output_processor=output_processor(loss.losses))
        total.backward()
    assert devices.waits == before and all(map(is_marked, loss.report.values()))
    for mode in ("linear", "tree"):
        decoded(built.eval(), mode)


def test_a_training_step(model: Any, devices: TwoDevices) -> None:
    """Forward, losses and backward: no wait at all, once there is a plan of this shape."""
    micro_batch = small.batch(model, 64)
    model.train()
    small.loss(model, micro_batch).backward()
    before = devices.waits.copy()
    small.loss(model, micro_batch).backward()
    model.eval()
    assert devices.waits == before
    assert next(model.parameters()).grad is not None


def test_a_collective_of_the_host_is_refused(devices: TwoDevices) -> None:
    values = torch.ones(2)
    with pytest.raises(Mixed, match="NCCL"):
        torch.distributed.all_reduce(values)
    mark(values)


def test_kernels_of_decoding(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill is causal without a mask, grouped heads with one are queries of one head, and cuDNN is left out."""
    from nemodiff_train.attention import kernels
    from nemodiff_train.attention.cache import DecodeBatch, KeyValueCache
    from nemodiff_train.attention.kernels import attend_by_group, attend_cached

    cache, rows = KeyValueCache(1, 3, 16, "cpu"), torch.arange(3)
    prefill = DecodeBatch.consecutive(cache, rows, 5, 1)
    assert prefill.causal and prefill.mask is None
    cache.lengths += torch.tensor([2, 4, 3])
    ragged = DecodeBatch.consecutive(cache, rows, 3, 1)
    assert ragged.mask is not None and not ragged.causal
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, n, 8, generator=draw) for heads, n in ((6, 3), (2, 7), (2, 7)))
    expected = attend_cached(query, key, value, ragged.mask, False, None)
    torch.testing.assert_close(attend_by_group(query, key, value, ragged.mask, None), expected)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(kernels, "attend_by_group", lambda *states: states[3])
        assert attend_cached(query, key, value, ragged.mask, False, None) is ragged.mask
    seen: list[bool] = []
    hook = model.output_layer.register_forward_pre_hook(
        lambda *unused: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    decoded(model, "ar")
    hook.remove()
    assert seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


def test_decoding_takes_cores_layers_where_training_takes_transformer_engines(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemodiff_train.model import loading, provider

    monkeypatch.setattr(provider, "LAYERS", "transformer_engine")
    decoded, trained = copy.copy(model.config), copy.copy(model.config)
    provider.fit_to_host(trained)
    loading.set_parallelism(decoded)
    assert (trained.transformer_impl, decoded.transformer_impl) == ("transformer_engine", "local")
    monkeypatch.setattr(provider, "get_gpt_layer_with_transformer_engine_spec", lambda **options: None)
    with pytest.raises(AttributeError):  # the specification of Transformer Engine was asked for
        provider.tri_mode_layer_spec(trained)
    assert provider.tri_mode_layer_spec(decoded).layer_specs
