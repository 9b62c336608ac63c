"""Checkpoint as a model of lm-evaluation-harness: ``--model nemodiff``.

It is the harness' own Hugging Face model with another forward and another decoder: tokens, windows, stops and
warnings are the harness', so that figures equal those of ``--model hf`` on the same weights.
"""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from nemodiff_train.console import console, warn
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.decoding.decode import decode, position_limit
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.decoding.loading import load_decoding_model
from nemodiff_train.decoding.oracle import path_forwards
from nemodiff_train.decoding.session import Session, check_prompts
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.pretrained import config_from

SAMPLING = ("temperature", "top_k", "top_p")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KEYWORDS = ("do_sample", "until", *SAMPLING, *LENGTHS)
"""Keywords of ``--gen_kwargs``, and of the tasks."""
_NO_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0}
"""Keywords of Transformers that are taken with this value, where they change nothing."""
_OF_THE_HARNESS = (
    "add_bos_token", "prefix_token_id", "max_length", "softmax_dtype", "think_end_token", "enable_thinking",
    "chat_template_args",
)  # fmt: skip
_OF_REQUESTS = (*SAMPLING, "stop_strings", "stop_token_ids", "detokenize", "detokenize_with_special", "on_commit")
_SETTINGS = tuple(
    field.name for field in fields(DecodingSettings) if field.name not in (*_OF_REQUESTS, "trained_sampler")
)
_NUMBERS = {
    field.name: (int,) if field.type is int else (int, float)
    for field in fields(DecodingSettings)
    if field.type in (int, float)
} | dict.fromkeys(("tensor_parallel", "pipeline_parallel", "max_length", "prefix_token_id"), (int,))
MODEL_ARGS = (
    "checkpoint", "mode", "drafter", "sampler", "tensor_parallel", "pipeline_parallel", *_SETTINGS, *_OF_THE_HARNESS,
)  # fmt: skip
"""Arguments of ``--model_args``."""


@register_model("nemodiff")
class NemodiffLM(HFLM):
    """Generates in any decoding mode and scores in AR mode; forwards are counted.

    Args:
        checkpoint: Megatron checkpoint of this project.
        mode: Decoding mode of ``generate_until``.
        batch_size: Requests decoded or scored together.
        max_batch_size: For ``batch_size=auto``.
        device: Taken from the harness and not used; the runtime chooses.
        model_args: The other :data:`MODEL_ARGS`.

    Raises:
        UserError: No checkpoint, a mode it cannot decode in, or an unknown argument.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        mode: str = "linear",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **model_args: Any,
    ) -> None:
        _check_model_args(checkpoint, model_args)
        harness = {name: model_args.pop(name) for name in _OF_THE_HARNESS if name in model_args}
        if drafter := model_args.pop("drafter", None):
            model_args["drafter"] = Checkpoint.open(drafter).require_drafter()
        self.loaded = load_decoding_model(Checkpoint.open(str(checkpoint)), modes=(mode,), **model_args)
        config = self.loaded.config
        # What the harness asks of a Transformers model besides logits and new tokens.
        weights = SimpleNamespace(config=config_from(config.hf_config), device=self.loaded.device)
        sizes = {"batch_size": batch_size, "max_batch_size": max_batch_size or 64}
        logger = logging.getLogger("lm_eval.models.huggingface")
        level = logger.level
        logger.setLevel(logging.ERROR)  # it warns of a model that is already in memory
        try:
            super().__init__(weights, backend="causal", tokenizer=self.loaded.tokenizer, **sizes, **harness)
        finally:
            logger.setLevel(level)
        positions = position_limit(config)
        if positions and self.max_length > positions:
            raise UserError(f"--model_args max_length={self.max_length}: the model has {positions} positions")
        self.mode = mode
        self._limit = int(model_args["max_new_tokens"]) if "max_new_tokens" in model_args else super().max_gen_toks
        self._chat: ChatTemplate | None = None
        self._warn_once = functools.cache(warn)
        self._decoded = 0
        self.forwards: Counter[str] = Counter()
        """Forwards of all generations so far, by kind."""
        self.tokens = 0
        """New tokens of all generations so far."""

    @property
    def max_gen_toks(self) -> int:
        """Return the limit on new tokens of a request that names none."""
        return self._limit

    @property
    def tokens_per_forward(self) -> float:
        """Return the new tokens per forward of all generations, without what an oracle spends on its search."""
        return self.tokens / max(sum(count for kind, count in self.forwards.items() if kind != "search"), 1)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results file says about the model."""
        parameters = [weight for chunk in self.loaded.model for weight in chunk.parameters()]
        return {
            "model_num_parameters": sum(weight.numel() for weight in parameters),
            "model_dtype": str(parameters[0].dtype),
            "mode": self.mode,
            "new_tokens": self.tokens,
            "forwards": dict(self.forwards),
            "tokens_per_forward": self.tokens_per_forward if self.tokens else None,
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model's tokenizer does, and as the harness does where it takes no system."""
        if self.chat_template_args or not add_generation_prompt:
            return str(super().apply_chat_template(chat_history, add_generation_prompt))
        self._chat = self._chat or ChatTemplate(self.tokenizer)
        try:
            return self._chat(chat_history, add_generation_prompt)
        except UserError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            self._warn_once(f"{error}; the system message is left out, as --model hf does")
            return self._chat(others, add_generation_prompt)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue every request until one of its stop strings; print tokens per forward at the end.

        Raises:
            UserError: A keyword of ``--gen_kwargs`` or of a task that decoding does not take, before any is decoded.
        """
        for options in {str(request.args[1]): request.args[1] for request in requests}.values():
            _check_keywords(options)
            self._settings(options, int(normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]))
        self._decoded = 0
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        console.print(
            f"{self.mode}: {self.tokens} tokens, forwards {dict(self.forwards)}: "
            f"{self.tokens_per_forward:.2f} tokens per forward"
        )
        return texts

    def _settings(self, options: Mapping[str, Any], limit: int) -> DecodingSettings:
        """Return the settings of requests with these keywords."""
        if limit >= self.max_length:
            raise UserError(
                f"max_gen_toks={limit} leaves no room for a prompt: the model has {self.max_length} positions; set "
                "--gen_kwargs max_gen_toks=N"
            )
        temperature = float(options.get("temperature") or 0.0)
        if not options.get("do_sample", temperature > 0):
            return replace(self.loaded.settings, max_new_tokens=limit)
        if not temperature:
            raise UserError("do_sample=true takes a temperature above 0: --gen_kwargs do_sample=true,temperature=1")
        settings = {
            name: type(getattr(self.loaded.settings, name))(options[name]) for name in SAMPLING if name in options
        }
        return replace(self.loaded.settings, max_new_tokens=limit, **settings)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Return [batch, context + new] tokens of a batch that is padded on the left.

        Each request has a random stream of its own, numbered in the harness' order, so batches do not matter.
        """
        prompts = [row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True)]
        settings = self._settings(options, max_length - context.shape[1])
        settings = replace(settings, stop_strings=tuple(text for text in stop if text))
        numbers = range(self._decoded, self._decoded + len(prompts))
        self._decoded += len(prompts)
        generations, session = decode(
            self.loaded.model, [prompt or [self.prefix_token_id] for prompt in prompts], self.mode, settings, numbers
        )
        for row, generation in enumerate(generations):
            self.forwards.update(path_forwards(generation, session.forwards[row]))
            self.tokens += len(generation.tokens)
        new = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(generation.tokens) for generation in generations],
            batch_first=True,
            padding_value=self.tokenizer.pad_token_id,
        )
        return torch.cat([context, new.to(context.device)], dim=1)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Return causal logits [texts, longest, vocab] of texts that are padded on the right."""
        session = Session(self.loaded.model, len(inps), inps.shape[1], None)
        check_prompts(inps.tolist(), session.vocab_size)
        return session.forward(inps, torch.arange(len(inps)), "prefill", causal=True)


def _check_keywords(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in SAMPLING and not isinstance(value, int | float):
            raise UserError(f"--gen_kwargs {name}={value} is not a number")
        if name not in KEYWORDS and not (name in _NO_EFFECT and value == _NO_EFFECT[name]):
            raise UserError(
                f"--gen_kwargs {name}={value}: decoding takes {', '.join(KEYWORDS)}.{nearest(name, KEYWORDS)}"
            )


def _check_model_args(checkpoint: str | None, model_args: Mapping[str, Any]) -> None:
    for name, value in model_args.items():
        if name in _OF_REQUESTS:
            raise UserError(f"--model_args {name}: the harness sets it for each task; use --gen_kwargs")
        if name not in MODEL_ARGS:
            known = ", ".join(MODEL_ARGS)
            raise UserError(f"--model_args has no '{name}'; it takes {known}.{nearest(name, MODEL_ARGS)}")
        if name in _NUMBERS and not isinstance(value, _NUMBERS[name]):
            raise UserError(f"--model_args {name}={value} is not a number")
    if checkpoint is None:
        raise UserError("--model_args names no checkpoint: --model_args checkpoint=DIR,mode=linear")
