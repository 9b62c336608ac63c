"""Directories that decode themselves: like Megatron's model, without Megatron, back again, and by themselves."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemodiff_train.cli import main
from tests import small

MASK, BLOCK, NEW = 1, 8, 18
THRESHOLD = 0.009  # of 320 tokens with random weights
PROMPTS = [[20, 21, 22, 23], [30, 33, 36, 39, 41, 44, 47], [100], [*range(20, 90)]]
SCRIPT = Path(__file__).with_name("plain_transformers.py")


@dataclass
class Exported:
    """One model on its way through the command line."""

    folder: Path
    family: str
    shift: bool = False
    clean_attention: str = "causal"
    tied: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return ("ar", "linear", "diffusion") if self.clean_attention == "causal" else ("diffusion",)

    def write_source(self) -> None:
        """A directory of the family, told by hand that it is a tri-mode one."""
        source = self.folder / "source"
        getattr(small, self.family)(source, tie_word_embeddings=self.tied)
        (self.folder / "family").mkdir()
        for file in source.iterdir():
            shutil.copy2(file, self.folder / "family" / file.name)
        (self.folder / "family" / "config.json").unlink()
        config = (source / "config.json").rename(self.folder / "family" / "config.json")
        settings = {
            "architectures": ["TriModeModel"],
            "auto_map": {"AutoConfig": "nowhere.Nothing"},  # never looked for
            "model_type": "tri_mode",
            "mask_token_id": MASK,
            "block_size": BLOCK,
            "shift": self.shift,
            "clean_attention": self.clean_attention,
            "text_config": json.loads(config.read_text()),
        }
        (source / "config.json").write_text(json.dumps(settings))
        (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")

    def convert(self) -> None:
        source, checkpoint, out = (str(self.folder / name) for name in ("source", "checkpoint", "out"))
        assert main(["convert", "import", source, checkpoint]) == 0
        assert main(["convert", "export", checkpoint, out, "--format", "tri-mode"]) == 0


KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "ministral3": {"family": "ministral3"},
    "shift": {"family": "qwen3", "shift": True, "tied": True},
    "blocks": {"family": "ministral3", "clean_attention": "block_causal"},
    "blocks-shift": {"family": "qwen3", "clean_attention": "block_causal", "shift": True},
}
SETTINGS = {"ar": {}, "linear": {"block_size": BLOCK}, "diffusion": {"block_size": BLOCK, "threshold": THRESHOLD}}
METHODS = {"ar": "ar_generate", "linear": "linear_spec_generate", "diffusion": "generate"}


def megatron(exported: Exported) -> list[tuple[str, list[int], dict[str, Any], list[int], int]]:
    """What the Megatron side decodes: method, prompt, arguments, new tokens, forwards."""
    from nemodiff_train.decoding.decode import decode
    from nemodiff_train.decoding.generation import DecodingSettings
    from nemodiff_train.model.checkpoint import Checkpoint
    from nemodiff_train.model.loading import load_model

    model = load_model(Checkpoint.open(exported.folder / "checkpoint")).chunks
    found = []

    def take(mode: str, prompts: list[list[int]], stops: frozenset[int]) -> list[Any]:
        settings = DecodingSettings(max_new_tokens=NEW, stop_token_ids=stops, **SETTINGS[mode])
        generations, session = decode(model, prompts, mode, settings)
        arguments: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": sorted(stops)}
        if mode == "diffusion":
            arguments["threshold"] = settings.threshold
        for row, (prompt, generation) in enumerate(zip(prompts, generations, strict=True)):
            found.append((METHODS[mode], prompt, arguments, generation.tokens, session.calls(row)))
        return generations

    # A whole block or not: where blocks count from the text's start, only the former are prefilled.
    groups = [prompts for long in (False, True) if (prompts := [p for p in PROMPTS if (len(p) >= BLOCK) == long])]
    for mode, prompts in itertools.product(exported.modes, groups):
        free = take(mode, prompts, frozenset())
        # One that each row will meet at another place, and those that the prompts end with, which end nothing.
        stops = {row.tokens[3 + place] for place, row in enumerate(free)} | {prompt[-1] for prompt in prompts}
        take(mode, prompts, frozenset(stops))
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    models = {name: Exported(tmp_path_factory.mktemp(name), **kind) for name, kind in KINDS.items()}
    for model in models.values():
        model.write_source()
        model.convert()
    return models


@pytest.fixture(scope="module")
def expected(exported: dict[str, Exported]) -> dict[str, Any]:
    return {name: megatron(model) for name, model in exported.items()}


@pytest.fixture(scope="module")
def plain(exported: dict[str, Exported], expected: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process without this project and Megatron makes of the directories."""
    folder = tmp_path_factory.mktemp("plain")
    jobs = [
        {
            "directory": str(model.folder / "out"),
            "family": str(model.folder / "family"),
            "calls": [call[:3] for call in expected[name]],
            "harness": name == "qwen3",
        }
        for name, model in exported.items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder / "jobs.json"), str(folder / "results.json")]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "results.json").read_text())


def test_the_directory_runs_without_us(plain: Any) -> None:
    assert plain["importable"] == [] and plain["imported"] == []


@pytest.mark.parametrize("name", KINDS)
def test_it_decodes_what_megatron_decodes(
    name: str, exported: dict[str, Exported], expected: dict[str, Any], plain: Any
) -> None:
    """Same tokens, same number of forwards, in all modes."""
    outputs = plain[str(exported[name].folder / "out")]["outputs"]
    for (method, prompt, arguments, tokens, calls), (found, nfe) in zip(expected[name], outputs, strict=True):
        assert (found, nfe) == (tokens, calls), (method, prompt, arguments)
    counts = {
        method: {call[4] for call in expected[name] if call[0] == method and not call[2]["eos_token_id"]}
        for method in METHODS.values()
    }
    assert len(counts["generate"]) > 1  # some forwards fixed several places
    ends = {len(call[3]) for call in expected[name]}
    assert len(ends) > 2 and max(ends) == NEW


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_familys_model(name: str, exported: dict[str, Exported], plain: Any) -> None:
    """Its logits and loss; and it survives saving, halving, and another attention kernel."""
    found = plain[str(exported[name].folder / "out")]
    assert found["logits"] and found["again"] and found["half"] == "torch.bfloat16"
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6)
    assert found["eager"] == found["outputs"][-1][0]


def test_pipelines_and_the_harness_take_it(exported: dict[str, Exported], plain: Any) -> None:
    """Text by block diffusion, rows padded in a batch or not; likelihoods are those of the family, bit for bit."""
    found = plain[str(exported["qwen3"].folder / "out")]
    ours, family = found["harness"], found["family"]
    assert ours["class"] == "TriModeModel" and family["class"] == "Qwen3ForCausalLM"
    assert ours["loglikelihood"] == family["loglikelihood"]
    assert ours["pipeline"] == ours["generate_until"] == ours["own"] != family["own"]
    stop, text = ours["stopped"]
    assert stop and text == ours["pipeline"][0].partition(stop)[0]


@pytest.mark.parametrize("name", KINDS)
def test_import_and_export_keep_everything(name: str, exported: dict[str, Exported]) -> None:
    source, out = exported[name].folder / "source", exported[name].folder / "out"
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert after.keys() - before.keys() <= ({"lm_head.weight"} if exported[name].tied else set())
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    for key in ("architectures", "model_type", "mask_token_id", "block_size", "shift", "clean_attention"):
        assert ours[key] == theirs[key]
    assert theirs["text_config"].items() <= ours["text_config"].items()
    card = (out / "README.md").read_text()
    assert f"id {MASK}" in card and ("ar_generate" in card) == (ours["clean_attention"] == "causal")


def test_the_card_says_what_it_is(
    exported: dict[str, Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base model and licence in the head, which the hub reads; the figures of an evaluation; commands."""
    from huggingface_hub import ModelCard

    from nemodiff_train.report.report import metrics_json
    from tests.evaluations import evaluation

    made = evaluation()
    (tmp_path / "metrics.json").write_text(metrics_json(made))
    words = ["convert", "export", str(exported["shift"].folder / "checkpoint"), str(tmp_path / "out")]
    assert main([*words, "--format", "tri-mode", "--results", str(tmp_path)]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == (
        "source",
        "apache-2.0",
        "transformers",
    )
    for mode, figures in made.modes.items():
        assert f"| {mode} | {figures.accuracy:.1%} | {figures.tpf_all:.2f} |" in card.text
    assert "lm_eval --model hf" in card.text and "pipeline(" in card.text
    assert "Results" not in (exported["shift"].folder / "out" / "README.md").read_text()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "out")
    for options, reason in (
        (["--format", "tri-mode", "--results", str(exported["shift"].folder)], "metrics.json"),
        (["--format", "ar", "--results", str(tmp_path)], "tri-mode"),
    ):
        assert main([*words, *options]) == 2
        assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_model_without_a_mask_token_is_refused(
    exported: dict[str, Exported], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = str(tmp_path / "checkpoint"), tmp_path / "out"
    assert main(["convert", "import", str(exported["qwen3"].folder / "family"), checkpoint]) == 0
    capsys.readouterr()
    assert main(["convert", "export", checkpoint, str(out), "--format", "tri-mode"]) == 2
    assert "needs a mask token" in capsys.readouterr().err
    assert not out.exists()


def test_training_does_not_start_from_it(exported: dict[str, Exported], tmp_path: Path) -> None:
    from nemodiff_train.errors import UserError
    from nemodiff_train.validation.check import check

    small.data(tmp_path / "data", documents=10)
    config = small.recipe(str(exported["qwen3"].folder / "out"), str(tmp_path / "data"), str(tmp_path / "run"))
    with pytest.raises(UserError, match="convert import"):
        check(config, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of the class itself, from the weights of a Qwen 3."""
    from transformers import AutoModelForCausalLM

    from nemodiff_train.conversion.automodel.configuration_tri_mode import TriModeConfig
    from nemodiff_train.conversion.automodel.modeling_tri_mode import TriModeModel

    directory = tmp_path_factory.mktemp("automodel") / "qwen3"
    small.qwen3(directory)
    family = AutoModelForCausalLM.from_pretrained(directory)
    model = TriModeModel(TriModeConfig(family.config, mask_token_id=MASK, block_size=BLOCK))
    model.load_state_dict(family.state_dict())
    return model.eval()


@pytest.mark.parametrize("method", ["ar_generate", "generate"])
def test_rows_do_not_see_each_other(model: Any, method: str) -> None:
    """Also when they end at different places; a row that has ended is filled with its stop token."""
    prompts = torch.randint(20, 220, (5, 9), generator=torch.Generator().manual_seed(2))
    settings = {"threshold": THRESHOLD} if method == "generate" else {}
    decode = getattr(model, method)
    free = [decode(row[None], 30, **settings)[0][0] for row in prompts]
    assert torch.equal(decode(prompts, 30, **settings)[0], torch.stack(free))
    stops = [int(free[0][15]), int(free[1][20])]
    alone = [decode(row[None], 30, eos_token_id=stops, **settings)[0][0].tolist() for row in prompts]
    longest = max(map(len, alone))
    together = decode(prompts, 30, eos_token_id=stops, **settings)[0].tolist()
    assert together == [row + [row[-1]] * (longest - len(row)) for row in alone]
    assert len(set(map(len, alone))) > 2


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_self_speculation_is_ar(model: Any, length: int, threshold: float) -> None:
    """With and without a thinking budget, whose end may fall on any place of a draft."""
    end, forced = 250, 0
    for row, budget in itertools.product(range(2), (None, 0, 7, 19, 20)):
        prompt = torch.randint(20, 220, (1, 3 + row), generator=torch.Generator().manual_seed(row))
        thinking = {"max_thinking_tokens": budget, "end_think_token_id": end}
        tokens, nfe = model.ar_generate(prompt, 20, **thinking)
        assert nfe == 20 and tokens.shape[1] == 23 + row
        speculated, _ = model.linear_spec_generate(prompt, 20, length, threshold=threshold, **thinking)
        assert torch.equal(speculated, tokens)
        if budget is not None and budget < 20:
            place = tokens[0, 3 + row :].tolist().index(end)
            assert place <= budget
            forced += place == budget
    assert forced > 3


@pytest.mark.parametrize("budget", [0, 5, 8, 20])
def test_block_diffusion_closes_the_thinking(model: Any, budget: int) -> None:
    ids, _ = model.generate(torch.tensor([PROMPTS[0]]), 24, max_thinking_tokens=budget, end_think_token_id=250)
    new = ids[0, 4:].tolist()
    assert new.index(250) == budget and new.count(250) == 1 and MASK not in new


def test_counts_of_block_diffusion(model: Any) -> None:
    """One prefill, one commit between blocks; without a threshold one denoising forward a mask."""
    prompt = torch.tensor([PROMPTS[0]])
    assert model.generate(prompt, 24, threshold=None)[1] == 1 + 3 * 7 + 2
    assert model.generate(prompt, 24, threshold=None, causal_context=False)[1] == 1 + 3 * 8 + 2
    assert model.generate(prompt, 24, threshold=0.0)[1] == 1 + 3 + 2
    assert model.generate(prompt, 20, 6, None)[1] == 1 + 3 * 5 + 1 + 3  # the last block: two tokens of six


def test_the_mask_token_is_never_predicted(model: Any) -> None:
    """Even where nothing is more probable, and the number of forwards stays what it was."""

    def prefer(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., MASK] += 1e4
        return output

    hook = model.lm_head.register_forward_hook(prefer)
    prompt = torch.tensor([PROMPTS[1]])
    found = [
        model.ar_generate(prompt, 20),
        model.generate(prompt, 20, threshold=0.5),
        model.linear_spec_generate(prompt, 20, threshold=0.5),
    ]
    hook.remove()
    for ids, _ in found:
        assert ids.shape[1] == prompt.shape[1] + 20 and MASK not in ids


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_sampled_self_speculation_is_distributed_as_ar(model: Any, threshold: float) -> None:
    """The first two new tokens of 250 draws over two tokens, against the exact probabilities."""
    bias = torch.full((model.config.vocab_size,), -torch.inf)
    bias[20:22] = 0.0
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5 + bias)
    prompt, draws, expected = torch.tensor([PROMPTS[0]]), 250, {}
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        for a in (20, 21):
            second = model(torch.cat([prompt, torch.tensor([[a]])], dim=1)).logits[0, -1].softmax(-1)
            expected |= {(a, b): draws * float(first[a] * second[b]) for b in (20, 21)}
    torch.manual_seed(1)
    found = Counter(
        tuple(model.linear_spec_generate(prompt, 2, 3, temperature=1.0, threshold=threshold)[0][0, -2:].tolist())
        for _ in range(draws)
    )
    hook.remove()
    assert set(found) <= set(expected) and min(expected.values()) > 5
    statistic = sum((found[text] - count) ** 2 / count for text, count in expected.items())
    assert statistic < 21.1  # chi-square with 3 degrees of freedom, p = 1e-4


def test_a_low_temperature_is_greedy(model: Any) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    for method in METHODS.values():
        decode = getattr(model, method)
        assert torch.equal(decode(prompt, 12, temperature=1e-30)[0], decode(prompt, 12)[0])


def test_transformers_contract(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Called with ``input_ids``: its settings are used, refused where asked for, or named in a warning."""
    from transformers import GenerationConfig

    prompt = torch.tensor([PROMPTS[0]])
    plain = model.generate(prompt, 20, threshold=0.9)[0]
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=20), plain)
    assert torch.equal(model.generate(inputs=prompt, max_length=24), plain)
    stop = int(plain[0, 15])
    stopped = model.generate(
        input_ids=prompt, generation_config=GenerationConfig(max_new_tokens=20, eos_token_id=stop)
    )
    assert torch.equal(stopped, plain[:, : plain[0, 4:].tolist().index(stop) + 5])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    both = torch.cat([padded, torch.tensor([PROMPTS[1]])])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    together = model.generate(input_ids=both, attention_mask=mask, max_new_tokens=20, pad_token_id=0)
    assert torch.equal(together[0, 3:], plain[0])
    ended = model.generate(torch.tensor([PROMPTS[1]]), 20, eos_token_id=0)[0][0].tolist()
    assert together[1].tolist() == ended + [0] * (27 - len(ended)) and len(ended) < 27

    def after_ten(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= 14] * len(ids))

    assert torch.equal(
        model.generate(input_ids=prompt, max_new_tokens=20, stopping_criteria=[after_ten]), plain[:, :14]
    )
    torch.manual_seed(0)
    sampled = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 20}
    several = model.generate(input_ids=prompt, num_return_sequences=3, **sampled)
    assert several.shape == (3, 24) and len(set(map(tuple, several.tolist()))) == 3
    assert torch.equal(model.generate(input_ids=prompt, top_k=1, **sampled), plain)
    for refused in ({"num_beams": 4}, {"repetition_penalty": 1.1}, {"streamer": print}):
        with pytest.raises(ValueError, match=next(iter(refused))):
            model.generate(input_ids=prompt, **refused)
    config = GenerationConfig(max_new_tokens=20, repetition_penalty=1.1)
    assert torch.equal(model.generate(input_ids=prompt, generation_config=config), plain)


@pytest.mark.parametrize(
    ("method", "prompt", "arguments", "words"),
    [
        ("ar_generate", [[]], {}, "with a token at least"),
        ("generate", [20], {}, "with a token at least"),
        ("generate", [[20]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("generate", [[20]], {"block_length": 0}, "block_length is 0"),
        ("ar_generate", [[20]], {"temperature": float("nan")}, "temperature is nan"),
        ("linear_spec_generate", [[20], [21]], {}, "one row, not 2"),
    ],
)
def test_what_cannot_be_is_refused(
    model: Any, method: str, prompt: list[Any], arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(model, method)(torch.tensor(prompt, dtype=torch.long), **arguments)


def test_models_of_other_objectives_are_refused_what_they_cannot(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    monkeypatch.setattr(model.config, "shift", True)
    with pytest.raises(ValueError, match="causal_context"):
        model.generate(prompt, 8, causal_context=False)
    monkeypatch.setattr(model.config, "clean_attention", "block_causal")
    for method in ("ar_generate", "linear_spec_generate"):
        with pytest.raises(ValueError, match=r"generate\(\) only"):
            getattr(model, method)(prompt)
