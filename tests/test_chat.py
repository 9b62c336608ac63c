"""Fine-tuning: conversations through the chat template, packed samples, training, decoding behind a prompt."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.bridge.peft.canonical_lora import CanonicalLoRA
from megatron.bridge.peft.dora import DoRA
from megatron.bridge.peft.lora import LoRA
from torch import Tensor

from nemodiff_train.cli import main
from nemodiff_train.data.chat import ChatEncoder, end_of_turn_id
from nemodiff_train.data.conversations import pack
from nemodiff_train.data.messages import Conversation
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import write_checksums
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.conversation import ConversationMaker
from nemodiff_train.objective.rule import can_attend
from nemodiff_train.objective.sample import Sample
from nemodiff_train.validation import adapters, start
from nemodiff_train.validation.objective import objective_problems
from tests import jobs, small
from tests.prepared import one_line, write_jsonl
from tools.support import layouts
from tools.support.ranks import Jobs, RankPool

BLOCK, LENGTH, MASK, PADDING = 4, 48, 1, 0


def maker(**switches: Any) -> ConversationMaker:
    objective = ObjectiveConfig(**{"block_size": BLOCK, **switches})
    assert not [*objective_problems(objective, LENGTH)]
    return ConversationMaker(objective=objective, mask_token_id=MASK, length=LENGTH, padding_id=PADDING, batch_size=8)


def packed(*conversations: list[int], first: int = 10) -> dict[str, Tensor]:
    """A pack of conversations, each the lengths of its turns; tokens count up from ``first``."""
    lengths = torch.tensor([length for turns in conversations for length in turns])
    return {
        "tokens": torch.arange(first, first + int(lengths.sum())),
        "lengths": lengths,
        "answers": torch.tensor([place % 2 == 1 for turns in conversations for place in range(len(turns))]),
        "conversations": torch.tensor([number for number, turns in enumerate(conversations) for _ in turns]),
    }


def sees(sample: Sample) -> Tensor:
    """[2 L, 2 L] who sees whom."""
    everything = small.sample_positions(1, sample["segment_ids"][1], sample["segment_ids"][0])
    return can_attend(everything.as_queries(), everything.as_keys())


def test_the_grid_starts_with_each_answer() -> None:
    made = maker(fully_masked_fraction=1.0).make(packed([3, 6, 2, 4], [5, 3]), 0, 0)
    #         prompt      answer             padding prompt answer      prompt          answer   padding
    document = [0] * 3 + [0] * 6 + [-1] * 2 + [0] * 2 + [0] * 4 + [1] * 5 + [1] * 3 + [-2]
    answer = [False] * 3 + [True] * 6 + [False] * 4 + [True] * 4 + [False] * 5 + [True] * 3 + [False]
    blocks = [0] * 3 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 4 + [5] * 4 + [6] + [7] * 4
    position = [*range(9), 9, 10, *range(9, 15), *range(8), 8]
    size = len(document)
    found = made["segment_ids"][:, :size].tolist()
    assert found[0] == document
    assert found[1] == blocks and found[2] == position
    assert made["maskable"][:size].tolist() == answer and not made["maskable"][size:].any()
    noisy, clean = made["tokens"].unflatten(0, (2, LENGTH))
    real = torch.tensor([number >= 0 for number in document])
    assert (
        clean[:size][real].tolist() == list(range(10, 10 + int(real.sum())))
        and (clean[:size][~real] == PADDING).all()
    )
    assert (noisy[made["maskable"]] == MASK).all() and (noisy[:size][~real] == MASK).all()
    prompt = real & ~torch.tensor(answer)
    assert torch.equal(noisy[:size][prompt], clean[:size][prompt])
    # The last place of a prompt predicts the answer's first token; the answer's last predicts nothing.
    weights = made["loss_mask"].unflatten(0, (2, LENGTH))
    assert weights[1].nonzero()[:, 0].tolist() == [place - 1 for place, said in enumerate(answer) if said]
    assert (weights[0] > 0).tolist() == made["maskable"].tolist()


def test_padding_and_other_conversations_are_unseen() -> None:
    made = maker().make(packed([3, 6, 2, 4], [5, 3]), 0, 0)
    allowed, document = sees(made), made["segment_ids"][0].repeat(2)
    clean = torch.arange(2 * LENGTH) >= LENGTH
    talk = torch.where(document < 0, -1 - document, document)
    assert not (allowed & (talk[:, None] != talk[None, :]) & clean[None, :]).any()
    assert not (allowed & (document < 0) & clean).any()  # nothing sees clean padding
    noisy_pairs = allowed & ~clean[None, :]
    same_block = made["segment_ids"][1].repeat(2)[:, None] == made["segment_ids"][1].repeat(2)[None, :]
    assert not (noisy_pairs & ~same_block).any()
    assert allowed.any(1).all()
    # An answer's blocks see their prompt, and the padding of their last block as the masks that it is in decoding.
    assert allowed[3, LENGTH : LENGTH + 3].all() and allowed[7, 9] and not allowed[13, LENGTH + 9 : LENGTH + 11].any()


def test_noise_is_drawn_for_each_conversation() -> None:
    """A pack trains what its conversations would alone: levels of their own, and all-masked ones among them."""
    levels: list[Tensor] = []
    for index in range(300):
        made = maker(fully_masked_fraction=0.3).make(packed([3, 6], [2, 6], [4, 5]), 0, index)
        level, document = made["noise_level"][:LENGTH], made["segment_ids"][0]
        each = torch.stack([level[(document == number).nonzero()[0, 0]] for number in range(3)])
        for number in range(3):
            assert (level[document == number] == each[number]).all()
        levels.append(each)
    found = torch.stack(levels)
    full = (found == 1).float()
    assert full.mean() == pytest.approx(0.3, abs=0.06)
    assert 0 < (full.sum(1) == 1).float().mean() < 1  # some, not all, of a pack
    assert abs(float(torch.corrcoef(found.T)[0, 1])) < 0.2


def test_shifted_targets_stay_in_their_answer() -> None:
    made = maker(shift=True, fully_masked_fraction=1.0).make(packed([3, 6], [5, 3]), 0, 0)
    weights, labels = made["loss_mask"][:LENGTH], made["labels"][:LENGTH]
    targets = [labels[place].item() for place in weights.nonzero()[:, 0]]
    assert targets == [14, 15, 16, 18, 25, 26]  # every answer token but the first of each block


def test_ar_samples_have_no_padding_between_turns() -> None:
    made = maker(stage="ar").make(packed([3, 6, 2, 4], [5, 3]), 0, 0)
    assert made["tokens"].tolist() == [*range(10, 33), *[PADDING] * (LENGTH - 23)]
    assert made["loss_mask"].sum() == 13


def test_what_does_not_fit_is_cut() -> None:
    made = maker().make(packed([40, 30]), 0, 0)
    assert made["tokens"].shape == (2 * LENGTH,) and made["maskable"].sum() == 8
    assert made["loss_mask"][LENGTH:].sum() == 8 and made["loss_mask"][-1] == 0


def test_packs_are_full_and_complete() -> None:
    sizes = np.random.default_rng(0).integers(1, 400, 2000)
    bins = pack(sizes, 512, seed=3)
    assert sorted(item for items in bins for item in items) == list(range(2000))
    filled = [int(sizes[items].sum()) for items in bins]
    assert max(filled) <= 512 and sum(filled) / (512 * len(bins)) > 0.95
    assert bins == pack(sizes, 512, seed=3) != pack(sizes, 512, seed=4)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (  # what an earlier turn has thought is left out, as Qwen 3's template does
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>hm</think>1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "<think>well</think>2"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    small.tokenizer(folder)
    made = load_tokenizer(str(folder))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


def spoken(tokenizer: Any, talk: list[dict[str, Any]]) -> list[list[str]]:
    """The sequences of the documents that a conversation becomes."""
    encoded = ChatEncoder(tokenizer, end_of_turn_id(tokenizer, None))((Conversation(talk, "talk"),))
    return [
        [tokenizer.decode(part) for part in np.split(document.tokens, np.cumsum(document.lengths)[:-1])]
        for document in encoded.documents
    ]


def test_turns_are_what_the_template_asks_and_the_model_says(tokenizer: Any) -> None:
    (turns,) = spoken(tokenizer, TALK)
    assert turns == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n",
        "<think>hm</think>1<|im_end|>",
        "\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n",
        "<think>well</think>2<|im_end|>",
    ]
    assert "".join(turns) + "\n" == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_forgets_gets_a_document_for_each_answer(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FORGETS)
    first, second = spoken(tokenizer, TALK)
    assert first[1] == "<think>hm</think>1<|im_end|>" and second[1] == "<think>well</think>2<|im_end|>"
    assert "assistant\n1<|im_end|>" in second[0] and "hm" not in second[0]


def test_a_template_without_an_end_gets_the_tokenizers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", said + "{% if add_generation_prompt %}assistant:{% endif %}")
    (turns,) = spoken(tokenizer, TALK[1:3])
    assert turns == ["user: one?\nassistant:", f" <think>hm</think>1\n{small.EOD}"]


def test_templates_that_cannot_serve_are_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    for template, said in (
        (None, "has no chat template"),
        (other, "generation prompt is not what it writes before an answer; correct"),
        ("{{ raise_exception('no system') }}", "talk: the chat template in .*no system"),
        ("{{ messages[9].content.x }}", "talk: the chat template .* cannot be used"),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(UserError, match=said):
            ChatEncoder(tokenizer, 0)((Conversation(TALK, "talk"),))


def prepare(folder: Path, rows: list[Any], model: Path, *options: str) -> int:
    source = write_jsonl(folder / "chat.jsonl", rows)
    words = ["data", "prepare", str(source), "--chat", "--tokenizer", str(model), "--output", str(folder / "chat")]
    return main([*words, "--workers", "1", *options])


def talks(count: int) -> list[dict[str, Any]]:
    """Conversations of one to three turns whose answers follow from their questions."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(draw.integers(1, 4)):
            start = int(draw.integers(0, 8))
            messages.append({"role": "user", "content": f"from {start} on?"})
            counted = "".join(str(n % 10) for n in range(start, start + int(draw.integers(3, 30))))
            messages.append({"role": "assistant", "content": counted})
        rows.append({"messages": messages})
    return rows


def give_template(folder: Path) -> None:
    """Give the tokenizer of a small model a chat template."""
    made = load_tokenizer(str(folder))
    made.chat_template = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", small.EOD)
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen 3 whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    small.qwen3(folder)
    give_template(folder)
    return folder


def test_prepared_and_inspected(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*talks(20), {"messages": []}, {"messages": None}]
    assert prepare(tmp_path, rows, model) == 0
    manifest = json.loads((tmp_path / "chat.json").read_text())
    assert manifest["documents"] == 20 and manifest["eod_token_id"] == 0
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "chat")]) == 0
    told = capsys.readouterr().out
    assert "conversation 0, prompt" in told and "conversation 0, answer" in told and "end of turn" in told
    pairs = [{"question": "a?", "reply": "b"}, {"question": "c?", "reply": None}]
    (tmp_path / "pairs").mkdir()
    fields = "--prompt-field", "question", "--answer-field", "reply"
    assert prepare(tmp_path / "pairs", pairs, model, *fields) == 0
    assert json.loads((tmp_path / "pairs" / "chat.json").read_text())["documents"] == 1


def test_conversations_are_shown_as_they_are_trained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tmp_path, talks(6), model) == 0
    (tmp_path / "recipe.py").write_text("from tests.small import chat as recipe\n")
    monkeypatch.chdir(tmp_path)
    words = [f"start_from={model}", "data=chat", "output=out", "objective.fully_masked_fraction=1"]
    assert main(["data", "show", "recipe.py", *words, "--count", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("|")]
    kinds = {kind: [line for line in lines if f" {kind} " in line] for kind in ("context", "learned", "padding")}
    assert kinds["context"] and len(lines) == sum(map(len, kinds.values()))
    assert not any("\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}" in line or " w " in line for line in kinds["context"])
    assert all("w 1.00" in line for line in kinds["learned"])
    assert any("\N{PILCROW SIGN}" in line and "\N{LIGHT SHADE}|" in line for line in kinds["learned"])


@pytest.mark.parametrize(
    ("row", "options", "said"),
    [
        ({"messages": "hi"}, (), "not a list of messages"),
        ({"messages": [{"from": "human"}]}, (), "not a list of messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, (), "chat.jsonl:1: no message of role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, (), "surrogate"),
        ({"talk": []}, (), "its fields: talk (--messages-field)"),
        ({"p": "a", "a": "b"}, ("--prompt-field", "p"), "go together"),
        ({"p": "a", "a": 3}, ("--prompt-field", "p", "--answer-field", "a"), "of type int"),
    ],
)
def test_refused_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, options: tuple[str, ...], said: str
) -> None:
    assert prepare(tmp_path, [row], model, *options) == 2
    assert said in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "micro1": (1, ["train.micro_batch_size=1"]),
    "sp2": (2, layouts.SP2),
    "pp2": (2, layouts.PP2),
    "cp2": (2, layouts.CP2),
    "dp2": (2, []),
}
SAVED = "checkpoint.save_interval=10"


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Jobs:
    """Joint fine-tuning on one rank and under other layouts, and LoRA on its result."""
    folder = tmp_path_factory.mktemp("chat")
    assert prepare(folder, talks(200), model) == 0
    runs = Jobs(ranks, folder)
    shared = {"data": str(folder / "chat"), "recipe": "chat"}
    for name, (world_size, settings) in {"one": (1, [SAVED]), **LAYOUTS}.items():
        arguments = {**shared, "start_from": str(model), "output": str(folder / name), "settings": settings}
        runs.add(name, world_size, jobs.train, **arguments)
    for name, world_size, settings in (("lora", 1, [SAVED]), ("lora_sp2", 2, [SAVED, *layouts.SP2])):
        arguments = {**shared, "start_from": str(folder / "one" / "checkpoints"), "output": str(folder / name)}
        runs.add(name, world_size, jobs.train, after="one", **arguments, rank=4, settings=settings)
    return runs


@pytest.fixture(scope="module")
def one(runs: Jobs) -> str:
    """The checkpoint of joint fine-tuning on one rank."""
    return runs.checkpoints("one")


@pytest.fixture(scope="module")
def lora(runs: Jobs) -> str:
    """The checkpoint of LoRA on one rank."""
    return runs.checkpoints("lora")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_same(runs: Jobs, layout: str) -> None:
    expected, steps = runs["one"]["steps"], runs[layout]["steps"]
    assert [step["step"] for step in steps] == [step["step"] for step in expected] != []
    for name in layouts.FIGURES:
        for mine, other in zip(steps, expected, strict=True):
            assert mine[name] == pytest.approx(other[name], rel=layouts.TOLERANCE), name


@pytest.mark.parametrize("name", ["one", "lora"])
def test_it_learns(runs: Jobs, name: str) -> None:
    steps = runs[name]["steps"]
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_lora_is_merged_wherever_it_is_loaded(runs: Jobs, one: str, lora: str, tmp_path: Path) -> None:
    """What was trained is what decodes and what is exported, under any layout of either."""
    from nemodiff_train.runtime import init_runtime as host

    host()
    from nemodiff_train.decoding.session import Session
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.loading import load_model

    first, second = (runs[name]["steps"] for name in ("lora", "lora_sp2"))
    for mine, other in zip(first, second, strict=True):
        # Bridge draws the adapters of each tensor-parallel rank apart; B is zero, so that the first loss is the same.
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5 if mine["step"] == 1 else 0.05)

    def logits(checkpoint: str) -> Tensor:
        models = load_model(Checkpoint.open(checkpoint)).chunks
        return Session(models, 1, 64, MASK).prefill([list(range(20, 40))]).masked_fill(torch.arange(320) == MASK, 0)

    base, tuned = logits(one), logits(lora)
    assert (base - tuned).abs().max() > 1e-3
    assert main(["convert", "export", lora, str(tmp_path / "model")]) == 0
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        there = exported(torch.arange(20, 40)[None]).logits[:, -1].masked_fill(torch.arange(320) == MASK, 0)
    torch.testing.assert_close(tuned, there, rtol=1e-4, atol=1e-4)
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert 0 in np.atleast_1d(settings["eos_token_id"])


def test_adapters_stay_with_their_base(
    one: str, lora: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the step that they were trained on though the base goes on, and of its weights or none."""
    base = Checkpoint.open(one)
    assert Checkpoint.open(lora).base.iteration == base.iteration
    later = base.iteration.with_name("iter_0000099")
    shutil.copytree(base.iteration, later)
    assert Checkpoint.open(one).iteration == later and Checkpoint.open(lora).base.iteration == base.iteration
    resumed = small.chat(one, str(Path(one).parents[1] / "chat"), str(Path(lora).parent), rank=4)
    assert start.problems(resumed) == []  # the same weights, though under another name
    later_config = later / "run_config.yaml"
    later_config.write_text(later_config.read_text() + "# trained on\n")
    write_checksums(later)
    assert "but the run would start from" in start.problems(resumed)[0]
    shutil.rmtree(later)
    shutil.copytree(base.iteration, later)
    capsys.readouterr()
    config = base.iteration / "run_config.yaml"
    config.write_text(config.read_text() + "# other weights\n")
    write_checksums(base.iteration)
    assert main(["convert", "export", lora, str(tmp_path / "model")]) == 2
    assert "adapters of other weights" in one_line(capsys) and not (tmp_path / "model").exists()
    shutil.rmtree(base.iteration)
    assert main(["convert", "export", lora, str(tmp_path / "model")]) == 2
    assert "which is not there" in one_line(capsys)
    later.rename(base.iteration)


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        (DoRA(), "DoRA, whose adapters cannot be merged"),
        (CanonicalLoRA(), "CanonicalLoRA, whose adapters cannot be merged"),
        (LoRA(target_modules=["linear_qkv", "output_layer"]), "'output_layer', which is not a linear layer"),
        (LoRA(target_modules=["word_embeddings"]), "'word_embeddings', which is not a linear layer"),
        (LoRA(target_modules=[], exclude_modules=["linear_proj"]), "adapts the output layer"),
        (LoRA(target_modules=["*.layers.9.*.linear_qkv"]), "'*.layers.9.*.linear_qkv', which is not a linear layer"),
    ],
)
def test_adapters_that_cannot_be_merged(model: Path, tmp_path: Path, peft: Any, said: str) -> None:
    config = small.chat(str(model), str(tmp_path / "data"), str(tmp_path / "run"))
    assert list(adapters.problems(config)) == []
    config.peft = peft
    (line,) = adapters.problems(config)
    assert said in line


def test_nothing_leaks_between_conversations(one: str) -> None:
    """Other words in one conversation of a pack leave the logits of the others as they were, bit for bit."""
    from nemodiff_train.runtime import init_runtime as host

    host()
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.loading import load_model

    (model,) = load_model(Checkpoint.open(one)).chunks
    make = ConversationMaker(
        objective=ObjectiveConfig(block_size=16), mask_token_id=MASK, length=64, padding_id=PADDING, batch_size=1
    )
    pack = packed([5, 9, 3, 6], [4, 12], first=20)
    other = {**pack, "tokens": pack["tokens"].clone()}
    other["tokens"][:23] += 100  # all of the first conversation
    before, after = (_logits(model, make.make(each, 0, 3)) for each in (pack, other))
    second = make.make(pack, 0, 3)["segment_ids"][0] == 1
    mine = second.repeat(2)
    assert torch.equal(before[mine], after[mine]) and not torch.equal(before[~mine], after[~mine])


def _logits(model: Any, sample: Sample) -> Tensor:
    """[2 L, vocabulary] of a training sample."""
    segment_ids = sample["segment_ids"][None]
    model.attention_state.rotary_segment_ids = segment_ids
    with torch.no_grad():
        found: Tensor = model(sample["tokens"][None], sample["position_ids"][None], attention_mask=segment_ids)
    found[..., MASK] = -torch.inf  # never a prediction in decoding
    return found[0]


def test_decoding_crosses_the_boundary_at_every_offset(one: str) -> None:
    """A block behind a prompt sees in decoding what it saw in training, wherever the prompt ends."""
    from nemodiff_train.runtime import init_runtime as host

    host()
    from nemodiff_train.decoding.session import Session
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.loading import load_model

    size, length = 16, 64
    models = load_model(Checkpoint.open(one)).chunks
    objective = ObjectiveConfig(block_size=size, fully_masked_fraction=1.0)
    make = ConversationMaker(objective=objective, mask_token_id=MASK, length=length, padding_id=PADDING, batch_size=1)
    for prompt in range(1, 2 * size + 1):
        pack = packed([prompt, size + 5], first=20)
        trained = _logits(models[0], make.make(pack, 0, 0))
        tokens = pack["tokens"].tolist()
        session = Session(models, 1, 128, MASK)
        first = session.prefill([tokens[:prompt]])
        # AR: the prompt's last place predicts the answer's first token.
        torch.testing.assert_close(first[0], trained[length + prompt - 1], rtol=1e-4, atol=1e-4)
        for begin in (0, size):
            drafted = session.forward(torch.full((1, size), MASK), torch.arange(1), "denoise", causal=False)
            start = prompt + begin  # the second block's last places lie behind the answer's end
            torch.testing.assert_close(drafted[0], trained[start : start + size], rtol=1e-4, atol=1e-4)
            if not begin:
                block = torch.tensor([tokens[prompt : prompt + size]])
                session.forward(block, torch.arange(1), "commit", causal=True)
                session.commit(torch.arange(1), size)


def test_decodes_a_conversation(one: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", one, "from 3 on?", "--chat", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out
    assert main(["generate", one, "from 3 on?", "--max-new-tokens", "4"]) == 0


def talk(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: str,
    *lines: str,
    mode: str = "ar",
) -> tuple[str, str]:
    """Return what ``nemodiff chat`` prints on both outputs for some lines of input."""
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    assert main(["chat", checkpoint, "--mode", mode, "--max-new-tokens", "12", "--block-size", "8"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_talks_in_the_terminal(one: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    question = "from 3 on?"
    assert main(["generate", one, question, "--chat", "--max-new-tokens", "12"]) == 0
    said = capsys.readouterr().out
    lines = (question, "/mode linear", "/reset", question, "", "/mode nothing", "/mode oracle", "/what", question)
    out, err = talk(monkeypatch, capsys, one, *lines, "/exit", question)
    assert out.startswith(said * 2) and out.count("\n") == 3 and "\x1b" not in out + err
    assert "ar \N{MIDDLE DOT} 12 tokens in 12 forwards: 1.00 tokens per forward" in err
    assert err.count("linear \N{MIDDLE DOT} 12 tokens in ") == 2
    assert "unknown mode 'nothing'" in err and "mode 'oracle' decodes" in err and "'/what' is not a command" in err

    monkeypatch.setenv("FORCE_COLOR", "1")
    out, err = talk(monkeypatch, capsys, one, question)
    assert "\x1b[36m" in out and "\x1b[33m" in out and "one colour" in err
    assert re.sub("\x1b\\[[0-9;]*m", "", out) == said


def test_an_answer_may_be_ended(
    one: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemodiff_train.cli import chat

    class Impatient(chat.AnswerPrinter):
        def __call__(self, generation: Any) -> None:
            super().__call__(generation)
            if len(generation.tokens) == 5 and len(asked) < 2:
                asked.append(1)
                raise KeyboardInterrupt

    asked: list[int] = []
    monkeypatch.setattr(chat, "AnswerPrinter", Impatient)
    out, err = talk(monkeypatch, capsys, one, "from 3 on?", "/reset", "from 3 on?", "from 4 on?")
    first, second, third = out.splitlines()
    assert first == second and third and err.count("ended after 5 tokens") == 2 and err.count("12 tokens in") == 1


def test_what_cannot_be_talked_to_is_refused(one: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = tmp_path / Checkpoint.open(one).iteration.name
    shutil.copytree(Checkpoint.open(one).iteration, silent)
    (silent / "tokenizer" / "chat_template.jinja").unlink()
    write_checksums(silent)
    capsys.readouterr()
    assert main(["chat", str(silent)]) == 2 and "has no chat template" in one_line(capsys)
    assert main(["chat", one, "--tensor-parallel", "2"]) == 2 and "runs in one process" in one_line(capsys)


def test_text_and_conversations_are_told_apart(
    runs: Jobs, one: str, lora: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = str(runs.folder / "chat")
    small.data(tmp_path / "text")
    capsys.readouterr()
    output = f"output={tmp_path / 'output'}"
    for words, said in (
        (["demo_sft", f"start_from={one}", f"data={tmp_path / 'text'}", output], "holds no conversations"),
        (["demo_joint", f"start_from={one}", f"problems={chat}", f"code={chat}", output], "use sft"),
        (["demo_sft", f"start_from={lora}", f"data={chat}", output], "holds adapters alone"),
        (
            ["demo_sft", f"start_from={one}", f"data={chat}", output, "objective.clean_attention=block_causal"],
            "clean_attention",
        ),
        (["demo_drafter", f"start_from={lora}", f"problems={chat}", output], "holds adapters alone"),
        (["demo_sft", f"start_from={one}", f"data={chat}", output, "lora_rank=-4"], "have rank -4 and alpha -8"),
    ):
        assert main(["train", *words]) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nemodiff: error:")]
        assert len(lines) == 1 and said in lines[0], lines
        assert not (tmp_path / "output").exists()
