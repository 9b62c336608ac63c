"""Decoding on a small random model: identity, counts, cache, exactness."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import small

PROMPTS = [[20, 21, 22, 23], [50, 51], [30, 33, 36, 39, 41, 44, 47], [100]]
MASK = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from nemodiff_train.host import prepare

    prepare()
    from nemodiff_train.decoding.loading import as_one_stage, start_model_parallel
    from nemodiff_train.model.pretrained import auto_bridge, hf_config, model_from

    directory: Path = tmp_path_factory.mktemp("decoding") / "qwen3"
    small.qwen3(directory)
    provider = model_from(str(directory))
    provider.mask_token_id = MASK
    start_model_parallel(1)
    as_one_stage(provider)
    provider.finalize()
    models = provider.provide_distributed_model(wrap_with_ddp=False)
    auto_bridge(hf_config(str(directory))).load_hf_weights(models, hf_path=str(directory))
    return models[0].eval()


def run(model: Any, prompts: list[list[int]], mode: str, **settings: Any) -> Any:
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.generation import DecodingSettings

    return decode(model, prompts, mode, DecodingSettings(**{"max_new_tokens": 30, "block_size": 8, **settings}))


def tokens(model: Any, prompts: list[list[int]], mode: str, **settings: Any) -> list[list[int]]:
    return [generation.tokens for generation in run(model, prompts, mode, **settings)[0]]


@pytest.mark.parametrize("block_size", [2, 5, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_linear_self_speculation_equals_ar(model: Any, seed: int, block_size: int) -> None:
    """On random weights, ragged prompts, and with a stop token met at any place of a draft."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (5,), generator=generator).tolist()
    prompts = [torch.randint(20, 220, (length,), generator=generator).tolist() for length in lengths]
    free = tokens(model, prompts, "ar")
    assert tokens(model, prompts, "linear", block_size=block_size) == free
    stop = frozenset({Counter(token for row in free for token in row).most_common(1)[0][0]})
    ended = tokens(model, prompts, "ar", stop_token_ids=stop)
    assert tokens(model, prompts, "linear", block_size=block_size, stop_token_ids=stop) == ended
    assert any(row[-1] in stop and len(row) < 30 for row in ended)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear"])
def test_rows_of_a_batch_do_not_see_each_other(model: Any, mode: str) -> None:
    together = tokens(model, PROMPTS, mode, threshold=0.02)
    assert together == [tokens(model, [prompt], mode, threshold=0.02)[0] for prompt in PROMPTS]
    assert all(len(row) == 30 and MASK not in row for row in together)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear"])
def test_forwards_are_the_calls_of_the_model(model: Any, mode: str) -> None:
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(1))
    generations, session = run(model, [PROMPTS[0]], mode, threshold=0.02)
    hook.remove()
    assert session.calls(0) == len(seen)
    kinds = set(session.forwards[0])
    assert kinds == {
        "prefill",
        *{"ar": ["decode"], "diffusion": ["denoise", "commit"]}.get(mode, ["draft", "verify"]),
    }
    if mode == "linear":
        assert sum(generations[0].accepted) + 1 == len(generations[0].tokens)
        assert len(generations[0].accepted) == session.forwards[0]["draft"]


def test_the_cache_after_drafts_is_a_fresh_prefill(model: Any) -> None:
    """What a draft wrote and a verification did not accept leaves no trace."""
    from nemodiff_train.decoding.session import Session

    rows = torch.arange(2)
    used, fresh = Session(model, 2, 64, MASK), Session(model, 2, 64, MASK)
    texts = [list(prompt) for prompt in PROMPTS[:2]]
    used.prefill(texts)
    for kept in (3, 1, 5):
        draft = torch.randint(20, 220, (2, 8), generator=torch.Generator().manual_seed(kept))
        used.forward(draft, rows, "draft", causal=False)
        used.forward(draft, rows, "verify", causal=True)
        used.commit(rows, kept)
        texts = [text + row[:kept].tolist() for text, row in zip(texts, draft, strict=True)]
    fresh.prefill(texts)
    following = torch.tensor([[60, 61], [70, 71]])
    for causal in (True, False):
        torch.testing.assert_close(
            used.forward(following, rows, "verify", causal=causal),
            fresh.forward(following, rows, "verify", causal=causal),
            rtol=1e-4,
            atol=1e-5,
        )


def test_block_diffusion_is_the_released_algorithm(model: Any) -> None:
    """Stated again for one row, as the released models' ``generate``; every forward starts from no cache."""
    prompt, block, threshold = PROMPTS[2][:7], 8, 0.02
    text = list(prompt)
    while len(text) < len(prompt) + 24:
        seed = int(logits(model, text, 0)[-1].argmax())
        filled = [seed] + [MASK] * (block - 1)
        while MASK in filled:
            probability, choice = logits(model, text + filled, block)[-block:].softmax(-1).max(-1)
            hidden = [place for place in range(block) if filled[place] == MASK]
            best = max(hidden, key=lambda place: float(probability[place]))
            for place in hidden:
                if place == best or probability[place] >= threshold:
                    filled[place] = int(choice[place])
        text += filled
    found = tokens(model, [prompt], "diffusion", max_new_tokens=24, threshold=threshold)
    assert found == [text[len(prompt) :]]


@pytest.fixture(params=[("causal", False), ("causal", True), ("block_causal", False), ("block_causal", True)])
def trained(model: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The model as training with blocks of 8 would run it, for each kind of clean half, with and without shift."""
    config = model.config
    config.clean_half, config.shift = request.param
    config.noisy_views, config.block_size = 1, 8
    yield model
    config.noisy_views, config.clean_half, config.shift = 0, "causal", False


def training_logits(model: Any, clean: list[int], noisy: list[int]) -> torch.Tensor:
    """[L, vocab] what a training forward over [noisy | clean] says of each noisy place, -inf for the mask token."""
    both = torch.tensor([noisy + clean])
    with torch.no_grad():
        found = model(both, torch.arange(len(clean)).repeat(2)[None], attention_mask=None)[0, : len(clean)]
    found = found.float()
    found[:, MASK] = -torch.inf
    return found.roll(1, 0) if model.config.shift else found


def test_a_block_is_decoded_as_it_was_trained(trained: Any) -> None:
    """One denoising forward behind a cache gives the logits of the noisy half."""
    from nemodiff_train.decoding.session import Session

    text = torch.randint(20, 220, (32,), generator=torch.Generator().manual_seed(5)).tolist()
    noisy = text[:24] + [token if place in (0, 3) else MASK for place, token in enumerate(text[24:])]
    session, row = Session(trained, 1, 32, MASK), torch.arange(1)
    session.prefill([text[:24]], 8 if trained.config.clean_half == "block_causal" else None)
    found = session.forward(torch.tensor([noisy[24:]]), row, "denoise", causal=False)[0]
    torch.testing.assert_close(found[1:], training_logits(trained, text, noisy)[25:], rtol=1e-4, atol=1e-4)


def test_block_diffusion_with_a_block_causal_clean_half(trained: Any) -> None:
    """Stated again with training forwards: blocks count from the text's start, the prompt's end is in the first."""
    from nemodiff_train.errors import UserError

    config, block, threshold = trained.config, 8, 0.02
    if config.clean_half == "causal":
        pytest.skip("its blocks start behind the prompt; stated above")
    for prompt in (PROMPTS[2], PROMPTS[0] * 4, PROMPTS[2] * 3):
        text = list(prompt)
        while len(text) < len(prompt) + 20:
            start = len(text) // block * block
            filled = text[start:] + [MASK] * (start + block - len(text))
            if config.shift and start == len(text) > 0:
                filled[0] = clean_logits(trained, text)
            while MASK in filled:
                padded = text[:start] + filled
                probability, choice = training_logits(trained, padded, padded)[start:].softmax(-1).max(-1)
                hidden = [place for place in range(block) if filled[place] == MASK]
                best = max(hidden, key=lambda place: float(probability[place]))
                for place in hidden:
                    if place == best or probability[place] >= threshold:
                        filled[place] = int(choice[place])
            text = text[:start] + filled
        found = tokens(trained, [prompt, PROMPTS[1]], "diffusion", max_new_tokens=20, threshold=threshold)
        assert found[0] == text[len(prompt) : len(prompt) + 20]
    with pytest.raises(UserError, match="use diffusion"):
        tokens(trained, PROMPTS, "linear")


def clean_logits(model: Any, text: list[int]) -> int:
    """The token that the clean half of a training forward predicts after the text."""
    both = torch.tensor([text + text])
    with torch.no_grad():
        last = model(both, torch.arange(len(text)).repeat(2)[None], attention_mask=None)[0, -1]
    last[MASK] = -torch.inf
    return int(last.argmax())


def logits(model: Any, text: list[int], block: int) -> torch.Tensor:
    """Logits of a whole text whose last ``block`` places see each other; the mask token is left out."""
    from nemodiff_train.decoding.session import Session

    session = Session(model, 1, len(text), MASK)
    row = torch.arange(1)
    if block:
        session.prefill([text[:-block]])
    return session.forward(torch.tensor([text[-block:]]), row, "denoise", causal=not block)[0]
