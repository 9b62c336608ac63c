"""What config.json says is computed as Transformers computes it, or refused in a line; nothing is left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemodiff_train.cli import main
from nemodiff_train.conversion import importing
from nemodiff_train.model.checkpoint import Checkpoint
from tests import small
from tests.conftest import end_process_groups
from tests.prepared import one_line


def rope(kind: str, **settings: float | bool) -> dict[str, Any]:
    scaled = {"original_max_position_embeddings": 64} if kind in ("yarn", "llama3") else {}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, **scaled, **settings}}


LLAMA3 = {"low_freq_factor": 0.5, "high_freq_factor": 3.0}

USED: dict[str, tuple[str, dict[str, Any]]] = {
    "YaRN with only factor and original length": ("qwen3", rope("yarn")),
    "YaRN with an attention factor": ("qwen2", rope("yarn", attention_factor=1.3)),
    "YaRN that is not rounded": ("mistral", rope("yarn", truncate=False, mscale=0.7, mscale_all_dim=0.3)),
    "Llama 3's scaling with its own bounds": ("llama3", rope("llama3", **LLAMA3)),
    "Llama 3's scaling of another family": ("qwen3", rope("llama3", **LLAMA3)),
    "linear scaling": ("qwen2", rope("linear")),
    "an activation": ("mistral", {"hidden_act": "gelu"}),
    "an epsilon": ("llama3", {"rms_norm_eps": 0.01, "num_key_value_heads": 1}),
}

NO_PARAMETER = "no parameter for the tensor 'model.layers.0.self_attn."
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases of a Llama": ("llama3", {"attention_bias": True}, NO_PARAMETER),
    "biases of a Qwen 3": ("qwen3", {"attention_bias": True}, NO_PARAMETER),
    "biases of an MLP": ("llama3", {"mlp_bias": True}, "biases"),
    "angles that change with the length": ("llama3", rope("dynamic"), "rope scaling 'dynamic'"),
    "a window": ("mistral", {"sliding_window": 32}, "sliding-window attention"),
    "an activation that cannot be loaded again": ("llama3", {"hidden_act": "tanh"}, "tanh"),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def nemotron(directory: Path) -> None:
    """Save a random Nemotron, which Bridge takes and this project's layers compute otherwise."""
    from transformers import NemotronConfig, NemotronForCausalLM

    settings = {key: value for key, value in small.sizes(64).items() if key != "head_dim"}
    small.save(NemotronForCausalLM, NemotronConfig(**settings), directory)


@pytest.mark.parametrize("name", USED)
def test_settings_are_used(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also over many positions, where a window, a scaling or a wrong frequency would show."""
    family, changes = USED[name]
    getattr(small, family)(tmp_path / "source", **changes)
    assert main(["convert", "import", "source", "imported"]) == 0
    assert main(["convert", "verify", "source", "imported", "--prompt", "the quick brown fox " * 25]) == 0
    assert main(["convert", "export", "imported", "back"]) == 0
    settings, back = (json.loads(Path(folder, "config.json").read_text()) for folder in ("source", "back"))
    assert {name: back.get(name) for name in settings} == settings  # engines read some under other names as well


@pytest.mark.parametrize("name", REFUSED)
def test_settings_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, changes, said = REFUSED[name]
    getattr(small, family)(tmp_path / "source", **changes)
    capsys.readouterr()
    assert main(["convert", "import", "source", "imported"]) == 2
    assert said in one_line(capsys) and not Path("imported").exists()


def test_a_family_that_is_computed_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bridge has converters for families whose norms or biases are not those of this project's layers."""
    nemotron(tmp_path / "source")
    capsys.readouterr()
    assert main(["convert", "import", "source", "imported"]) == 2
    line = one_line(capsys)
    assert "away from Transformers'" in line and "(docs/conversion.md)" in line and not Path("imported").exists()
    small.data(tmp_path / "data")
    end_process_groups()
    assert main(["train", "joint", "start_from=source", "data=data", "output=run", "--dry-run"]) == 2
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "compared with Transformers' at import alone" in page


@pytest.mark.parametrize(("kind", "said"), [(None, "missing"), ("qwen33", "'qwen33'")])
def test_a_family_without_its_model_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str | None, said: str
) -> None:
    """The architecture alone is not called unsupported, which it is not."""
    small.qwen3(tmp_path / "source", num_hidden_layers=1)
    settings = json.loads(Path("source/config.json").read_text())
    del settings["model_type"]
    Path("source/config.json").write_text(json.dumps(settings if kind is None else {**settings, "model_type": kind}))
    capsys.readouterr()
    assert main(["convert", "import", "source", "imported"]) == 2
    assert f"config.json of Qwen3ForCausalLM: its model_type is {said}" in one_line(capsys)
    assert not Path("imported").exists()


def test_two_models_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that an index names beside weights that it does not; a checkpoint beside a model."""
    from transformers import AutoModelForCausalLM

    small.qwen3(tmp_path / "source")
    shutil.copytree("source", "old")
    AutoModelForCausalLM.from_pretrained("source").save_pretrained("old", max_shard_size="100KB")
    for shard in Path("old").glob("model-*"):
        shutil.copy(shard, "source")
    shutil.copy("old/model.safetensors.index.json", "source")
    capsys.readouterr()
    for words in (["import", "source", "imported"], ["inspect", "source"]):
        assert main(["convert", *words]) == 2
        assert "holds two models" in one_line(capsys)
    Path("source/model.safetensors.index.json").unlink()
    assert main(["convert", "import", "source", "imported"]) == 2  # both, and no index that says which
    assert "is both in" in one_line(capsys)
    for shard in Path("source").glob("model-*"):
        shard.unlink()
    assert main(["convert", "import", "source", "imported"]) == 0
    shutil.copy("source/config.json", "imported")
    capsys.readouterr()
    assert main(["convert", "inspect", "imported"]) == 2
    assert "a Megatron checkpoint and a Hugging Face model" in one_line(capsys)


def test_what_else_would_change_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters beside it, which Transformers adds to its weights; code of its own; no quantization is none."""
    small.qwen3(tmp_path / "source")
    settings = json.loads(Path("source/config.json").read_text())
    for content, said in (
        ({**settings, "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "names code of its own (auto_map)"),
        ({**settings, "quantization_config": None}, "holds adapters beside the model"),
    ):
        Path("source/adapter_config.json").write_text("{}")
        Path("source/config.json").write_text(json.dumps(content))
        capsys.readouterr()
        assert main(["convert", "import", "source", "imported"]) == 2
        assert said in one_line(capsys)
    Path("source/adapter_config.json").unlink()
    Path("source/config.json").write_text(json.dumps({**settings, "attention_dropout": 0.1}))
    Path("source/generation_config.json").write_text('{"repetition_penalty": 1.1, "num_beams": 1, "top_p": 0.8}')
    assert main(["convert", "import", "source", "imported"]) == 0
    assert "attention_dropout=0.1 is not used" in " ".join(capsys.readouterr().err.split())
    assert main(["generate", "imported", "the quick", "--mode", "ar", "--max-new-tokens", "2"]) == 0
    assert "asks for repetition_penalty=1.1, which decoding here" in " ".join(capsys.readouterr().err.split())


def test_more_tokens_than_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said at import; text that holds such a token is refused, other text is not."""
    from transformers import AutoTokenizer

    small.tokenizer(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained("source")
    rows = len(tokenizer)
    small.qwen3(tmp_path / "source", vocab_size=rows)
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.save_pretrained("source")
    capsys.readouterr()
    assert main(["convert", "import", "source", "imported", "--mask-token", small.MASK]) == 0
    told = f"1 token id beyond the model's vocabulary of {rows:,}, such as '<|tool|>' ({rows})"
    assert told in " ".join(capsys.readouterr().err.split())
    assert main(["generate", "imported", "the quick", "--mode", "ar", "--max-new-tokens", "2"]) == 0
    assert main(["generate", "imported", "the <|tool|>", "--mode", "ar"]) == 2
    assert f"holds token {rows}, but the model has tokens 0 to {rows - 1}" in capsys.readouterr().err
    assert main(["convert", "verify", "source", "imported", "--prompt", "a <|tool|>"]) == 2
    for name, text in (("without", "the quick brown fox"), ("with", "the <|tool|> fox")):
        Path(f"{name}.jsonl").write_text(json.dumps({"text": text}) * 1 + "\n")
        words = ["data", "prepare", f"{name}.jsonl", "--tokenizer", "source", "--output", f"{name}-data"]
        assert main([*words, "--workers", "1"]) == 0
    capsys.readouterr()
    end_process_groups()  # those of a conversion are not those of a training
    train = ["train", "joint", "start_from=imported", "output=run", "--dry-run"]
    for name, said in (
        ("without", "such as '<|tool|>'"),
        ("with", f"token {rows} ('<|tool|>') occurs 1 times"),
    ):
        main([*train, f"data={name}-data"])
        printed = capsys.readouterr()
        assert said in " ".join((printed.out + printed.err).split())


def overflowing(folder: Path, factor: float, dtype: torch.dtype) -> None:
    """Save a model of finite weights whose products in the second layer are not."""
    small.qwen3(folder, num_hidden_layers=3, dtype=dtype)
    weights = load_file(folder / "model.safetensors")
    for part in ("up_proj", "gate_proj", "down_proj"):
        weights[f"model.layers.1.mlp.{part}.weight"] *= factor
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 200), (torch.float32, 1e20)])
def test_weights_that_overflow_are_not_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, factor: float
) -> None:
    """As they are stored: an export of them would be as useless to every engine."""
    overflowing(tmp_path / "source", factor, dtype)
    capsys.readouterr()
    assert main(["convert", "import", "source", "imported", "--mask-token", small.MASK]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "infinite or not numbers, from layer 2 of 3 on" in line and str(dtype).removeprefix("torch.") in line
    assert not list(tmp_path.glob("*imported*"))


def test_logits_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is made of them, no score, and no equality, where an import did not compare them."""
    overflowing(tmp_path / "source", 1e20, torch.float32)
    monkeypatch.setattr(importing, "_compare_logits", lambda *arguments: None)
    assert main(["convert", "import", "source", "imported", "--mask-token", small.MASK]) == 0
    Path("task.jsonl").write_text(json.dumps({"prompt": "the quick", "answer": "0"}) + "\n")
    Path("text.jsonl").write_text(json.dumps({"text": "the quick brown fox " * 20}) + "\n")
    more = ["--max-new-tokens", "4"]
    capsys.readouterr()
    for words in (
        *(["generate", "imported", "the quick", "--mode", mode, *more] for mode in ("ar", "linear", "diffusion")),
        ["generate", "imported", "the quick", "--mode", "ar", "--temperature", "1", *more],
        ["eval", "imported", "--task", "task.jsonl", "--modes", "ar", "--output", "report", *more],
        ["likelihood", "imported", "text.jsonl", "--length", "32"],
        ["convert", "verify", "source", "imported"],
    ):
        assert main(words) == 2, words
        line = capsys.readouterr().err.splitlines()[-1]  # after a progress bar
        assert "infinite or not numbers, from layer 2 of 3 on, first at position" in line and "float32" in line, words
    assert Checkpoint.open("imported").step == 0
