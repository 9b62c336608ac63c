"""Exported directories elsewhere: the keys and files that each engine reads, and the tokens that engines decode.

The engines are those of ``tools/engines``, the real model that of ``tools/real_model``; what is missing is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemodiff_train.cli import main
from tests import jobs, small
from tools.support.ranks import Jobs, RankPool

ROOT = Path(__file__).parent.parent
ENGINES = ROOT / "build" / "engines"
MLX, TRANSFORMERS_4 = ENGINES / "bin" / "python", ENGINES / "transformers4"
REAL = ROOT / "runs" / "models" / "smollm2"
NEW, BLOCK, THRESHOLD = 32, 16, 0.5
TEXT = "the quick  brown fox,\n 42 times"
PROMPTS = [[20, 21, 22, 23], [30, 33, 36, 39, 41, 44, 47], [100], [*range(20, 90)]]  # one beyond YaRN's first length
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip

Tokens = dict[str, dict[str, list[list[int]]]]
"""New tokens by model, mode and prompt."""

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 5e4}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_theta": 5e4}}),
    "llama3": ("llama3", {}),
    "mistral": ("mistral", {"rope_parameters": {"rope_theta": 5e4}}),
    "ministral3": ("ministral3", {}),
}
BACKBONES = ("ministral3", "llama3", "mistral")


@dataclass
class Served:
    """Models on their way from Hugging Face directories to exported ones."""

    folder: Path

    def path(self, name: str, kind: str) -> str:
        return str(self.folder / f"{name}-{kind}")

    def settings(self, name: str, kind: str) -> dict[str, Any]:
        return json.loads(Path(self.path(name, kind), "config.json").read_text())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Every family as ``ar``; and those that a NemotronLabsDiffusion model can be, as ``nemotron``."""
    served = Served(tmp_path_factory.mktemp("served"))
    for name, (family, changes) in FAMILIES.items():
        getattr(small, family)(Path(served.path(name, "source")), **changes)
        if name in BACKBONES:  # the mask token is never the most probable one, which mlx-vlm would take
            weights = small.weights(Path(served.path(name, "source")))
            weights["lm_head.weight"] *= 20  # nor does its probability count
            weights["lm_head.weight"][1] = 0
            save_file(weights, Path(served.path(name, "source"), "model.safetensors"), metadata={"format": "pt"})
        mask = ["--mask-token", small.MASK] if name in BACKBONES else []
        assert main(["convert", "import", served.path(name, "source"), served.path(name, "checkpoint"), *mask]) == 0
        for kind in ("ar", "nemotron") if name in BACKBONES else ("ar",):
            assert main(["convert", "export", served.path(name, "checkpoint"), served.path(name, kind),
                         "--format", kind]) == 0  # fmt: skip
    return served


def test_ar_names_what_engines_read(served: Served) -> None:
    """Where Transformers 5 has ``rope_parameters`` alone, Transformers 4 and mlx-lm read two other keys."""
    for name in FAMILIES:
        before, after = served.settings(name, "source"), served.settings(name, "ar")
        assert before.items() <= after.items()
        rope = before["rope_parameters"]
        assert after["rope_theta"] == rope["rope_theta"] and isinstance(after["tie_word_embeddings"], bool)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        assert after.get("rope_scaling") == (scaling if rope["rope_type"] != "default" else None)
    assert served.settings("llama3", "ar")["rope_scaling"] == LLAMA_3
    for name in ("qwen2", "qwen3-tied"):
        assert served.settings(name, "ar")["tie_word_embeddings"]


def vllms_query_scale(settings: dict[str, Any]) -> tuple[float, int] | None:
    """Where vLLM 0.33 looks for Ministral 3's query scale: a mapping at the top, and nowhere else."""
    scaling = settings.get("llama_4_scaling")
    return None if scaling is None else (scaling["beta"], scaling["original_max_position_embeddings"])


def sglangs_query_scale(settings: dict[str, Any]) -> tuple[float, int]:
    """Where SGLang 0.5.23 looks for it: the length at the top, else its default."""
    return settings["rope_parameters"]["llama_4_scaling_beta"], settings.get(
        "original_max_position_embeddings", 16384
    )


def test_the_query_scale_of_ministral_3_is_where_vllm_and_sglang_look(served: Served) -> None:
    from transformers import AutoModelForCausalLM

    settings = served.settings("ministral3", "ar")
    assert vllms_query_scale(settings) == sglangs_query_scale(settings) == (0.1, 64)
    assert vllms_query_scale(served.settings("llama3", "ar")) is None
    ids = torch.arange(20, 220)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(served.path("ministral3", kind))(ids).logits
            for kind in ("source", "ar")
        )
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", BACKBONES)
def test_nemotron_of_every_backbone(name: str, served: Served, tmp_path: Path) -> None:
    """The keys of vLLM and mlx-vlm; no file is named that is not there; back in, it is the same model."""
    settings, source = served.settings(name, "nemotron"), served.settings(name, "source")
    assert (settings["architectures"], settings["model_type"]) == (
        ["NemotronLabsDiffusionModel"],
        "nemotron_labs_diffusion",
    )
    assert (settings["mask_token_id"], settings["block_size"], settings["tie_word_embeddings"]) == (1, 32, False)
    assert source["rope_parameters"].items() <= settings["rope_parameters"].items()
    assert "llama_4_scaling_beta" in settings["rope_parameters"]  # Ministral 3's code takes no other for 0
    assert "auto_map" not in settings and (settings["head_dim"], settings["vocab_size"]) == (
        32 if name == "mistral" else 16,
        small.VOCABULARY,
    )
    generation = json.loads(Path(served.path(name, "nemotron"), "generation_config.json").read_text())
    assert not [key for key in generation if key.startswith("diffusion_")]
    again = str(tmp_path / "again")
    assert main(["convert", "import", served.path(name, "nemotron"), again]) == 0
    assert main(["convert", "verify", served.path(name, "checkpoint"), again]) == 0


def test_nemotron_is_refused_where_its_code_computes_something_else(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemodiff_train.conversion import formats
    from nemodiff_train.errors import UserError
    from nemodiff_train.model.pretrained import model_from

    capsys.readouterr()
    words = ["convert", "export", served.path("qwen2", "checkpoint"), str(tmp_path / "out"), "--format", "nemotron"]
    assert main(words) == 2 and "Qwen2ForCausalLM" in capsys.readouterr().err
    for changes in ({"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}):
        provider = model_from(served.path("llama3", "checkpoint"))
        provider.hf_config = {**provider.hf_config, **changes}
        with pytest.raises(UserError, match=f"LlamaForCausalLM with {next(iter(changes))}"):
            formats.nemotron_format(provider)


def test_code_is_named_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a directory that came without ``auto_map``, or with the names of another repository."""
    (tmp_path / "code").mkdir()
    for name in ("configuration_nemotron_labs_diffusion", "modeling_nemotron_labs_diffusion"):
        (tmp_path / "code" / f"{name}.py").write_text("raise RuntimeError('never run')\n")
    elsewhere = {"AutoModel": "someone/model--modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel"}
    for name, changes in (("without", {}), ("elsewhere", {"auto_map": elsewhere})):
        source, checkpoint = tmp_path / name, str(tmp_path / f"{name}-checkpoint")
        small.nemotron(source, **changes)
        assert main(["convert", "import", str(source), checkpoint]) == 0
        for kind, options in (("plain", []), ("code", ["--remote-code", str(tmp_path / "code")])):
            out = tmp_path / f"{name}-{kind}"
            assert main(["convert", "export", checkpoint, str(out), *options]) == 0
            named = json.loads((out / "config.json").read_text()).get("auto_map", {})
            assert bool(named) == bool(options) == bool(list(out.glob("*.py")))
    capsys.readouterr()
    words = ["convert", "export", str(tmp_path / "without-checkpoint"), str(tmp_path / "out")]
    assert main([*words, "--remote-code", str(tmp_path)]) == 2
    assert "lacks configuration_nemotron_labs_diffusion.py" in capsys.readouterr().err


class Engine:
    """A program in another environment, which starts at its first job.

    Args:
        folder: Where it keeps what it downloads, and its log.
        python: Interpreter of the environment.
        script: The program in ``tests``.
        environment: Added to this process's.
    """

    def __init__(self, folder: Path, python: Path | str, script: str, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment = inherited | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment |= environment
        self.command = [str(python), str(ROOT / "tests" / script)]
        self.log = folder / "log"

    @cached_property
    def process(self) -> subprocess.Popen[str]:
        pipe, log = subprocess.PIPE, self.log.open("w")
        return subprocess.Popen(
            self.command, env=self.environment, cwd=self.log.parent, stdin=pipe, stdout=pipe, stderr=log, text=True
        )

    def __call__(self, kind: str, **job: Any) -> Any:
        """Do a job; return what the program found."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([kind, job]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return json.loads(answer)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """Those that are there: Transformers 5, Transformers 4, and MLX with mlx-lm and mlx-vlm."""
    program = "engine_transformers.py"
    found = {"transformers 5": Engine(tmp_path_factory.mktemp("transformers5"), sys.executable, program)}
    if TRANSFORMERS_4.is_dir():
        folder = tmp_path_factory.mktemp("transformers4")
        found["transformers 4"] = Engine(folder, sys.executable, program, PYTHONPATH=str(TRANSFORMERS_4))
    if MLX.exists():
        found["mlx"] = Engine(tmp_path_factory.mktemp("mlx"), MLX, "engine_mlx.py")
    yield found
    for engine in found.values():
        if "process" in vars(engine):
            engine.process.kill()
            engine.process.communicate()


def of_transformers(engines: dict[str, Engine]) -> list[Engine]:
    return [engine for name, engine in engines.items() if name != "mlx"]


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block-causal, unshifted Qwen 3 whose tokenizer ends where that of Qwen 3 does."""
    folder = tmp_path_factory.mktemp("sdar")
    small.qwen3(folder / "family", num_hidden_layers=1, vocab_size=151936, hidden_size=16, intermediate_size=16,
                rope_parameters={"rope_theta": 5e4})  # fmt: skip
    settings = {"architectures": ["TriModeModel"], "model_type": "tri_mode", "block_size": 4, "shift": False,
                "clean_attention": "block_causal"}  # fmt: skip
    family = json.loads((folder / "family" / "config.json").read_text())
    for name, changes in (
        ("sdar", {"mask_token_id": 151669}),
        ("other-mask", {"mask_token_id": 1}),
        ("causal", {"mask_token_id": 151669, "clean_attention": "causal"}),
        ("shifted", {"mask_token_id": 151669, "shift": True}),
    ):
        shutil.copytree(folder / "family", folder / name)
        (folder / name / "config.json").write_text(json.dumps({**settings, **changes, "text_config": family}))
        assert main(["convert", "import", str(folder / name), str(folder / f"{name}-checkpoint")]) == 0
    return folder


def test_sdar_of_a_block_causal_qwen_3(
    sdar: Path, engines: dict[str, Engine], capsys: pytest.CaptureFixture[str]
) -> None:
    """The names, mask token and rotary base that SGLang 0.5.23 and lmdeploy read; and what they could not decode."""
    out = sdar / "out"
    assert main(["convert", "export", str(sdar / "sdar-checkpoint"), str(out), "--format", "sdar"]) == 0
    settings = json.loads((out / "config.json").read_text())
    expected = {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "mask_token_id": 151669, "block_size": 4}
    assert expected.items() <= settings.items()
    assert (out / f"{settings['auto_map']['AutoConfig'].split('.')[0]}.py").is_file()
    assert small.same(small.weights(sdar / "family"), small.weights(out))
    assert main(["convert", "import", str(out), str(sdar / "again")]) == 0  # comes back as what it was
    assert main(["convert", "export", str(sdar / "again"), str(sdar / "out-again"), "--format", "sdar"]) == 0
    assert json.loads((sdar / "out-again" / "config.json").read_text()) == settings
    for engine in of_transformers(engines):
        found = engine("config", directory=str(out))
        assert found == {"class": "SDARConfig", "rope_theta": 5e4, "architectures": ["SDARForCausalLM"]}
    for name, reason in (("other-mask", "151669"), ("causal", "clean_attention=causal"), ("shifted", "shift=true")):
        capsys.readouterr()
        words = ["convert", "export", str(sdar / f"{name}-checkpoint"), str(sdar / "none"), "--format", "sdar"]
        assert main(words) == 2 and reason in capsys.readouterr().err


def trained(ranks: RankPool, folder: Path, recipe: str, checkpoint: str, settings: list[str], **choices: Any) -> str:
    """Train on one rank; return the checkpoints."""
    data, output = folder / f"{recipe}-data", folder / f"{recipe}-run"
    small.data(data, documents=10)
    runs = Jobs(ranks, folder)
    arguments = {"start_from": checkpoint, "data": str(data), "output": str(output), **choices}
    runs.add("run", 1, jobs.train, recipe=recipe, **arguments, settings=settings)
    assert runs["run"]["steps"]
    return f"{output}/checkpoints"


def older(directory: Path) -> None:
    """Write a tokenizer's files as Transformers 4 did: more of them, other fields, two templates."""
    file = directory / "tokenizer_config.json"
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in tokens}
    settings = {"added_tokens_decoder": decoder, "additional_special_tokens": [small.MASK], "eos_token": small.EOD,
                "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    file.write_text(json.dumps(settings, indent=4))
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": small.EOD}))
    (directory / "added_tokens.json").write_text(json.dumps({token["content"]: token["id"] for token in tokens}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}{{ messages }}")


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "additional_chat_templates/tools.jinja",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """A directory with every file of a tokenizer; trained on, exported, and given a mask token."""
    folder = tmp_path_factory.mktemp("tokenized")
    small.qwen3(folder / "source", num_hidden_layers=1)
    older(folder / "source")
    source, checkpoint = str(folder / "source"), str(folder / "checkpoint")
    assert main(["convert", "import", source, checkpoint, "--mask-token", small.MASK]) == 0
    run = trained(ranks, folder, "recipe", checkpoint, ["train.train_iters=2", "checkpoint.async_save=true"])
    assert main(["convert", "export", run, str(folder / "trained")]) == 0
    assert main(["convert", "import", source, str(folder / "added"), "--add-mask-token", "<mask>"]) == 0
    assert main(["convert", "export", str(folder / "added"), str(folder / "masked")]) == 0
    return folder


def test_a_tokenizer_leaves_a_run_as_it_came(tokenized: Path) -> None:
    for name in TOKENIZER_FILES:
        assert (tokenized / "trained" / name).read_bytes() == (tokenized / "source" / name).read_bytes(), name


def test_an_added_mask_token_is_all_that_changes(tokenized: Path) -> None:
    changed = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    for name in TOKENIZER_FILES:
        before, after = ((tokenized / folder / name).read_text() for folder in ("source", "masked"))
        assert (before != after) == (name in changed), name
    before, after = (
        json.loads((tokenized / folder / "tokenizer_config.json").read_text()) for folder in ("source", "masked")
    )
    assert after.pop("mask_token") == "<mask>"
    (added,) = after["added_tokens_decoder"].keys() - before["added_tokens_decoder"].keys()
    assert after["added_tokens_decoder"].pop(added)["special"] and after == before


def test_tokenizers_load_in_transformers_4_and_5(tokenized: Path, engines: dict[str, Engine]) -> None:
    """Also one that Transformers 5 has saved, with a class and a field that the older version does not know."""
    newer, out = tokenized / "newer", tokenized / "newer-out"
    shutil.copytree(tokenized / "source", newer)
    settings = json.loads((newer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|mask|>"], "is_local": True}
    del settings["additional_special_tokens"]
    (newer / "tokenizer_config.json").write_text(json.dumps(settings))
    assert main(["convert", "import", str(newer), str(tokenized / "newer-checkpoint")]) == 0
    assert main(["convert", "export", str(tokenized / "newer-checkpoint"), str(out)]) == 0
    folders = ("source", "trained", "masked", "newer-out")
    for engine in of_transformers(engines):
        found = {name: engine("tokenizer", directory=str(tokenized / name), text=TEXT) for name in folders}
        assert len({tuple(found[name]["text"]) for name in folders}) == 1
        assert found["masked"]["mask"] not in (None, found["source"]["mask"])
    if "transformers 4" in engines:
        assert engines["transformers 4"]("version").startswith("4.57")


@pytest.fixture(scope="module")
def expected(served: Served) -> Tokens:
    """What the Megatron side decodes from each checkpoint, by mode."""
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.loading import load_model

    settings = DecodingSettings(max_new_tokens=NEW, block_size=BLOCK, threshold=THRESHOLD)
    found = {}
    for name in FAMILIES:
        model = load_model(Checkpoint.open(served.path(name, "checkpoint"))).chunks
        modes = ("ar", "diffusion", "linear") if name in BACKBONES else ("ar",)
        found[name] = {mode: [row.tokens for row in decode(model, PROMPTS, mode, settings)[0]] for mode in modes}
    return found


def decoded_by(engine: Engine, served: Served, name: str) -> dict[str, Any]:
    """Decode a family's prompts and tokenize a text."""
    return engine("ar", directory=served.path(name, "ar"), prompts=PROMPTS, new=NEW, text=TEXT)


@pytest.mark.skipif(not MLX.exists(), reason="no build/engines; make it with tools/engines")
def test_mlx_lm_decodes_every_family(served: Served, expected: Tokens, engines: dict[str, Engine]) -> None:
    for name in FAMILIES:
        assert decoded_by(engines["mlx"], served, name)["tokens"] == expected[name]["ar"], name


@pytest.mark.skipif(not TRANSFORMERS_4.is_dir(), reason="no build/engines; make it with tools/engines")
def test_transformers_4_and_5_decode_every_family(
    served: Served, expected: Tokens, engines: dict[str, Engine]
) -> None:
    older_ones = [name for name in FAMILIES if name != "ministral3"]  # which Transformers 4 does not have
    for version, names in (("transformers 5", list(FAMILIES)), ("transformers 4", older_ones)):
        found = {name: decoded_by(engines[version], served, name) for name in names}
        for name in names:
            assert found[name]["tokens"] == expected[name]["ar"], (name, version)
            assert found[name]["text"] == found["qwen3"]["text"]


@pytest.mark.skipif(not REAL.is_dir(), reason="no runs/models/smollm2; make it with tools/real_model")
@pytest.mark.skipif(not MLX.exists(), reason="no build/engines; make it with tools/engines")
def test_a_real_model_decodes_the_same_everywhere(tmp_path: Path, engines: dict[str, Engine]) -> None:
    """The model itself in Transformers 5; its export there, in Transformers 4 and mlx-lm: tokens of texts."""
    from nemodiff_train.data.tokenizer import load_tokenizer

    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "out")
    assert main(["convert", "import", str(REAL), checkpoint]) == 0
    assert main(["convert", "export", checkpoint, out, "--format", "ar"]) == 0
    assert small.same(small.weights(REAL), small.weights(Path(out)))
    texts = ["The capital of France is", "def fibonacci(n):\n    if n <", "Once upon a time, there"]
    tokenizer = load_tokenizer(str(REAL))
    job = {"prompts": [tokenizer(text)["input_ids"] for text in texts], "new": NEW, "text": TEXT}
    model = engines["transformers 5"]("ar", directory=str(REAL), **job)
    assert [engine("ar", directory=out, **job) for engine in engines.values()] == [model] * 3
    assert "Paris" in tokenizer.decode(model["tokens"][0])


@pytest.fixture(scope="module")
def drafted(served: Served, ranks: RankPool) -> tuple[dict[str, str], Any]:
    """Directories of a Llama as ``nemotron`` and ``tri-mode`` with its drafter; and the drafter's own draft.

    The adapters have another rank and scale than the released ones, and the draft is [block, vocabulary] logits after
    the first prompt, without them and with them.
    """
    from nemodiff_train.decoding.session import Session
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.loading import load_model

    settings = ["train.train_iters=3", "optimizer.lr=0.05"]
    name, checkpoint = "llama3", served.path("llama3", "checkpoint")
    adapters = trained(ranks, served.folder, "drafter", checkpoint, settings, rank=6, alpha=9)
    directories = {}
    for kind in ("nemotron", "tri-mode"):
        directories[kind] = served.path(name, f"drafted-{kind}")
        words = ["convert", "export", checkpoint, directories[kind], "--format", kind, "--drafter", adapters]
        assert main(words) == 0
    drafts = []
    for drafter in (None, Checkpoint.open(adapters)):
        model = load_model(Checkpoint.open(checkpoint), drafter=drafter).chunks
        session = Session(model, 1, 64, 1)
        session.prefill([PROMPTS[0][:-1]])
        block = torch.tensor([PROMPTS[0][-1:] + [1] * (BLOCK - 1)])
        drafts.append(session.forward(block, torch.zeros(1, dtype=torch.long), "draft", causal=False)[0])
    assert not torch.allclose(*drafts, atol=1e-2)
    return directories, torch.stack(drafts)


def test_a_drafter_leaves_with_the_scale_and_names_that_engines_expect(
    served: Served, drafted: tuple[dict[str, str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scale 4 whatever it was trained with; written beside its model, or into a model's directory later on."""
    adapters = str(served.folder / "drafter-run" / "checkpoints")
    files = {kind: Path(folder) / "linear_spec_lora" for kind, folder in drafted[0].items()}
    for folder in files.values():
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"]) == (6, 24)
    prefixes = {"nemotron": "base_model.model.encoder.layers.", "tri-mode": "base_model.model.model.layers."}
    for kind, prefix in prefixes.items():
        assert all(name.startswith(prefix) for name in load_file(files[kind] / "adapter_model.safetensors"))
        later = tmp_path / kind
        shutil.copytree(drafted[0][kind], later, ignore=shutil.ignore_patterns("linear_spec_lora"))
        assert main(["convert", "export", adapters, str(later / "linear_spec_lora")]) == 0
        for file in files[kind].iterdir():
            assert file.read_bytes() == (later / "linear_spec_lora" / file.name).read_bytes()
    capsys.readouterr()
    for words, reason in (
        ([adapters, f"{served.path('ministral3', 'nemotron')}/linear_spec_lora"], "hidden_size=64"),
        ([adapters, f"{drafted[0]['nemotron']}/another", "--format", "ar"], "does not fit"),
        ([served.path("ministral3", "checkpoint"), str(tmp_path / "out"), "--drafter", adapters], "hidden_size=64"),
    ):
        assert main(["convert", "export", *words]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.skipif(not MLX.exists(), reason="no build/engines; make it with tools/engines")
def test_mlx_vlm_decodes_every_backbone(
    served: Served,
    expected: Tokens,
    drafted: tuple[dict[str, str], Any],
    engines: dict[str, Engine],
) -> None:
    """Tokens of three modes; and the logits of a draft, with and without the drafter."""
    settings = {"prompts": PROMPTS, "new": NEW, "block": BLOCK, "threshold": THRESHOLD}
    directories = {name: served.path(name, "nemotron") for name in BACKBONES} | {"drafted": drafted[0]["nemotron"]}
    found = {name: engines["mlx"]("diffusion", directory=folder, **settings) for name, folder in directories.items()}
    for name in directories:
        for mode, tokens in expected["llama3" if name == "drafted" else name].items():
            assert found[name][mode] == tokens, (name, mode)
        assert found[name]["drafter"] == (name == "drafted")
    drafts = torch.tensor(found["drafted"]["drafts"])
    torch.testing.assert_close(drafts[..., 2:], drafted[1][..., 2:].float(), rtol=1e-4, atol=1e-3)


def test_the_own_code_takes_the_drafter(
    served: Served, expected: Tokens, drafted: tuple[dict[str, str], Any]
) -> None:
    """Same tokens as without; the draft is that of the Megatron side."""
    from transformers import AutoModel

    directory = drafted[0]["tri-mode"]
    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    model.load_drafter()
    model.load_drafter(f"{directory}/linear_spec_lora")  # in the place of the first, not beside it
    for prompt, tokens in zip(PROMPTS, expected["llama3"]["ar"], strict=True):
        ids, _ = model.linear_spec_generate(torch.tensor([prompt]), NEW, BLOCK)
        assert ids[0, len(prompt) :].tolist() == tokens
    from transformers import DynamicCache

    prompt, block = torch.tensor([PROMPTS[0][:-1]]), torch.tensor([PROMPTS[0][-1:] + [1] * (BLOCK - 1)])
    both_ways = torch.zeros(1, 1, BLOCK, prompt.shape[1] + BLOCK)
    for drafts, draft in zip((False, True), drafted[1], strict=True):
        cache = DynamicCache()
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
            model._drafting = drafts
            logits = model(block, attention_mask=both_ways, past_key_values=cache, use_cache=True).logits[0]
            model._drafting = False
        torch.testing.assert_close(logits[:, 2:], draft[:, 2:].float(), rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="not a drafter of this model"):
        model.load_drafter(f"{drafted[0]['nemotron']}/linear_spec_lora")
