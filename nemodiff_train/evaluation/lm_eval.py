"""lm-evaluation-harness's view of a checkpoint: ``--model nemodiff``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import batched
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from nemodiff_train.console import console, progress_bar
from nemodiff_train.data.template import ChatTemplate
from nemodiff_train.decoding.decode import decode
from nemodiff_train.decoding.oracle import path_forwards
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.decoding.session import Session
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.loading import load_model


@register_model("nemodiff")
class NemodiffLM(TemplateLM):
    """Generates in any decoding mode and scores with the AR half; forwards are counted.

    Args:
        checkpoint: Megatron checkpoint of this project.
        mode: Decoding mode of ``generate_until``.
        batch_size: Requests decoded or scored together.
        settings: Fields of :class:`~nemodiff_train.decoding.generation.DecodingSettings`, and ``block_size``.

    Raises:
        UserError: No checkpoint, or a mode it cannot decode in.
    """

    def __init__(
        self, checkpoint: str, mode: str = "linear", batch_size: int | str = 1, device: Any = None, **settings: Any
    ) -> None:
        super().__init__()
        settings.pop("max_batch_size", None)  # the harness passes its own
        if drafter := settings.pop("drafter", None):
            settings["drafter"] = Checkpoint.open(drafter)
        self.opened = load_model(Checkpoint.open(checkpoint), modes=(mode,), **settings)
        self.tokenizer = self.opened.tokenizer
        self._chat: ChatTemplate | None = None
        self.mode = mode
        self.batch_size = int(batch_size)
        self.forwards: Counter[str] = Counter()
        """Forwards of all generations so far, by kind."""
        self.tokens = 0
        """New tokens of all generations so far."""

    @property
    def eot_token_id(self) -> int:
        """What an empty context is replaced by."""
        return int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of prompts."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; special tokens only where the text spells them."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's tokenizer writes it."""
        self._chat = self._chat or ChatTemplate(self.tokenizer)
        return self._chat(chat_history, add_generation_prompt)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue every request until one of its stop strings; prints tokens per forward at the end."""
        texts: list[str] = []
        with progress_bar(shown=False if disable_tqdm else None) as progress:
            bar = progress.add_task(f"decoding ({self.mode})", total=len(requests))
            for numbers in batched(range(len(requests)), self.batch_size):
                for options, rows in _by_options([requests[number].args for number in numbers]):
                    found = self._generate([context for _, context in rows], options, [numbers[i] for i, _ in rows])
                    texts += [""] * (numbers[-1] + 1 - len(texts))
                    for (i, _), text in zip(rows, found, strict=True):
                        texts[numbers[i]] = text
                progress.update(bar, completed=numbers[-1] + 1)
        counted = sum(count for kind, count in self.forwards.items() if kind != "search")
        console.print(
            f"{self.mode}: {self.tokens} tokens in {counted} forwards {dict(self.forwards)}: "
            f"[bold]{self.tokens / max(counted, 1):.2f} tokens per forward[/bold]"
        )
        return texts

    def _generate(self, contexts: list[str], options: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        until = options.get("until") or []
        settings = replace(
            self.opened.settings,
            stop_strings=tuple([until] if isinstance(until, str) else until),
            max_new_tokens=int(options.get("max_gen_toks") or self.opened.settings.max_new_tokens),
            temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
        )
        prompts = [self.tok_encode(context) or [self.eot_token_id] for context in contexts]
        generations, session = decode(self.opened.model, prompts, self.mode, settings, numbers)
        for row, generation in enumerate(generations):
            self.forwards.update(path_forwards(generation, session.forwards[row]))
            self.tokens += len(generation.tokens)
        return [settings.text(generation.tokens) for generation in generations]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts under the AR half, each from an end-of-text token."""
        limit = int(PipelineRunner(self.opened.model).config.hf_config.get("max_position_embeddings") or 2048) - 1
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id, limit, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(score for score, _ in self._score(pairs, disable_tqdm)))
        return totals

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
        return self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one: one causal forward a batch."""
        found: list[tuple[float, bool]] = []
        with progress_bar(shown=False if disable_tqdm else None) as progress:
            bar = progress.add_task("scoring", total=len(pairs))
            for batch in batched(pairs, self.batch_size):
                logits = self._logits([context + continuation[:-1] for context, continuation in batch])
                for row, (context, continuation) in enumerate(batch):
                    places = slice(len(context) - 1, len(context) - 1 + len(continuation))
                    log_p, target = logits[row, places].log_softmax(-1), torch.tensor(continuation)
                    chosen = log_p.gather(-1, target.to(log_p.device)[:, None])
                    found.append((float(chosen.sum()), log_p.argmax(-1).tolist() == continuation))
                progress.update(bar, completed=len(found))
        return found

    def _logits(self, texts: list[list[int]]) -> Tensor:
        longest = max(map(len, texts))
        session = Session(self.opened.model, len(texts), longest, None)
        rows = torch.arange(len(texts), device=session.device)
        padded = torch.zeros(len(texts), longest, dtype=torch.long, device=session.device)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = torch.tensor(text)
        return session.forward(padded, rows, "prefill", causal=True)


def _by_options(
    arguments: Sequence[tuple[str, dict[str, Any]]],
) -> list[tuple[dict[str, Any], list[tuple[int, str]]]]:
    """Requests of a batch that share their options, with their place in it."""
    groups: list[tuple[dict[str, Any], list[tuple[int, str]]]] = []
    for place, (context, options) in enumerate(arguments):
        same = next((rows for known, rows in groups if known == options), None)
        if same is None:
            groups.append((options, same := []))
        same.append((place, context))
    return groups
