"""Bad input: one line that says what is wrong, exit code 2, and nothing left behind."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.cli import main
from tests import small
from tests.conftest import end_process_groups

RECIPE = """
from tests.small import recipe
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs, and damaged ones made from them."""
    made = tmp_path_factory.mktemp("bad")
    small.qwen3(made / "model", num_hidden_layers=4)
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
    _more(made)
    (made / "prompts.jsonl").write_text('{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n')
    return made


def _more(made: Path) -> None:
    """Text, data sets and checkpoints that somebody else damaged."""
    (made / "good.jsonl").write_text('{"prompt": "a", "answer": "1", "text": "one two"}\n')
    (made / "deep.jsonl").write_text("[" * 100_000 + "\n")
    (made / "rows.jsonl").write_text('{"question": "a"}\n')
    (made / "text.txt").write_text("the quick brown fox")
    (made / "binary.txt").write_bytes(b"ab\xff\xfe")
    index = (made / "data.idx").read_bytes()
    for name, content in (("cut", index[:-9]), ("huge", index[:18] + b"\xff" * 8 + index[26:]), ("other", b"x" * 99)):
        (made / f"{name}.bin").write_bytes((made / "data.bin").read_bytes())
        (made / f"{name}.idx").write_bytes(content)
    object_, target = "model: !!python/object/apply:os.system [ls]", "model: {_target_: os.system, command: ls}"
    for name, content in (("torn", "model: [1"), ("nothing", "x: 1"), ("object", object_), ("target", target)):
        (made / name / "iter_0000001").mkdir(parents=True)
        (made / name / "iter_0000001" / "run_config.yaml").write_text(content)
    small.tokenizer(made / "no_config")
    for name, content in (("config_list", "[1]"), ("config_deep", '{"a":' * 100_000), ("no_json", "{")):
        (made / name).mkdir()
        (made / name / "config.json").write_text(content)
    (made / "no_function.py").write_text("x = 1\n")
    (made / "syntax.py").write_text("x = 1\ndef recipe(:\n")
    (made / "raises.py").write_text("def recipe(start_from, data, output):\n    return 1 / 0\n")
    (made / "needs.py").write_text("import no_such_module\n")
    (made / "returns.py").write_text("def recipe():\n    return 5\n")
    for name, shard in (("nameless", ["x" * 300]), ("outside", "../model/model.safetensors")):
        small.qwen3(made / name)
        (made / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    for name in ("empty.txt", "empty.jsonl"):
        (made / name).touch()
    (made / "loop.txt").symlink_to("loop.txt")
    small.qwen3(made / "linked")
    (made / "linked" / "chat_template.jinja").symlink_to("../text.txt")
    small.tokenizer(made / "listed")
    (made / "listed" / "tokenizer_config.json").write_text("[1]")
    for name, key, value in (("dtype", "dtype", "float99"), ("activation", "hidden_act", "nope")):
        small.qwen3(made / name)
        settings = json.loads((made / name / "config.json").read_text())
        (made / name / "config.json").write_text(json.dumps({**settings, key: value}))


def train(*words: str, model: str = "model", data: str = "data", output: str = "out") -> list[str]:
    return ["train", "recipe.py", f"start_from={model}", f"data={data}", f"output={output}", *words]


def evaluate(*words: str) -> list[str]:
    return ["eval", "empty", "--task", "good.jsonl", "--output", "out", *words]


def prepare_data(*words: str) -> list[str]:
    return ["data", "prepare", *words, "--tokenizer", "model", "--output", "out"]


SHARDED = """
optimizer: {use_distributed_optimizer: true}
checkpoint: {dist_ckpt_optim_fully_reshardable: false}
model: {tensor_model_parallel_size: 1, pipeline_model_parallel_size: 2, context_parallel_size: 1}
"""

LONG = "x" * 5000

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
    "half-life without a count": (
        train("objective.position_bias_half_life=0.1"),
        ["mask_sampling=exact", "noise_granularity=block"],
    ),
    "AR loss that can see its targets": (
        train("objective.clean_attention=block_causal"),
        ["ar_weight=0", "shift=true"],
    ),
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
        ["iter_0000005", "optimizer.use_distributed_optimizer=true", "output=NEW"],
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
    "pipeline does not divide": (train("model.pipeline_model_parallel_size=3"), ["4 layers", "divisor of 4"]),
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
        ["2 layers of a stage", "divisor of 2"],
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
        ["1 of 4 layers", "multiple of 3"],
    ),
    "layers counted do not divide": (
        train("model.pipeline_model_parallel_size=2", "model.account_for_loss_in_pipeline_split=true"),
        ["5 layers (loss counted)"],
    ),
    "drawn layers are not the model's": (
        train("model.pipeline_model_parallel_size=2", "model.pipeline_model_parallel_layout=Ett|tL"),
        ["Ett|tL", "3 layers", "change one of them"],
    ),
    "fewer ranks than the layout": (train("model.tensor_model_parallel_size=2"), ["1 processes", "multiple of 2"]),
    "batch does not divide": (train("train.micro_batch_size=3"), ["train.global_batch_size=8", "multiple of 3"]),
    "negative alpha": (train("objective.alpha=-1"), ["objective.alpha"]),
    "no checkpoint to start from": (train(model="empty"), ["empty", "not a checkpoint"]),
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
    "import: an index of no names": (
        ["convert", "import", "nameless", "out"],
        ["index.json", "weight_map.a"],
    ),
    "import: an index of paths": (["convert", "import", "outside", "out"], ["../model/", "not a file beside it"]),
    "import: unsupported": (["convert", "import", "gpt2", "out"], ["GPT2LMHeadModel", "Ministral3ForCausalLM"]),
    "import: output exists": (["convert", "import", "model", "empty"], ["empty", "exists"]),
    "export: no checkpoint": (["convert", "export", "model", "out"], ["model", "Megatron"]),
    "eval: no checkpoint": (["eval", "empty", "--task", "arithmetic", "--output", "out"], ["empty"]),
    "eval: bad prompts": (["eval", "empty", "--task", "prompts.jsonl", "--output", "out"], ["prompts.jsonl:"]),
    "eval: unknown task": (["eval", "empty", "--task", "arithmetics", "--output", "out"], ["'arithmetic'"]),
    "generate: no checkpoint": (["generate", "empty", "hello"], ["empty"]),
    "export: output exists": (["convert", "export", "sharded", "empty"], ["empty", "exists"]),
    "export: unknown format": (["convert", "export", "model", "out", "--format", "gguf"], ["--format", "gguf"]),
    "import: two mask tokens": (
        ["convert", "import", "model", "out", "--mask-token", "a", "--add-mask-token", "b"],
        ["--add-mask-token", "--mask-token"],
    ),
    "import: another number of processes": (
        ["convert", "import", "model", "out", "--tensor-parallel", "2"],
        ["1 processes", "takes 2"],
    ),
    "import: no settings": (["convert", "import", "no_config", "out"], ["no_config", "not a checkpoint"]),
    "import: settings are a list": (["convert", "import", "config_list", "out"], ["config_list/config.json"]),
    "import: settings nested too deep": (["convert", "import", "config_deep", "out"], ["config_deep/config.json"]),
    "import: settings are no JSON": (["convert", "import", "no_json", "out"], ["no_json/config.json", "not JSON"]),
    "import: an empty mask token": (
        ["convert", "import", "model", "no/such/out", "--add-mask-token", ""],
        ["--add-mask-token is empty"],
    ),
    "import: unknown dtype": (["convert", "import", "dtype", "out"], ["config.json", "float99"]),
    "import: unknown activation": (["convert", "import", "activation", "out"], ["config.json", "nope"]),
    "verify: a tolerance that is no number": (
        ["convert", "verify", "model", "model", "--tolerance", "nan"],
        ["--tolerance is nan"],
    ),
    "verify: nothing to compare": (["convert", "verify", "model", "nowhere"], ["nowhere"]),
    "verify: no action": (["convert"], ["ACTION"]),
    "inspect: nothing": (["convert", "inspect", "empty"], ["empty", "not a checkpoint"]),
    "inspect: damaged configuration": (
        ["convert", "inspect", "torn"],
        ["torn/iter_0000001/run_config.yaml", "damaged"],
    ),
    "inspect: a configuration without a model": (["convert", "inspect", "nothing"], ["describes no model"]),
    "export: a configuration with an object": (["convert", "export", "object", "out"], ["object", "damaged"]),
    "export: a configuration with a program": (["convert", "export", "target", "out"], ["os.system", "not allowed"]),
    "generate: a configuration with a program": (["generate", "target", "hello"], ["os.system", "not allowed"]),
    "eval: no argument": (["eval", "--output", "out"], ["checkpoint"]),
    "eval: no batch": (evaluate("--batch-size", "0"), ["--batch-size", "above 0"]),
    "eval: nothing in parallel": (evaluate("--tensor-parallel", "0"), ["--tensor-parallel", "above 0"]),
    "import: nothing in parallel": (
        ["convert", "import", "model", "out", "--pipeline-parallel", "-2"],
        ["--pipeline-parallel"],
    ),
    "eval: an empty output": (["eval", "empty", "--output", ""], ["--output is empty"]),
    "likelihood: an empty option": (["likelihood", "empty", "text.txt", "--output="], ["--output is empty"]),
    "eval: an output that is a file": (["eval", "empty", "--output", "text.txt"], ["text.txt", "is a file"]),
    "generate: bytes that are no text": (["generate", "empty", "a\udcffb"], ["'a\\udcffb'", "not valid UTF-8"]),
    "train: no ranks": (["train", "joint", "--nproc", "0"], ["--nproc is 0"]),
    "train: more ranks than memory": (["train", "joint", "--nproc", "1000000"], ["--nproc 1000000", "GB"]),
    "train: GPUs beyond any run": (train("--dry-run", "--gpus", "1000000000000"), ["--gpus", "100,000"]),
    "data prepare: more workers than memory": (prepare_data("text.txt", "--workers", "1000000"), ["--workers", "GB"]),
    "eval: more problems than there are": (
        ["eval", "empty", "--task", "arithmetic", "--count", "1000000000000", "--output", "out"],
        ["1,000,000,000,000", "100,000"],
    ),
    "train: ranks of a dry run": (["train", "joint", "--nproc", "2", "--dry-run"], ["--nproc", "--gpus"]),
    "eval: no prompts": (evaluate("--count", "0"), ["--count (evaluation.count) is 0; use 1 or more"]),
    "eval: unknown scorer": (evaluate("--scorer", "numerc"), ["numerc", "numeric"]),
    "eval: pattern that is none": (evaluate("--scorer", "regex", "--pattern", "("), ["pattern '('"]),
    "eval: thresholds that are no numbers": (evaluate("--thresholds", "0.5;0.7"), ["--thresholds", "0.5;0.7"]),
    "eval: threshold that is no probability": (evaluate("--thresholds", "1.5"), ["threshold", "1.5"]),
    "eval: block size of nothing": (evaluate("--block-sizes", "0"), ["block_size is 0"]),
    "eval: benchmark of other fields": (
        ["eval", "empty", "--task", "gsm8k", "--data", "rows.jsonl", "--output", "out"],
        ["rows.jsonl", "'answer'", "gsm8k"],
    ),
    "eval: programs without leave": (["eval", "empty", "--task", "mbpp", "--output", "out"], ["--run-code"]),
    "eval: deep prompts": (["eval", "empty", "--task", "deep.jsonl", "--output", "out"], ["deep.jsonl:1"]),
    "likelihood: no checkpoint": (["likelihood", "empty", "text.txt"], ["empty"]),
    "likelihood: a folder for the figures": (
        ["likelihood", "empty", "text.txt", "--output", "empty"],
        ["--output empty", "JSON file"],
    ),
    "likelihood: a file for a folder": (
        ["likelihood", "empty", "text.txt", "--output", "text.txt/figures.json"],
        ["'text.txt' is a file"],
    ),
    "likelihood: no text": (["likelihood", "empty", "nowhere.txt"], ["nowhere.txt"]),
    "likelihood: no batch": (["likelihood", "empty", "text.txt", "--batch-size", "0"], ["--batch-size"]),
    "generate: no temperature": (["generate", "empty", "a", "--temperature", "-1"], ["temperature", "-1"]),
    "generate: two things at once": (
        ["generate", "empty", "a", "--infill", "--revise", "0.5"],
        ["--infill", "one of"],
    ),
    "generate: unknown policy": (["generate", "empty", "a", "--policy", "treshold"], ["'threshold'"]),
    "generate: a number that is none": (["generate", "empty", "a", "--max-new-tokens", "x"], ["--max-new-tokens"]),
    "plan: no GPUs": (["plan", "joint", "--gpus", "0"], ["--gpus", "above 0"]),
    "plan: unknown GPU": (["plan", "joint", "--gpus", "8", "--gpu", "h1000"], ["--gpu", "h1000"]),
    "plan: unknown recipe": (["plan", "jont", "--gpus", "8"], ["jont", "Did you mean 'joint'?"]),
    "launch: unknown recipe": (["launch", "jont", "--slurm"], ["jont", "Did you mean 'joint'?"]),
    "launch: after no job": (["launch", "joint", "--slurm", "--after", "-1"], ["--after -1"]),
    "launch: no time": (["launch", "joint", "--slurm", "--time", "soon"], ["--time soon"]),
    "launch: name of two lines": (["launch", "joint", "--slurm", "--name", "a\nb"], ["--name", "a\\nb"]),
    "launch: a key": (["launch", "joint", "--slurm", "--dry-run", "logger.comet_api_key=abc"], ["comet_api_key"]),
    "train: an empty argument": (train(output=""), ["'output=' has no value"]),
    "train: nothing in parallel, without a run": (
        train("--dry-run", "model.tensor_model_parallel_size=0"),
        ["model.tensor_model_parallel_size is 0"],
    ),
    "plan: no micro-batch": (
        [
            "plan",
            "recipe.py",
            "start_from=model",
            "data=data",
            "output=out",
            "train.micro_batch_size=0",
            "--gpus",
            "8",
        ],
        ["train.micro_batch_size is 0"],
    ),
    "train: nothing saved": (train("checkpoint.save_interval=0"), ["checkpoint.save_interval is 0"]),
    "train: no steps": (train("train.train_iters=0"), ["train.train_iters is 0"]),
    "train: no batch": (train("train.global_batch_size=-8"), ["train.global_batch_size is -8"]),
    "train: no micro-batch": (train("train.micro_batch_size=0"), ["train.micro_batch_size is 0"]),
    "train: no length": (train("dataset.seq_length=-64"), ["dataset.seq_length is -64"]),
    "train: nothing in parallel": (
        train("model.pipeline_model_parallel_size=0"),
        ["model.pipeline_model_parallel_size"],
    ),
    "train: no layers": (train("model.num_layers=0"), ["model.num_layers is 0"]),
    "train: more layers than the checkpoint": (train("model.num_layers=8"), ["model.num_layers is 8", "has 4"]),
    "train: a rate below nothing": (train("optimizer.lr=-1"), ["optimizer.lr is -1"]),
    "train: an endless rate": (train("optimizer.lr=1e400"), ["optimizer.lr is inf"]),
    "train: no such optimizer": (train("optimizer.optimizer=adamm"), ["'adamm'", "'adam'"]),
    "train: no such decay": (train("scheduler.lr_decay_style=cosin"), ["Did you mean 'cosine'?"]),
    "train: another checkpoint format": (
        train("checkpoint.ckpt_format=torch"),
        ["checkpoint.ckpt_format", "'torch_dist'"],
    ),
    "train: saves by another package": (
        train("checkpoint.async_strategy=nvrx"),
        ["checkpoint.async_strategy is 'nvrx'", "use 'mcore'"],
    ),
    "train: shares of nothing": (train("dataset.split='0,0,0'"), ["dataset.split is '0,0,0'"]),
    "train: shares that are none": (train("dataset.split=abc"), ["dataset.split is 'abc'"]),
    "train: no data": (train("dataset.data=[]"), ["dataset.data is empty"]),
    "train: a weight for one of two": (train("dataset.data=['0.5',data,data]"), ["weights for some"]),
    "train: a weight below nothing": (train("dataset.data=['-1',data,'0.3',data]"), ["not above 0"]),
    "train: nowhere to go on from": (train("checkpoint.load=nope"), ["checkpoint.load='nope'"]),
    "train: no such step to go on from": (train("checkpoint.ckpt_step=7"), ["checkpoint.ckpt_step=7"]),
    "train: an evaluation of nothing": (
        train("evaluation.interval=1", "evaluation.task=empty.jsonl"),
        ["empty.jsonl is empty"],
    ),
    "train: an evaluation in no mode": (
        train("evaluation.interval=1", "evaluation.modes=[ar,lineer]"),
        ["evaluation.modes", "Did you mean 'linear'?"],
    ),
    "train: output is a file": (train(output="text.txt"), ["text.txt", "is a file"]),
    "train: output where nothing can be made": (train(output="/proc/run"), ["/proc/run", "cannot be written to"]),
    "train: memory that is no number": (train("--dry-run", "--gpu-memory", "nan"), ["--gpu-memory"]),
    "train: a recipe that is no Python": (
        ["train", "syntax.py", "start_from=model", "data=data", "output=out"],
        ["'syntax.py', line 2"],
    ),
    "train: a recipe that fails": (
        ["train", "raises.py", "start_from=model", "data=data", "output=out"],
        ["'raises.py', line 2", "ZeroDivisionError"],
    ),
    "train: a recipe of missing modules": (["train", "needs.py"], ["'needs.py'", "no_such_module"]),
    "train: a recipe of another kind": (["train", "returns.py"], ["'returns.py' returns int"]),
    "train: GPUs without a dry run": (train("--gpus", "8"), ["--gpus", "--dry-run"]),
    "train: a file that is no recipe": (["train", "no_function.py"], ["no_function.py", "no function 'recipe'"]),
    "train: no such file": (["train", "nowhere.py"], ["no recipe file 'nowhere.py'", "nemodiff train --list"]),
    "train: a setting from the environment": (train("logger.wandb_project=${oc.env:HOME}"), ["wandb_project", "${"]),
    "train: a key with control codes": (train("train.\x1b[31m=5"), ["train.\\x1b[31m"]),
    "train: a list where text is meant": (train("checkpoint.save=[1]"), ["checkpoint.save", "string"]),
    "train: text where a list is meant": (train("dataset.data=abc"), ["dataset.data='abc'", "list"]),
    "train: a fraction where a count is meant": (train("train.train_iters=2.5"), ["train.train_iters=2.5"]),
    "train: no number": (train("optimizer.lr=nan"), ["optimizer.lr=nan", "not a number"]),
    "train: half a list": (train("dataset.data=[a"), ["cannot apply the overrides"]),
    "train: index cut off": (train(data="cut"), ["cut.idx", "do not hold"]),
    "train: index of too many sequences": (train(data="huge"), ["huge.idx", "do not hold"]),
    "train: index of another kind": (train(data="other"), ["other.idx", "does not begin like one"]),
    "data prepare: no input": (prepare_data("nowhere.txt"), ["nowhere.txt", "no such file"]),
    "data prepare: no text": (prepare_data("binary.txt"), ["binary.txt", "byte 2"]),
    "data prepare: nested too deep": (prepare_data("deep.jsonl"), ["deep.jsonl:1", "malformed JSON"]),
    "data prepare: no such field": (
        prepare_data("good.jsonl", "--text-field", "txt"),
        ["'txt'", "Did you mean 'text'?"],
    ),
    "train: a tokenizer that links elsewhere": (train(model="linked"), ["chat_template.jinja", "text.txt", "remove"]),
    "import: a tokenizer that links elsewhere": (
        ["convert", "import", "linked", "out", "--mask-token", "a"],
        ["chat_template.jinja", "text.txt"],
    ),
    "data prepare: a tokenizer that links elsewhere": (
        ["data", "prepare", "text.txt", "--tokenizer", "linked", "--output", "out"],
        ["chat_template.jinja", "text.txt"],
    ),
    "data prepare: no such token": (prepare_data("good.jsonl", "--eod-token", "<end>"), ["<end>"]),
    "data prepare: no workers": (prepare_data("good.jsonl", "--workers", "0"), ["--workers is 0"]),
    "data prepare: no tokenizer": (["data", "prepare", "text.txt", "--output", "out"], ["--tokenizer"]),
    "data prepare: a damaged tokenizer": (
        ["data", "prepare", "text.txt", "--tokenizer", "listed", "--output", "out"],
        ["listed", "cannot load a tokenizer"],
    ),
    "data prepare: no chat template": (
        ["data", "prepare", "good.jsonl", "--chat", "--tokenizer", "model", "--output", "out"],
        ["chat template"],
    ),
    "data prepare: half a pair of fields": (prepare_data("good.jsonl", "--answer-field", "answer"), ["go together"]),
    "data prepare: an endless name": (prepare_data(LONG), ["file name too long"]),
    "data prepare: output below a file": (
        ["data", "prepare", "text.txt", "--tokenizer", "model", "--output", "text.txt/out"],
        ["text.txt/out"],
    ),
    "data prepare: a link to itself": (prepare_data("loop.txt"), ["loop.txt"]),
    "data prepare: nothing but an empty file": (prepare_data("empty.txt"), ["empty.txt"]),
    "data merge: no manifest": (["data", "merge", "data", "--output", "out"], ["data.json", "no such manifest"]),
    "data merge: a directory": (["data", "merge", "data", "--output", "empty"], ["empty", "a directory"]),
    "data inspect: no manifest": (["data", "inspect", "data"], ["data.json", "no such manifest"]),
    "data: unknown action": (["data", "mrege"], ["mrege"]),
    "demo: no problems": (["demo", "--output", "out", "--count", "0"], ["--count"]),
    "demo: output below a file": (["demo", "--output", "text.txt/out"], ["text.txt/out", "is a file"]),
    "demo: output where nothing can be made": (["demo", "--output", "/proc/demo"], ["/proc/demo"]),
    "demo: a mask token that a model lacks": (
        ["demo", "--output", "out", "--start-from", "model", "--mask-token", "nope"],
        ["--mask-token 'nope'"],
    ),
    "lm-eval: no task": (["lm-eval", "--model", "nemodiff"], ["lm-eval", "tasks"]),
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
    from nemodiff_train.runtime import init_runtime

    init_runtime()
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
    end_process_groups()  # the launcher's variables count only while there are none
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
