"""The demo started from a model of one's own: its mask token, its layout and its budget."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nemodiff_train.cli import main
from nemodiff_train.errors import UserError
from tests import small


def tokenizer_of(*tokens: str, special: bool = True, **roles: str) -> PreTrainedTokenizerFast:
    words = {"a": 0, "b": 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), **roles)
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens], special_tokens=special)
    return tokenizer


RESERVED = {
    "SmolLM2": (tokenizer_of("<|end|>", "<repo_name>", "<file_sep>", eos_token="<|end|>"), "<repo_name>"),
    "Llama 3": (tokenizer_of("<|python|>", "<|reserved_special_token_0|>"), "<|reserved_special_token_0|>"),
    "Mistral": (tokenizer_of("[INST]", "<SPECIAL_20>"), "<SPECIAL_20>"),
    "Qwen 3, where it is not marked special": (tokenizer_of("<tool>", "<|fim_pad|>", special=False), "<|fim_pad|>"),
    "all have a role": (tokenizer_of("<|end|>", "<pad>", eos_token="<|end|>", pad_token="<pad>"), None),
    "nothing but words of its text": (tokenizer_of("<tool>", special=False), None),
}


@pytest.mark.parametrize("name", RESERVED)
def test_a_reserved_token_is_found(name: str) -> None:
    from nemodiff_train.conversion.mask_token import reserved_token

    tokenizer, expected = RESERVED[name]
    assert reserved_token(tokenizer, len(tokenizer), frozenset()) == expected
    assert reserved_token(tokenizer, 2, frozenset()) is None  # the model has no rows for them


def test_tokens_of_the_template_and_those_that_end_answers_are_in_use() -> None:
    from nemodiff_train.conversion.mask_token import reserved_token

    tokenizer = tokenizer_of("<|user|>", "<|eot|>", "<|other|>")
    tokenizer.chat_template = "{{ '<|user|>' + messages[0]['content'] }}"
    stop = frozenset({tokenizer.convert_tokens_to_ids("<|eot|>")})
    assert reserved_token(tokenizer, len(tokenizer), stop) == "<|other|>"


def test_a_large_model_gets_a_smaller_budget_on_a_cpu_alone() -> None:
    from nemodiff_train.demo.run import Budget, _budget

    assert _budget(10**6, cuda=False) == _budget(10**9, cuda=True) == Budget()
    assert _budget(135 * 10**6, cuda=False) == Budget(steps=10, count=6, thresholds=())


def test_a_model_of_three_key_value_heads_without_a_mask_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All steps on two processes, in the least that they can be."""
    from nemodiff_train.demo import run as demo
    from nemodiff_train.model.checkpoint import Checkpoint

    heads: dict[str, Any] = {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "hidden_size": 96,
        "dtype": "bfloat16",
    }
    small.llama3(tmp_path / "model", **heads, tie_word_embeddings=True, num_hidden_layers=1)
    text = (tmp_path / "model" / "tokenizer_config.json").read_text()
    (tmp_path / "model" / "tokenizer_config.json").write_text(text.replace('"mask_token": "<|mask|>"', '"x": 1'))
    monkeypatch.setattr(demo, "PROBLEMS", 400)
    monkeypatch.setattr(demo, "CODE_BYTES", 50_000)
    monkeypatch.setattr(demo, "_budget", lambda parameters, cuda: demo.Budget(steps=2, count=1, thresholds=()))
    demo.run_demo(tmp_path / "out", str(tmp_path / "model"), None, None)
    printed = capsys.readouterr()
    assert "<|mask|>, a reserved token" in printed.err and "data parallel" in printed.err
    assert "linear" in printed.out
    checkpoint = Checkpoint.open(tmp_path / "out" / "joint" / "checkpoints")
    assert checkpoint.run_config["model"]["mask_token_id"] == 1
    assert main(printed_command(printed.err, "try it")[1:]) == 0
    python, *words = printed_command(printed.err, "without this package")
    alone = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert python == "python" and alone.returncode == 0, alone.stderr
    assert "Answer:" in alone.stdout


def printed_command(text: str, before: str) -> list[str]:
    """Return the words of the command that the demo prints after some words."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{before}: ")]
    return shlex.split(line.removeprefix(f"{before}: "), comments=True)


def test_a_mask_token_goes_with_a_model(tmp_path: Path) -> None:
    import argparse

    from nemodiff_train.cli.demo import run

    words = {"output": str(tmp_path / "out"), "start_from": None, "mask_token": "<x>", "count": None}
    with pytest.raises(UserError, match="--start-from"):
        run(argparse.Namespace(**words))
