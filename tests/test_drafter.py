"""The drafter: its loss, its training under every layout, its use in decoding, its directory."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemodiff_train.cli import main
from nemodiff_train.config.overrides import override
from nemodiff_train.decoding.session import Session
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.drafter.loss import simulate_acceptance, slot_losses
from nemodiff_train.drafter.slots import SlotOutcomes, Slots
from nemodiff_train.objective.drafts import DRAFT_KINDS
from nemodiff_train.objective.noise import DRAFTS, generator
from nemodiff_train.training.samples import first_samples
from nemodiff_train.validation.settings import section_problems
from tests import jobs, small
from tests.test_chat import give_template, maker, packed, prepare, talks
from tools.support import layouts
from tools.support.ranks import Jobs, RankPool


def stated(draft: Tensor, verifier: Tensor, config: DrafterConfig) -> Tensor:
    """One slot's loss, token by token, as section 3.3 has it."""
    size = min(config.support or len(draft), len(draft))
    support = {int(i) for logits in (draft, verifier) for i in logits.topk(size).indices}
    tokens = sorted(support)

    def probabilities(logits: Tensor, temperature: float) -> list[Tensor]:
        powers = [(logits[token] / temperature).exp() for token in tokens]
        return [power / torch.stack(powers).sum() for power in powers]

    p, q = probabilities(verifier, config.temperature), probabilities(draft, config.temperature)
    choice = max(range(len(tokens)), key=lambda index: float(verifier[tokens[index]]))
    of_choice = -probabilities(draft, 1.0)[choice].log()
    divergence = torch.stack([a * (a / b).log() for a, b in zip(p, q, strict=True)]).sum()
    variation = torch.stack([(a - b).abs() for a, b in zip(p, q, strict=True)]).sum() / 2
    acceptance = sum(min(float(a), float(b)) for a, b in zip(p, q, strict=True))
    share = math.exp(-0.5 * acceptance)
    return {
        "lk_hybrid": share * divergence + (1 - share) * variation + of_choice,
        "total_variation": variation,
        "cross_entropy": of_choice,
        "kl": divergence,
    }[config.loss]


@pytest.mark.parametrize(("support", "temperature"), [(3, 3.0), (200, 3.0), (0, 1.0)])
@pytest.mark.parametrize("loss", ["lk_hybrid", "total_variation", "cross_entropy", "kl"])
def test_loss_and_gradient_are_the_papers(loss: Any, support: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    config = DrafterConfig(loss=loss, support=support, temperature=temperature)
    draft, verifier = (torch.randn(6, 12, generator=draw, dtype=torch.float64) * 2 for _ in range(2))
    found, expected = draft.clone().requires_grad_(), draft.clone().requires_grad_()
    ours = slot_losses(found, verifier, config)
    theirs = torch.stack([stated(one, other, config) for one, other in zip(expected, verifier, strict=True)])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)


def outcomes(
    draft: Tensor, verifier: Tensor, usable: Tensor, uniform: Tensor, config: DrafterConfig | None = None
) -> SlotOutcomes:
    """What becomes of one draft after a known token: of [1, k + 1] positions, the first is that token."""
    config = config or DrafterConfig()
    slots = Slots.from_segment_ids(
        torch.zeros(1, 3, draft.shape[1], dtype=torch.int32), DRAFT_KINDS["nemotron"], shifted=False
    )
    return SlotOutcomes.from_acceptance(slots, usable, *simulate_acceptance(draft, verifier, uniform, config), config)


def test_the_accepted_prefix_and_the_first_rejected_slot_count() -> None:
    verifier = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3, 1, 2]]), 5) * 9.0
    draft = torch.nn.functional.one_hot(torch.tensor([[4, 1, 2, 0, 1, 2]]), 5) * 9.0
    usable, greedy = torch.ones(1, 6, dtype=torch.bool), torch.full((1, 6, 2), 0.999)
    assert outcomes(draft, verifier, usable, greedy).counted.tolist() == [[False] + [True] * 3 + [False] * 2]
    every = outcomes(draft, verifier, usable, greedy, DrafterConfig(slots="all"))
    assert every.counted[:, 1:].all() and every.accepted.tolist() == [[False, True, True, False, False, False]]
    unlucky = torch.tensor([0.0, 0.9999]).expand(1, 6, 2)  # every slot drawn; none of the draws is the choice
    assert outcomes(draft, verifier, usable, unlucky).counted.nonzero().tolist() == [[0, 1]]
    ended = torch.tensor([[True, True, False, True, True, True]])
    assert outcomes(draft, verifier, ended, greedy).counted.sum() == 1
    weights = outcomes(draft, verifier, usable, greedy, DrafterConfig(position_decay=4.0)).weights
    assert weights[0, 1:4].tolist() == pytest.approx([1, math.exp(-1 / 4), math.exp(-2 / 4)])


def test_as_many_slots_are_accepted_as_q_gives_the_choice() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, generator=draw)
    draft, verifier = (each.expand(100_000, 4) for each in logits)
    uniform = torch.rand(100_000, 2, generator=draw)
    _, accepted = simulate_acceptance(draft, verifier, uniform, DrafterConfig(sampled_fraction=1.0))
    of_choice = float(logits[0].softmax(-1)[logits[1].argmax()])
    assert float(accepted.float().mean()) == pytest.approx(of_choice, abs=0.005)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", DRAFT_KINDS)
def test_slots_of_documents_and_blocks_of_any_size(kind: str, shift: bool) -> None:
    """Found by walking over every block: which positions draft, their numbers, and where a draft ends."""
    choices, draw = DRAFT_KINDS[kind], torch.Generator().manual_seed(3)
    for block in (2, 3, 7, 16):
        segment_ids = torch.stack([small.documents(draw, 90, block, average=25) for _ in range(3)])
        documents, blocks = segment_ids[:, 0].tolist(), segment_ids[:, 1].tolist()
        slots = Slots.from_segment_ids(segment_ids, choices, choices.shifted(shift))
        passed = torch.rand(3, 90, generator=draw) < 0.7
        reached = slots.reached(passed)
        for row in range(3):
            for number in range(blocks[row][-1] + 1):
                places = [place for place in range(90) if blocks[row][place] == number]
                if kind == "uno":
                    before = places[0] - 1
                    drafts = places if before >= 0 and documents[row][before] == documents[row][places[0]] else []
                else:
                    drafts = places[:-1] if shift else places[1:]
                assert [place for place in places if slots.exists[row, place]] == drafts
                assert [int(slots.draft_position[row, place]) for place in drafts] == list(range(1, len(drafts) + 1))
                open_ = True
                for place in drafts:
                    assert bool(reached[row, place]) == open_
                    open_ = open_ and bool(passed[row, place])


def test_slots_of_conversations() -> None:
    """A block after nothing drafts nothing, as before; padding is part of its conversation."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        turns = [draw.integers(1, 9, 2 * draw.integers(1, 3)).tolist() for _ in range(draw.integers(1, 5))]
        segment_ids = maker().make(packed(*turns), 0, 0)["segment_ids"]
        document, block, _ = segment_ids.tolist()
        whose = [number if number >= 0 else -1 - number for number in document]
        exists = Slots.from_segment_ids(segment_ids[None], DRAFT_KINDS["uno"], shifted=True).exists[0].tolist()
        for place, found in enumerate(exists):
            start = block.index(block[place])
            assert found == (start > whose.index(whose[place]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "kt"}, "lk_hybrid"),
        ({"kind": "unos"}, "uno"),
        ({"temperature": 0}, "temperature"),
        ({"sampled_fraction": 2}, "sampled_fraction"),
        ({"support": -1}, "support"),
    ],
)
def test_switches_are_checked(changes: dict[str, Any], said: str) -> None:
    (line,) = section_problems("drafter", DrafterConfig(**changes))
    assert said in line


CURRICULUM = [
    "dataset.reset_attention_mask=true",
    "objective.block_schedule=curriculum",
    "objective.block_sizes=[2,4,6,8,12,16]",
    "objective.block_steps=2",
]
"""The blocks of Uno, with documents: blocks begin anywhere and reach across context-parallel chunks."""

SMOOTH = "drafter.loss=kl"
"""A loss whose gradient moves no further than its logits do.  That of the total variation, Uno's own loss, jumps
where the draft and the verifier give a token the same probability: what rounding makes of it differs between
processors."""

FASTER = ["optimizer.lr=1e-2", "optimizer.min_lr=1e-3"]
"""A rate at which ten steps of a path selector change drafts."""

REFERENCES: dict[str, tuple[str, str, list[str]]] = {
    "one": ("drafter", "base", []),
    "documents": ("drafter", "base", [word for word in layouts.DOCUMENTS if "alpha" not in word]),
    "uno": ("uno", "ar", [*CURRICULUM, SMOOTH]),
    "uno_variation": ("uno", "ar", CURRICULUM),
    "talks": ("drafter", "base", ["drafter.sampled_fraction=0"]),
    "uno_talks": ("uno", "ar", [*CURRICULUM[1:], SMOOTH]),
    "selector": ("selector", "base", FASTER),
    "own_selector": ("selector", "base", FASTER),
    "uno_selector": ("selector", "ar", [*FASTER, "dataset.reset_attention_mask=true"]),
}
"""Recipe, start and settings of the drafters that are trained on one rank."""

SELECTED = {"selector": "one", "uno_selector": "uno"}
"""Whose drafts a path selector is trained for; ``own_selector`` for those of the model itself."""

LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "micro1": ("one", 1, ["train.micro_batch_size=1"]),
    "sp2": ("one", 2, layouts.SP2),
    "cp2": ("one", 2, layouts.CP2),
    "pp2_dp2": ("one", 4, layouts.PP2),
    "documents_cp2": ("documents", 2, layouts.CP2),
    "uno_sp2_cp2": ("uno", 4, [*layouts.SP2, *layouts.CP2]),
    "uno_pp2_dp2": ("uno", 4, layouts.PP2),
    "uno_variation_pp2_dp2": ("uno_variation", 4, layouts.PP2),
    "uno_variation_sp2_cp2": ("uno_variation", 4, [*layouts.SP2, *layouts.CP2]),
    "talks_sp2_cp2": ("talks", 4, [*layouts.SP2, *layouts.CP2]),
    "talks_pp2_dp2": ("talks", 4, layouts.PP2),
    "uno_talks_sp2_cp2": ("uno_talks", 4, [*layouts.SP2, *layouts.CP2]),
    "selector_again": ("selector", 1, []),
    "selector_sp2": ("selector", 2, layouts.SP2),
    "selector_pp2_dp2": ("selector", 4, layouts.PP2),
    "uno_selector_sp2_cp2": ("uno_selector", 4, [*layouts.SP2, *layouts.CP2]),
}
"""What each continues after the first steps, the number of ranks, and the layout."""
HALF_WAY, STEPS = 2, 10
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Jobs:
    """A tri-mode and an AR model, drafters for them on one rank, and those drafters continued under other layouts."""
    folder = tmp_path_factory.mktemp("drafter")
    small.qwen3(folder / "qwen3")
    give_template(folder / "qwen3")
    small.data(folder / "data")
    assert prepare(folder, talks(200), folder / "qwen3") == 0
    runs = Jobs(ranks, folder)
    data = str(folder / "data")
    base = {"start_from": str(folder / "qwen3"), "data": data, "output": str(folder / "base")}
    runs.add("base", 1, jobs.train, **base, settings=["train.train_iters=5", "checkpoint.save_interval=5"])
    plain = str(folder / "ar" / "checkpoints")
    runs.add("ar", 1, jobs.convert, commands=[["import", str(folder / "qwen3"), plain]])

    def arguments(name: str, reference: str, *settings: str) -> dict[str, Any]:
        recipe, start, shared = REFERENCES[reference]
        steps = [f"train.train_iters={STEPS}", "train.micro_batch_size=4"]
        start_from, output = str(folder / start / "checkpoints"), str(folder / name)
        settings = (*steps, *shared, *settings)
        source = str(folder / "chat") if "talks" in name else data
        words = {"recipe": recipe, "start_from": start_from, "data": source, "output": output, "settings": settings}
        drafter = {"drafter": str(folder / SELECTED[reference] / "checkpoints")} if reference in SELECTED else {}
        return drafter | words

    for name, (_, start, _) in REFERENCES.items():
        saved = f"checkpoint.save_interval={HALF_WAY}"
        after = SELECTED.get(name, start)
        runs.add(name, 1, jobs.train, after=after, **arguments(name, name, saved, "checkpoint.most_recent_k=-1"))
    for name, (reference, world_size, settings) in LAYOUTS.items():
        stopped = {"stopped": str(folder / reference), "step": HALF_WAY}
        runs.add(name, world_size, jobs.resume, after=reference, **stopped, **arguments(name, reference, *settings))
    for name, world_size, options in (
        ("one", 1, []), ("sp2", 2, ["--tensor-parallel", "2"]), ("uno", 1, []), ("uno_sp2_cp2", 1, []),
        ("selector_again", 1, []),
    ):  # fmt: skip
        export = ["export", str(folder / name / "checkpoints"), str(folder / f"{name}-peft"), *options]
        runs.add(f"export_{name}", world_size, jobs.convert, after=name, commands=[export])
    for name, (start, parts) in {"selector": ("base", (2, 2)), "uno_selector": ("ar", (2, 1))}.items():
        models = [str(folder / part / "checkpoints") for part in (start, name)]
        for tensor, pipeline in ((1, 1), parts):
            world_size, named = tensor * pipeline, f"drafts_{name}_{tensor}x{pipeline}"
            runs.add(named, world_size, jobs.drafts, after=name, models=models, tensor=tensor, pipeline=pipeline)
    return runs


@pytest.fixture(scope="module")
def base(runs: Jobs) -> str:
    """The checkpoint of the tri-mode model."""
    return runs.checkpoints("base")


@pytest.fixture(scope="module")
def drafter(runs: Jobs) -> str:
    """The checkpoint of the drafter on one rank."""
    return runs.checkpoints("one")


def continued(runs: Jobs, layout: str) -> tuple[layouts.Steps, layouts.Steps]:
    """Return the steps of a layout, and those of the run that it continues."""
    steps, expected = runs[layout]["steps"], runs[LAYOUTS[layout][0]]["steps"][HALF_WAY:]
    assert [step["step"] for step in steps] == [step["step"] for step in expected] != []
    return steps, expected


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "uno_variation_sp2_cp2"])
def test_every_layout_trains_the_same_drafter(runs: Jobs, layout: str) -> None:
    steps, expected = continued(runs, layout)
    for name in ("draft_loss", "grad_norm", "counted_slots", "acceptance_length/7", "expected_tpf"):
        for mine, other in zip(steps, expected, strict=True):
            assert mine[name] == pytest.approx(other[name], rel=layouts.TOLERANCE), name


def test_another_order_of_sums_trains_with_the_total_variation(runs: Jobs) -> None:
    """The first loss is the same; what follows is near, see ``SMOOTH``."""
    steps, expected = continued(runs, "uno_variation_sp2_cp2")
    for mine, other, tolerance in zip(
        steps, expected, [layouts.TOLERANCE] + (STEPS - HALF_WAY - 1) * [1e-3], strict=True
    ):
        assert mine["draft_loss"] == pytest.approx(other["draft_loss"], rel=tolerance)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("name", ["talks", "uno_talks"])
def test_answers_are_drafted_as_in_decoding(runs: Jobs, name: str) -> None:
    """Slots and losses of a step, from forwards of decoding after each conversation's own text."""
    expected = runs[name]["steps"][HALF_WAY]
    recipe, start, settings = REFERENCES[name]
    model, output = str(runs.folder / start / "checkpoints"), runs.folder / name
    config = getattr(small, recipe)(model, str(runs.folder / "chat"), str(output))
    config = override(config, dict(word.split("=", 1) for word in settings))
    config.propagate()
    first = HALF_WAY * config.train.global_batch_size
    samples = first_samples(config, first + config.train.global_batch_size)[first:]
    decoding = opened(model, str(output / "checkpoints" / f"iter_{HALF_WAY:07d}"))
    losses, usable = [], 0
    for sample in samples:
        for draft, verifier in answer_drafts(decoding.model, sample, config):
            usable += len(draft)
            agrees = draft.argmax(-1) == verifier.argmax(-1)
            reached = agrees.long().cumprod(0).roll(1)
            reached[:1] = 1
            counts = reached.bool() if config.drafter.slots == "visited" else torch.ones_like(agrees)
            losses.append(slot_losses(draft, verifier, config.drafter)[counts])
    counted = torch.cat(losses)
    assert len(counted) and (len(counted) < usable) == (name == "talks")
    assert float(counted.mean()) == pytest.approx(expected["draft_loss"], rel=1e-4)
    assert len(counted) / usable == pytest.approx(expected["counted_slots"], rel=1e-6)


def answer_drafts(model: Any, sample: dict[str, Tensor], config: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of each draft inside an answer, and of its verification: [slots, vocabulary] each."""
    kind, mask = config.drafter.draft_kind, config.model.mask_token_id
    length = config.dataset.seq_length
    tokens, (documents, blocks, _) = sample["tokens"][length:].tolist(), sample["segment_ids"].tolist()
    noise = generator(config.objective.seed, DRAFTS, int(sample["index"])).integers(0, small.VOCABULARY, length)
    answers = {blocks[place] for place in range(length) if sample["maskable"][place]}
    for block in sorted(answers):
        places = [place for place in range(length) if blocks[place] == block]
        said = sum(bool(sample["maskable"][place]) for place in places)
        before = [tokens[place] for place in range(places[0]) if documents[place] == documents[places[0]]]
        text, rows = [*before, *(tokens[place] for place in places)], torch.arange(1)
        if kind.known_token_in_block:
            known, filling = len(before), [mask] * (len(places) - 1)
            targets = said - 1
        else:
            known, filling = len(before) - 1, noise[places].tolist()
            following = places[0] + said
            goes_on = following < length and bool(sample["maskable"][following])
            targets = said if goes_on else said - 1
        session = Session(model, 1, len(text) + 2, mask)
        if known:
            session.prefill([text[:known]])
        drafted = session.forward(torch.tensor([[text[known], *filling]]), rows, "draft", causal=kind.causal)[0]
        verified = session.forward(torch.tensor([text[known:]]), rows, "verify", causal=True)[0]
        later = 0 if kind.known_token_in_block else 1  # the verifier predicts the token after each, as such drafts do
        if targets > 0:
            yield (
                drafted[1 : 1 + targets].clamp(min=-1e30),
                verified[later : later + targets].clamp(min=-1e30),
            )


def test_it_acts_on_drafts_alone(base: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapters in place, what is prefilled, verified and denoised stays bit for bit as it was."""
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.model.checkpoint import Checkpoint

    prompts = [list(range(20, 33)), list(range(50, 55))]
    tokens, rows = torch.tensor([[40, 41, 42, 1], [60, 61, 1, 1]]), torch.arange(2)

    def logits(opened: Any) -> dict[str, Tensor]:
        session = Session(opened.model, 2, 64, opened.model[0].config.mask_token_id)
        found = {"prefill": session.prefill(prompts)}
        for kind, causal in (("verify", True), ("denoise", False), ("draft", False)):
            found[kind] = session.forward(tokens, rows, kind, causal=causal)  # type: ignore[arg-type]
        return found

    plain = load_decoding_model(Checkpoint.open(base), max_new_tokens=24)
    with_drafter = load_decoding_model(Checkpoint.open(base), max_new_tokens=24, drafter=Checkpoint.open(drafter))
    before, after = logits(plain), logits(with_drafter)
    assert all(torch.equal(before[kind], after[kind]) for kind in ("prefill", "verify", "denoise"))
    assert not torch.equal(before["draft"], after["draft"])
    outputs = [decode(opened.model, prompts, "linear", opened.settings)[0] for opened in (plain, with_drafter)]
    assert [one.tokens for one in outputs[0]] == [one.tokens for one in outputs[1]]

    # Megatron's own forward, which Transformer Engine's layers take, gives the same.
    from nemodiff_train.decoding import pipeline

    monkeypatch.setattr(pipeline, "can_fast_forward", lambda chunk: False)
    for kind, values in logits(with_drafter).items():
        torch.testing.assert_close(values, after[kind], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def uno(runs: Jobs) -> tuple[str, str]:
    """The checkpoints of an AR model and of its ``uno`` drafter on one rank."""
    return str(runs.folder / "ar" / "checkpoints"), runs.checkpoints("uno")


def opened(model: str, drafter: str | None) -> Any:
    """A model that is ready to decode."""
    from nemodiff_train.decoding.loading import load_decoding_model
    from nemodiff_train.model.checkpoint import Checkpoint

    options = {"drafter": Checkpoint.open(drafter)} if drafter else {}
    return load_decoding_model(Checkpoint.open(model), max_new_tokens=30, **options)  # type: ignore[arg-type]


def test_an_ar_model_drafts_for_itself(uno: tuple[str, str]) -> None:
    """Token for token AR, for batches and alone, with limits and stop tokens anywhere in a draft."""
    from collections import Counter
    from dataclasses import replace

    from nemodiff_train.decoding.decode import decode

    model = opened(*uno)
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (48,), generator=draw).tolist()
    prompts = [torch.randint(20, 220, (length,), generator=draw).tolist() for length in lengths]

    def tokens(mode: str, **settings: Any) -> list[list[int]]:
        rows = decode(model.model, prompts, mode, replace(model.settings, **settings))[0]
        assert all(len(row.tokens) - 1 == sum(cycle.committed for cycle in row.cycles) for row in rows if row.cycles)
        return [row.tokens for row in rows]

    free = tokens("ar")
    stop = frozenset([Counter(token for row in free for token in row).most_common(1)[0][0]])
    ended = tokens("ar", stop_token_ids=stop)
    for mode in ("linear", "tree"):
        for block_size in (2, 7, 16):
            assert tokens(mode, block_size=block_size, tree_nodes=24) == free
            assert tokens(mode, block_size=block_size, stop_token_ids=stop) == ended
        for limit in range(1, 6):
            assert tokens(mode, block_size=8, max_new_tokens=limit) == [row[:limit] for row in free]
        alone = [decode(model.model, [prompt], mode, model.settings, [number])[0][0].tokens for number, prompt in
                 enumerate(prompts[:6])]  # fmt: skip
        assert alone == free[:6]


@torch.inference_mode()
def test_its_draft_is_the_exported_adapters_on_noise_alone(runs: Jobs, uno: tuple[str, str], tmp_path: Path) -> None:
    """What SGLang computes: the base model for the text and the known token, the adapters for what follows it.

    The directory follows its loader: PEFT's two files, ``base_model.model.model.layers.N.`` and the name of a
    projection before ``lora_A.weight`` or ``lora_B.weight``, all projections of a fused layer at once, one rank for
    all, and no tensor besides.
    """
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert runs["export_uno"]["codes"] == runs["export_uno_sp2_cp2"]["codes"] == [0]
    folder = runs.folder / "uno-peft"
    settings, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / FILE)
    assert {"adapter_config.json", FILE} <= {path.name for path in folder.iterdir()}
    blocks = {"self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}
    expected = {
        f"base_model.model.model.layers.{layer}.{block}.{name}.lora_{factor}.weight"
        for layer in range(2) for block, names in blocks.items() for name in names for factor in "AB"
    }  # fmt: skip
    assert set(tensors) == expected
    assert set(settings["target_modules"]) == set().union(*blocks.values()) and settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["bias"], settings["use_dora"]) == (8, 128, "none", False)
    assert not settings["modules_to_save"] and not settings["rank_pattern"] and not settings["use_rslora"]
    for name, values in tensors.items():
        assert values.dtype == torch.float32 and values.shape[0 if "lora_A" in name else 1] == 8
    for name, values in load_file(runs.folder / "uno_sp2_cp2-peft" / FILE).items():  # trained under another layout
        torch.testing.assert_close(values, tensors[name], rtol=1e-3, atol=1e-5)

    model, prompt, known, noise = opened(*uno), [30, 31, 40, 52, 77], 90, [7, 300, 150, 22, 219, 64, 5]
    session = Session(model.model, 1, 40, None)
    session.prefill([prompt])
    drafted = session.forward(torch.tensor([[known, *noise]]), torch.arange(1), "draft", causal=True)[0]
    plain = session.forward(torch.tensor([[known, *noise]]), torch.arange(1), "verify", causal=True)[0]
    assert torch.equal(drafted[0], plain[0]) and not torch.allclose(drafted[1:], plain[1:], atol=1e-3)

    base = AutoModelForCausalLM.from_pretrained(runs.folder / "qwen3", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
    for name, module in adapted.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, inputs: inputs[0] * (torch.arange(13) > 5)[:, None])
    logits = adapted(torch.tensor([[*prompt, known, *noise]])).logits[0, 5:]
    torch.testing.assert_close(drafted, logits, rtol=1e-4, atol=1e-4)


def test_exported_as_peft_writes_it(runs: Jobs, base: str, tmp_path: Path) -> None:
    """The adapters that PEFT reads do to the exported model what ours do to the checkpoint."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    assert runs["export_one"]["codes"] == runs["export_sp2"]["codes"] == [0]
    exported = runs.folder / "one-peft"
    one, split = (load_file(runs.folder / f"{name}-peft" / "adapter_model.safetensors") for name in ("one", "sp2"))
    assert list(one) == list(split) and len(one) == 2 * 2
    for key, values in one.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, split[key], rtol=1e-4, atol=1e-6)
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (16, 64, ["o_proj"])

    assert main(["convert", "export", base, str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(model, str(exported), torch_device="cpu")
    loaded = {name: values for name, values in adapted.state_dict().items() if "lora_" in name}
    assert {name.replace(".default", ""): None for name in loaded}.keys() == one.keys()
    for name, values in loaded.items():
        assert torch.equal(values, one[name.replace(".default", "")])


def test_refused_in_one_line(
    runs: Jobs, base: str, drafter: str, uno: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = runs.folder
    output, (plain, own) = tmp_path / "output", uno
    train = ["train", "drafter", f"start_from={base}", f"data={folder / 'data'}", f"output={output}"]
    select, own_selector = ["train", "selector", *train[2:]], runs.checkpoints("own_selector")
    train_uno = ["train", "drafter_uno", f"start_from={plain}", *train[3:]]
    other = tmp_path / "other"
    small.qwen3(other, num_hidden_layers=4)
    assert main(["convert", "import", str(other), str(tmp_path / "four")]) == 0
    wider = tmp_path / "wider"
    small.qwen3(wider, intermediate_size=256)
    assert main(["convert", "import", str(wider), str(tmp_path / "wide")]) == 0
    broken = tmp_path / "broken"
    shutil.copytree(drafter, broken)
    for file in broken.rglob("*.distcp"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    capsys.readouterr()
    for words, said in (
        (["generate", drafter, "a"], "is a drafter"),
        (["generate", base, "a", "--drafter", base], "is not a drafter"),
        (["generate", base, "a", "--mode", "ar", "--drafter", drafter], "modes linear and tree"),
        (["generate", plain, "a"], "or a drafter of kind uno"),
        (["generate", plain, "a", "--mode", "tree"], "or a drafter of kind uno"),
        (["generate", plain, "a", "--drafter", drafter], "drafts with a mask token"),
        (["generate", plain, "a", "--mode", "quadratic", "--drafter", own], "needs a mask token"),
        (["generate", str(tmp_path / "four"), "a", "--drafter", own], "num_layers=2; this one has 4"),
        (["generate", plain, "a", "--mode", "tree", "--drafter", own, "--tree-nodes", "1"], "tree_nodes is 1"),
        ([*train[:2], f"start_from={folder / 'qwen3'}", *train[3:]], "import"),
        ([*train[:2], f"start_from={drafter}", *train[3:]], "is a drafter"),
        ([*select, f"drafter={base}"], "is not a drafter"),
        (["train", "selector", f"start_from={tmp_path / 'four'}", *train[3:], f"drafter={own}"], "this one has 4"),
        ([*select, "rank=0"], "takes 1 to"),
        ([*select, "rank=1000000000"], "takes 1 to"),
        (["convert", "export", own_selector, str(output)], "a path selector alone"),
        ([*train[:2], f"start_from={plain}", *train[3:]], "has no mask token"),
        ([*train, "lora_rank=many"], "lora_rank=many is not a whole number"),
        ([*train, "lora_rank=0"], "have rank 0"),
        ([*train, "objective.block_schedule=random", "objective.block_sizes=[1,8]"], "a block of 1 has no token"),
        ([*train, "objective.alpha=0.5"], "objective.alpha has no effect on a drafter"),
        ([*train_uno, "objective.mask_embedding_noise=1"], "objective.mask_embedding_noise has no effect"),
        ([*train_uno, "targets=some"], "use all or o_proj"),
        ([*train_uno, "peft.target_modules=['linear_q']"], "peft.target_modules cannot be overridden"),
        ([*train_uno, "drafter.kind=uni"], "drafter.kind is 'uni'"),
        (["convert", "export", drafter, str(output), "--format", "nemotron"], "Ministral 3"),
        (["convert", "export", own, str(output), "--format", "tri-mode"], "use --format ar"),
        (["convert", "export", plain, str(output), "--drafter", own], "holds drafters of kind nemotron"),
        (["convert", "export", str(broken), str(output)], "has changed since it was saved"),
        (["convert", "export", base, str(output), "--drafter", str(broken)], "has changed since it was saved"),
        (["generate", str(tmp_path / "wide"), "a", "--drafter", own], "ffn_hidden_size=128; this one has 256"),
        (["convert", "export", own, str(wider / "uno")], "intermediate_size=128; "),
    ):
        assert main(words) == 2, words
        said_so = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nemodiff: error:")]
        assert len(said_so) == 1 and said in said_so[0], (words, said_so)
        assert not output.exists()


def test_a_selectors_checkpoint_has_the_adapters_too(runs: Jobs, drafter: str) -> None:
    """Those that it was trained for, to the bit; and tables of the pairs under every layout."""
    from safetensors.torch import load_file

    from nemodiff_train.decoding.path_distribution import PathDistribution

    assert runs["export_one"] and runs["own_selector"] and runs["export_selector_again"]["codes"] == [0]
    adapters, kept = (load_file(runs.folder / f"{name}-peft" / FILE) for name in ("one", "selector_again"))
    assert all(torch.equal(adapters[name], kept[name]) for name in {*adapters, *kept})

    loaded = opened(str(runs.folder / "base" / "checkpoints"), str(runs.folder / "selector" / "checkpoints"))
    (chunk,) = loaded.model
    rows = chunk.output_layer.weight.double()
    rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for matrix, table in ((chunk.selector.before, "before"), (chunk.selector.after, "after")):
        found = getattr(chunk.selector_tables, table)
        assert matrix.std() > 1e-3
        torch.testing.assert_close(found.double(), rows @ matrix.double().mT, rtol=1e-4, atol=1e-5)
    own = opened(str(runs.folder / "base" / "checkpoints"), str(runs.folder / "own_selector" / "checkpoints"))
    assert own.model[0].selector.after.any()
    assert not any("adapter" in name for name, _ in own.model[0].named_parameters())
    assert PathDistribution.from_draft(own.model[0].selector_tables, torch.randn(1, 3, 320), torch.ones(1, 3, 8))


@pytest.mark.parametrize(("name", "parts"), [("selector", "2x2"), ("uno_selector", "2x1")])
def test_drafts_are_selected_alike_under_every_layout(runs: Jobs, name: str, parts: str) -> None:
    alone, split = runs[f"drafts_{name}_1x1"], runs[f"drafts_{name}_{parts}"]
    assert alone == split
    assert alone["linear"] != alone["unselected"]
    assert alone["tokens"] == alone["ar"]


def test_inspected_as_what_it_is(
    runs: Jobs, drafter: str, uno: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    selector = str(runs.folder / "uno_selector" / "checkpoints")
    assert runs["uno_selector"]
    for checkpoint, kind in (
        (drafter, "nemotron"),
        (uno[1], "uno"),
        (selector, "uno, with a path selector"),
    ):
        assert main(["convert", "inspect", checkpoint]) == 0
        assert f"Megatron checkpoint: drafter, {kind}" in capsys.readouterr().out


@pytest.mark.parametrize("drafts", [True, False], ids=["drafter", "model"])
def test_a_spike_of_the_loss_is_seen(drafts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rerun_state_machine.check_for_spiky_loss asks for it; otherwise nobody waits for the loss."""
    from nemodiff_train.config.context import StepContext
    from nemodiff_train.model.draft_adapter import DraftLoRA
    from nemodiff_train.objective import ObjectiveConfig
    from nemodiff_train.training import step

    built, objective = small.built({}), ObjectiveConfig()
    if drafts:
        DraftLoRA(target_modules=["linear_proj"], dim=4, alpha=16)(built)
    seen: list[tuple[str, bool, bool]] = []
    machine = SimpleNamespace(
        spiky_loss_factor=7.0,
        is_unexpectedly_large=lambda loss, threshold, context: (threshold, context) == (7.0, "loss") and loss > 0,
        validate_result=lambda loss, rejects, message, fatal: seen.append((message, bool(rejects(loss)), fatal)),
    )
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: machine)
    reruns = SimpleNamespace(check_for_spiky_loss=False)
    config = SimpleNamespace(
        objective=objective,
        selector_rank=0,
        drafter=DrafterConfig() if drafts else None,
        model=built.config,
        dataset=SimpleNamespace(needs_segment_ids=False),
        diagnostics=SimpleNamespace(loss_interval=1),
        rerun_state_machine=reruns,
    )
    state: Any = SimpleNamespace(cfg=config, train_state=SimpleNamespace(step=0))
    forward = step.ForwardStep(StepContext(tmp_path))
    monkeypatch.setattr(forward.reader, "read", lambda *arguments: small.batch(built, 64))
    for reruns.check_for_spiky_loss, expected in ((False, []), (True, [("Spiky loss", True, False)])):
        output, reduce = forward(state, iter([]), built)
        assert reduce is not None
        total, denominator, report = reduce(output)
        assert seen == expected and total.item() > 0 and denominator > 0
        assert ("draft_loss" if drafts else "diffusion_loss") in report
