"""The commands of README and documents, run in their order on small models like published ones.

The models are in bf16, one of them with tied embeddings, and have a chat template but no mask token.  Commands do
what they say, in fewer steps and on fewer ranks, and a recipe for one published size becomes that for any.  Lines
marked ``# from the hub`` are refused without a network.  ``docs/extending.md`` has a test of its own.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from nemodiff_train.cli import VERBS
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.demo.tokenizer import train_tokenizer
from tests import small
from tests.prepared import write_jsonl
from tests.test_chat import CHATML
from tests.test_docs import ROOT, blocks
from tools.support.ranks import Jobs, RankPool, run_commands

PAGES = (
    "training", "data", "conversion", "evaluation", "drafter", "serving", "finetuning", "objectives", "cluster",
    "performance",
)  # fmt: skip

ELSEWHERE = {
    "make", "uv", "pip", "source", "tools/gpu_check", "vllm", "python", "mlx_vlm.server", "lmdeploy", "echo",
    "lm_eval", "hf", "tensorboard",
}  # fmt: skip
"""Commands of other programs."""
NOT_HERE = {
    ("lm-eval",): "tests/test_harness.py",
    ("demo",): "tests/test_demo.py",
}
"""Commands that other tests run."""

RANKS = 2
FEW = {
    "train": [
        "train.train_iters=1", "train.global_batch_size=2", "train.micro_batch_size=1", "dataset.seq_length=64",
        "model.pipeline_model_parallel_size=1", "checkpoint.save_interval=1",
    ],
    "eval": ["--count", "1", "--max-new-tokens", "4"],
    "generate": ["--max-new-tokens", "4"],
    "sampler": ["--count", "10", "--max-new-tokens", "32", "--trajectories", "2", "--steps", "2"],
    "likelihood": ["--draws", "1", "--length", "64"],
    "data show": ["train.train_iters=1", "train.global_batch_size=2"],
}  # fmt: skip
"""What is added to the words of a verb."""
REFUSED = ("--format nemotron", "--format sdar")
"""Formats that a Qwen 3 with a causal clean half does not have."""
PUBLISHED = ("qwen3_8b_joint", "ministral3_8b_joint")


class Command:
    """One line of a page.

    Args:
        line: As it stands there.
    """

    def __init__(self, line: str) -> None:
        words = shlex.split(line, comments=True)
        self.from_hub = line.endswith("# from the hub")
        self.ranks = 1
        if words[0] == "torchrun":
            self.ranks, words = int(words[2]), words[words.index("nemodiff_train") :]
        if "--nproc" in words:
            place = words.index("--nproc")
            self.ranks = int(words[place + 1])
            del words[place : place + 2]
        self.words = ["joint" if word in PUBLISHED else word for word in words[1:]]
        self.refused = self.from_hub or any(part in line for part in REFUSED)

    @property
    def outputs(self) -> list[str]:
        """The files and folders that the command makes, which must not be there."""
        named = [word.removeprefix("output=") for word in self.words if self.trains and word.startswith("output=")]
        if "--output" in self.words:
            named.append(self.words[self.words.index("--output") + 1])
        return (
            [*named, *self.words[3:4]] if self.words[:2] in (["convert", "import"], ["convert", "export"]) else named
        )

    @property
    def trains(self) -> bool:
        return self.words[0] == "train" and "--dry-run" not in self.words

    def made_small(self) -> tuple[int, list[str]]:
        """Return the number of ranks and the words."""
        if not self.trains:
            verbs = [" ".join(self.words[:count]) for count in (1, 2)]
            few = [] if "--dry-run" in self.words else [word for verb in verbs for word in FEW.get(verb, [])]
            return (self.ranks if self.words[0] != "train" else 1), [*self.words, *few]
        sizes = [f"model.tensor_model_parallel_size={min(self.ranks, RANKS)}"] if self.ranks > 1 else []
        words = [word for word in self.words if not word.startswith(("train.train_iters", "model.pipeline"))]
        return min(self.ranks, RANKS), [*words, *FEW["train"], *sizes]


def commands(page: Path) -> Iterator[list[Command]]:
    """Yield the commands of nemodiff in each block of a page."""
    for body in blocks(page, "bash"):
        lines = [line for line in body.replace("\\\n", " ").splitlines() if line.strip()]
        for line in lines:
            assert shlex.split(line)[0] in {"nemodiff", "torchrun", *ELSEWHERE}, line
        found = [Command(line) for line in lines if shlex.split(line)[0] in ("nemodiff", "torchrun")]
        yield [each for each in found if tuple(each.words[:1]) not in NOT_HERE]


def published(folder: Path, mask: str) -> None:
    """Give a model's tokenizer a chat template and a reserved token, and take its mask token."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", small.EOD)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace(small.MASK, mask))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("mask_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: models, text, tasks and conversations."""
    folder = tmp_path_factory.mktemp("walk")
    wide = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2, "dtype": "bfloat16"}
    small.qwen3(folder / "models" / "qwen3-8b", **wide, tie_word_embeddings=True)
    small.ministral3(folder / "models" / "ministral-8b", **wide)
    published(folder / "models" / "qwen3-8b", "<|fim_pad|>")
    published(folder / "models" / "ministral-8b", "<SPECIAL_20>")
    shutil.copytree(folder / "models" / "qwen3-8b", folder / "models" / "qwen3-32b")
    texts = [{"text": "the quick brown fox " * (20 + n), "content": "a lazy dog " * 40} for n in range(20)]
    for name in ("corpus", "shards", "held-out", "text"):
        (folder / name).mkdir()
        write_jsonl(folder / name / "text.jsonl", texts)
    write_jsonl(folder / "corpus.jsonl", texts)
    parquet.write_table(pyarrow.Table.from_pylist(texts), folder / "extra.parquet")
    for name in ("problems", "questions"):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": "How much is 2 + 2?", "answer": "4"}])
    (folder / "gsm8k").mkdir()
    rows = [{"question": "How much is 2 + 2?", "answer": "It is 4\n#### 4"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "gsm8k" / "test.parquet")
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    write_jsonl(folder / "talks.jsonl", [{"messages": talk}] * 20)
    demo = folder / "runs" / "demo"
    (demo / "data").mkdir(parents=True)
    train_tokenizer((text["text"] for text in texts), 300, demo / "tokenizer")
    write_jsonl(demo / "data" / "chat.jsonl", [{"messages": talk}] * 20)
    for name in ("problems", "code"):
        write_jsonl(demo / "data" / f"{name}.jsonl", texts)
    small.qwen3(demo / "ar-model")
    shutil.copytree(demo / "tokenizer", demo / "ar-model", dirs_exist_ok=True)
    return folder


class Walk(Jobs):
    """Runs pages, one after another, in one folder; one process for all commands up to a training."""

    def go(self, name: str, page: Path) -> None:
        """Run a page's blocks in their order."""
        for number, block in enumerate(commands(page)):
            for output in {output for each in block for output in each.outputs}:
                self.remove(self.folder / output)
            waiting: list[Command] = []
            for place, each in enumerate(block):
                if each.made_small()[0] == 1 and not each.trains:
                    waiting.append(each)
                    continue
                self.run(f"{name}-{number}-{place}-before", 1, waiting)
                waiting = []
                self.run(f"{name}-{number}-{place}", each.made_small()[0], [each])
            self.run(f"{name}-{number}", 1, waiting)

    def run(self, name: str, ranks: int, block: list[Command]) -> None:
        if not block:
            return
        words = [each.made_small()[1] for each in block]
        self.add(name, ranks, run_commands, folder=str(self.folder), commands=words)
        if self[name] != [2 if each.refused else 0 for each in block]:
            pytest.fail(f"exit codes {self[name]} of {words}:\n{self.pool_output(name)}", pytrace=False)

    def pool_output(self, name: str) -> str:
        return "".join(file.read_text() for file in sorted((self.folder / "logs").glob(f"{name}.rank*.log")))[-9000:]

    @staticmethod
    def remove(path: Path) -> None:
        for found in path.parent.glob(f"{path.name}*"):
            if found.name == path.name or re.fullmatch(r"\.(bin|idx|json|counts\.npy)", found.name[len(path.name) :]):
                shutil.rmtree(found) if found.is_dir() else found.unlink()


DEMO = """
nemodiff data prepare runs/demo/data/problems.jsonl --tokenizer runs/demo/tokenizer --output runs/demo/data/problems
nemodiff data prepare runs/demo/data/code.jsonl --tokenizer runs/demo/tokenizer --output runs/demo/data/code
nemodiff train --nproc 2 demo_joint start_from=runs/demo/ar-model problems=runs/demo/data/problems \
    code=runs/demo/data/code output=runs/demo/joint
nemodiff convert export runs/demo/joint/checkpoints runs/demo/tri-mode-model --format tri-mode
"""
"""What stands for ``make demo``."""
CLUSTER = """
nemodiff data prepare text --tokenizer models/ministral-8b --output data/corpus
"""
"""What stands for ``slurm/data.sh``."""


def test_the_commands_of_the_documents_run(folder: Path, ranks: RankPool) -> None:
    """As a user types them, page by page."""
    walk = Walk(ranks, folder)
    (folder / "demo.md").write_text(f"```bash{DEMO}```\n")
    walk.go("demo", folder / "demo.md")
    walk.go("readme", ROOT / "README.md")
    assert (folder / "models" / "qwen3-8b-tri-mode" / "config.json").is_file()
    for page in PAGES:
        if page == "conversion":
            checkpoints = folder / "runs" / "joint" / "checkpoints"
            shutil.copytree(checkpoints / "iter_0000001", checkpoints / "iter_0000900")
        if page == "data":
            for number in range(3):
                for file in (folder / "data").glob("corpus.*"):
                    shutil.copy(file, file.with_name(f"shard-{number}{file.name.removeprefix('corpus')}"))
        if page == "cluster":  # another user's day, of another model
            for used in ("runs/start", "runs/joint", "data/corpus"):
                walk.remove(folder / used)
            (folder / "cluster.md").write_text(f"```bash{CLUSTER}```\n")
            walk.go("data-on-the-cluster", folder / "cluster.md")
        walk.go(page, ROOT / "docs" / f"{page}.md")


def test_every_verb_is_walked_or_tested_elsewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES), ROOT / "docs" / "install.md"]
    walked = {each.words[0] for page in pages for block in commands(page) for each in block}
    assert walked | {name for (name,) in NOT_HERE} == set(VERBS)
    assert all((ROOT / file).is_file() for file in NOT_HERE.values())
