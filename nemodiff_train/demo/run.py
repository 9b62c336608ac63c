"""The demo: an AR checkpoint in, a tri-mode checkpoint out, scored in three modes; offline."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemodiff_train.console import console
from nemodiff_train.conversion.exporting import export_checkpoint
from nemodiff_train.conversion.importing import import_checkpoint
from nemodiff_train.data.prepare import PrepareOptions, prepare
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.loading import load_decoding_model
from nemodiff_train.demo.corpus import write_stdlib_text
from nemodiff_train.demo.tokenizer import train_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.arithmetic import problems, write_conversations
from nemodiff_train.evaluation.evaluate import evaluate
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.settings import EvaluationSettings
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.files import locked
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.report.report import write_report
from nemodiff_train.report.table import print_table
from nemodiff_train.report.trace import Decode
from nemodiff_train.runtime import init_runtime

STEPS = 6
CODE_BYTES = 1_000_000
PROBLEMS = 25_000
VOCABULARY = 1024
MAX_NEW_TOKENS = 128
THRESHOLD = 0.98  # a wrong digit is a wrong answer
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)  # further points of the accuracy against TPF curve


def run_demo(output: Path, start_from: str | None, mask_token: str, count: int) -> None:
    """Run all steps and announce each; see :class:`Demo`.

    Raises:
        UserError: The tokenizer lacks the mask token, or a step failed.
    """
    started = time.monotonic()
    # The joint stage would refuse it too, minutes later.
    if start_from and mask_token not in load_tokenizer(start_from).get_vocab():
        raise UserError(
            f"--mask-token '{mask_token}' is not in the tokenizer of '{start_from}'; name one of its reserved tokens"
        )
    with locked(output):
        output.mkdir(exist_ok=True)
        Demo(output, start_from, mask_token, count).run()
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


class Demo:
    """The steps, each of which leaves its result in the output folder.

    Args:
        output: The output folder.
        start_from: The user's own Hugging Face AR model, or None to train a small one first.
        mask_token: The tokenizer's mask token.
        count: Number of held-out problems to score.
    """

    def __init__(self, output: Path, start_from: str | None, mask_token: str, count: int) -> None:
        self.output = output
        self.ar_model = Path(start_from) if start_from else output / "ar-model"
        self.trains_ar = start_from is None
        self.mask_token = mask_token
        self.count = count
        # As many as the layouts need; one on a machine with a single GPU.
        self.processes = min(2, torch.cuda.device_count()) if init_runtime().cuda else 2
        self.step = 0

    def run(self) -> None:
        """Run all steps in order."""
        with self._announce("text: Python's standard library, and arithmetic problems with worked answers"):
            tokenizer = self._prepare_data()
        with self._announce(
            f"AR stage: {'a small Qwen 3, data parallel' if self.trains_ar else 'skipped, using yours'}"
        ):
            if self.trains_ar:
                self._torchrun("demo_ar", "ar", tokenizer=tokenizer)
                self._export("ar", self.ar_model)
        with self._announce("AR model, before the joint stage"):
            accuracy_before = self._evaluate_ar()
        with self._announce("joint stage: AR + diffusion, tensor parallel"):
            self._torchrun(
                "demo_joint",
                "joint",
                start_from=str(self.ar_model),
                mask_token=self.mask_token,
                tensor_parallel=str(self.processes),
            )
        with self._announce("export to Hugging Face"):
            self._export("joint", self.output / "tri-mode-model")
        with self._announce(f"three modes on {self.count} held-out problems"):
            self._evaluate_tri_mode(accuracy_before)

    @contextmanager
    def _announce(self, description: str) -> Iterator[None]:
        self.step += 1
        started = time.monotonic()
        console.print(f"[bold]{self.step}/{STEPS}[/bold] {description}")
        yield
        console.print(f"    [dim]{time.monotonic() - started:.0f} s[/dim]")

    def _prefix(self, name: str) -> str:
        return str(self.output / "data" / name)

    def _prepare_data(self) -> str:
        """Write the text, train a tokenizer unless the model brings one, and prepare .bin/.idx.

        Returns:
            The directory of the tokenizer.
        """
        folder = self.output / "data"
        folder.mkdir()
        write_stdlib_text(folder / "code.jsonl", CODE_BYTES)
        with (folder / "problems.jsonl").open("w") as file:
            for problem in problems("train", PROBLEMS, seed=0):
                print(json.dumps({"text": problem.prompt + problem.solution}), file=file)
        write_conversations(folder / "chat.jsonl", PROBLEMS)
        tokenizer = str(self.ar_model)
        if self.trains_ar:
            tokenizer = str(self.output / "tokenizer")
            train_tokenizer(_texts(folder), VOCABULARY, Path(tokenizer))
        for name in ("problems", "code"):
            prepare(
                PrepareOptions(
                    inputs=[f"{folder}/{name}.jsonl"],
                    tokenizer=tokenizer,
                    output=self._prefix(name),
                    workers=len(os.sched_getaffinity(0)),
                )
            )
        return tokenizer

    def _torchrun(self, recipe: str, run: str, **settings: str) -> None:
        """Train a recipe under torchrun, as on a cluster."""
        settings |= {
            "problems": self._prefix("problems"),
            "code": self._prefix("code"),
            "output": str(self.output / run),
        }
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun = [*launcher, "--nproc-per-node", str(self.processes)]
        words = [f"{key}={value}" for key, value in settings.items()]
        command = [*torchrun, "-m", "nemodiff_train", "train", recipe, *words]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        if subprocess.run(command, env=environment, check=False).returncode:
            raise UserError(f"training {recipe} failed; see {self.output}/{run}/train.log")

    def _export(self, run: str, directory: Path) -> None:
        export_checkpoint(Checkpoint.open(self.output / run / "checkpoints"), str(directory))

    def _evaluate_ar(self) -> float:
        """Return the accuracy of the exported AR model before the joint stage."""
        checkpoint = self.output / "ar-imported"
        import_checkpoint(str(self.ar_model), str(checkpoint))
        evaluation, _ = self._evaluate(checkpoint, ("ar",), ())
        accuracy = evaluation.modes["ar"].accuracy
        assert accuracy is not None  # the task has answers
        shutil.rmtree(checkpoint)
        console.print(f"    accuracy {accuracy:.1%}")
        return accuracy

    def _evaluate_tri_mode(self, accuracy_before: float) -> None:
        """Score every mode, print the table and write the report."""
        checkpoint = self.output / "joint" / "checkpoints"
        evaluation, decode = self._evaluate(checkpoint, ("ar", "diffusion", "linear"), THRESHOLDS)
        evaluation.settings["AR accuracy before the joint stage"] = accuracy_before
        report = write_report(self.output / "report", evaluation, decode)
        print_table(evaluation)
        console.print(f"AR accuracy before the joint stage: {accuracy_before:.1%}")
        console.print(f"tri-mode model: [bold]{self.output / 'tri-mode-model'}[/bold]")
        console.print(f"report: [bold]{report}[/bold]")

    def _evaluate(
        self, checkpoint: Path, modes: tuple[str, ...], thresholds: tuple[float, ...]
    ) -> tuple[Evaluation, Decode]:
        """Return the figures, and the function that turns tokens into text."""
        task = load_task("arithmetic", count=self.count)
        loaded = load_decoding_model(Checkpoint.open(checkpoint), max_new_tokens=MAX_NEW_TOKENS, threshold=THRESHOLD)
        settings = EvaluationSettings(modes=modes, thresholds=thresholds, batch_size=1)  # the speed one user sees
        return evaluate(loaded, task, settings, str(checkpoint)), loaded.settings.text


def _texts(folder: Path) -> Iterator[str]:
    for name in ("problems", "code"):
        with (folder / f"{name}.jsonl").open() as file:
            for line in file:
                yield json.loads(line)["text"]
