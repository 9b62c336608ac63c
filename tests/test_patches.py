"""Patches of third parties: each finds the function that it was written for, and says how long it is needed."""

import ast
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nemodiff_train.runtime.replace import UnknownSignature, replace

RUNTIME = Path(__file__).parents[1] / "nemodiff_train" / "runtime"

ALL_APPLIED = """
import torch
cuda = torch.cuda.is_available()
from nemodiff_train.runtime import init_runtime
init_runtime()
from nemodiff_train.runtime import patches
from nemodiff_train.runtime.replace import REPLACED
import nemodiff_train.model.adapters
from megatron.bridge.training import setup
patches.let_tokenizers_be_larger(setup)
from megatron.bridge.training.utils import sig_utils
patches.take_signals_in_silence(sig_utils)
before = patches.serialization.apply_factory_merges
with patches.halves_joined_in_place():
    assert patches.serialization.apply_factory_merges is not before
assert patches.serialization.apply_factory_merges is before
import torch._dynamo  # the real compiler takes functions of torch that are replaced
torch._dynamo.config
print(cuda, *REPLACED)
"""


def patch_functions() -> list[ast.FunctionDef]:
    """Functions of patches.py that replace something."""
    tree = ast.parse((RUNTIME / "patches.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if "replace" in ast.unparse(function) and function.name[0] != "_"]


def test_every_patch_finds_what_it_replaces() -> None:
    done = subprocess.run([sys.executable, "-c", ALL_APPLIED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cuda, *replaced = done.stdout.split()
    sources = [ast.parse((RUNTIME / name).read_text()) for name in ("patches.py", "cpu.py", "start.py")]
    calls = [node for tree in sources for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {
        call.args[1].value
        for call in calls
        if ast.unparse(call.func) == "replace" and isinstance(call.args[1], ast.Constant)
    }
    elsewhere = {"compile_helpers", "fused_apply_rotary_pos_emb"}  # where there is a Makefile, or Transformer Engine
    assert cuda == "True" or names - elsewhere <= {name.rpartition(".")[2] for name in replaced}


@pytest.mark.parametrize("function", patch_functions(), ids=lambda function: function.name)
def test_every_patch_says_until_when(function: ast.FunctionDef) -> None:
    assert "Until: " in (ast.get_docstring(function) or "")


def test_nothing_else_is_replaced() -> None:
    """Outside of these modules, no attribute of a module of a third party is set."""
    for path in RUNTIME.parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        foreign = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name.partition(".")[0] in ("megatron", "torch", "peft", "tqdm", "transformers", "datasets")
        }
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute):
                    assert ast.unparse(target.value) not in foreign, f"{path}:{node.lineno}"


def module(**functions: object) -> types.ModuleType:
    made = types.ModuleType("somebody.else")
    vars(made).update(functions)
    return made


def test_replacing_returns_the_original() -> None:
    owner = module(f=lambda a, b: a + b)
    original = replace(owner, "f", lambda a, b: a - b, takes="a, b")
    assert (owner.f(3, 2), original(3, 2)) == (1, 5)


def test_other_parameters_are_refused() -> None:
    owner = module(g=lambda a, b, c: a)
    with pytest.raises(UnknownSignature, match=r"somebody.else.g takes \(a, b, c\).*written for \(a, b\)"):
        replace(owner, "g", lambda a, b: a, takes="a, b")
    assert list(inspect.signature(owner.g).parameters) == ["a", "b", "c"]


def test_further_parameters_may_be_allowed() -> None:
    replace(module(h=lambda a, b, c: a), "h", lambda *args: 0, takes="a, b, ...")


def test_what_is_gone_is_named() -> None:
    with pytest.raises(UnknownSignature, match=r"somebody.else.i is gone"):
        replace(module(), "i", lambda: 0, takes="")
