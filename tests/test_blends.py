"""What a run reads of its data sets: blends, splits, the index of samples, the ends of documents."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard.writer import SummaryWriter

from nemodiff_train.cli import main
from nemodiff_train.config.datasets import ChatDatasetConfig, TextDatasetConfig
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.prompts import encode_prompts
from nemodiff_train.training.callbacks.run_log import _hide_after
from nemodiff_train.validation.data import split_problems
from tests.prepared import run, write_jsonl

LENGTH = 16


class Context:
    """Of the kind that Bridge hands to a data set."""

    def __init__(self, tokenizer: Any, samples: int) -> None:
        self.tokenizer, self.train_samples, self.valid_samples, self.test_samples = tokenizer, samples, 0, 0


@pytest.fixture(scope="module")
def megatron(tokenizer_dir: str) -> Any:
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=tokenizer_dir))


def texts(folder: Path, name: str, letter: str, count: int, *options: str, tokenizer: str) -> str:
    source = write_jsonl(folder / f"{name}.jsonl", [{"text": letter * 40}] * count)
    assert run(source, tokenizer, folder / name, *options) == 0
    return str(folder / name)


def samples(config: TextDatasetConfig, tokenizer: Any, cache: Path, count: int) -> list[list[int]]:
    config.index_folder = str(cache)
    train, _, _ = config.build_datasets(Context(tokenizer, count))  # type: ignore[arg-type]
    assert len(train) >= count
    return [train.samples[index]["tokens"].tolist() for index in range(count)]


def test_a_blend_without_weights_is_as_one_data_set_for_any_number_of_epochs(
    tmp_path: Path, tokenizer_dir: str, megatron: Any
) -> None:
    """In proportion to tokens; the folder of the data stays as it was, which may be one that is only read."""
    (tmp_path / "data").mkdir()
    small, large = (
        texts(tmp_path / "data", name, name, count, tokenizer=tokenizer_dir) for name, count in (("b", 3), ("c", 12))
    )
    before = sorted((tmp_path / "data").iterdir())
    config = TextDatasetConfig(seq_length=LENGTH, data=[small, large], split="100,0,0")
    found = samples(config, megatron, tmp_path / "run", 400)  # 15 documents of 41 tokens are 38 samples
    of_small = sum(load_tokenizer(tokenizer_dir).convert_tokens_to_ids("b") in sample for sample in found)
    assert 0.17 < of_small / len(found) < 0.23
    assert sorted((tmp_path / "data").iterdir()) == before and list((tmp_path / "run").glob("*/*"))
    assert run(tmp_path / "data" / "b.jsonl", tokenizer_dir, small) == 0


def test_data_prepared_anew_are_read_anew(tmp_path: Path, tokenizer_dir: str, megatron: Any) -> None:
    """The index of samples belongs to the content: the old one would read the old number of documents."""
    prefix = texts(tmp_path, "data", "a", 2, tokenizer=tokenizer_dir)
    config = TextDatasetConfig(seq_length=LENGTH, data=[prefix], split="100,0,0")
    samples(config, megatron, tmp_path, 5)
    rows = [{"text": letter * 60} for letter in "xyz"]
    assert run(write_jsonl(tmp_path / "new.jsonl", rows), tokenizer_dir, prefix, "--overwrite") == 0
    again = samples(config, megatron, tmp_path, 5)
    fresh = TextDatasetConfig(seq_length=LENGTH, data=[prefix], split="100,0,0")
    assert again == samples(fresh, megatron, tmp_path / "other", 5)


def test_a_copy_without_a_manifest_is_told_apart_too(tmp_path: Path, tokenizer_dir: str, megatron: Any) -> None:
    prefix = texts(tmp_path, "data", "a", 2, tokenizer=tokenizer_dir)
    other = texts(tmp_path, "other", "b", 5, tokenizer=tokenizer_dir)
    config = TextDatasetConfig(seq_length=LENGTH, data=[prefix], split="100,0,0")
    Path(f"{prefix}.json").unlink()
    samples(config, megatron, tmp_path / "run", 4)
    for suffix in (".bin", ".idx"):
        Path(prefix + suffix).write_bytes(Path(other + suffix).read_bytes())
    assert samples(config, megatron, tmp_path / "run", 4) == samples(config, megatron, tmp_path / "new", 4)


def test_documents_end_where_the_data_say(tmp_path: Path, tokenizer_dir: str, megatron: Any) -> None:
    """``--eod-token``, not the tokenizer's token, separates documents and is left out of the losses."""
    prefix = texts(tmp_path, "data", "a", 4, "--eod-token", "!", tokenizer=tokenizer_dir)
    config = TextDatasetConfig(
        seq_length=64, data=[prefix], split="100,0,0", reset_attention_mask=True, eod_mask_loss=True
    )
    config.objective.stage = "ar"
    config.index_folder = str(tmp_path)
    sample = config.build_datasets(Context(megatron, 2))[0][0]  # type: ignore[arg-type]
    ends = sample["tokens"] == load_tokenizer(tokenizer_dir).convert_tokens_to_ids("!")
    assert (
        ends.any() and not sample["maskable"][ends].any() and int(sample["segment_ids"][0].max()) == int(ends.sum())
    )


def test_a_share_that_rounds_to_no_document_is_refused(tmp_path: Path, tokenizer_dir: str) -> None:
    prefix = texts(tmp_path, "data", "a", 6, tokenizer=tokenizer_dir)
    for split in ("100,0,0", "90,10,0", "0,0,1", "1,1,1", "nonsense"):
        assert not [*split_problems(prefix, split)]
    for split, name in (
        ("99,1,0", "validation"),
        ("98,1,1", "validation"),
        ("95,0,5", "test"),
        ("1,99,0", "training"),
    ):
        assert f"leaves {name} none of the 6 documents" in next(split_problems(prefix, split))


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    """Killed after step 9, and continued from step 5."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((0, 9), (5, 12)):
        state: Any = type("State", (), {"tensorboard_logger": SummaryWriter(tmp_path, filename_suffix=str(first))})
        _hide_after(state, first)
        for step in range(first + 1, last + 1):
            state.tensorboard_logger.add_scalar("loss", first, step)
        state.tensorboard_logger.close()
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in shown] == [(step, 0 if step < 6 else 5) for step in range(1, 13)]


def test_the_end_of_turn_stops_conversations(tokenizer_dir: str) -> None:
    """Also where neither the tokenizer nor the model's configuration names it."""
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}<eos>{% endif %}"
    )
    asked, plain = (encode_prompts(tokenizer, ["x"], chat) for chat in (True, False))
    settings = DecodingSettings(stop_token_ids=frozenset([0]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert settings.stopping_at(asked.end_of_turn).stop_token_ids == {0, end}
    assert settings.stopping_at(plain.end_of_turn) == settings


def test_conversations_that_are_too_long_are_counted(
    tmp_path: Path, tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    tokenizer.save_pretrained(folder)
    lengths = (("a", "b"), ("a", "b" * 99), ("a" * 99, "b"), ("a" * 99, "b"))
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in lengths
    ]
    assert run(write_jsonl(tmp_path / "rows.jsonl", rows), str(folder), tmp_path / "data", "--chat") == 0
    capsys.readouterr()
    context: Any = Context(None, 4)
    ChatDatasetConfig(seq_length=LENGTH, data=[str(tmp_path / "data")], split="100,0,0").read(context)
    said = " ".join(capsys.readouterr().err.split())
    assert f"of 4 conversations 3 are longer than dataset.seq_length={LENGTH}: 1 are cut, 2 left out" in said


def test_conversations_of_a_checkpoints_tokenizer(tmp_path: Path, tokenizer_dir: str) -> None:
    """``--tokenizer CHECKPOINT``, as the page on fine-tuning has it; such a blend has weights as well."""
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    iteration = tmp_path / "model" / "iter_0000000"
    tokenizer.save_pretrained(iteration / "tokenizer")
    (iteration / "run_config.yaml").write_text("model: {}\n")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name, count in (("one", 2), ("two", 4)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": talk}] * count)
        assert run(source, str(tmp_path / "model"), tmp_path / name, "--chat") == 0
    assert main(["data", "inspect", str(tmp_path / "one")]) == 0
    config = ChatDatasetConfig(seq_length=LENGTH, data=[str(tmp_path / name) for name in ("one", "two")])
    config.split = "100,0,0"
    context: Any = Context(None, 20)
    assert len(config.read(context)[0]) >= 20 and config.eod_token_id() == tokenizer.eos_token_id
