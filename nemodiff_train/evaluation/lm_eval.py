"""Checkpoint as a model of lm-evaluation-harness: ``--model nemodiff``."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import batched
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from nemodiff_train.console import console, progress_bar
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.loading import load_decoding_model
from nemodiff_train.decoding.oracle import path_forwards
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.session import Session, check_prompts
from nemodiff_train.model.checkpoint import Checkpoint

Options = Mapping[str, Any]
"""The harness's generation options: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature`` and others."""


@register_model("nemodiff")
class NemodiffLM(TemplateLM):
    """Generates in any decoding mode and scores with the AR half; forwards are counted.

    Args:
        checkpoint: Megatron checkpoint of this project.
        mode: Decoding mode of ``generate_until``.
        batch_size: Requests decoded or scored together.
        device: Taken from the harness and not used; the runtime chooses.
        settings: Fields of :class:`~nemodiff_train.decoding.generation.DecodingSettings`, and ``block_size``.

    Raises:
        UserError: No checkpoint, or a mode it cannot decode in.
    """

    def __init__(
        self,
        checkpoint: str,
        mode: str = "linear",
        batch_size: int | str = 1,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        settings.pop("max_batch_size", None)  # the harness passes its own
        if drafter := settings.pop("drafter", None):
            settings["drafter"] = Checkpoint.open(drafter)
        self.loaded = load_decoding_model(Checkpoint.open(checkpoint), modes=(mode,), **settings)
        self.tokenizer = self.loaded.tokenizer
        self._chat: ChatTemplate | None = None
        self.mode = mode
        self.batch_size = int(batch_size)
        self.forwards: Counter[str] = Counter()
        """Forwards of all generations so far, by kind."""
        self.tokens = 0
        """New tokens of all generations so far."""

    @property
    def eot_token_id(self) -> int:
        """Return the token that takes the place of an empty context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """Return a name for the harness's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text; special tokens only where the text spells them."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation as the model's tokenizer does."""
        self._chat = self._chat or ChatTemplate(self.tokenizer)
        return self._chat(chat_history, add_generation_prompt)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue every request until one of its stop strings; print tokens per forward at the end."""
        texts = [""] * len(requests)
        with progress_bar(shown=False if disable_tqdm else None) as progress:
            bar = progress.add_task(f"decoding ({self.mode})", total=len(requests))
            for batch in batched(range(len(requests)), self.batch_size):
                for options, numbers in _by_options((number, requests[number].args[1]) for number in batch):
                    contexts = [requests[number].args[0] for number in numbers]
                    for number, text in zip(numbers, self._generate(contexts, options, numbers), strict=True):
                        texts[number] = text
                progress.update(bar, completed=batch[-1] + 1)
        counted = sum(count for kind, count in self.forwards.items() if kind != "search")
        console.print(
            f"{self.mode}: {self.tokens} tokens in {counted} forwards {dict(self.forwards)}: "
            f"[bold]{self.tokens / max(counted, 1):.2f} tokens per forward[/bold]"
        )
        return texts

    def _generate(self, contexts: list[str], options: Options, numbers: Sequence[int]) -> list[str]:
        """Decode requests that share their options in one batch."""
        until = options.get("until") or []
        settings = replace(
            self.loaded.settings,
            stop_strings=tuple([until] if isinstance(until, str) else until),
            max_new_tokens=int(options.get("max_gen_toks") or self.loaded.settings.max_new_tokens),
            temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
        )
        prompts = [self.tok_encode(context) or [self.eot_token_id] for context in contexts]
        generations, session = decode(self.loaded.model, prompts, self.mode, settings, numbers)
        for row, generation in enumerate(generations):
            self.forwards.update(path_forwards(generation, session.forwards[row]))
            self.tokens += len(generation.tokens)
        return [settings.text(generation.tokens) for generation in generations]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-probabilities of whole texts under the AR half, each from an end-of-text token."""
        limit = int(PipelineRunner(self.loaded.model).config.hf_config.get("max_position_embeddings") or 2048) - 1
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, limit, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(score for score, _ in self._score(pairs, disable_tqdm)))
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation and whether it is the greedy one; one forward per batch."""
        scores: list[tuple[float, bool]] = []
        with progress_bar(shown=False if disable_tqdm else None) as progress:
            bar = progress.add_task("scoring", total=len(pairs))
            for batch in batched(pairs, self.batch_size):
                logits = self._logits([context + continuation[:-1] for context, continuation in batch])
                for row, (context, continuation) in enumerate(batch):
                    # [continuation, vocab] the logits that predict it begin at the context's last token.
                    start = len(context) - 1
                    log_probs = logits[row, start : start + len(continuation)].log_softmax(-1)
                    target = torch.tensor(continuation, device=log_probs.device)
                    score = float(log_probs.gather(-1, target[:, None]).sum())
                    scores.append((score, log_probs.argmax(-1).tolist() == continuation))
                progress.update(bar, completed=len(scores))
        return scores

    def _logits(self, texts: list[list[int]]) -> Tensor:
        """Return causal logits [texts, longest, vocab], padded on the right."""
        longest = max(map(len, texts))
        session = Session(self.loaded.model, len(texts), longest, None)
        check_prompts(texts, session.vocab_size)
        rows = torch.arange(len(texts), device=session.device)
        padded = torch.zeros(len(texts), longest, dtype=torch.long, device=session.device)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = torch.tensor(text)
        return session.forward(padded, rows, "prefill", causal=True)


def _by_options(requests: Iterable[tuple[int, Options]]) -> list[tuple[Options, list[int]]]:
    """Group the numbers of requests by equal options."""
    groups: list[tuple[Options, list[int]]] = []
    for number, options in requests:
        for known, numbers in groups:
            if known == options:
                numbers.append(number)
                break
        else:
            groups.append((options, [number]))
    return groups
