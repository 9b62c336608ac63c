"""Decoding in the training loop: accuracy and tokens per forward on the live weights, under the training layout."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.console import console
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.loading import DecodingModel, for_tokenizer
from nemodiff_train.distributed import is_main_process
from nemodiff_train.evaluation.decode_task import evaluate
from nemodiff_train.evaluation.settings import EvaluationSettings
from nemodiff_train.evaluation.tasks import load_task
from nemodiff_train.model.parameters import gathered_parameters
from nemodiff_train.report.display import percent


class LoopEvaluation(Callback):
    """Decode a fixed set of prompts in every mode, every ``evaluation.interval`` steps.

    All ranks take part: tensor and pipeline ranks share the model as in training, data-parallel replicas split the
    prompts, context-parallel ranks repeat each other.  Training is not affected: weights are only read, and random
    states are restored.

    Args:
        step_context: Where the figures go.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context

    def on_train_start(self, context: CallbackContext) -> None:
        config = config_of(context.state)
        evaluation = config.evaluation
        if not evaluation.interval:
            return
        modes = ("ar",) if config.objective.stage == "ar" else tuple(evaluation.modes)
        self.task = load_task(evaluation.task, scorer=evaluation.scorer, count=evaluation.count)
        self.settings = EvaluationSettings(modes=modes, batch_size=evaluation.count, chat=evaluation.chat)
        self.tokenizer = load_tokenizer(str(config.tokenizer.tokenizer_model))
        decoding = DecodingSettings(
            max_new_tokens=evaluation.max_new_tokens,
            block_size=config.objective.block_size,
            threshold=evaluation.threshold,
        )
        self.decoding = for_tokenizer(decoding, config.model, self.tokenizer)

    def on_train_step_end(self, context: CallbackContext) -> None:
        step, interval = context.state.train_state.step + 1, config_of(context.state).evaluation.interval
        if not interval or step % interval:
            return
        started = time.perf_counter()
        with _ready_for_decoding(context.model):
            model = DecodingModel([unwrap_model(chunk) for chunk in context.model], self.tokenizer, self.decoding)
            evaluation = evaluate(model, self.task, self.settings, f"step {step}", shown=False)
        seconds = time.perf_counter() - started
        self.step_context.figures["eval/seconds"] = seconds
        for mode, metrics in evaluation.modes.items():
            measured = metrics.accuracy, metrics.tpf_all, metrics.acceptance_length
            for name, value in zip(("accuracy", "tpf", "acceptance_length"), measured, strict=True):
                if value is not None:
                    self.step_context.figures[f"eval/{name}/{mode}"] = value
        self.step_context.evaluated = evaluation, self.decoding.text
        if is_main_process():
            modes = (f"{mode} {percent(m.accuracy)} @ {m.tpf_all:.2f} TPF" for mode, m in evaluation.modes.items())
            console.print(f"step {step}: {', '.join(modes)} ({seconds:.0f} s)")


@contextlib.contextmanager
def _ready_for_decoding(chunks: Sequence[MegatronModule]) -> Iterator[None]:
    """Give the model complete weights, and neither sequence or context parallelism nor dropout, for a while."""
    random_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    sequence_parallel = [
        (module, name)
        for chunk in chunks
        for module in (*chunk.modules(), unwrap_model(chunk).config)
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(module, name, False)
    ]
    states = [unwrap_model(chunk).attention_state for chunk in chunks]
    shards = [state.shard for state in states]
    with gathered_parameters(chunks):
        try:
            for module, name in sequence_parallel:
                setattr(module, name, False)
            for state in states:
                state.shard = ContextParallelShard()
            for chunk in chunks:
                chunk.eval()
            yield
        finally:
            for chunk in chunks:
                chunk.train()
            for state, shard in zip(states, shards, strict=True):
                state.shard = shard
            for module, name in sequence_parallel:
                setattr(module, name, True)
            torch.set_rng_state(random_state[0])
            torch.cuda.set_rng_state(random_state[1])
