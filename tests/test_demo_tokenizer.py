"""The demo's tokenizer writes what it reads, and numbers digit by digit."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemodiff_train.demo.tokenizer import train_tokenizer
from nemodiff_train.evaluation.arithmetic import problems


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [problem.prompt + problem.solution for problem in problems("train", 500, seed=1)]
    train_tokenizer([*texts, Path(__file__).read_text()], 512, directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", ["a  b ,\n\n\tc\r\n", "x = 3 ** 41  # é ✓ 漢字", " 'tis . n't", "<|end"])
def test_decoding_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token, tokenizer.mask_token) == ("<|endoftext|>", "<|mask|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id != tokenizer.mask_token_id


def test_one_token_per_digit(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("12 + 345")[-3:] == ["Ġ3", "4", "5"]
    assert tokenizer.tokenize("12 + 345")[:2] == ["1", "2"]


def test_a_prompt_is_a_prefix(tokenizer: PreTrainedTokenizerFast) -> None:
    """Evaluation encodes the prompt alone; training reads prompt and solution as one text."""
    for problem in problems("test", 50, seed=1):
        whole = tokenizer.encode(problem.prompt + problem.solution)
        assert whole == tokenizer.encode(problem.prompt) + tokenizer.encode(problem.solution)
