"""The trained sampler: its features, its training, its file, and decoding with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemodiff_train.cli import main
from nemodiff_train.errors import UserError
from nemodiff_train.sampler.features import FEATURES, TOP, SlotHistory
from nemodiff_train.sampler.network import SlotNetwork
from nemodiff_train.sampler.storage import TrainedSampler, read_sampler, write_sampler
from tests import small
from tests.test_decoding import MASK, PROMPTS, few_tokens, model, run

__all__ = ["model"]

BLOCK = 8


@pytest.fixture(scope="module")
def sampler() -> TrainedSampler:
    return small.sampler(BLOCK, 0.3)


def test_the_default_network_has_the_size_of_the_papers() -> None:
    """4.8M parameters at 4 layers of width 384 (arXiv 2607.05722)."""
    count = sum(each.numel() for each in SlotNetwork(32, 4, 384).parameters())
    assert 4.7e6 < count < 4.9e6


# What three forwards see of two blocks, 0 for a mask.
VISIBLE = (
    ((7, 0, 0, 0, 0, 0), (5, 0, 3, 0, 0, 0)),
    ((7, 0, 4, 0, 0, 2), (5, 0, 3, 3, 0, 0)),
    ((7, 9, 4, 0, 1, 2), (5, 0, 3, 3, 8, 0)),
)


def test_features_are_what_they_are_said_to_be() -> None:
    """Against plain sums over slots and tokens in double precision, over three forwards."""
    draw = torch.Generator().manual_seed(0)
    history, past = SlotHistory(torch.tensor(VISIBLE[0])), [[], []]  # type: ignore[var-annotated]
    for number, visible in enumerate(VISIBLE):
        blocks = torch.tensor(visible)
        logits = 3 * torch.randn(2, 6, 12, generator=draw)
        tokens = logits.argmax(-1)
        tokens[0, 3] = 11  # one that was drawn
        if number == 1:
            tokens[:, 4] = torch.tensor([past[0][0][1][4], past[1][0][1][4]])
        found = history.observe(torch.arange(2), logits, tokens, blocks, blocks == 0)
        for row in range(2):
            past[row].append((logits[row].double().softmax(-1).tolist(), tokens[row].tolist(), visible[row]))
            for slot in range(6):
                expected = stated(past[row], slot)
                assert list(expected) == list(FEATURES)
                assert found[row, slot].tolist() == pytest.approx(list(expected.values()), abs=1e-5), (row, slot)


def stated(past: list[Any], slot: int) -> dict[str, float]:
    """The features of a slot, from what all forwards over its block have said and seen."""
    probabilities, tokens, visible = past[-1]
    size, p, token = len(visible), probabilities[slot], tokens[slot]
    ranked, masked = sorted(p, reverse=True), visible[slot] == 0

    def odds(forward: int) -> float:
        q = past[forward][0][slot][past[forward][1][slot]]
        return math.log(q / (1 - q))

    def agrees(other: int) -> float:
        if not 0 <= other < size:
            return 0.0
        return probabilities[other][token] if visible[other] == 0 else float(visible[other] == token)

    said = [each[1][slot] for each in past]
    same = next((back for back in range(len(said)) if said[-1 - back] != token), len(said))
    seen = [each[2] for each in past]
    since = sum(view[slot] != 0 for view in seen)
    known_left = [slot - other for other in range(slot + 1) if visible[other]]
    known_right = [other - slot for other in range(slot, size) if visible[other]]
    newly = (
        sum(now != 0 and before == 0 for now, before in zip(visible, seen[-2], strict=True)) if len(seen) > 1 else 0
    )
    of_token = {
        "log_odds": odds(-1) / 8,
        "probability": p[token],
        **{f"top_{rank}": math.log(ranked[rank - 1]) / 8 for rank in range(1, TOP + 1)},
        "margin": ranked[0] - ranked[1],
        "entropy": -sum(q * math.log(q) for q in p),
        "is_top": float(p[token] == ranked[0]),
        "left_agrees": agrees(slot - 1),
        "right_agrees": agrees(slot + 1),
    }
    state = {
        "left_correct_probability": math.prod(probabilities[i][tokens[i]] for i in range(slot) if visible[i] == 0)
    }
    of_past = {
        "unchanged": float(len(past) > 1 and same > 1),
        "repeats": same / 8,
        "log_odds_change": (odds(-1) - odds(-2)) / 8 if len(past) > 1 else 0.0,
    }
    if not masked:
        of_token, of_past = dict.fromkeys(of_token, 0.0), dict.fromkeys(of_past, 0.0)
    return {
        "masked": float(masked),
        **of_token,
        **state,
        **of_past,
        "inverse_age": 1 / since if 0 < since < len(past) else 0.0,
        "slot": slot / size,
        "to_left": min(known_left) / size if known_left else 1.0,
        "to_right": min(known_right) / size if known_right else 1.0,
        "masked_fraction": visible.count(0) / size,
        "just_unmasked": newly / size,
        "forwards": 1 / len(past),
    }


def test_before_training_it_is_the_threshold(model: Any) -> None:
    """The same tokens from the same forwards, and others once it corrects."""
    untrained = small.sampler(BLOCK, 0.0)
    for threshold in (0.02, 0.5):
        plain = run(model, PROMPTS, "diffusion", threshold=threshold)[0]
        trained = run(model, PROMPTS, "diffusion", policy="trained", trained_sampler=untrained, threshold=threshold)[
            0
        ]
        assert [(row.tokens, row.steps) for row in plain] == [(row.tokens, row.steps) for row in trained]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_see_each_other(model: Any, sampler: TrainedSampler, temperature: float) -> None:
    """Ragged prompts, some of which end earlier: together as alone, and as again."""
    settings = {
        "policy": "trained", "trained_sampler": sampler, "threshold": 0.4, "temperature": temperature, "seed": 3
    }  # fmt: skip
    hook = few_tokens(model, 3)
    together = run(model, PROMPTS, "diffusion", **settings)[0]
    alone = [run(model, [prompt], "diffusion", [number], **settings)[0][0] for number, prompt in enumerate(PROMPTS)]
    plain = run(model, PROMPTS, "diffusion", **{**settings, "policy": "threshold", "trained_sampler": None})[0]
    hook.remove()
    assert [(row.tokens, row.steps) for row in together] == [(row.tokens, row.steps) for row in alone]
    assert [row.steps for row in together] != [row.steps for row in plain]
    assert all(MASK not in row.tokens for row in together)


def test_it_fills_the_middle(model: Any, sampler: TrainedSampler) -> None:
    from nemodiff_train.decoding.decode import fill
    from nemodiff_train.decoding.generation import DecodingSettings

    text = [20, 21, MASK, 23, MASK, MASK, 26, 27]
    settings = DecodingSettings(block_size=BLOCK, policy="trained", trained_sampler=sampler, threshold=0.5)
    filled, _ = fill(model, text, settings)
    assert MASK not in filled.tokens and filled.positions == [2, 4, 5]


def test_another_block_size_is_refused(model: Any, sampler: TrainedSampler) -> None:
    with pytest.raises(UserError, match="blocks of 8, not of 16"):
        run(model, PROMPTS, "diffusion", policy="trained", trained_sampler=sampler, block_size=16)


def test_references_are_cut_into_the_blocks_of_decoding() -> None:
    from nemodiff_train.decoding.generation import DecodingSettings, Generation
    from nemodiff_train.decoding.trajectories import ReferenceBlock, reference_blocks

    ended = Generation(DecodingSettings(stop_token_ids=frozenset([0])), [11, 12, 13, 14, 15, 0])
    cut = Generation(DecodingSettings(), [11, 12, 13, 14, 15])
    prompt, whole = [1, 2, 3], ReferenceBlock([1, 2, 3], [11, 12, 13, 14], 1)
    known_first = reference_blocks(prompt, ended, 4, blocks_from_text_start=False, known_first_token=True)
    assert known_first == [whole, ReferenceBlock([1, 2, 3, 11, 12, 13, 14], [15, 0], 1)]
    assert reference_blocks(prompt, cut, 4, blocks_from_text_start=False, known_first_token=True) == [whole]
    assert reference_blocks(prompt, ended, 4, blocks_from_text_start=True, known_first_token=False) == [
        ReferenceBlock([], [1, 2, 3, 11], 3),
        ReferenceBlock([1, 2, 3, 11], [12, 13, 14, 15], 0),
        ReferenceBlock([1, 2, 3, 11, 12, 13, 14, 15], [0], 0),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random tri-mode checkpoint."""
    from nemodiff_train.conversion.importing import import_checkpoint
    from nemodiff_train.model.hf_directory import HFDirectory

    folder = tmp_path_factory.mktemp("sampler")
    small.qwen3(folder / "hf")
    import_checkpoint(HFDirectory(folder / "hf"), str(folder / "megatron"), mask_token=small.MASK)
    return str(folder / "megatron")


def loaded(model: Any, **settings: Any) -> Any:
    """What :func:`train_sampler` takes of a model that has no tokenizer."""
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.decoding.loading import DecodingModel

    return DecodingModel([model], None, DecodingSettings(block_size=BLOCK, max_new_tokens=24, **settings))  # type: ignore[arg-type]


def test_training_beats_chance_and_the_models_confidence(model: Any) -> None:
    """On blocks that it was not trained on; chance is the share of right tokens."""
    from nemodiff_train.decoding.sampler_training import model_confidence, references
    from nemodiff_train.decoding.trajectories import record
    from nemodiff_train.sampler.training import fit, slot_loss

    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(20, 220, (5,), generator=draw).tolist() for _ in range(60)]
    hook = few_tokens(model, 2)
    found = [block for blocks in references(loaded(model), prompts, 60) for block in blocks]
    taught, held_out = (
        record([model], part, BLOCK, model_confidence, torch.linspace(0.5, 1, len(part)))
        for part in (found[:120], found[120:])
    )
    hook.remove()
    assert taught.tokens == sum(BLOCK - 1 for _ in range(120)) and taught.forwards == len(taught.states)
    assert 0 < taught.wrong < taught.tokens
    network, cpu = SlotNetwork(BLOCK, 1, 64), torch.device("cpu")
    before = slot_loss(network, held_out.states, cpu).item()
    losses = list(fit(network, taught.states, steps=80, batch_size=32, learning_rate=1e-3, seed=0))
    share = held_out.states.right[held_out.states.masked].float().mean().item()
    chance = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert slot_loss(network, held_out.states, cpu).item() < min(chance, before)


def test_what_is_visible_in_a_state_is_right(model: Any) -> None:
    """Trajectories at a threshold of 0 take one forward; at 1, one for each token; all end with the reference."""
    from nemodiff_train.decoding.sampler_training import model_confidence, references
    from nemodiff_train.decoding.trajectories import record

    blocks = [block for part in references(loaded(model), PROMPTS, 4) for block in part]
    for threshold, forwards in ((0.0, 1), (1.0, BLOCK - 1)):
        found = record([model], blocks, BLOCK, model_confidence, torch.full((len(blocks),), threshold))
        assert found.forwards == forwards * len(blocks)
    oracle = record([model], blocks, BLOCK, None, torch.full((len(blocks),), 0.5))
    assert len(blocks) <= oracle.forwards <= oracle.tokens
    first = found.states[torch.arange(len(blocks))]
    assert first.masked.sum(1).tolist() == [BLOCK - 1] * len(blocks)


@pytest.mark.parametrize("clean_attention", ["causal", "block_causal"])
def test_trajectories_go_as_decoding_does(model: Any, monkeypatch: pytest.MonkeyPatch, clean_attention: str) -> None:
    """What block diffusion decodes one position per forward, a trajectory finds again without one mistake."""
    from nemodiff_train.decoding.diffusion import has_known_first_token
    from nemodiff_train.decoding.sampler_training import model_confidence
    from nemodiff_train.decoding.trajectories import record, reference_blocks

    monkeypatch.setattr(model.config, "clean_attention", clean_attention)
    layout = {
        "blocks_from_text_start": clean_attention == "block_causal",
        "known_first_token": has_known_first_token(model.config),
    }
    answers = run(model, PROMPTS, "diffusion", policy="fixed", steps=BLOCK, max_new_tokens=24)[0]
    blocks = [
        block
        for prompt, answer in zip(PROMPTS, answers, strict=True)
        for block in reference_blocks(prompt, answer, BLOCK, **layout)
    ]
    found = record([model], blocks, BLOCK, model_confidence, torch.full((len(blocks),), 1.0))
    assert found.wrong == 0 and found.forwards == found.tokens == sum(BLOCK - block.known for block in blocks)
    assert len(blocks) >= 11 and (layout["blocks_from_text_start"] or found.tokens == 7 * 12)


def test_the_threshold_is_as_careful_as_the_policy_at_its_best() -> None:
    from nemodiff_train.decoding.sampler_training import select_threshold
    from nemodiff_train.sampler.description import Point

    def points(*wrong: float) -> list[Point]:
        return [
            Point(threshold=0.5 + index / 10, tokens_per_forward=2, wrong=share) for index, share in enumerate(wrong)
        ]

    assert select_threshold(points(0.03, 0.02, 0.01, 0.0), points(0.05, 0.02, 0.03)) == 0.6
    assert select_threshold(points(0.03, 0.02, 0.01, 0.01), points(0.05, 0.0)) == 0.7


def test_a_sampler_is_what_was_written(tmp_path: Path, sampler: TrainedSampler) -> None:
    write_sampler(tmp_path / "sampler", sampler)
    read = read_sampler(tmp_path / "sampler")
    assert read.description == sampler.description
    features = torch.rand(3, BLOCK, len(FEATURES))
    assert torch.equal(read(features), sampler(features))
    assert sorted(file.name for file in (tmp_path / "sampler").iterdir()) == ["sampler.json", "sampler.safetensors"]


def damage(folder: Path, what: str) -> None:
    """Make a sampler unusable."""
    file = folder / "sampler.json"
    told = json.loads(file.read_text())
    if what == "no weights":
        (folder / "sampler.safetensors").unlink()
    elif what == "half of the weights":
        (folder / "sampler.safetensors").write_bytes((folder / "sampler.safetensors").read_bytes()[:1000])
    elif what == "another shape":
        file.write_text(json.dumps(told | {"width": 128}))
    elif what == "no whole heads":
        file.write_text(json.dumps(told | {"width": 200}))
    elif what == "other features":
        file.write_text(json.dumps(told | {"features": told["features"][1:]}))
    else:
        file.write_text(json.dumps(told | {"threshold": 1.5}))


@pytest.mark.parametrize(
    "what",
    [
        "no weights",
        "half of the weights",
        "another shape",
        "no whole heads",
        "other features",
        "a threshold of 1.5",
    ],
)
def test_a_damaged_sampler_is_refused(tmp_path: Path, sampler: TrainedSampler, what: str) -> None:
    write_sampler(tmp_path / "sampler", sampler)
    damage(tmp_path / "sampler", what)
    with pytest.raises(UserError, match="nemodiff sampler"):
        read_sampler(tmp_path / "sampler")


def test_a_prompt_that_comes_again_is_taken_once(tmp_path: Path) -> None:
    """It would be learned from and held out."""
    from nemodiff_train.cli.sampler import training_prompts

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abacb"))
    assert training_prompts(str(file), None) == ["a", "b", "c"] and training_prompts(str(file), 2) == ["a", "b"]


def test_the_commands(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train one in small, decode with it, sweep its threshold, and refuse what does not fit."""
    tasks = tmp_path / "prompts.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"the quick {n}", "answer": "1"}) + "\n" for n in range(12)))
    made, common = str(tmp_path / "sampler"), ["--block-size", str(BLOCK), "--max-new-tokens", "17"]
    small_one = ["--trajectories", "8", "--steps", "2", "--layers", "1", "--width", "64"]
    train = ["sampler", checkpoint, "--task", str(tasks), "--output", made, *common, *small_one]
    assert main(train) == 0
    told = json.loads((tmp_path / "sampler" / "sampler.json").read_text())
    assert told["block_size"] == BLOCK and told["checkpoint"].endswith("iter_0000000")
    use = ["--policy", "trained", "--sampler", made]
    assert main(["generate", checkpoint, "the quick", "--mode", "diffusion", "--max-new-tokens", "9", *use]) == 0
    report = tmp_path / "report"
    sweep = ["--modes", "diffusion", "--thresholds", "0.3", "--max-new-tokens", "9", *use]
    assert main(["eval", checkpoint, "--task", str(tasks), "--output", str(report), *sweep]) == 0
    figures = json.loads((report / "metrics.json").read_text())
    points = {point["metrics"]["settings"]["threshold"] for point in figures["sweep"]}
    assert points == {0.3, told["threshold"]}  # its own threshold is the default
    capsys.readouterr()
    for words, reason in (
        (train, "exists already"),
        (["generate", checkpoint, "x", "--policy", "trained"], "go together"),
        (["generate", checkpoint, "x", "--sampler", made], "go together"),
        (["generate", checkpoint, "x", "--policy", "trained", "--sampler", checkpoint], "not a trained sampler"),
        (["generate", checkpoint, "x", "--mode", "diffusion", "--block-size", "4", *use], "blocks of 8, not of 4"),
        (["sampler", checkpoint, "--task", "gsm8k", "--output", f"{made}2"], "unknown task"),
        (["generate", checkpoint, "x", *use], "decides in mode diffusion, not in linear"),
        (["eval", checkpoint, "--modes", "ar,tree", "--output", f"{made}2", *use], "not in ar, tree"),
        (["sampler", checkpoint, "--width", "100", "--output", f"{made}2"], "multiple of 64"),
        (["sampler", checkpoint, "--width", "8256", "--output", f"{made}2"], "at most 8192"),
        (["sampler", checkpoint, "--layers", "65", "--output", f"{made}2"], "at most 64"),
        (["sampler", checkpoint, "--block-size", "1", "--output", f"{made}2"], "block_size is 1"),
        (["sampler", checkpoint, "--seed", "-1", "--output", f"{made}2"], "seed is -1"),
        (["sampler", checkpoint, "--seed", str(2**64), "--output", f"{made}2"], "below 2^64"),
    ):
        assert main(words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert sum("error" in line for line in lines) == 1 and reason in lines[-1], lines
    assert {path.name for path in tmp_path.iterdir()} == {"sampler", "report", "prompts.jsonl"}
