"""Import, export, verify and inspect through the command line: bit-exact and complete.

Several ranks convert in tests/test_layouts.py, where the processes for it are.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemodiff_train.cli import main
from nemodiff_train.conversion import importing
from nemodiff_train.model import checkpoint
from tests import small
from tests.prepared import one_line

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


def test_a_damaged_tokenizer_is_refused_before_the_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.qwen3(tmp_path / "source")
    Path("source/tokenizer.json").write_text("{")
    monkeypatch.setattr(importing, "start_model_parallel", None)
    capsys.readouterr()
    assert main(["convert", "import", "source", "out"]) == 2
    assert "source: cannot load a tokenizer from it" in one_line(capsys) and not Path("out").exists()


def test_verify_finds_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.nemotron(tmp_path / "one")
    for name in ("changed", "rotated"):
        small.nemotron(tmp_path / name)
    changed = load_file("changed/model.safetensors")
    changed["encoder.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(changed, "changed/model.safetensors")
    settings = json.loads(Path("rotated/config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 10_000.0
    Path("rotated/config.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert main(["convert", "verify", "one", "changed"]) == 1
    assert "the first that differs is model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out
    assert main(["convert", "verify", "one", "changed", "--tolerance", "0.1"]) == 0
    assert main(["convert", "verify", "one", "rotated"]) == 1
    table = capsys.readouterr().out.splitlines()
    assert {line.split("│")[1].strip() for line in table if "│ no" in line} == {"AR logits", "block-diffusion logits"}


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a damaged configuration": lambda iteration: (iteration / "run_config.yaml").write_text("{"),
    "a changed configuration": lambda iteration: (iteration / "run_config.yaml").write_text(
        (iteration / "run_config.yaml").read_text().replace("block_size: 8", "block_size: 4")
    ),
    "damaged weights": lambda iteration: flip(next(iter(sorted(iteration.glob("*.distcp"))))),
    "a changed tokenizer": lambda iteration: flip(iteration / "tokenizer" / "tokenizer.json"),
}


@pytest.fixture(scope="module")
def two_iterations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose second iteration has other weights, other settings and another tokenizer than its first."""
    folder = tmp_path_factory.mktemp("iterations")
    for step, block_size in enumerate((16, 8)):
        source = folder / f"source-{step}"
        small.nemotron(source, block_size=block_size)
        save_file(
            {name: (1 + step) * tensor for name, tensor in small.weights(source).items()},
            source / "model.safetensors",
        )
        (source / "chat_template.jinja").write_text(f"{step}")
        assert main(["convert", "import", str(source), str(folder / f"imported-{step}")]) == 0
        (folder / "saved").mkdir(exist_ok=True)
        (folder / f"imported-{step}" / "iter_0000000").rename(folder / "saved" / f"iter_000000{step}")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_export_is_of_one_iteration(
    two_iterations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Settings, tokenizer and weights are those of the newest iteration that is whole."""
    shutil.copytree(two_iterations / "saved", "saved")
    assert main(["convert", "export", "saved", "newest"]) == 0
    DAMAGES[damage](tmp_path / "saved" / "iter_0000001")
    capsys.readouterr()
    assert main(["convert", "export", "saved", "out"]) == 0
    for step, folder in (("0", "out"), ("1", "newest")):
        source = two_iterations / f"source-{step}"
        assert small.same(small.weights(source), small.weights(tmp_path / folder))
        settings = json.loads((source / "config.json").read_text())
        assert json.loads(Path(folder, "config.json").read_text())["block_size"] == settings["block_size"]
        assert Path(folder, "chat_template.jinja").read_text() == step
    assert main(["convert", "verify", "saved", str(two_iterations / "source-0")]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "export", "saved", "out", "--format", "ar", "--remote-code", "code"], "--remote-code"),
        (["convert", "export", "saved", "out", "--max-shard-size", "much"], "much"),
        (["convert", "verify", "saved", "typo"], "typo"),
        (["generate", "saved", "text", "--drafter", "saved"], "not a drafter"),
    ],
    ids=lambda words: words[1] if isinstance(words, list) else None,
)
def test_a_mistake_is_said_before_the_weights_are_read(
    two_iterations: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose damage nobody has seen then."""
    shutil.copytree(two_iterations / "saved", "saved")
    DAMAGES["damaged weights"](Path("saved") / "iter_0000001")
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and "is damaged" not in error


def counted(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> Counter[str]:
    """Return the number of calls of functions, by name, from here on."""
    calls: Counter[str] = Counter()

    def count(name: str, plain: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
        calls[name] += 1
        return plain(*arguments, **words)

    for module, name in functions:
        monkeypatch.setattr(module, name, partial(count, name, getattr(module, name)))
    return calls


def test_a_command_opens_its_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemodiff_train.model import hf_directory

    small.qwen3(tmp_path / "source")
    names = ("read_config", "read_headers", "expected_shapes", "load_tokenizer")
    calls = counted(monkeypatch, *((hf_directory, name) for name in names))
    assert main(["convert", "import", "source", "imported", "--mask-token", small.MASK]) == 0
    # Of the miniature, too, Transformers is asked for the shapes.
    assert calls == {"read_config": 2, "read_headers": 1, "expected_shapes": 2, "load_tokenizer": 1}
    # Which iteration is the newest, by names and sizes; and again by all bytes, before they are loaded.
    functions = ((yaml, "CSafeLoader"), (checkpoint, "structure_damage"), (checkpoint, "damage"))
    for words in (
        ["generate", "imported", "a b c", "--max-new-tokens", "4"],
        ["convert", "export", "imported", "out"],
    ):
        calls = counted(monkeypatch, *functions)
        assert main(words) == 0
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
        "2 layers",
        "id 1, blocks of 16",
        "tensors: 21",
        "training step",
        "F32",
    ):
        assert told in found.stdout, told
    assert main(["convert", "inspect", str(tmp_path)]) == 2
