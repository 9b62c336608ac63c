"""Decoding on a small random model: identity, counts, cache, exactness."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import small

PROMPTS = [[20, 21, 22, 23], [50, 51], [30, 33, 36, 39, 41, 44, 47], [100]]
MASK = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a random path selector, which modes named "selected" use."""
    built = build(tmp_path_factory.mktemp("decoding") / "qwen3", small.qwen3)
    add_selector(built)
    return built


def add_selector(built: Any) -> None:
    from nemodiff_train.model.draft_adapter import DraftLoRA

    chunk = getattr(built, "module", built)
    DraftLoRA(target_modules=[], selector_rank=6)(built, training=False)
    draw = torch.Generator().manual_seed(1)
    for parameter in chunk.selector.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def build(directory: Path, family: Callable[[Path], None]) -> Any:
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.model.bridges import auto_bridge
    from nemodiff_train.model.loading import set_parallelism, start_model_parallel
    from nemodiff_train.model.pretrained import config_from, model_from, stored_settings

    family(directory)
    provider = model_from(str(directory))
    provider.mask_token_id = MASK
    start_model_parallel(1)
    set_parallelism(provider)
    provider.finalize()
    models = provider.provide_distributed_model(wrap_with_ddp=False)
    auto_bridge(config_from(stored_settings(str(directory)))).load_hf_weights(models, hf_path=str(directory))
    return models[0].eval()


def run(model: Any, prompts: list[list[int]], mode: str, numbers: list[int] | None = None, **settings: Any) -> Any:
    """Decode in a mode.

    After "uno ", with drafts as a drafter of that kind makes them, and without its adapters; after "selected ", with
    the path selector.
    """
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.model.path_selector import SelectorTables
    from nemodiff_train.objective.drafts import DRAFT_KINDS

    *words, mode = mode.split()
    chunk = getattr(model, "module", model)
    chunk.attention_state.draft_kind = DRAFT_KINDS["uno" if "uno" in words else "nemotron"]
    chunk.selector_tables = SelectorTables.from_model([chunk], rank=6) if "selected" in words else None
    return decode(
        model, prompts, mode, DecodingSettings(**{"max_new_tokens": 30, "block_size": 8, **settings}), numbers
    )


def tokens(model: Any, prompts: list[list[int]], mode: str, **settings: Any) -> list[list[int]]:
    return [generation.tokens for generation in run(model, prompts, mode, **settings)[0]]


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear", "tree", "uno linear", "uno tree", "quadratic"])
def test_a_row_can_be_watched(model: Any, mode: str) -> None:
    """Tokens are told as forwards commit them, and nothing else changes."""
    told: list[list[int]] = []
    plain = run(model, PROMPTS[:1], mode)[0][0]
    (row,), session = run(model, PROMPTS[:1], mode, on_commit=lambda generation: told.append(list(generation.tokens)))
    assert row.tokens == plain.tokens == told[-1] and row.steps == plain.steps
    assert all(told[-1][: len(tokens)] == tokens for tokens in told)
    lengths = [len(tokens) for tokens in told]
    assert lengths == sorted(set(lengths)) and 1 < len(told) <= session.calls(0)


LOSSLESS = (
    "linear", "tree", "uno linear", "uno tree", "quadratic", "selected linear", "selected uno linear",
    "selected uno tree",
)  # fmt: skip


@pytest.mark.parametrize("block_size", [2, 5, 8, 16])
@pytest.mark.parametrize("seed", range(4))
def test_self_speculation_equals_ar(model: Any, seed: int, block_size: int) -> None:
    """On random weights, ragged prompts, and with a stop token met at any position of a draft."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (5,), generator=generator).tolist()
    prompts = [torch.randint(20, 220, (length,), generator=generator).tolist() for length in lengths]
    free = tokens(model, prompts, "ar")
    for mode in LOSSLESS:
        assert tokens(model, prompts, mode, block_size=block_size, tree_nodes=20) == free
    stop = frozenset({Counter(token for row in free for token in row).most_common(1)[0][0]})
    ended = tokens(model, prompts, "ar", stop_token_ids=stop)
    for mode in LOSSLESS:
        assert tokens(model, prompts, mode, block_size=block_size, tree_nodes=20, stop_token_ids=stop) == ended
    assert any(row[-1] in stop and len(row) < 30 for row in ended)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "mode", ["ar", "diffusion", "linear", "uno linear", "uno tree", "quadratic", "selected linear"]
)
def test_rows_of_a_batch_do_not_see_each_other(model: Any, mode: str, temperature: float) -> None:
    settings = {"threshold": 0.02, "temperature": temperature, "seed": 3}
    together = tokens(model, PROMPTS, mode, **settings)
    alone = [run(model, [prompt], mode, [number], **settings)[0][0].tokens for number, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert all(len(row) == 30 and MASK not in row for row in together)


@pytest.mark.parametrize("family", [small.qwen3, small.ministral3])
@torch.inference_mode()
def test_the_plain_forward_is_megatrons(tmp_path: Path, family: Callable[[Path], None]) -> None:
    """Prefill of ragged prompts, split by rows; a block that sees all of itself; logits at some positions."""
    from nemodiff_train.decoding import session as sessions

    built = build(tmp_path / "hf", family)
    prompts = [torch.randint(20, 220, (length,)).tolist() for length in (3, 90, 17, 120, 1)]
    rows, block = torch.tensor([3, 0, 4]), torch.randint(20, 220, (3, 8))
    logits_of = []
    for fast in (True, False):
        session = sessions.Session(built, len(prompts), 140, MASK)
        assert session.model._fast
        session.model._fast = fast
        last = session.prefill(prompts)
        whole = session.forward(block, rows, "draft")
        session.forward(block, rows, "commit", causal=True)
        session.commit(rows, torch.tensor([8, 3, 5]))
        some = session.forward(block, rows, "verify", causal=True, indices=torch.tensor([[1], [7], [0]]))
        logits_of.append((last, whole, some))
    for ours, megatrons in zip(*logits_of, strict=True):
        torch.testing.assert_close(ours, megatrons, rtol=0, atol=2e-5)
    assert logits_of[0][0][:, 2:].std() > 0.1


def test_a_prefill_is_one_forward_of_every_row_however_it_is_split(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemodiff_train.decoding import session as sessions

    whole = sessions.Session(model, len(PROMPTS), 20, MASK)
    logits = whole.prefill(PROMPTS)
    calls: list[int] = []
    hook = on_logits(model, lambda output: (calls.append(output.shape[1]), output)[1])
    monkeypatch.setattr(sessions, "PREFILL_TOKENS", 8)
    split = sessions.Session(model, len(PROMPTS), 20, MASK)
    torch.testing.assert_close(split.prefill(PROMPTS), logits)
    hook.remove()
    assert calls == [1, 2, 1] and split.forwards == whole.forwards == [Counter(prefill=1)] * 4
    assert split.cache.lengths.tolist() == [4, 2, 7, 1]


KINDS = {
    "ar": {"decode"},
    "diffusion": {"denoise", "commit"},
    "linear": {"draft", "verify"},
    "tree": {"draft", "verify"},
    "uno linear": {"draft", "verify"},
    "uno tree": {"draft", "verify"},
    "selected linear": {"draft", "verify"},
    "selected uno linear": {"draft", "verify"},
    "quadratic": {"fused"},
    "oracle": {"search"},
}


@pytest.mark.parametrize("mode", KINDS)
def test_forwards_are_the_calls_of_the_model(model: Any, mode: str) -> None:
    seen = []
    hook = model.output_layer.register_forward_hook(lambda module, inputs, output: seen.append(1))
    generations, session = run(model, [PROMPTS[0]], mode, threshold=0.02)
    hook.remove()
    assert session.calls(0) == len(seen)
    assert set(session.forwards[0]) == {"prefill", *KINDS[mode]}
    if mode in LOSSLESS:
        assert sum(cycle.committed for cycle in generations[0].cycles) + 1 == len(generations[0].tokens)
        assert len(generations[0].cycles) == session.forwards[0]["fused" if mode == "quadratic" else "draft"]
        assert all(cycle.target_tokens == ("uno" in mode) for cycle in generations[0].cycles)


def on_logits(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change what the output layer returns, until the hook is removed."""
    return model.output_layer.register_forward_hook(lambda module, inputs, output: (change(output[0]), output[1]))


def few_tokens(model: Any, count: int) -> Any:
    """Forbid all but a few tokens, so that drafts are often right; returns the hook."""
    bias = torch.full((model.config.vocab_size,), -1e30)
    bias[20 : 20 + count] = 0.0
    return on_logits(model, lambda logits: logits[..., : len(bias)] + bias)


@pytest.mark.parametrize("block_size", [2, 4, 8])
@pytest.mark.parametrize("count", [2, 4])
def test_the_oracle_takes_no_more_forwards_than_drafts_do(model: Any, count: int, block_size: int) -> None:
    """For every row, whatever the batch, within the budget, and on the way to the AR output."""
    generator = torch.Generator().manual_seed(count)
    prompts = [torch.randint(20, 220, (length,), generator=generator).tolist() for length in range(1, 17)]
    hook = few_tokens(model, count)
    fused = [counted["fused"] for counted in run(model, prompts, "quadratic", block_size=block_size)[1].forwards]
    linear = [counted.total() - 1 for counted in run(model, prompts, "linear", block_size=block_size)[1].forwards]
    generations, session = run(model, prompts, "oracle", block_size=block_size, search_budget=150)
    alone = run(model, prompts[:1], "oracle", block_size=block_size, search_budget=150)[0][0]
    ar = tokens(model, prompts, "ar")
    hook.remove()
    assert [generation.tokens for generation in generations] == ar
    paths = [generation.oracle_forwards for generation in generations]
    assert all(path <= min(costs) for path, *costs in zip(paths, fused, linear, strict=True))
    assert sum(paths) < 29 * 16 or block_size == 2  # some drafts are right
    assert all(sum(cycle.committed for cycle in generation.cycles) == 29 for generation in generations)
    assert all(counted["search"] <= 150 for counted in session.forwards) and alone.oracle_forwards == paths[0]


@pytest.mark.parametrize("shift", [False, True])
def test_a_fused_forward_drafts_as_a_forward_over_masks_would(
    model: Any, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draft's logits against a fresh cache; equality of the output could not tell a misplaced draft."""
    from nemodiff_train.decoding import quadratic
    from nemodiff_train.decoding.session import Session

    rejection_sample, text, compared = quadratic.rejection_sample, list(PROMPTS[0]), []

    def compare(sampler: Any, draft_tokens: torch.Tensor, draft_logits: torch.Tensor, *rest: Any) -> Any:
        fresh = Session(model, 1, 64, MASK)
        fresh.prefill([text])
        masks = torch.full((1, draft_logits.shape[1] + 1), MASK)
        expected = fresh.forward(masks, torch.arange(1), "draft")[0, 1:]
        torch.testing.assert_close(draft_logits[0], expected, rtol=1e-4, atol=1e-4)
        verification = rejection_sample(sampler, draft_tokens, draft_logits, *rest)
        accepted = int(verification.accept_mask[0].long().cumprod(0).sum())
        assert accepted == verification.accepted
        text.extend([known[-1], *draft_tokens[0, :accepted].tolist()])
        known.append(int(verification.tokens[0, accepted]))
        compared.append(accepted + 1)
        return verification

    monkeypatch.setattr(quadratic, "rejection_sample", compare)
    monkeypatch.setattr(model.config, "shift", shift)
    hook = few_tokens(model, 3)
    known = tokens(model, PROMPTS[:1], "ar", max_new_tokens=1)[0]
    run(model, PROMPTS[:1], "quadratic", block_size=6)
    hook.remove()
    assert len(compared) > 5 and max(compared) > 1


def test_the_oracle_finds_the_shortest_path() -> None:
    from nemodiff_train.decoding.oracle import _shortest_path

    gains = [[1, 4], [1], [1], [1], [2], [1], []]
    assert _shortest_path(gains, 7) == [(2, 4), (1, 2)]  # 3 forwards; one at a time would take 5
    gains = [[2], [3], [1], [1], []]
    assert _shortest_path(gains, 5) == [(1, 1), (1, 3)]  # keeping both tokens of the first cycle would take 3


@pytest.fixture
def small_vocabulary(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model with all but eight tokens forbidden, its drafts made to disagree with it; paths take five."""
    monkeypatch.setattr("nemodiff_train.decoding.path_distribution.CANDIDATES", 5)
    allowed = torch.arange(20, 28)
    bias = torch.full((model.config.vocab_size,), -1e30)
    bias[allowed] = 0.0

    hook = on_logits(model, lambda logits: logits[..., : len(bias)] * 0.5 + bias)
    yield model
    hook.remove()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"temperature": 0.7, "top_k": 3, "max_new_tokens": 4, "block_size": 3},  # reaches the token after whole drafts
]


DEEP = {"temperature": 0.7, "top_k": 3, "max_new_tokens": 5, "block_size": 3, "tree_nodes": 5, "tree_width": 2}


@pytest.mark.parametrize(
    ("mode", "filters"),
    [
        *((mode, filters) for mode in ("linear", "quadratic") for filters in FILTERS),
        *((mode, filters) for mode in ("tree", "uno linear", "uno tree") for filters in (FILTERS[2], DEEP)),
        *(("selected linear", filters) for filters in (*FILTERS, DEEP)),
        ("selected uno linear", DEEP),
        ("selected tree", DEEP),
    ],
)
def test_sampled_self_speculation_is_distributed_as_ar(small_vocabulary: Any, mode: str, filters: dict) -> None:
    """Chi-square of the first tokens of 3000 rows against the exact AR probabilities (p = 1e-6)."""
    rows, prompt = 3000, PROMPTS[0]
    settings = {"temperature": 1.0, "max_new_tokens": 3, "block_size": 4, **filters}
    counts = Counter(tuple(row) for row in tokens(small_vocabulary, [prompt] * rows, mode, **settings))
    expected = {
        text: rows * probability
        for text, probability in exact(small_vocabulary, prompt, settings["max_new_tokens"], settings).items()
    }
    assert set(counts) <= set(expected)
    common = [text for text, count in expected.items() if count >= 5]
    rest = rows - sum(expected[text] for text in common), rows - sum(counts[text] for text in common)
    statistic = sum((counts[text] - expected[text]) ** 2 / expected[text] for text in common)
    statistic += (rest[1] - rest[0]) ** 2 / rest[0] if rest[0] >= 5 else 0
    freedom = len(common)
    # Wilson-Hilferty: the cube root of a chi-square over its degrees of freedom is close to normal.
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert normal < 4.75 and freedom > 20


def exact(model: Any, prompt: list[int], positions: int, settings: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of so many tokens, one causal forward without a cache for each prefix."""
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.decoding.sampling import TokenSampler

    sampler = TokenSampler(DecodingSettings(**settings), [0])
    probabilities = {(): 1.0}
    for _ in range(positions):
        longer = {}
        for text, probability in probabilities.items():
            p = sampler.distribution(logits(model, prompt + list(text), 0)[None, -1:])[0, 0]
            for token in p.nonzero()[:, 0].tolist():
                longer[(*text, token)] = probability * float(p[token])
        probabilities = longer
    return probabilities


def test_a_tree_has_the_most_probable_continuations() -> None:
    """Against all of them, enumerated; with equal probabilities and impossible tokens among them."""
    from itertools import product

    from nemodiff_train.decoding.tree import DraftTree

    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=draw)
    logits[1] = logits[1].round()
    logits[1, 2, 3:] = -torch.inf
    log_probs = logits.log_softmax(-1)
    for nodes, width in ((2, 1), (6, 2), (17, 3), (40, 9), (200, 5)):
        values, candidates = log_probs.topk(min(width, 5))
        last = torch.zeros(2, 1, dtype=torch.long)
        tree = DraftTree.most_probable(lambda depth, _: values[:, depth, None], candidates, last, nodes)  # noqa: B023
        for row in range(2):
            tokens, parents, depths = (each[row].tolist() for each in (tree.tokens, tree.parents, tree.depths))
            paths: list[tuple[int, ...]] = [()]
            for node in range(1, len(tokens)):
                assert parents[node] < node and depths[node] == depths[parents[node]] + 1
                paths.append((*paths[parents[node]], tokens[node]))
            assert len(set(paths)) == len(paths)
            above = [
                {other for other in range(len(paths)) if path[: len(paths[other])] == paths[other]} for path in paths
            ]
            assert [set(line.nonzero()[:, 0].tolist()) for line in tree.ancestors()[row]] == above
            candidates = [log_probs[row, depth].topk(min(width, 5)).indices.tolist() for depth in range(3)]
            every = [path for depth in range(4) for path in product(*candidates[:depth])]
            mass = {path: sum(float(log_probs[row, at, token]) for at, token in enumerate(path)) for path in every}
            best = sorted(mass.values(), reverse=True)[:nodes]
            assert sorted((mass[path] for path in paths), reverse=True) == pytest.approx(best, abs=1e-5)


def test_settings_of_the_draw() -> None:
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.decoding.sampling import TokenSampler

    raw = torch.tensor([[[2.0, 1.0, 0.0, -1.0]]])
    p = raw.softmax(-1)[0, 0]

    def of(**settings: Any) -> list[float]:
        return TokenSampler(DecodingSettings(temperature=1.0, **settings), [0]).distribution(raw)[0, 0].tolist()

    assert of() == pytest.approx(p.tolist())
    assert of(top_k=2) == pytest.approx([float(p[0] / p[:2].sum()), float(p[1] / p[:2].sum()), 0, 0])
    assert of(top_p=0.7) == pytest.approx(of(top_k=2))  # 0.64 alone does not reach it
    assert of(top_p=0.6) == [1, 0, 0, 0]


@pytest.mark.parametrize("policy", ["threshold", "entropy", "fixed", "leftmost"])
def test_policies_fix_what_they_say(policy: str) -> None:
    """By hand on one block of six positions, the fourth known."""
    from nemodiff_train.decoding.diffusion import select_positions_to_unmask
    from nemodiff_train.decoding.generation import DecodingSettings

    p = torch.tensor([0.95, 0.5, 0.99, 1.0, 0.9, 0.6])
    log = torch.stack([p.log(), (1 - p).clamp(min=1e-30).log()], dim=-1)[None]
    masked = torch.tensor([[True, True, True, False, True, True]])
    settings = DecodingSettings(policy=policy, threshold=0.9, steps=3, entropy_bound=0.3)  # type: ignore[arg-type]
    unmasked = select_positions_to_unmask(log, log.argmax(-1), masked, settings, step=0)[0].nonzero()[:, 0].tolist()
    # Entropies: 0.056 (position 2), 0.199 (0), 0.325 (4): the sum before the third is 0.255.
    expected = {"threshold": [0, 2, 4], "entropy": [0, 2, 4], "fixed": [0, 2], "leftmost": [0]}
    assert unmasked == expected[policy]
    strict = DecodingSettings(policy=policy, threshold=1.0, steps=9, entropy_bound=0.0)  # type: ignore[arg-type]
    alone = select_positions_to_unmask(log, log.argmax(-1), masked, strict, step=0)[0].nonzero()[:, 0].tolist()
    assert alone == ([0] if policy == "leftmost" else [2])


@pytest.mark.parametrize("policy", ["threshold", "entropy", "fixed", "leftmost"])
def test_a_block_takes_as_many_forwards_as_its_policy_says(model: Any, policy: str) -> None:
    """One block of 8, seven masks; 5 tokens asked for leave four to find."""
    steps = {"policy": policy, "steps": 3, "threshold": 1.0, "entropy_bound": 0.0}
    for limit, masks in ((8, 7), (5, 4)):
        _, session = run(model, [PROMPTS[0]], "diffusion", max_new_tokens=limit, **steps)
        assert session.forwards[0]["denoise"] == (3 if policy == "fixed" else masks)


def test_stop_strings_end_a_row_and_cut_its_text(model: Any) -> None:
    def as_text(ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    free = tokens(model, PROMPTS, "ar")
    stop = f"{free[0][6]}><{free[0][7]}"
    for mode in ("ar", *LOSSLESS):
        ended = run(model, PROMPTS, mode, stop_strings=(stop,), detokenize=as_text)[0]
        position = as_text(free[0]).index(stop)
        assert ended[0].settings.text(ended[0].tokens) == as_text(free[0])[:position]
        assert stop in as_text(ended[0].tokens) and stop not in as_text(ended[0].tokens[:-1])


def test_masks_are_filled_in_the_middle(model: Any) -> None:
    """Stated again: a block from before its first mask, everything in it in view, nothing after it."""
    from nemodiff_train.decoding.decode import fill
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.errors import UserError

    text = torch.randint(20, 220, (40,), generator=torch.Generator().manual_seed(8)).tolist()
    for position in (5, 6, 9, 11, 13, 38):
        text[position] = MASK
    expected = list(text)
    while MASK in expected:
        start = expected.index(MASK) - 1
        block = expected[start : start + 8]
        while MASK in block:
            probability, choice = (
                logits(model, expected[:start] + block, len(block))[-len(block) :].softmax(-1).max(-1)
            )
            hidden = [position for position, token in enumerate(block) if token == MASK]
            best = max(hidden, key=lambda position: float(probability[position]))
            for position in hidden:
                if position == best or probability[position] >= 0.02:
                    block[position] = int(choice[position])
        expected[start : start + 8] = block
    settings = DecodingSettings(block_size=8, threshold=0.02)
    filled, _ = fill(model, text, settings)
    assert filled.tokens == expected and filled.positions == [5, 6, 9, 11, 13, 38]
    for bad, words in ((text[5:], "begins with"), ([20, 21], "nothing to fill")):
        with pytest.raises(UserError, match=words):
            fill(model, bad, settings)


def test_revision_masks_what_the_ar_half_doubts(model: Any) -> None:
    from nemodiff_train.decoding.decode import fill
    from nemodiff_train.decoding.generation import DecodingSettings

    settings = DecodingSettings(block_size=8)
    prompt = PROMPTS[0]
    draft = tokens(model, [prompt], "ar", max_new_tokens=12)[0]
    draft[4] = 300  # not what the model would say
    p = logits(model, prompt + draft, 0).softmax(-1)
    found = [float(p[len(prompt) + position - 1, token]) for position, token in enumerate(draft)]
    least = sorted(found)[2]
    revised, _ = fill(model, prompt + draft, settings, len(prompt), least)
    doubted = [len(prompt) + position for position, probability in enumerate(found) if probability < least]
    assert revised.positions == doubted and len(prompt) + 4 in doubted
    kept = [position for position in range(len(prompt) + 12) if position not in doubted]
    assert all(revised.tokens[position] == (prompt + draft)[position] for position in kept)
    assert MASK not in revised.tokens
    unchanged, session = fill(model, prompt + draft, settings, len(prompt), 1e-9)
    assert unchanged.tokens == prompt + draft and session.calls(0) == 1


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-42},
        {"entropy_bound": float("nan")},
        {"seed": 2**64},
        {"stop_strings": ("",)},
    ],
)
def test_settings_that_could_not_end_or_draw_are_refused(setting: dict[str, Any]) -> None:
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.errors import UserError

    with pytest.raises(UserError, match=next(iter(setting))):
        DecodingSettings(**setting)


def test_a_budget_too_small_for_the_oracle_is_refused(model: Any) -> None:
    from nemodiff_train.errors import UserError

    with pytest.raises(UserError, match="search_budget is 89"):
        run(model, PROMPTS, "oracle", search_budget=89)


def test_too_many_positions_are_refused(model: Any) -> None:
    from nemodiff_train.errors import UserError

    with pytest.raises(UserError, match="1024"):
        run(model, [[20] * 1000], "ar")


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


def released_ar(model: Any, prompt: list[int], new: int) -> tuple[list[int], int]:
    """``ar_generate``: one token a forward, of which the prefill gives the first; nfe = tokens."""
    text, nfe = list(prompt), 0
    for _ in range(new):
        nfe += 1
        text.append(int(logits(model, text, 0)[-1].argmax()))
    return text[len(prompt) :], nfe


def released_diffusion(model: Any, prompt: list[int], new: int, block: int = 8) -> tuple[list[int], int]:
    """``generate``: the prefill is not counted, a cache refresh after every block is."""
    text, nfe = list(prompt), 0
    while len(text) < len(prompt) + new:
        seed = int(logits(model, text, 0)[-1].argmax())
        filled = [seed] + [MASK] * (block - 1)
        while MASK in filled:
            nfe += 1
            probability, choice = logits(model, text + filled, block)[-block:].softmax(-1).max(-1)
            hidden = [position for position in range(block) if filled[position] == MASK]
            best = max(hidden, key=lambda position: float(probability[position]))
            for position in hidden:
                if position == best or probability[position] >= 0.02:
                    filled[position] = int(choice[position])
        nfe += 1
        text += filled
    return text[len(prompt) :], nfe


def released_linear(model: Any, prompt: list[int], new: int, block: int = 8) -> tuple[list[int], int]:
    """``linear_spec_generate`` at threshold 0: the prefill is counted, then two forwards a cycle."""
    text, nfe = list(prompt), 1
    text.append(int(logits(model, text, 0)[-1].argmax()))
    while len(text) < len(prompt) + new:
        nfe += 2
        drafted = logits(model, text + [MASK] * (block - 1), block)[1:].argmax(-1).tolist()
        verified = logits(model, text + drafted, 0)[len(text) - 1 :].argmax(-1).tolist()
        count = 0
        while count < block - 1 and verified[count] == drafted[count]:
            count += 1
        text += verified[: count + 1]
    return text[len(prompt) :][:new], nfe


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_the_released_models_semantics(model: Any, prompt: list[int]) -> None:
    """Same tokens and same counts as their remote code, stated again; every forward starts from no cache.

    Their block diffusion leaves the prefill out and refreshes the cache once more than anybody needs.
    """
    for mode, statement in (("ar", released_ar), ("diffusion", released_diffusion), ("linear", released_linear)):
        expected, nfe = statement(model, prompt, 24)
        (generation,), session = run(model, [prompt], mode, max_new_tokens=24, threshold=0.02)
        counted = session.calls(0)
        if mode == "diffusion":
            counted += 1 - session.forwards[0]["prefill"]
        assert (generation.tokens, counted) == (expected, nfe)


@pytest.fixture(params=[("causal", False), ("causal", True), ("block_causal", False), ("block_causal", True)])
def trained(model: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The model as training with blocks of 8 would run it, for each kind of clean half, with and without shift."""
    config = model.config
    config.clean_attention, config.shift = request.param
    config.noisy_views, config.block_size = 1, 8
    yield model
    config.noisy_views, config.clean_attention, config.shift = 0, "causal", False


def training_logits(model: Any, clean: list[int], noisy: list[int]) -> torch.Tensor:
    """[L, vocab] a training forward over [noisy | clean]: logits of each noisy position, -inf for the mask token."""
    both = torch.tensor([noisy + clean])
    with torch.no_grad():
        output = model(both, torch.arange(len(clean)).repeat(2)[None], attention_mask=None)[0, : len(clean)]
    output = output.float()
    output[:, MASK] = -torch.inf
    return output.roll(1, 0) if model.config.shift else output


def test_a_block_is_decoded_as_it_was_trained(trained: Any) -> None:
    """A denoising forward after a cache gives the logits of the noisy half."""
    from nemodiff_train.decoding.session import Session

    text = torch.randint(20, 220, (32,), generator=torch.Generator().manual_seed(5)).tolist()
    noisy = text[:24] + [token if position in (0, 3) else MASK for position, token in enumerate(text[24:])]
    session, row = Session(trained, 1, 32, MASK), torch.arange(1)
    session.prefill([text[:24]], 8 if trained.config.clean_attention == "block_causal" else None)
    output = session.forward(torch.tensor([noisy[24:]]), row, "denoise", causal=False)[0]
    torch.testing.assert_close(output[1:], training_logits(trained, text, noisy)[25:], rtol=1e-4, atol=1e-4)


def test_rows_draw_alone_in_trained_blocks(trained: Any) -> None:
    """A prompt shorter than a block has no seed to draw, even beside one that has."""
    settings = {"threshold": 0.02, "temperature": 1.0, "seed": 3}
    prompts = [*PROMPTS, PROMPTS[2] * 3]
    together = tokens(trained, prompts, "diffusion", **settings)
    alone = [
        run(trained, [prompt], "diffusion", [row], **settings)[0][0].tokens for row, prompt in enumerate(prompts)
    ]
    assert together == alone


def test_block_diffusion_with_a_block_causal_clean_half(trained: Any) -> None:
    """Stated again with training forwards: blocks count from the text's start, the prompt's end is in the first."""
    from nemodiff_train.errors import UserError

    config, block, threshold = trained.config, 8, 0.02
    if config.clean_attention == "causal":
        pytest.skip("its blocks start after the prompt; stated above")
    for prompt in (PROMPTS[2], PROMPTS[0] * 4, PROMPTS[2] * 3):
        text = list(prompt)
        while len(text) < len(prompt) + 20:
            start = len(text) // block * block
            filled = text[start:] + [MASK] * (start + block - len(text))
            if config.shift and start == len(text) > 0:
                filled[0] = clean_logits(trained, text)
            asked = min(block, len(prompt) + 20 - start)  # nothing after the limit is asked for
            while MASK in filled[:asked]:
                padded = text[:start] + filled
                probability, choice = training_logits(trained, padded, padded)[start:].softmax(-1).max(-1)
                hidden = [position for position in range(asked) if filled[position] == MASK]
                best = max(hidden, key=lambda position: float(probability[position]))
                for position in hidden:
                    if position == best or probability[position] >= threshold:
                        filled[position] = int(choice[position])
            text = text[:start] + filled
        decoded = tokens(trained, [prompt, PROMPTS[1]], "diffusion", max_new_tokens=20, threshold=threshold)
        assert decoded[0] == text[len(prompt) : len(prompt) + 20]
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
    """Logits of a whole text whose last ``block`` positions see each other; the mask token is left out."""
    from nemodiff_train.decoding.session import Session

    session = Session(model, 1, len(text), MASK)
    row = torch.arange(1)
    if block:
        session.prefill([text[:-block]])
    return session.forward(torch.tensor([text[-block:]]), row, "denoise", causal=not block)[0]
