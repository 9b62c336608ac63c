"""What a command imports: arguments are refused, and folders looked at, without torch's distributed stack."""

import subprocess
import sys
from pathlib import Path

import pytest

from nemodiff_train.cli import VERBS
from tests.prepared import write_jsonl

WATCHED = """
import sys
from nemodiff_train.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
heavy = [name for name in ("torch", "megatron", "transformers") if name in sys.modules]
sys.exit(f"imported {heavy}" if heavy else code)
"""


def start(*words: str | Path) -> tuple[int, str]:
    """Exit code of a command (1 if it imported something heavy), and what it said of errors."""
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_light(verb: str) -> None:
    code, errors = start(verb, "--help")
    assert code == 0, errors


@pytest.mark.parametrize("verb", ["train", "launch", "demo", "plan"])
def test_a_launcher_can_stop_a_verb_soon(verb: str) -> None:
    """What is imported before the handlers of signals are set has to be little."""
    code = (
        f"import sys, nemodiff_train.cli.{verb}; sys.exit(any(name in sys.modules for name in ('pydantic', 'yaml')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("action", ["import", "export", "verify", "inspect"])
def test_help_of_a_conversion_is_light(action: str) -> None:
    code, errors = start("convert", action, "--help")
    assert code == 0, errors


@pytest.mark.parametrize(
    "words",
    [
        ["train", "demo_ar", "--gpus", "8"],
        ["plan", "demo_ar", "--gpus", "0"],
        ["launch", "demo_ar"],
        ["convert", "verify", "a", "b", "--tolerance", "-1"],
        ["convert", "import", "a", "b", "--tensor-parallel", "2"],
        ["convert", "import", "a", "/proc"],
        ["convert", "export", "a", "b", "--pipeline-parallel", "3"],
        ["convert", "export", "a", "/proc"],
        ["convert", "export", "a", "b"],
        ["eval", "x", "--output", "y", "--task", "arithmetics"],
        ["eval", "x", "--output", "y", "--thresholds", "2"],
        ["lm-eval", "--no-such-option"],
        ["likelihood", "x", "no-such-file.txt"],
        ["generate", "x", "prompt", "--temperature", "-1"],
        ["data", "merge", "a"],
        ["demo", "--output", "/proc/nowhere"],
    ],
    ids=lambda words: words[0],
)
def test_refusals_are_light(words: list[str]) -> None:
    code, errors = start(*words)
    assert code == 2, errors


def test_inspecting_a_model_is_light(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}')
    code, errors = start("convert", "inspect", tmp_path)
    assert code in (0, 2) and "imported" not in errors


def test_looking_at_a_checkpoint_is_light(tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000001"
    iteration.mkdir()
    (iteration / "run_config.yaml").write_text("model: {_target_: x.y}\ndrafter: {}\n")
    code, errors = start("convert", "inspect", tmp_path)
    assert code in (0, 2) and "imported" not in errors
    code, errors = start("convert", "import", tmp_path, tmp_path / "out")
    assert code == 2 and "is a Megatron checkpoint already" in errors
    code, errors = start("convert", "export", tmp_path, tmp_path / "out", "--results", "x")
    assert code == 2 and "--results belongs to a model" in errors


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--draws", "0", "--draws is 0; use 1 to 1,000,000"),
        ("--seed", "-1", "--seed is -1; use 0 to 4,294,967,295"),
        ("--length", "24", "--length is 24; use a multiple of the model's block size 16"),
    ],
)
def test_a_likelihood_is_refused_before_the_model_is_loaded(
    tmp_path: Path, option: str, value: str, words: str
) -> None:
    (tmp_path / "run_config.yaml").write_text("model: {_target_: x.y, mask_token_id: 1, block_size: 16}\n")
    text = tmp_path / "text.txt"
    text.write_text("one two")
    code, errors = start("likelihood", tmp_path, text, option, value)
    assert code == 2 and words in errors, errors
    (tmp_path / "run_config.yaml").write_text("model: {_target_: x.y, block_size: 16}\n")
    code, errors = start("likelihood", tmp_path, text)
    assert code == 2 and "no joint stage" in errors, errors


def test_missing_folder_of_data_is_refused_lightly(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "a.jsonl", ["text"])
    code, errors = start("data", "inspect", rows)
    assert code == 2, errors


DEFERRED = """
import sys, torch
cuda = torch.cuda.is_available()
from nemodiff_train.runtime import init_runtime
init_runtime()
from nemodiff_train.runtime import deferred
import megatron.bridge.training.pretrain
from megatron.bridge.training import checkpointing

unused = ("wandb", "modelopt", "sklearn", "datasets") + (() if cuda else ("torch._dynamo", "sympy"))
loaded = [name for name in unused if not isinstance(sys.modules.get(name), deferred._DeferredModule)]
assert not [name for name in loaded if name in sys.modules], loaded
assert not any(name.startswith("megatron.bridge.models.deepseek") for name in sys.modules)

assert checkpointing.save_sharded_modelopt_state([torch.nn.Linear(1, 1)], "") is None  # nothing is converted
assert isinstance(sys.modules["modelopt"], deferred._DeferredModule)

weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
torch.optim.AdamW([weight]).step()
torch._check(True)
from accelerate.utils import extract_model_from_parallel  # asked by Transformers when it saves
from transformers import Qwen3Config
from nemodiff_train.model.pretrained import empty_reference
sizes = {name: 8 for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
empty = empty_reference(Qwen3Config(architectures=["Qwen3ForCausalLM"], num_hidden_layers=1, **sizes))
assert extract_model_from_parallel(empty) is empty and empty.device.type == "meta"
with_sympy = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes")
assert cuda or all(isinstance(sys.modules[name], deferred._DeferredModule) for name in with_sympy)

import importlib.metadata
found = importlib.metadata.packages_distributions()
assert found["torch"] == ["torch"] and found["PIL"] == ["pillow"] and found.get("torch") == ["torch"]
assert "PIL" in found and "nothing" not in found and found.get("nothing") is None and len(found) == len([*found]) > 50

import wandb
assert wandb.run is None and wandb.__version__ and wandb.Settings()  # the real one
import modelopt.torch.opt as mto
assert not mto.ModeloptStateManager.is_converted(torch.nn.Linear(1, 1))
real = sys.modules["modelopt.torch.opt.plugins"].save_sharded_modelopt_state
assert checkpointing.save_sharded_modelopt_state is real  # bound in the place of the stand-in

from megatron.bridge.models import GPTModelProvider
from megatron.bridge.models.gpt_provider import GPTModelProvider as same
assert GPTModelProvider is same
from megatron.bridge import AutoBridge
assert "DeepseekV3ForCausalLM" not in AutoBridge.list_supported_models()
deferred.execute("megatron.bridge")
assert {"DeepseekV3ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM"} <= {*AutoBridge.list_supported_models()}
"""


def test_packages_load_at_their_first_use() -> None:
    done = subprocess.run([sys.executable, "-c", DEFERRED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
