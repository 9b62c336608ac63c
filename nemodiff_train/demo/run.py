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
from typing import TYPE_CHECKING

from nemodiff_train.console import console
from nemodiff_train.errors import UserError

if TYPE_CHECKING:
    from nemodiff_train.evaluation.evaluation import Evaluation
    from nemodiff_train.report.trace import Decode

STEPS = 6
CODE_BYTES = 1_000_000
PROBLEMS = 25_000
VOCABULARY = 1024
MAX_NEW_TOKENS = 128
THRESHOLD = 0.98  # a wrong digit is a wrong answer
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)  # further points of the accuracy against TPF curve


def run_demo(output: Path, start_from: str | None, mask_token: str, count: int) -> None:
    """Run the whole job, one announced step after another; arguments as of :class:`Demo`."""
    started = time.monotonic()
    if start_from:
        _check_mask_token(start_from, mask_token)
    output.mkdir(parents=True, exist_ok=True)
    Demo(output, start_from, mask_token, count).run()
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


def _check_mask_token(model: str, token: str) -> None:
    """Minutes before the joint stage would."""
    from nemodiff_train.data.tokenizer import load_tokenizer

    if token not in load_tokenizer(model).get_vocab():
        raise UserError(
            f"--mask-token '{token}' is not in the tokenizer of '{model}'; name one of its reserved tokens"
        )


class Demo:
    """The steps, each leaving its result under the output folder.

    Args:
        output: Where everything goes.
        start_from: A Hugging Face AR model of the user's, or None to train a small one first.
        mask_token: The tokenizer's token for hidden places.
        count: Held-out problems to score.
    """

    def __init__(self, output: Path, start_from: str | None, mask_token: str, count: int) -> None:
        self.output = output
        self.ar_model = Path(start_from) if start_from else output / "ar-model"
        self.own_model = start_from is None
        self.mask_token = mask_token
        self.count = count
        self.processes = _processes()
        self.step = 0

    def run(self) -> None:
        """All steps in order."""
        with self._announced("text: Python's standard library, and arithmetic problems with worked answers"):
            tokenizer = self._prepare_data()
        with self._announced(
            "AR stage: a small Qwen 3, data parallel" if self.own_model else "AR stage: skipped, using yours"
        ):
            if self.own_model:
                self._train_ar(tokenizer)
        with self._announced("AR model, before the joint stage"):
            before = self._evaluate_ar()
        with self._announced("joint stage: AR + diffusion, tensor parallel"):
            self._torchrun(
                "demo_joint",
                "joint",
                start_from=str(self.ar_model),
                mask_token=self.mask_token,
                ranks=str(self.processes),
            )
        with self._announced("export to Hugging Face"):
            self._export("joint", self.output / "tri-mode-model")
        with self._announced(f"three modes on {self.count} held-out problems"):
            self._evaluate_tri_mode(before)

    @contextmanager
    def _announced(self, what: str) -> Iterator[None]:
        self.step += 1
        started = time.monotonic()
        console.print(f"[bold]{self.step}/{STEPS}[/bold] {what}")
        yield
        console.print(f"    [dim]{time.monotonic() - started:.0f} s[/dim]")

    def _prefix(self, name: str) -> str:
        return str(self.output / "data" / name)

    def _prepare_data(self) -> str:
        """Write the text, train a tokenizer where the model brings none, and make .bin/.idx."""
        from nemodiff_train.data.prepare import Options, prepare
        from nemodiff_train.demo.arithmetic import problems, write_conversations
        from nemodiff_train.demo.corpus import write_stdlib_text
        from nemodiff_train.demo.tokenizer import train_tokenizer

        folder = self.output / "data"
        folder.mkdir()
        write_stdlib_text(folder / "code.jsonl", CODE_BYTES)
        with (folder / "problems.jsonl").open("w") as file:
            for problem in problems("train", PROBLEMS, seed=0):
                print(json.dumps({"text": problem.prompt + problem.solution}), file=file)
        write_conversations(folder / "chat.jsonl", PROBLEMS)
        tokenizer = str(self.ar_model)
        if self.own_model:
            tokenizer = str(self.output / "tokenizer")
            train_tokenizer(_texts(folder), VOCABULARY, Path(tokenizer))
        for name in ("problems", "code"):
            options = Options(
                inputs=[f"{folder}/{name}.jsonl"],
                tokenizer=tokenizer,
                output=self._prefix(name),
                text_field="text",
                split="train",
                glob="*",
                eod_token=None,
                workers=len(os.sched_getaffinity(0)),
                overwrite=False,
            )
            prepare(options)
        return tokenizer

    def _train_ar(self, tokenizer: str) -> None:
        """Train, then export an ordinary Hugging Face checkpoint."""
        self._torchrun("demo_ar", "ar", tokenizer=tokenizer)
        self._export("ar", self.ar_model)

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
        from nemodiff_train.conversion.exporting import export_checkpoint
        from nemodiff_train.model.checkpoint import Checkpoint

        export_checkpoint(Checkpoint.open(self.output / run / "checkpoints"), str(directory))

    def _evaluate_ar(self) -> float:
        """Accuracy of the AR model before the joint stage, from the exported directory."""
        from nemodiff_train.conversion.importing import import_checkpoint

        checkpoint = self.output / "ar-imported"
        import_checkpoint(str(self.ar_model), str(checkpoint))
        evaluation, _ = self._evaluate(checkpoint, ("ar",), ())
        accuracy = evaluation.modes["ar"].accuracy
        assert accuracy is not None  # the task has answers
        shutil.rmtree(checkpoint)
        console.print(f"    accuracy {accuracy:.1%}")
        return accuracy

    def _evaluate_tri_mode(self, ar_before: float) -> None:
        """Score every mode, print the table, write the report."""
        from nemodiff_train.report.report import write_report
        from nemodiff_train.report.table import print_table

        checkpoint = self.output / "joint" / "checkpoints"
        evaluation, decode = self._evaluate(checkpoint, ("ar", "diffusion", "linear"), THRESHOLDS)
        evaluation.settings["AR accuracy before the joint stage"] = ar_before
        report = write_report(self.output / "report", evaluation, decode)
        print_table(evaluation)
        console.print(f"AR accuracy before the joint stage: {ar_before:.1%}")
        console.print(f"tri-mode model: [bold]{self.output / 'tri-mode-model'}[/bold]")
        console.print(f"report: [bold]{report}[/bold]")

    def _evaluate(
        self, checkpoint: Path, modes: tuple[str, ...], thresholds: tuple[float, ...]
    ) -> "tuple[Evaluation, Decode]":
        from nemodiff_train.evaluation.evaluate import EvaluationSettings, evaluate
        from nemodiff_train.evaluation.tasks import load_task
        from nemodiff_train.model.checkpoint import Checkpoint
        from nemodiff_train.model.loading import load_model

        task = load_task("arithmetic", count=self.count)
        opened = load_model(Checkpoint.open(checkpoint), max_new_tokens=MAX_NEW_TOKENS, threshold=THRESHOLD)
        settings = EvaluationSettings(modes=modes, thresholds=thresholds, batch_size=1)  # the speed one user sees
        return evaluate(opened, task, settings, str(checkpoint)), opened.settings.text


def _processes() -> int:
    """Two, as many as the layouts need; one on a machine with a single GPU."""
    import torch

    from nemodiff_train.runtime import init_runtime

    return min(2, torch.cuda.device_count()) if init_runtime().cuda else 2


def _texts(folder: Path) -> Iterator[str]:
    for name in ("problems", "code"):
        with (folder / f"{name}.jsonl").open() as file:
            for line in file:
                yield json.loads(line)["text"]
