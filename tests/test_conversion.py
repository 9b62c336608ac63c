"""Import, export, verify and inspect through the command line: bit-exact and complete.

Several ranks convert in tests/test_layouts.py, where the processes for it are.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemodiff_train.cli import main
from nemodiff_train.model import checkpoint
from tests import small

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen 3": ("qwen3", {}),
    "Qwen 3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "Qwen 2.5": ("qwen2", {}),
    "Llama 3": ("llama3", {}),
    "Mistral": ("mistral", {}),
    "Ministral 3": ("ministral3", {}),
    "Ministral 3, bf16": ("ministral3", {"dtype": "bfloat16"}),
    "Ministral 3 with a vision tower": ("ministral3_vision", {}),
    "NemotronLabsDiffusion": ("nemotron", {}),
    "NemotronLabsDiffusion, YaRN below 1": ("nemotron", {"rope_parameters": {**small.YARN, "factor": 0.25}}),
    "NemotronLabsDiffusion, bf16": ("nemotron", {"dtype": "bfloat16"}),
}

OF_ENGINES = {
    "rope_theta", "rope_scaling", "tie_word_embeddings", "llama_4_scaling", "original_max_position_embeddings",
}  # fmt: skip
"""Keys that an export adds beside the others; tests/test_serving.py says what for."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_out_after_in_is_bit_exact(tmp_path: Path, family: str) -> None:
    build, changes = FAMILIES[family]
    getattr(small, build)(tmp_path / "source", **changes)
    assert main(["convert", "import", "source", "imported"]) == 0
    assert main(["convert", "verify", "source", "imported"]) == 0  # logits against Transformers among others
    assert main(["convert", "export", "imported", "back"]) == 0

    before, after = small.weights(tmp_path / "source"), small.weights(tmp_path / "back")
    source, back = (json.loads(Path(folder, "config.json").read_text()) for folder in ("source", "back"))
    if build == "ministral3_vision":
        kept = {name: tensor for name, tensor in before.items() if name.startswith("language_model")}
        assert len(kept) < len(before)
        before = {name.removeprefix("language_model."): tensor for name, tensor in kept.items()}
        source = {**source["text_config"], "architectures": ["Ministral3ForCausalLM"], "dtype": source["dtype"]}
    assert small.same(before, after)
    assert {key: back[key] for key in source} == source
    assert back.keys() - source.keys() <= OF_ENGINES
    source, back = (json.loads(Path(folder, "generation_config.json").read_text()) for folder in ("source", "back"))
    assert source == back
    for file in Path("source").glob("*token*"):
        assert file.read_bytes() == Path("back", file.name).read_bytes()
    assert Path("source/chat_template.jinja").exists() == Path("back/chat_template.jinja").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_a_family_member_becomes_nemotron_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.ministral3(tmp_path / "source", tie_word_embeddings=True)
    (tmp_path / "code").mkdir()
    for name in ("configuration_nemotron_labs_diffusion", "modeling_nemotron_labs_diffusion", "helpers"):
        (tmp_path / "code" / f"{name}.py").write_text("raise RuntimeError('never run')\n")
    assert main(["convert", "import", "source", "imported", "--mask-token", small.MASK]) == 0
    words = ["--format", "nemotron", "--max-shard-size", "100KB"]
    assert main(["convert", "export", "imported", "nemotron", *words, "--remote-code", "code"]) == 0
    assert len(list(Path("nemotron").glob("*.safetensors"))) > 3
    assert {file.name for file in Path("nemotron").glob("*.py")} == {file.name for file in Path("code").iterdir()}
    settings = json.loads(Path("nemotron/config.json").read_text())
    assert settings["mask_token_id"] == 1 and settings["block_size"] == 32
    assert set(settings["auto_map"]) == {"AutoConfig", "AutoModel"}
    assert settings["rope_parameters"] == small.YARN
    named = small.weights(tmp_path / "nemotron")
    assert torch.equal(named["diffusion_head.weight"], named["encoder.embed_tokens.weight"])
    capsys.readouterr()
    assert main(["convert", "export", "imported", "nemotron2", *words]) == 0
    assert "--remote-code" in capsys.readouterr().err

    assert main(["convert", "import", "nemotron", "again"]) == 0
    assert main(["convert", "verify", "nemotron", "again"]) == 0
    assert "block-diffusion logits" in capsys.readouterr().out
    assert main(["convert", "export", "again", "ar", "--format", "ar"]) == 0
    original, ar = small.weights(tmp_path / "source"), small.weights(tmp_path / "ar")
    assert torch.equal(ar.pop("lm_head.weight"), original["model.embed_tokens.weight"])
    assert small.same(original, ar)

    from transformers import AutoModelForCausalLM

    ids = torch.arange(20, 120)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in ("source", "ar")]
    assert torch.equal(*logits)


def test_a_model_that_the_format_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.qwen3(tmp_path / "qwen3")
    small.ministral3(tmp_path / "ministral3")
    for family, reason in (("qwen3", "Qwen3ForCausalLM"), ("ministral3", "mask token")):
        assert main(["convert", "import", family, f"imported-{family}"]) == 0
        capsys.readouterr()
        assert main(["convert", "export", f"imported-{family}", "out", "--format", "nemotron"]) == 2
        assert reason in capsys.readouterr().err and not Path("out").exists()


def test_a_mask_token_is_added_and_exported(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    small.tokenizer(tmp_path / "tokenizer")
    rows = len(AutoTokenizer.from_pretrained("tokenizer"))
    small.qwen3(tmp_path / "source", vocab_size=rows)
    assert main(["convert", "import", "source", "imported", "--add-mask-token", "<hidden>"]) == 0
    assert main(["convert", "export", "imported", "out"]) == 0
    before, after = small.weights(tmp_path / "source"), small.weights(tmp_path / "out")
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == rows + 1
    for name in before:
        assert torch.equal(after[name][: len(before[name])], before[name])
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            assert len(after[name]) == rows + 1
            assert torch.allclose(after[name][rows], before[name].mean(0), atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.mask_token == "<hidden>" and tokenizer.mask_token_id == rows

    from nemodiff_train.model.pretrained import model_from

    assert model_from("imported").mask_token_id == rows
    assert main(["convert", "import", "imported", "x"]) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--mask-token", "<nope>"], "<nope>"),
        (["--mask-token", "320"], "below 320"),
        (["--add-mask-token", small.EOD], "--mask-token"),
    ],
)
def test_mask_tokens_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    small.qwen3(tmp_path / "source")
    capsys.readouterr()
    assert main(["convert", "import", "source", "out", *words]) == 2
    assert reason in capsys.readouterr().err
    small.nemotron(tmp_path / "nemotron")
    assert main(["convert", "import", "nemotron", "out", *words]) == 2
    assert "already" in capsys.readouterr().err and not Path("out").exists()


def test_verify_finds_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.nemotron(tmp_path / "one")
    for name in ("changed", "rotated"):
        small.nemotron(tmp_path / name)
    changed = load_file("changed/model.safetensors")
    changed["encoder.layers.2.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(changed, "changed/model.safetensors")
    settings = json.loads(Path("rotated/config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 10_000.0
    Path("rotated/config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert main(["convert", "verify", "one", "changed"]) == 1
    assert "the first that differs is model.layers.2.mlp.up_proj.weight" in capsys.readouterr().out
    assert main(["convert", "verify", "one", "changed", "--tolerance", "0.1"]) == 0
    assert main(["convert", "verify", "one", "rotated"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert {line.split("│")[1].strip() for line in table if "│ no" in line} == {"AR logits", "block-diffusion logits"}


def test_generate_opens_its_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.nemotron(tmp_path / "source")
    assert main(["convert", "import", "source", "imported"]) == 0
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def counted(*arguments: Any, **words: Any) -> Any:
            calls[name] += 1
            return plain(*arguments, **words)

        monkeypatch.setattr(module, name, counted)

    count(yaml, "CSafeLoader")
    count(checkpoint, "structure_damage")  # which iteration is the newest, by names and sizes
    count(checkpoint, "damage")  # and again by all bytes, before they are loaded
    assert main(["generate", "imported", "a b c", "--max-new-tokens", "4"]) == 0
    assert calls == {"CSafeLoader": 1, "structure_damage": 1, "damage": 1}


def test_inspect_says_what_is_there_without_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.nemotron(tmp_path / "source")
    assert main(["convert", "import", "source", "imported"]) == 0
    capsys.readouterr()
    program = (
        "import sys; from nemodiff_train.cli import main; "
        "codes = [main(['convert', 'inspect', name]) for name in ('source', 'imported')]; "
        "assert codes == [0, 0] and not any(name.startswith(('megatron', 'transformers')) for name in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    for told in (
        "NemotronLabsDiffusionModel",
        "4 layers",
        "id 1, blocks of 16",
        "tensors: 39",
        "training step",
        "F32",
    ):
        assert told in found.stdout, told
    assert main(["convert", "inspect", str(tmp_path)]) == 2
