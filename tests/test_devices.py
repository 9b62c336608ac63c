"""Tensors of the host and of the device never mix, and decoding waits for the device a stated number of times."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import small
from tests.two_devices import Mixed, TwoDevices, mark, mark_model, two_devices

MASK = 1
PROMPTS = [[20, 21, 22, 23], [50, 51], [30, 33, 36, 39, 41, 44, 47]]

WAITS = {"ar": 2, "diffusion": 2.5, "linear": 1.6, "quadratic": 2.1, "oracle": 2.3}
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
