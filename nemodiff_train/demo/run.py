"""The demo: an AR checkpoint in, a tri-mode checkpoint out, scored in three modes; offline."""

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemodiff_train.console import console
from nemodiff_train.conversion.exporting import export_checkpoint
from nemodiff_train.conversion.importing import import_checkpoint
from nemodiff_train.conversion.mask_token import reserved_token, select_mask_token
from nemodiff_train.conversion.weights import check_weights
from nemodiff_train.data.prepare import PrepareOptions, prepare
from nemodiff_train.decoding.loading import load_decoding_model
from nemodiff_train.demo.corpus import write_stdlib_text
from nemodiff_train.demo.tokenizer import train_tokenizer
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.arithmetic import problems, write_conversations
from nemodiff_train.evaluation.decode_task import evaluate
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.settings import EvaluationSettings
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.files import locked
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.hf_directory import HFDirectory
from nemodiff_train.model.loading import stop_tokens
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.processes import run_ranks
from nemodiff_train.report.report import print_table, write_report
from nemodiff_train.report.trace import Detokenize
from nemodiff_train.runtime import init_runtime

STEPS = 6
CODE_BYTES = 1_000_000
PROBLEMS = 25_000
VOCABULARY = 1024
MAX_NEW_TOKENS = 128
THRESHOLD = 0.98  # a wrong digit is a wrong answer
SMALL = 2_000_000  # parameters that two cores train and score in minutes
NEW_MASK_TOKEN = "<|mask|>"


def run_demo(output: Path, start_from: str | None, mask_token: str | None, count: int | None) -> None:
    """Run all steps and announce each; see :class:`Demo`.

    Raises:
        UserError: The model cannot be used, the tokenizer lacks the mask token, or a step failed.
    """
    started = time.monotonic()
    budget = Budget()
    if start_from is not None:  # refused before anything is made
        source = HFDirectory.open(start_from)
        select_mask_token(source, model_from(start_from), mask_token, None)
        check_weights(source)
        parameters = sum(math.prod(tensor.shape) for tensor in source.weights.values())
        budget = _budget(parameters, init_runtime().cuda)
    if budget != Budget():
        console.print(
            f"this model is large for a CPU: {budget.steps} steps instead of {Budget.steps} in the joint stage, "
            f"{count or budget.count} problems, and one threshold"
        )
    if count is not None:
        budget = replace(budget, count=count)
    with locked(output):
        output.mkdir(exist_ok=True)
        Demo(output, start_from, mask_token, budget).run()
    console.print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


@dataclass(frozen=True)
class Budget:
    """How much is trained and scored."""

    steps: int = 700
    """Steps of the joint stage, 1024 tokens each."""
    count: int = 200
    """Held-out problems."""
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    """Further points of the accuracy against TPF curve."""


def _budget(parameters: int, cuda: bool) -> Budget:
    """Return what takes minutes for a model of the user's own; on a CPU less, the more parameters it has."""
    share = SMALL / parameters
    if cuda or share >= 1:
        return Budget()
    return Budget(max(10, int(share * Budget.steps)), max(6, int(share * Budget.count)), ())


class Demo:
    """The steps, each of which leaves its result in the output folder.

    Args:
        output: The output folder.
        start_from: The user's own Hugging Face AR model, or None to train a small one first.
        mask_token: A token of its tokenizer; None for a reserved one, or a new one where it has none.
        budget: How much is trained and scored.
    """

    def __init__(self, output: Path, start_from: str | None, mask_token: str | None, budget: Budget) -> None:
        self.output = output
        self.ar_model = Path(start_from) if start_from else output / "ar-model"
        self.start = output / "ar-imported"
        self.tri_mode_model = output / "tri-mode-model"
        self.trains_ar = start_from is None
        self.mask_token = mask_token
        self.budget = budget
        # As many as the layouts need; one on a machine with a single GPU.
        self.processes = min(2, torch.cuda.device_count()) if init_runtime().cuda else 2
        self.step = 0

    def run(self) -> None:
        """Run all steps in order."""
        with self._announce("text: Python's standard library, and arithmetic problems with worked answers"):
            if not self.trains_ar:
                self._import()
            tokenizer = self._prepare_data()
        with self._announce(
            f"AR stage: {'a small Qwen 3, data parallel' if self.trains_ar else 'skipped, using yours'}"
        ):
            if self.trains_ar:
                self._train("demo_ar", "ar", tokenizer=tokenizer)
                export_checkpoint(Checkpoint.open(self.output / "ar" / "checkpoints"), str(self.ar_model))
                self._import()
        with self._announce("AR model, before the joint stage"):
            evaluation, _ = self._evaluate(self.start, ("ar",), (), batch_size=50)
            accuracy_before = evaluation.modes["ar"].accuracy
            assert accuracy_before is not None  # the task has answers
            console.print(f"    accuracy {accuracy_before:.1%}")
        # The small model trains faster in replicas; another one is halved, where its heads allow.
        tensor_parallel = 1
        if not self.trains_ar and not model_from(Checkpoint.open(self.start)).num_query_groups % self.processes:
            tensor_parallel = self.processes
        trained = self.output / "joint" / "checkpoints"
        with self._announce(f"joint stage: AR + diffusion, {'tensor' if tensor_parallel > 1 else 'data'} parallel"):
            steps = self.budget.steps
            self._train("demo_joint", "joint", start_from=self.start, tensor_parallel=tensor_parallel, steps=steps)
        with self._announce(f"three modes on {self.budget.count} held-out problems"):
            evaluation, decode = self._evaluate(trained, ("ar", "diffusion", "linear"), self.budget.thresholds)
            evaluation.settings["AR accuracy before the joint stage"] = accuracy_before
            report = write_report(self.output / "report", evaluation, decode)
            print_table(evaluation)
            console.print(f"AR accuracy before the joint stage: {accuracy_before:.1%}")
            console.print(f"report: {report}")
        with self._announce("export to Hugging Face, with the code that decodes in every mode"):
            source, results = Checkpoint.open(trained), str(report.parent)
            export_checkpoint(source, str(self.tri_mode_model), format="tri-mode", results=results)
        self._invite(trained)

    def _import(self) -> None:
        """Import the AR model with a mask token: its own, the named one, a reserved one, or a new one."""
        source = HFDirectory.open(str(self.ar_model))
        provider, tokenizer = model_from(str(source.path)), source.tokenizer
        mask_token, added = self.mask_token, None
        if mask_token is None and provider.mask_token_id is None and (mask_token := tokenizer.mask_token) is None:
            mask_token = reserved_token(tokenizer, provider.vocab_size, stop_tokens(provider, tokenizer))
            added = None if mask_token else NEW_MASK_TOKEN
            console.print(
                f"    mask token: {mask_token or NEW_MASK_TOKEN}, "
                f"{'a reserved token of its tokenizer' if mask_token else 'added to its vocabulary'}"
            )
        import_checkpoint(source, str(self.start), mask_token=mask_token, add_mask_token=added)

    @contextmanager
    def _announce(self, description: str) -> Iterator[None]:
        self.step += 1
        started = time.monotonic()
        console.print(f"{self.step}/{STEPS} {description}", style="bold")
        yield
        console.print(f"    {time.monotonic() - started:.0f} s", style="dim")

    def _prepare_data(self) -> Path:
        """Write the text, train a tokenizer unless the model brings one, and prepare .bin/.idx.

        Returns:
            The directory of the tokenizer.
        """
        folder, tokenizer = self.output / "data", self.output / "tokenizer"
        folder.mkdir()
        write_stdlib_text(folder / "code.jsonl", CODE_BYTES)
        with (folder / "problems.jsonl").open("w") as file:
            for problem in problems("train", PROBLEMS, seed=0):
                print(json.dumps({"text": problem.prompt + problem.solution}), file=file)
        write_conversations(folder / "chat.jsonl", PROBLEMS)
        if not self.trains_ar:
            tokenizer = Checkpoint.open(self.start).tokenizer_directory
        else:
            lines = "".join((folder / f"{name}.jsonl").read_text() for name in ("problems", "code")).splitlines()
            train_tokenizer((json.loads(line)["text"] for line in lines), VOCABULARY, tokenizer)
        for name in ("problems", "code"):
            prefix, workers = f"{folder}/{name}", len(os.sched_getaffinity(0))
            prepare(
                PrepareOptions(inputs=[f"{prefix}.jsonl"], tokenizer=str(tokenizer), output=prefix, workers=workers)
            )
        return tokenizer

    def _train(self, recipe: str, run: str, **settings: object) -> None:
        """Train a recipe on several ranks."""
        for name in ("problems", "code"):
            settings[name] = self.output / "data" / name
        settings["output"] = self.output / run
        words = [f"{key}={value}" for key, value in settings.items()]
        if run_ranks([sys.executable, "-m", "nemodiff_train", "train", recipe, *words], self.processes):
            raise UserError(f"training {recipe} failed; see {self.output}/{run}/train.log")

    def _invite(self, trained: Path) -> None:
        """Say how to try the checkpoint here and the model in Transformers, with a problem that it has not seen."""
        (problem,) = problems("test", 1, seed=1)
        checkpoint, asked = shlex.quote(str(trained)), f"Question: {problem.question}"
        model, prompt = json.dumps(str(self.tri_mode_model)), json.dumps(problem.prompt)
        program = (
            "from transformers import pipeline; "
            f'tri_mode = pipeline("text-generation", model={model}, trust_remote_code=True); '
            f'print(tri_mode({prompt}, max_new_tokens={MAX_NEW_TOKENS})[0]["generated_text"])'
        )
        here = f"nemodiff generate {checkpoint} {shlex.quote(asked)}"
        if self.trains_ar:  # its template writes conversations as the problems are written
            here = f"nemodiff chat {checkpoint}    # and ask: {problem.question}"
        for words, line in (("try it", here), ("without this package", f"python -c {shlex.quote(program)}")):
            console.print(f"{words}: {line}", soft_wrap=True, markup=False)

    def _evaluate(
        self, checkpoint: Path, modes: tuple[str, ...], thresholds: tuple[float, ...], batch_size: int = 1
    ) -> tuple[Evaluation, Detokenize]:
        """Return the figures, at the speed that one user sees by default, and the function from tokens to text."""
        task = load_task("arithmetic", count=self.budget.count)
        loaded = load_decoding_model(Checkpoint.open(checkpoint), max_new_tokens=MAX_NEW_TOKENS, threshold=THRESHOLD)
        settings = EvaluationSettings(modes=modes, thresholds=thresholds, batch_size=batch_size)
        return evaluate(loaded, task, settings, str(checkpoint)), loaded.settings.text
