"""The path selector: its paths and trees, its loss and gradient."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.path_distribution import PathDistribution
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.tree import DraftTree
from nemodiff_train.drafter.config import selector as switches
from nemodiff_train.model.path_selector import HISTORY, PathSelector, SelectorTables
from tests import small

ROWS, VOCABULARY, RANK, K, LENGTH = 3, 9, 3, 4, 4


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> PathDistribution:
    """Paths of three drafts of four tokens with four candidates each, in fp64."""
    monkeypatch.setattr("nemodiff_train.decoding.path_distribution.CANDIDATES", K)
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(HISTORY, VOCABULARY, RANK, generator=draw, dtype=torch.float64)
    after = torch.randn(VOCABULARY, RANK, generator=draw, dtype=torch.float64) * 1.5
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, generator=draw, dtype=torch.float64)
    contexts = torch.randn(ROWS, LENGTH, RANK, generator=draw, dtype=torch.float64)
    made = PathDistribution.from_draft(SelectorTables(before, after), logits, contexts)
    made.__dict__["stated"] = (before, after, logits, contexts)
    return made


LAST = torch.tensor([[2], [5], [7]])


def conditional(distribution: PathDistribution, row: int, path: tuple[int, ...]) -> dict[int, Tensor]:
    """Return q of every candidate after a path, summed term by term as the formula has it."""
    before, after, logits, contexts = distribution.__dict__["stated"]
    position, known = len(path), int(LAST[row])
    history = [*reversed(path), *[known] * HISTORY][:HISTORY]
    scores = {}
    for token in logits[row, position].sort(descending=True).indices[:K].tolist():
        score = logits[row, position, token]
        for r in range(RANK):
            inner = contexts[row, position, r] + sum(before[i, history[i], r] for i in range(HISTORY))
            score = score + inner / (1 + (-inner).exp()) * after[token, r]
        scores[token] = score.exp()
    total = torch.stack([*scores.values()]).sum()
    return {token: score / total for token, score in scores.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_path_takes_each_token_from_the_formula(distribution: PathDistribution, temperature: float) -> None:
    """The most probable one at temperature 0; and the logits are q's, whatever was drawn before."""
    sampler = TokenSampler(DecodingSettings(temperature=temperature), range(ROWS))
    path, logits = distribution.sample_path(sampler, LAST, torch.arange(ROWS))
    for row, position in product(range(ROWS), range(LENGTH)):
        expected = torch.zeros(VOCABULARY, dtype=torch.float64)
        given = conditional(distribution, row, tuple(path[row, :position].tolist()))
        for token, q in given.items():
            expected[token] = q
        torch.testing.assert_close(logits[row, position].softmax(-1), expected, rtol=1e-12, atol=1e-14)
        assert int(path[row, position]) in given
        if not temperature:
            assert int(path[row, position]) == int(expected.argmax())


def every_path(distribution: PathDistribution, row: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every continuation of one to four tokens."""
    level, paths = {(): 1.0}, {}
    for _ in range(LENGTH):
        level = {
            (*path, token): mass * float(q)
            for path, mass in level.items()
            for token, q in conditional(distribution, row, path).items()
        }
        paths |= level
    return paths


@pytest.mark.parametrize(("nodes", "width"), [(2, 1), (7, 2), (30, 3), (400, 4)])
def test_a_tree_takes_the_most_probable_continuations(distribution: PathDistribution, nodes: int, width: int) -> None:
    """Against all of them."""

    def log_probs(depth: int, histories: Tensor) -> Tensor:
        return distribution.logits(depth, histories).log_softmax(-1)[..., :width]

    tree = DraftTree.most_probable(log_probs, distribution.candidates[..., :width], LAST, nodes)
    for row in range(ROWS):
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        paths: list[tuple[int, ...]] = [()]
        for node in range(1, len(tokens)):
            paths.append((*paths[parents[node]], tokens[node]))
        allowed = [set(distribution.candidates[row, at, :width].tolist()) for at in range(LENGTH)]
        mass = {
            path: value
            for path, value in every_path(distribution, row).items()
            if all(token in allowed[at] for at, token in enumerate(path))
        }
        assert len(set(paths)) == len(paths) == min(nodes, len(mass) + 1)
        best = sorted(mass.values(), reverse=True)[: len(paths) - 1]
        assert sorted((mass[path] for path in paths[1:]), reverse=True) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("kind", ["nemotron", "uno"])
def test_loss_and_gradient_are_those_of_the_formula(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot by slot from the model's final states: KL of the verifier and the chain over the candidates."""
    from dataclasses import replace

    from nemodiff_train.drafter.selector import SelectorLoss
    from nemodiff_train.drafter.step import draft_tokens
    from nemodiff_train.model.draft_adapter import DraftLoRA
    from nemodiff_train.model.head import output_processor
    from nemodiff_train.objective.drafts import DRAFT_KINDS

    many = 100  # of 320 tokens: a random model's draft seldom has the verifier's choice among 16
    monkeypatch.setattr("nemodiff_train.drafter.selector.CANDIDATES", many)
    length, block, config = 96, 32, replace(switches(kind), slots="all", loss="kl")
    built = small.built({})
    DraftLoRA(dim=4, alpha=16, selector_rank=6)(built)
    assert [name for name, value in built.named_parameters() if value.requires_grad] == [
        "selector.before", "selector.context", "selector.after"
    ]  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    for name, parameter in built.named_parameters():
        if "selector" in name or "adapter" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    batch, text = small.batch(built, length), small.batch(built, length)["tokens"][0, length:]
    batch["tokens"] = draft_tokens(batch, built.config, DRAFT_KINDS[kind], 0, built.attention_state.shard)
    loss, states = SelectorLoss(batch, config, built.config, 0, built.attention_state, selector=built.selector), []

    def losses_of(hidden_states: Tensor, layer: Any, weight: Tensor) -> Tensor:
        states.append(hidden_states[:, 0].detach().double())
        return loss.losses(hidden_states, layer, weight)

    total = built(batch["tokens"], batch["position_ids"], None, output_processor=output_processor(losses_of))
    total.backward()

    rows = built.output_layer.weight.detach().double()[: built.config.vocab_size]
    before, context, after = (each.detach().double().requires_grad_() for each in built.selector.parameters())
    noisy, clean = states[0].split(length)

    def scaled(values: Tensor) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    expected, counted = torch.zeros((), dtype=torch.float64), 0
    for position in range(length):
        if kind == "nemotron":  # the position's own token, after the one before it; a block's first is known
            exists, known = position % block > 0, position - 1
        else:  # the next token, after the position's own; the first block follows nothing
            exists, known = position >= block, position
        if not exists:
            continue
        draft, verifier = rows @ noisy[position], rows @ clean[known]
        draft[1] = verifier[1] = -1e30  # the mask token
        candidates = draft.topk(many).indices
        if int(verifier.argmax()) not in candidates.tolist():
            continue
        seed = position - position % block - (kind == "uno") + (kind == "uno")
        key = context @ scaled(noisy[position])
        for distance, matrix in enumerate(before):
            key = key + matrix @ scaled(rows[text[max(known - distance, seed)]])
        key = key / (1 + (-key).exp())
        chain = (draft[candidates] + scaled(rows[candidates]) @ after.T @ key).log_softmax(-1)
        p = verifier[candidates].softmax(-1)
        expected, counted = expected + (p * (p.log() - chain)).sum(), counted + 1
    assert 5 < counted < length and int(loss.reduce(total)[1]) == counted
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    for found, stated in zip(built.selector.parameters(), (before, context, after), strict=True):
        torch.testing.assert_close(found.grad.double(), stated.grad, rtol=1e-3, atol=1e-4)


def test_an_untrained_selector_changes_nothing() -> None:
    selector = PathSelector(8, 4, torch.empty(0))
    assert selector.before.std() > 0 and selector.before.dtype == torch.float32
    assert not selector(torch.randn(3, HISTORY, 8), torch.randn(3, 5, 8), torch.randn(3, 8)).any()
