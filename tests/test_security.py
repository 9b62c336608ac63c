"""The promises of SECURITY.md: foreign code is not run, and keys stay out of files."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from nemodiff_train.cli import main
from nemodiff_train.data import template as templates
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError
from tests import jobs, small
from tools.support.ranks import RankPool

ROOT = Path(__file__).parents[1]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    "COMET_API_KEY": "comet-key-0123456789",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.run_inputs(tmp_path_factory.mktemp("secure"))


def test_a_run_writes_no_keys(model: Path, ranks: RankPool) -> None:
    """A real run with two loggers; every file that it leaves, and all that it prints."""
    words = ["start_from=model", "data=data", "output=out", "train.train_iters=2", "logger.wandb_project=test"]
    words += [
        "logger.wandb_exp_name=run",
        "logger.wandb_save_dir=out/wandb",
        "logger.tensorboard_dir=out/tensorboard",
    ]
    environment = {**SECRETS, "WANDB_MODE": "offline", "NEMODIFF_LOG": "1"}
    run = {"folder": str(model), "words": ["recipe.py", *words], "environment": environment}
    world = ranks.start("keys", 1, jobs.train_as_told, **run)
    assert ranks.wait(world) == [0] and world.result() == 0, world.output()
    written = {path: path.read_bytes() for path in (model / "out").rglob("*") if path.is_file()}
    names = {path.name for path in written}
    assert {"run_config.yaml", "metrics.jsonl", "train.log"} <= names
    assert any(name.endswith(".wandb") for name in names) and any("tfevents" in name for name in names)
    for place, content in [*written.items(), ("output", world.output().encode())]:
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} in {place}"


@pytest.mark.parametrize(
    "word",
    [
        f"logger.wandb_project={SECRETS['WANDB_API_KEY']}",
        f"logger.wandb_save_dir=/runs/{SECRETS['HF_TOKEN']}/x",
        f"output={SECRETS['HF_TOKEN']}",
        "logger.wandb_project=${oc.env:WANDB_API_KEY}",
        "logger.comet_api_key=a-key-that-is-in-no-variable",
    ],
)
@pytest.mark.parametrize("verb", ["train", "launch", "plan"])
def test_keys_are_no_settings(
    word: str, verb: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    capsys.readouterr()
    options = {"train": [], "launch": ["--slurm", "--dry-run"], "plan": ["--gpus", "8"]}
    words = ["start_from=model", "data=data", *([] if word.startswith("output") else ["output=kept"])]
    assert main([verb, "recipe.py", *words, word, *options[verb]]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert not any(secret in printed.err for secret in [*SECRETS.values(), "a-key-that-is-in-no-variable"])
    assert not (model / "kept").exists()


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_pickled_weights_are_not_opened(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.qwen3(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    bomb = pickle.dumps(Bomb(tmp_path / "went off"))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(bomb)
    assert main(["convert", "import", str(tmp_path / "pickled"), str(tmp_path / "out")]) == 2
    assert "only safetensors" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]
    pickle.loads(bomb).close()
    assert (tmp_path / "went off").exists()  # it would have


def test_code_beside_weights_is_not_run(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    small.qwen3(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'went off')!r}, 'w')\n")
    for name, classes in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((folder / name).read_text())
        named = ["own.Own", None] if classes == "AutoTokenizer" else "own.Own"
        (folder / name).write_text(json.dumps({**settings, "auto_map": {classes: named}}))
    try:
        load_tokenizer(str(folder))
    except UserError as error:
        assert "trust_remote_code" in str(error) or "cannot load" in str(error)
    assert main(["convert", "inspect", str(folder)]) == 0
    assert main(["convert", "import", str(folder), str(tmp_path / "out")]) in (0, 2)
    assert not (tmp_path / "went off").exists()


def test_sources_have_no_way_to_run_data() -> None:
    """No shell, no pickle, no unsafe YAML, no trust in remote code, anywhere in the package."""
    found = []
    for file in sorted((ROOT / "nemodiff_train").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if (
                    called in ("os.system", "os.popen", "eval", "exec", "yaml.load", "yaml.unsafe_load", "torch.load")
                    and given.get("weights_only") != "True"
                ) or (given.get("shell") == "True" or given.get("trust_remote_code") == "True"):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if {"pickle", "marshal", "shelve"} & {*names, module}:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: imports {names or module}")
    assert found == []


def template(tokenizer: Any, text: str) -> str:
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)([{"role": "user", "content": "hello"}])


def test_chat_template_as_transformers_writes_it(model: Path) -> None:
    tokenizer: Any = load_tokenizer(str(model / "model"))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [{"role": "user", "content": " h\u00e9llo\u2028 "}, {"role": "assistant", "content": "hi"}]
    rendered = ChatTemplate(tokenizer)
    for prompt in (True, False):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert rendered(messages, prompt) == expected


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("{{ 9 ** (9 ** 9) }}", "more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ ('a' * 10 ** 8) }}", "100,000,000 characters"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_chat_template_within_limits(text: str, needle: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if needle == "more than":
        monkeypatch.setattr(templates, "SECONDS", 3.0)
    with pytest.raises(UserError, match=r"chat template in .* cannot be used: ") as refusal:
        template(load_tokenizer(str(model / "model")), text)
    assert needle in str(refusal.value)
