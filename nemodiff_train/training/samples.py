"""Training samples as text, for people: a line per block, the same with and without colour."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text
from torch import Tensor

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.console import PlainConsole, quiet
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.errors import UserError, escape_to_one_line
from nemodiff_train.objective.sample import Sample
from nemodiff_train.report.display import span
from nemodiff_train.validation import data, objective
from nemodiff_train.validation.rehearsal import datasets
from nemodiff_train.validation.settings import check_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEGEND = "⟦masked⟧  ¶ ends a document or an answer  ° without an AR loss of the next token  ░ padding"
PADDING = "░"
COLOURS = ("on #dbe7fb", "on #fbe6d4")
"""Backgrounds of the blocks, in turn."""


def show_samples(config: TriModeConfig, count: int) -> None:
    """Print the first training samples of a run to standard output, as its loader makes them.

    Raises:
        UserError: The objective or the data cannot be used.
    """
    check_sizes(config)
    if lines := [*objective.problems(config), *data.problems(config)]:
        raise UserError("; ".join(lines))
    config.propagate()
    output, tokenizer = PlainConsole(), load_tokenizer(str(config.tokenizer.tokenizer_model))
    output.print(Text(LEGEND, "dim"))
    eod_token_id = config.dataset.eod_token_id()
    end = tokenizer.eos_token_id if eod_token_id is None else eod_token_id
    for number, sample in enumerate(first_samples(config, count)):
        length = len(sample["maskable"])
        views, ar_targets = len(sample["tokens"]) // length - 1, int((sample["loss_mask"][-length:] > 0).sum())
        counts = f"{length} tokens, {int(sample['maskable'].sum())} that may be masked, {ar_targets} AR targets"
        output.print(Text.assemble("\n", (f"sample {number}", "bold"), f": {counts}"), soft_wrap=True)
        for view in range(max(views, 1)):
            # Of one view, or of the text alone in the AR stage, [L]: the weights of its losses, what is masked.
            here = slice(view * length, (view + 1) * length)
            weights = sample["loss_mask"][here] if views else sample["loss_mask"].new_zeros(length)
            is_masked = sample["tokens"][here] != sample["tokens"][-length:]
            if views:
                masked, weighted = int(is_masked.sum()), int((weights > 0).sum())
                output.print(f"view {view}: {masked} masked, {weighted} with a loss", soft_wrap=True)
            for line in _blocks(sample, is_masked, weights, int(end if end is not None else -1), tokenizer):
                output.print(line, soft_wrap=True)


def first_samples(config: TriModeConfig, count: int) -> list[Sample]:
    """Return the first training samples of a run; its folder is not made, but what it has there is used."""
    with quiet(), datasets(config) as (train, *_):
        return [train[index] for index in range(min(count, len(train)))]


def _blocks(
    sample: Sample, is_masked: Tensor, weights: Tensor, end: int, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Text]:
    """Yield a line per block of a view: its number, its document, what it is, the weights of its losses, its text.

    ``is_masked`` is [L] bool; ``weights`` are those of its loss, [L]; ``end`` is the token that ends a document.
    """
    maskable, length = sample["maskable"], len(sample["maskable"])
    clean, has_ar_loss = sample["tokens"][-length:].tolist(), (sample["loss_mask"][-length:] > 0).tolist()
    documents, blocks, _ = sample["segment_ids"].tolist()
    for block in dict.fromkeys(blocks):
        inside = [index for index in range(length) if blocks[index] == block]
        document = documents[inside[0]]
        learns = bool(maskable[inside].any())
        kind = "padding" if document < 0 else "learned" if learns else "context"
        counted = [weight for weight in weights[inside].tolist() if weight > 0]
        weight = f"w {span(counted)}" if counted else ""
        line = Text(f"{block:>5} document {max(document, -1 - document):<3} {kind:<8}{weight:<12}|", "dim")
        for index in inside:
            shade = f"{COLOURS[block % 2]} {'black' if learns else 'bright_black'}"
            if documents[index] < 0:
                line.append(PADDING, shade)
                continue
            written = escape_to_one_line(str(tokenizer.decode([clean[index]])))
            marks = "¶" * (clean[index] == end) + "°" * (learns and not has_ar_loss[index])
            line.append(
                f"⟦{written}⟧{marks}" if is_masked[index] else f"{written}{marks}",
                f"{shade}{' bold reverse' if is_masked[index] else ''}",
            )
        line.append("|", "dim")
        yield line
