"""One stage starts from what the stage before has saved, on two replicas with overlapping communication."""

from typing import Any

import pytest

from nemodiff_train.cli import main
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.model.checkpoint import Checkpoint
from tests import jobs, small
from tests.prepared import write_jsonl
from tools.support import layouts
from tools.support.ranks import Jobs, RankPool

REPLICAS = [*layouts.SHARDED, *layouts.OVERLAP, "train.train_iters=2", "checkpoint.save_interval=2"]

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant\n{% endif %}"
)

STAGES = {
    "ar": ("qwen3", "recipe", {"stage": "ar"}),
    "joint": ("ar", "recipe", {}),
    "sft": ("joint", "chat", {}),
    "lora": ("sft", "chat", {"rank": 4}),
    "drafter": ("sft", "drafter", {}),
    "joint again": ("sft", "recipe", {}),
    "ar again": ("joint again", "recipe", {"stage": "ar"}),
}
"""What each stage starts from, its recipe in :mod:`tools.support.small`, and the arguments of that."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Jobs:
    """Two steps of every stage, each from the checkpoint of the one before."""
    folder = tmp_path_factory.mktemp("stages")
    small.qwen3(folder / "qwen3")
    tokenizer = load_tokenizer(str(folder / "qwen3"))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "qwen3")
    small.data(folder / "text")
    talk = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    source = write_jsonl(folder / "chat.jsonl", [{"messages": talk}] * 40)
    words = ["data", "prepare", str(source), "--chat", "--tokenizer", str(folder / "qwen3"), "--workers", "1"]
    assert main([*words, "--output", str(folder / "chat")]) == 0
    runs = Jobs(ranks, folder)
    for name, (before, recipe, arguments) in STAGES.items():
        trained = before in STAGES
        start = folder / before / "checkpoints" if trained else folder / before
        data = str(folder / ("chat" if recipe == "chat" else "text"))
        shared: dict[str, Any] = {"start_from": str(start), "data": data, "output": str(folder / name)}
        runs.add(
            name, 2, jobs.train, after=before if trained else None, recipe=recipe, settings=REPLICAS,
            **shared, **arguments,
        )  # fmt: skip
    return runs


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_from_the_one_before(runs: Jobs, stage: str) -> None:
    assert [step["step"] for step in runs[stage]["steps"]] == [1, 2]


def test_what_is_saved_is_settings_alone(runs: Jobs) -> None:
    """Nothing in the file is a method of the run, or anything else that only its process has."""
    model = Checkpoint.open(runs.checkpoints("joint")).run_config["model"]
    assert [name for name, value in model.items() if name.endswith("_func") and value] == ["activation_func"]
    assert model["timers"] is None


def test_a_drafter_is_no_start(runs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs["drafter"]
    folder = runs.folder
    start = ["train", "joint", f"start_from={folder / 'drafter' / 'checkpoints'}", f"data={folder / 'text'}"]
    assert main([*start, f"output={folder / 'refused'}"]) == 2
    assert "start from the model that it was trained for" in capsys.readouterr().err
