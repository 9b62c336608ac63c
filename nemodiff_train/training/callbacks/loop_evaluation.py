"""Decoding in the training loop: accuracy and tokens per forward on the live weights, under the training layout."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.utils import unwrap_model

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.console import console
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.distributed import is_main_process
from nemodiff_train.evaluation.evaluate import evaluate
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.settings import EvaluationSettings
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.model.loading import LoadedModel, stop_tokens
from nemodiff_train.report.display import percent
from nemodiff_train.training.callbacks.gradient_probe import gathered_parameters
from nemodiff_train.training.callbacks.run_log import RunLog


class LoopEvaluation(Callback):
    """Every ``evaluation.interval`` steps, decodes a fixed set of prompts in every mode.

    All ranks take part: tensor and pipeline ranks share the model as in training, data-parallel replicas split
    the prompts, context-parallel ranks repeat each other.  Nothing of it reaches the training: weights are
    only read, and random states are put back.

    Args:
        log: Where the figures go.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def on_train_start(self, context: CallbackContext) -> None:
        config: Any = context.state.cfg
        chosen = config.evaluation
        if not chosen.interval:
            return
        modes = ("ar",) if config.objective.stage == "ar" else tuple(chosen.modes)
        self.task = load_task(chosen.task, scorer=chosen.scorer, count=chosen.count)
        self.plan = EvaluationSettings(modes=modes, batch_size=chosen.count, chat=chosen.chat)
        self.tokenizer = load_tokenizer(str(config.tokenizer.tokenizer_model))
        self.settings = DecodingSettings(
            max_new_tokens=chosen.max_new_tokens,
            block_size=config.objective.block_size,
            threshold=chosen.threshold,
            stop_token_ids=stop_tokens(config.model, self.tokenizer),
            detokenize=lambda tokens: str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
        )

    def on_train_step_end(self, context: CallbackContext) -> None:
        config: Any = context.state.cfg
        step, interval = context.state.train_state.step + 1, config.evaluation.interval
        if not interval or step % interval:
            return
        started = time.perf_counter()
        with _as_for_decoding(context.model):
            evaluation = evaluate(
                LoadedModel([unwrap_model(chunk) for chunk in context.model], self.tokenizer, self.settings),
                self.task,
                self.plan,
                f"step {step}",
                shown=False,
            )
        seconds = time.perf_counter() - started
        self.log.note(_figures(evaluation, seconds))
        if is_main_process():
            words = (f"{mode} {percent(m.accuracy)} @ {m.tpf_all:.2f} TPF" for mode, m in evaluation.modes.items())
            console.print(f"step {step}: {', '.join(words)} [dim]({seconds:.0f} s)[/dim]")


def _figures(evaluation: Evaluation, seconds: float) -> dict[str, float]:
    found = {"eval/seconds": seconds}
    for mode, metrics in evaluation.modes.items():
        if metrics.accuracy is not None:
            found[f"eval/accuracy/{mode}"] = metrics.accuracy
        found[f"eval/tpf/{mode}"] = metrics.tpf_all
        if metrics.acceptance_length is not None:
            found[f"eval/acceptance_length/{mode}"] = metrics.acceptance_length
    return found


@contextlib.contextmanager
def _as_for_decoding(chunks: Any) -> Iterator[None]:
    """The training model as decoding takes it: complete weights, no sequence or context parallelism, no dropout."""
    random_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    switched = [
        (module, name)
        for chunk in chunks
        for module in (*chunk.modules(), unwrap_model(chunk).config)
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(module, name, False)
    ]
    states = [unwrap_model(chunk).attention_state for chunk in chunks]
    shares = [state.shard for state in states]
    with gathered_parameters(chunks):
        try:
            for module, name in switched:
                setattr(module, name, False)
            for state in states:
                state.shard = ContextParallelShard()
            for chunk in chunks:
                chunk.eval()
            yield
        finally:
            for chunk in chunks:
                chunk.train()
            for state, share in zip(states, shares, strict=True):
                state.shard = share
            for module, name in switched:
                setattr(module, name, True)
            torch.set_rng_state(random_state[0])
            torch.cuda.set_rng_state(random_state[1])
