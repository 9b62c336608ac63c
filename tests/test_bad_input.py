"""Bad input: one line that says what is wrong, exit code 2, and nothing left behind."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.cli import main
from tests import small

RECIPE = """
from tests.small import recipe
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs, and damaged ones made from them."""
    made = tmp_path_factory.mktemp("bad")
    small.qwen3(made / "model")
    small.qwen3(made / "truncated")
    weights = made / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    small.qwen3(made / "incomplete")
    (made / "incomplete" / "model.safetensors").rename(made / "incomplete" / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (made / "incomplete" / "model.safetensors.index.json").write_text(json.dumps(index))
    small.qwen3(made / "sliding", use_sliding_window=True, sliding_window=16, max_window_layers=0)
    small.tokenizer(made / "gpt2")
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16}
    (made / "gpt2" / "config.json").write_text(json.dumps(gpt2))
    (made / "gpt2" / "model.safetensors").write_bytes((made / "model" / "model.safetensors").read_bytes())
    (made / "empty").mkdir()
    small.data(made / "data", documents=20)
    (made / "none.bin").write_bytes(b"")
    (made / "none.idx").write_bytes((made / "data.idx").read_bytes())
    (made / "recipe.py").write_text(RECIPE)
    (made / "sharded" / "checkpoints" / "iter_0000005").mkdir(parents=True)
    (made / "sharded" / "checkpoints" / "iter_0000005" / "run_config.yaml").write_text(SHARDED)
    (made / "prompts.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n')
    return made


def train(*words: str, model: str = "model", data: str = "data", output: str = "out") -> list[str]:
    return ["train", "recipe.py", f"start_from={model}", f"data={data}", f"output={output}", *words]


SHARDED = """
optimizer: {use_distributed_optimizer: true}
checkpoint: {dist_ckpt_optim_fully_reshardable: false}
model: {tensor_model_parallel_size: 1, pipeline_model_parallel_size: 2, context_parallel_size: 1}
"""

# Words of the command, and what its one line must name.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "missing data": (train(data="nowhere"), ["nowhere.bin"]),
    "empty data": (train(data="none"), ["none", "empty"]),
    "mask token unknown": (train("objective.mask_token=nope"), ["nope", "objective.mask_token"]),
    "mask token is text": (train("objective.mask_token=a"), ["mask token", "times as text"]),
    "length not a multiple of the block": (train("objective.block_size=24"), ["64", "24"]),
    "unknown choice of an objective": (train("objective.weighting=invers"), ["objective.weighting", "'inverse'"]),
    "noise levels the wrong way round": (train("objective.max_noise_level=0.0001"), ["min_noise_level"]),
    "complementary without a second view": (train("objective.complementary=true"), ["objective.views=2"]),
    "complementary with unbounded weights": (
        train("objective.complementary=true", "objective.views=2"),
        ["max_noise_level", "0.999"],
    ),
    "half-life without a count": (train("objective.half_life=0.1"), ["masked_count=exact", "noise_per=block"]),
    "AR loss that can see its targets": (train("objective.clean_half=block_causal"), ["ar_weight=0", "shift=true"]),
    "random blocks without a range": (train("objective.block_schedule=random"), ["objective.block_sizes"]),
    "a range of three sizes": (
        train("objective.block_schedule=random", "objective.block_sizes=[2,4,8]"),
        ["lowest", "highest"],
    ),
    "a curriculum without steps": (
        train("objective.block_schedule=curriculum", "objective.block_sizes=[4,16]"),
        ["objective.block_steps"],
    ),
    "nothing to train": (train("objective.alpha=0", "objective.ar_weight=0"), ["both 0"]),
    "positions restart without documents": (train("dataset.reset_position_ids=true"), ["reset_attention_mask"]),
    "another optimizer than the run began with": (
        train(output="sharded"),
        ["iter_0000005", "optimizer.use_distributed_optimizer=true", "another output"],
    ),
    "another layout than the optimizer state was saved for": (
        train("optimizer.use_distributed_optimizer=true", output="sharded"),
        ["iter_0000005", "model.pipeline_model_parallel_size", "dist_ckpt_optim_fully_reshardable"],
    ),
    "context parallel does not divide": (
        train("model.context_parallel_size=3"),
        ["dataset.seq_length=64", "6 equal"],
    ),
    "a reduction that context parallel splits": (
        train("model.context_parallel_size=2", "objective.reduction=bridge"),
        ["objective.reduction=bridge", "context"],
    ),
    "tensor parallel does not divide": (train("model.tensor_model_parallel_size=4"), ["2 key-value heads"]),
    "pipeline does not divide": (train("model.pipeline_model_parallel_size=3"), ["4 layers"]),
    "sequence parallel alone": (train("model.sequence_parallel=true"), ["model.tensor_model_parallel_size"]),
    "virtual stages alone": (
        train("model.virtual_pipeline_model_parallel_size=2"),
        ["model.virtual_pipeline_model_parallel_size", "model.pipeline_model_parallel_size"],
    ),
    "uneven stages alone": (
        train("model.num_layers_in_first_pipeline_stage=1"),
        ["num_layers_in_first_pipeline_stage", "model.pipeline_model_parallel_size"],
    ),
    "virtual stages do not divide": (
        train("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=4"),
        ["2 layers of a stage"],
    ),
    "micro-batches do not fill the pipeline": (
        train(
            "model.pipeline_model_parallel_size=2",
            "model.virtual_pipeline_model_parallel_size=2",
            "train.global_batch_size=6",
        ),
        ["2 at a time", "3 of them"],
    ),
    "ends take all layers": (
        train("model.pipeline_model_parallel_size=4", "model.num_layers_in_first_pipeline_stage=3"),
        ["1 of 4 layers"],
    ),
    "layers counted do not divide": (
        train("model.pipeline_model_parallel_size=2", "model.account_for_loss_in_pipeline_split=true"),
        ["5 layers (loss counted)"],
    ),
    "drawn layers are not the model's": (
        train("model.pipeline_model_parallel_size=2", "model.pipeline_model_parallel_layout=Ett|tL"),
        ["Ett|tL", "3 layers"],
    ),
    "fewer ranks than the layout": (train("model.tensor_model_parallel_size=2"), ["1 processes", "multiple of 2"]),
    "batch does not divide": (train("train.micro_batch_size=3"), ["train.global_batch_size=8"]),
    "negative alpha": (train("objective.alpha=-1"), ["objective.alpha"]),
    "no checkpoint to start from": (train(model="empty"), ["empty", "no checkpoint"]),
    "truncated weights": (train(model="truncated"), ["truncated/model.safetensors", "incomplete"]),
    "missing shard": (train(model="incomplete"), ["model-00002-of-00002.safetensors"]),
    "unsupported architecture": (train(model="gpt2"), ["GPT2LMHeadModel", "Qwen3ForCausalLM"]),
    "sliding window": (train(model="sliding"), ["sliding-window"]),
    "unknown recipe": (["train", "demo_join"], ["demo_join", "Did you mean 'demo_joint'?"]),
    "recipe argument missing": (["train", "recipe.py", "start_from=model"], ["data=..."]),
    "unknown recipe argument": (train("dta=x"), ["dta", "Did you mean 'data'?"]),
    "unknown key": (train("train.train_iter=5"), ["train.train_iter", "Did you mean 'train_iters'?"]),
    "unknown section": (train("modle.num_layers=5"), ["modle", "Did you mean 'model'?"]),
    "not key=value": (train("hello"), ["hello", "key=value"]),
    "value of the wrong type": (train("train.train_iters=abc"), ["train.train_iters"]),
    "import: no model": (["convert", "import", "empty", "out"], ["empty"]),
    "import: truncated": (["convert", "import", "truncated", "out"], ["truncated/model.safetensors"]),
    "import: missing shard": (["convert", "import", "incomplete", "out"], ["model-00002-of-00002.safetensors"]),
    "import: unsupported": (["convert", "import", "gpt2", "out"], ["GPT2LMHeadModel", "Ministral3ForCausalLM"]),
    "import: output exists": (["convert", "import", "model", "empty"], ["empty", "exists"]),
    "export: no checkpoint": (["convert", "export", "model", "out"], ["model", "Megatron"]),
    "eval: no checkpoint": (["eval", "empty", "--task", "arithmetic", "--output", "out"], ["empty"]),
    "eval: bad prompts": (["eval", "empty", "--task", "prompts.jsonl", "--output", "out"], ["prompts.jsonl:"]),
    "eval: unknown task": (["eval", "empty", "--task", "arithmetics", "--output", "out"], ["'arithmetic'"]),
    "generate: no checkpoint": (["generate", "empty", "hello"], ["empty"]),
    "unknown verb": (["trian"], ["Did you mean 'train'?"]),
    "unknown option": (["generate", "empty", "hello", "--mod", "ar", "--nope"], ["--nope"]),
    "demo: output in use": (["demo", "--output", "model"], ["model", "not empty"]),
}


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run where the inputs are; afterwards nothing may be there that was not before."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    yield
    made = {str(path.relative_to(folder)) for path in set(folder.rglob("*")) - set(before)}
    assert not {path for path in made if "__pycache__" not in path}


def refused(words: list[str], capsys: Any, *needles: str) -> None:
    from nemodiff_train.host import prepare

    prepare()
    capsys.readouterr()
    assert main(words) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("nemodiff: error: "), output.err
    assert output.out == ""
    for needle in needles:
        assert needle in lines[0]


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, needles = CASES[case]
    refused(words, capsys, *needles)


def test_more_ranks_than_the_layout(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(train("model.tensor_model_parallel_size=2"), capsys, "3 processes", "multiple of 2")


def test_tokenizer_and_data_disagree(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other: Callable[[Path], None] = small.qwen3
    other(tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    changed = json.loads(tokenizer.read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(changed))
    (tmp_path / "text.txt").write_text("the quick brown fox " * 50)
    prefix = f"{tmp_path}/prepared"
    assert main(["data", "prepare", f"{tmp_path}/text.txt", "--tokenizer", "model", "--output", prefix]) == 0
    refused(train(data=prefix, model=os.fspath(tmp_path / "other")), capsys, prefix, "another tokenizer")
