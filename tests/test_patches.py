"""Patches of third parties: each finds the function that it was written for, and says how long it is needed."""

import ast
import functools
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nemodiff_train.runtime.replace import UnknownSignature, replace, replace_in
from nemodiff_train.runtime.versions import pinned

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
patches.allow_larger_tokenizers(setup)
from megatron.bridge.training.utils import sig_utils
patches.silence_signal_handlers(sig_utils)
before = patches.serialization.apply_factory_merges
with patches.merge_gate_and_up_in_place():
    assert patches.serialization.apply_factory_merges is not before
assert patches.serialization.apply_factory_merges is before
import torch._dynamo  # the real compiler takes functions of torch that are replaced
torch._dynamo.config
print(cuda, *REPLACED)
"""


def replaces(node: ast.AST) -> bool:
    """Return whether a node has a call that replaces something."""
    calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
    return any(ast.unparse(call.func) in ("replace", "replace_in") for call in calls)


def patch_functions() -> list[ast.FunctionDef]:
    """Functions that replace something; what cpu.py replaces is needed for as long as there is a CPU backend."""
    trees = [ast.parse((RUNTIME / name).read_text()) for name in ("patches.py", "start.py", "deferred.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [function for function in functions if replaces(function)]


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
    """And in which version it still is, which is the pinned one: a new version asks for a look at each."""
    until = (ast.get_docstring(function) or "").partition("Until: ")[2]
    versions = re.findall(r"\d+\.\d+\.\d+", until)
    assert set(versions) <= set(pinned().values()) and (versions or until == "no CPU backend is needed.")


def test_nothing_else_is_replaced() -> None:
    """Outside of these modules, nothing of a third party's is set: of a module, of a class or of an object.

    Of an object that is what begins with an underscore, or gets a function.
    """
    allowed = {"conversion/importing.py: pretrained._state_dict_accessor"}
    for path in RUNTIME.parent.rglob("*.py"):
        tree, found = ast.parse(path.read_text()), set()
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
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
                if not isinstance(target, ast.Attribute) or ast.unparse(target.value) in ("self", "sys"):
                    continue
                gets = ast.unparse(node.value).removeprefix("self.")
                patches = target.attr[0] == "_" or gets in functions or gets.startswith("lambda ")
                if ast.unparse(target.value) in foreign or (patches and path.parent != RUNTIME):
                    found.add(f"{path.relative_to(RUNTIME.parent)}: {ast.unparse(target)}")
        assert found <= allowed


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


def test_an_object_is_patched_alone() -> None:
    class Step:
        def finish(self, forced: bool = False) -> str:
            return "finished"

    patched, other = Step(), Step()
    for _ in range(2):  # what a patch wraps may be patched again
        original = patched.finish
        replaced = replace_in(patched, "finish", functools.wraps(original)(lambda forced=False: "not yet"), "forced")
        assert replaced == original
    assert (patched.finish(), other.finish()) == ("not yet", "finished")
    with pytest.raises(UnknownSignature, match=r"Step.finish takes \(forced\).*written for \(\)"):
        replace_in(other, "finish", lambda: "", takes="")
    with pytest.raises(UnknownSignature, match=r"Step.start is gone"):
        replace_in(other, "start", lambda: "", takes="")


def test_what_is_gone_is_named() -> None:
    with pytest.raises(UnknownSignature, match=r"somebody.else.i is gone"):
        replace(module(), "i", lambda: 0, takes="")
