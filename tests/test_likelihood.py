"""AR perplexity and the diffusion bound on a small random model."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import small

MASK = 1
TEXT = torch.randint(20, 220, (29,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.model.bridges import auto_bridge
    from nemodiff_train.model.loading import set_parallelism, start_model_parallel
    from nemodiff_train.model.pretrained import config_from, model_from, stored_settings

    directory: Path = tmp_path_factory.mktemp("likelihood") / "qwen3"
    small.qwen3(directory)
    provider = model_from(str(directory))
    provider.mask_token_id, provider.noisy_views, provider.block_size = MASK, 1, 2
    start_model_parallel(1)
    set_parallelism(provider)
    provider.finalize()
    models = provider.provide_distributed_model(wrap_with_ddp=False)
    auto_bridge(config_from(stored_settings(str(directory)))).load_hf_weights(models, hf_path=str(directory))
    return models[0].eval(), directory


@pytest.fixture(params=[False, True], ids=["no shift", "shift"])
def model(opened: tuple[Any, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    opened[0].config.shift = request.param
    yield opened[0]
    opened[0].config.shift = False


@pytest.mark.parametrize("trained_views", [0, 1, 2])
def test_ar_loss_is_transformers(
    opened: tuple[Any, Path], trained_views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 16 tokens; each predicts its own next tokens, the one after its last included."""
    monkeypatch.setattr(opened[0].config, "noisy_views", trained_views)
    from transformers import AutoModelForCausalLM

    from nemodiff_train.evaluation.likelihood import likelihood

    reference = AutoModelForCausalLM.from_pretrained(opened[1])
    losses = []
    for start in range(0, len(TEXT), 16):
        part = torch.tensor(TEXT[start : start + 17])
        with torch.no_grad():
            logits = reference(part[None, :-1]).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, part[1:], reduction="none").tolist()
    found = likelihood([opened[0]], [TEXT], length=16, draws=1)
    assert found.ar_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.tokens == len(TEXT) and math.isnan(found.diffusion_error)


def bound(model: Any, text: list[int]) -> float:
    """The bound for blocks of two, in closed form: both hidden, or either one, with weight a half each."""
    total = 0.0
    for start in range(0, len(text), 2):
        for hidden in ((0, 1), (0,), (1,)):
            noisy = [MASK if position - start in hidden else token for position, token in enumerate(text)]
            tokens = torch.tensor([noisy + text])
            with torch.no_grad():
                logits = model(tokens, torch.arange(len(text)).repeat(2)[None], attention_mask=None)[0]
            log_p = logits.float().log_softmax(-1)
            for position in hidden:
                source = start + position - 1 if model.config.shift else start + position
                if model.config.shift and not position:
                    continue
                total -= 0.5 * float(log_p[source, text[start + position]])
        if model.config.shift and start:
            total -= float(log_p[len(text) + start - 1, text[start]])
    return total


def test_the_diffusion_bound_is_the_exact_expectation(model: Any) -> None:
    """Within five standard errors of 400 draws; levels begin at 0.001, which shifts the mean far less."""
    from nemodiff_train.evaluation.likelihood import likelihood

    text = TEXT[:16]
    found = likelihood([model], [text], length=16, draws=400, batch_size=100)
    assert abs(found.diffusion_loss - bound(model, text) / 16) < 5 * found.diffusion_error + 1e-4
    assert found.diffusion_error < 0.4


def test_no_more_logits_at_once_than_in_training(opened: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from nemodiff_train.evaluation.likelihood import likelihood
    from nemodiff_train.model import head

    whole = likelihood([opened[0]], [TEXT], length=16, draws=1)
    monkeypatch.setitem(head.LOGIT_CHUNK, "cpu", 5)
    chunks: list[int] = []
    plain = head._logits
    monkeypatch.setattr(
        head, "_logits", lambda states, weight: (chunks.append(len(states)), plain(states, weight))[1]
    )
    found = likelihood([opened[0]], [TEXT], length=16, draws=1)
    assert chunks == [5] * 12 + [4]  # of two samples, both halves
    assert found.diffusion_loss == pytest.approx(whole.diffusion_loss, rel=1e-5)


def test_refusals(opened: tuple[Any, Path]) -> None:
    from nemodiff_train.errors import UserError
    from nemodiff_train.evaluation.likelihood import likelihood

    for length, draws, texts, words in (
        (15, 1, [TEXT], "15"),
        (16, 0, [TEXT], "draws"),
        (16, 10**12, [TEXT], "draws"),
        (16, 1, [[5]], "no text"),
    ):
        with pytest.raises(UserError, match=words):
            likelihood([opened[0]], texts, length=length, draws=draws)
