"""A tri-mode language model: AR decoding, block diffusion and self-speculation with one set of weights.

This file is copied into exported directories and runs there: it needs PyTorch and Transformers only.
The network is the AR family's own class from Transformers, under the family's own weight names.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .configuration_tri_mode import TriModeConfig

DRAFTER_FOLDER = "linear_spec_lora"
"""Folder of the drafter in a model's directory."""

_USED = {
    "max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p",
    "num_return_sequences",
}  # fmt: skip
_HARMLESS = {"bos_token_id", "use_cache", "transformers_version", "_from_model_config", "tokenizer"}
"""Settings of Transformers' generation that are used here, and those that change nothing."""

logger = logging.get_logger(__name__)


class TriModeModel(PreTrainedModel, GenerationMixin):
    """The AR family's causal language model, with three ways to decode.

    Each returns the prompt with the new tokens, and the number of forwards: every call of the model for the
    batch, the prefill included.  Names and arguments are those of NVIDIA's Nemotron-Labs-Diffusion; at
    temperature 0 so are tokens and counts, except for what each method says, and:

    - The mask token is never predicted.
    - ``max_new_tokens`` is an exact limit and need not be a multiple of the block.
    - Rows of a batch do not influence each other.  A row that has ended is padded with its stop token.
    - Probabilities are computed in fp32 whatever the model's dtype.
    """

    config_class = TriModeConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True  # flash attention takes no mask, which a block needs

    def __init__(self, config: TriModeConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.vocab_size, bias=False)
        self._drafting = False
        self.post_init()

    def load_drafter(self, directory: str | None = None) -> None:
        """Load a drafter: low-rank adapters that make the drafts of :meth:`linear_spec_generate` better.

        They act on drafts alone, so that the tokens stay those of :meth:`ar_generate`.

        Args:
            directory: Folder as PEFT writes it; None for ``linear_spec_lora`` beside the model's own files.

        Raises:
            ValueError: It is not a drafter of this model.
        """
        name = "adapter_model.safetensors"
        model = self.config._name_or_path if directory is None else None
        file = (
            str(cached_file(model, name, subfolder=DRAFTER_FOLDER)) if model else str(Path(directory or ".") / name)
        )
        rank, scale = _adapter_size(Path(file).with_name("adapter_config.json"))
        factors = load_file(file)
        for number, layer in enumerate(self.model.layers):
            projection = layer.self_attn.o_proj
            prefix = f"base_model.model.model.layers.{number}.self_attn.o_proj"
            a, b = (factors.pop(f"{prefix}.lora_{part}.weight", None) for part in "AB")
            rows, columns = projection.weight.shape
            if a is None or b is None or (tuple(a.shape), tuple(b.shape)) != ((rank, columns), (rows, rank)):
                raise ValueError(f"{file} is not a drafter of this model: '{prefix}' is missing or of another shape")
            first = not hasattr(projection, "draft_a")
            projection.register_buffer("draft_a", a.to(projection.weight.device), persistent=False)
            projection.register_buffer("draft_b", scale * b.to(projection.weight.device), persistent=False)
            if first:
                projection.register_forward_hook(self._correct_draft)
        if factors:
            raise ValueError(f"{file} is not a drafter of this model: it has '{next(iter(factors))}' too")

    def _correct_draft(self, projection: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Add the drafter's part to an attention's output projection, [batch, length, hidden], in drafts alone."""
        if not self._drafting:
            return output
        # [batch, length, rank] and [batch, length, hidden], in the adapters' dtype.
        low = F.linear(inputs[0].to(projection.draft_a.dtype), projection.draft_a)
        return output + F.linear(low, projection.draft_b).to(output.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the plain causal model: position i predicts token i + 1.

        Args:
            input_ids: [batch, length] token ids.
            attention_mask: [batch, length], 0 at padding; or [batch, 1, length, keys] to add to the scores.
            labels: [batch, length] the same ids, -100 where there is no loss.
            logits_to_keep: Number of last positions whose logits are returned; 0 for all.
            kwargs: Further arguments of the family's model, such as ``position_ids`` and ``past_key_values``.

        Returns:
            Logits [batch, length or logits_to_keep, vocab], and the mean cross-entropy where there are labels.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss: Any = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def ar_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> tuple[Tensor, int]:
        """Decode autoregressively, one token per forward.

        The batch ends when every row has had a stop token, not only when all have one at the same position.

        Args:
            prompt_ids: [batch, length] token ids.
            max_new_tokens: Maximum number of new tokens per row, the stop token included.
            temperature: 0 is greedy; above, tokens are sampled from softmax(logits / temperature).
            eos_token_id: Token or tokens that end a row; None for none.
            max_thinking_tokens: New tokens after which ``end_think_token_id`` is forced unless it has come.
            end_think_token_id: Token that closes the thinking.

        Returns:
            Prompt and new tokens [batch, length + new], and the forwards: as many as new tokens.

        Raises:
            ValueError: An argument is out of its range, or clean text is not attended to causally.
        """
        self._check(prompt_ids, max_new_tokens, temperature, causal=True)
        session = _Session(self, self.config.mask_token_id)
        stops = _Stops(eos_token_id)
        force_end = partial(_force_end, budget=max_thinking_tokens, end=end_think_token_id)
        new = prompt_ids[:, :0]
        while new.shape[1] < max_new_tokens and not stops.all_met(new):
            logits = session.forward(new[:, -1:] if new.shape[1] else prompt_ids, last=True)
            new = torch.cat([new, force_end(_sample(logits, temperature), new)], dim=1)
        return torch.cat([prompt_ids, stops.cut(new)], dim=1), session.nfe

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        prompt_ids: Tensor | None = None,
        max_new_tokens: int | None = None,
        block_length: int | None = None,
        threshold: float | None = 0.9,
        causal_context: bool = True,
        temperature: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        *,
        input_ids: Tensor | None = None,
        **settings: Any,
    ) -> tuple[Tensor, int] | Tensor:
        """Decode by block diffusion: block after block, several tokens per forward.

        A block starts where the text ends, with one token that the AR prediction gives.  Each denoising
        forward sees the text and the whole block, and unmasks the positions whose token is probable enough, but at
        least the most probable one.  One more forward puts a full block into the cache.

        NVIDIA's code counts that forward for the last block too, where it has no use, and does not count the
        prefill; here it is the other way round, which is the same number.  The last block is denoised no
        further than ``max_new_tokens``.

        With block-causal attention on clean text, blocks are counted from the start of the text, and the AR
        prediction gives a block's first token only if the model was trained with the shift.

        Called with ``input_ids=``, as pipelines and harnesses do, it keeps Transformers' contract instead: the
        settings come from ``generation_config`` and from the arguments, rows may be padded on the left by
        ``attention_mask``, ``stopping_criteria`` are asked token by token, and the ids alone are returned.

        Args:
            prompt_ids: [batch, length] token ids.
            max_new_tokens: Maximum number of new tokens per row, the stop token included; 128 by default.
            block_length: Positions per block; None for what the model was trained with.
            threshold: Probability from which a position is unmasked; None for one position per forward.
            causal_context: Whether the AR prediction gives a block's first token; otherwise it is a mask too.
            temperature: 0 is greedy, the default; above, tokens are sampled from softmax(logits / temperature).
            eos_token_id: Token or tokens that end a row; None for none.
            max_thinking_tokens: New tokens after which ``end_think_token_id`` is forced unless it has come.
            end_think_token_id: Token that closes the thinking.
            input_ids: [batch, length] token ids, for Transformers' contract.
            settings: The further arguments of that contract.

        Returns:
            Prompt and new tokens [batch, length + new], and the forwards; with ``input_ids`` the tokens alone.

        Raises:
            ValueError: An argument is out of its range, or asks for what block diffusion cannot do.
        """
        force_end = partial(_force_end, budget=max_thinking_tokens, end=end_think_token_id)
        blocks = _Blocks(block_length or self.config.block_size, threshold, causal_context, force_end)
        if self.config.shift and not causal_context:
            raise ValueError("causal_context=False: a model with the shift predicts no first token of a block itself")
        if prompt_ids is not None:
            if settings or input_ids is not None:
                raise ValueError(
                    f"prompt_ids do not go with {next(iter(settings), 'input_ids')}; give input_ids alone"
                )
            limit = 128 if max_new_tokens is None else max_new_tokens
            self._check(prompt_ids, limit, temperature or 0.0, block_length)
            sample_tokens = partial(_sample, temperature=temperature or 0.0)
            return self._diffuse(prompt_ids, limit, blocks, _Stops(eos_token_id), sample_tokens)
        named = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos_token_id": eos_token_id}
        settings |= {name: value for name, value in named.items() if value is not None}
        if (ids := settings.pop("inputs", input_ids)) is None:
            raise ValueError("generate() takes prompt_ids, or input_ids")
        return self._generate_ids(ids, blocks, **settings)

    def _diffuse(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        blocks: "_Blocks",
        stops: "_Stops",
        sample_tokens: Callable[[Tensor], Tensor],
        criteria: Sequence[Any] = (),
    ) -> tuple[Tensor, int]:
        """Decode rows [batch, length] without padding; see :meth:`generate`."""
        size, block_causal = blocks.size, self.config.clean_attention == "block_causal"
        known_first_token = self.config.shift or (blocks.causal_context and not block_causal)
        session = _Session(self, self.config.mask_token_id)

        text, length = prompt_ids, prompt_ids.shape[1]
        end = length + max_new_tokens
        start = length // size * size if block_causal else length
        uncached = prompt_ids[:, :start]  # tokens of the text that are not in the cache
        while True:
            block = session.masks(len(text), size)
            if uncached.shape[1]:
                logits = session.forward(uncached, size if block_causal else None, last=True)
                if known_first_token:
                    block[:, :1] = sample_tokens(logits)
            known = text.shape[1] - start  # positions of a first block-causal block that the prompt fills
            block[:, :known] = text[:, start:]
            block[:, known:] = blocks.force_end(block[:, known:], text[:, length:])
            position = torch.arange(size, device=text.device)  # within the block
            # [batch, size]: positions to fill are new, within the limit, and in rows without a stop token.
            wanted = (position >= known) & (position < end - start) & ~stops.met(text[:, length:])[:, None]
            uncached = session.denoise(block, wanted, blocks.threshold, sample_tokens, stops)
            before = text.shape[1]
            text = torch.cat([text[:, :start], uncached], dim=1)[:, :end]
            start += size
            cut = _length_by(criteria, text, before)
            if cut or start >= end or stops.all_met(text[:, length:]):
                text = text[:, :cut]
                return torch.cat([prompt_ids, stops.cut(text[:, length:])], dim=1), session.nfe

    def _generate_ids(
        self,
        ids: Tensor,
        blocks: "_Blocks",
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Decode by Transformers' contract; rows are decoded one by one, because their lengths differ.

        Args:
            ids: [batch, length], padded on the left.
            blocks: How blocks are decoded.
            attention_mask: [batch, length], 0 at padding.
            generation_config: Settings; None for the model's own.
            stopping_criteria: Called with ids [batch, n] and None; True for each row that ends there.
            settings: Settings that take the place of those.

        Returns:
            [batch, length + new].
        """
        config = _merge_generation_config(generation_config or self.generation_config, settings)
        many, length = config.num_return_sequences or 1, ids.shape[1]
        ids = ids.repeat_interleave(many, 0)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.repeat_interleave(many, 0)
        limit = config.max_new_tokens
        if limit is None:
            limit = 128 if config.max_length is None else config.max_length - length
        sampled = bool(config.do_sample)
        sample_tokens = partial(
            _sample,
            temperature=(1.0 if config.temperature is None else config.temperature) if sampled else 0.0,
            top_k=(config.top_k or 0) if sampled else 0,
            top_p=(config.top_p or 1.0) if sampled else 1.0,
        )
        stops, criteria = _Stops(config.eos_token_id), stopping_criteria or ()
        self._check(ids, limit, sample_tokens.keywords["temperature"])
        rows = []
        for row, seen in zip(ids, mask, strict=True):
            prompt = row[seen.bool()][None]
            decoded, _ = self._diffuse(prompt, limit, blocks, stops, sample_tokens, criteria if len(ids) == 1 else ())
            rows.append(decoded[0, prompt.shape[1] :])
        padding = config.pad_token_id if config.pad_token_id is not None else [*stops.tokens, 0][0]
        new = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        text = torch.cat([ids, new], dim=1)
        if len(ids) > 1 and (end := _length_by(criteria, text, length)) is not None:
            return text[:, :end]
        return text

    @torch.no_grad()
    def linear_spec_generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        temperature: float = 0.0,
        mask_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
        threshold: float = 0.0,
    ) -> tuple[Tensor, int]:
        """Decode by linear self-speculation: block diffusion drafts, one causal forward verifies.

        The tokens are those of :meth:`ar_generate`: each is the causal model's own choice, or sample, after
        those before it.  A cycle accepts the draft tokens that equal this choice, and adds one token of the
        verifier: the recovered one after a rejection, the bonus token otherwise.

        A forced ``end_think_token_id`` is part of the output, which NVIDIA's code leaves out.

        Args:
            prompt_ids: [1, length] token ids.
            max_new_tokens: Maximum number of new tokens, the stop token included.
            block_length: Positions per draft, its known first one included; None for the model's block size.
            temperature: 0 is greedy; above, drafts and tokens are sampled from softmax(logits / temperature).
            mask_token_id: Mask token; None for the model's.
            eos_token_id: Token or tokens that end the text; None for none.
            max_thinking_tokens: New tokens after which ``end_think_token_id`` is forced unless it has come.
            end_think_token_id: Token that closes the thinking.
            threshold: Probability from which a drafting forward unmasks a position; 0 drafts all in one forward.

        Returns:
            Prompt and new tokens [1, length + new], and the forwards: with a threshold of 0, one and two per cycle.

        Raises:
            ValueError: An argument is out of its range, there are several rows, or clean text is not attended to
                causally.
        """
        self._check(prompt_ids, max_new_tokens, temperature, block_length, causal=True)
        if len(prompt_ids) != 1:
            raise ValueError(f"linear_spec_generate takes one row, not {len(prompt_ids)}; call it for each")
        size = block_length or self.config.block_size
        session = _Session(self, self.config.mask_token_id if mask_token_id is None else mask_token_id)
        stops = _Stops(eos_token_id)
        force_end = partial(_force_end, budget=max_thinking_tokens, end=end_think_token_id)
        wanted = torch.ones(1, size, dtype=torch.bool, device=prompt_ids.device)

        new = prompt_ids[:, :0]
        sample_tokens = partial(_sample, temperature=temperature)
        new = force_end(sample_tokens(session.forward(prompt_ids, last=True)), new)
        while new.shape[1] < max_new_tokens and not stops.all_met(new):
            block = torch.cat([new[:, -1:], session.masks(1, size - 1)], dim=1)
            self._drafting = True
            try:
                draft = session.denoise(block, wanted, threshold, sample_tokens)[:, 1:]
            finally:
                self._drafting = False
            # [1, size] choices of the verifier: one for each of the size - 1 draft tokens, and one after them.
            verified = sample_tokens(session.forward(torch.cat([new[:, -1:], draft], dim=1)))
            forced = force_end(verified, new)
            # A token that was forced in place of the verifier's ends the cycle, as a rejected draft token does.
            accept_mask = (verified[:, :-1] == draft) & (forced == verified)[:, :-1]
            committed = int(accept_mask.long().cumprod(1).sum()) + 1  # the accepted ones, and one of the verifier
            session.crop(size - committed)
            new = torch.cat([new, forced[:, :committed]], dim=1)
        return torch.cat([prompt_ids, stops.cut(new[:, :max_new_tokens])], dim=1), session.nfe

    def _check(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int,
        temperature: float,
        block_length: int | None = None,
        causal: bool = False,
    ) -> None:
        if prompt_ids.dim() != 2 or 0 in prompt_ids.shape:
            raise ValueError(
                f"prompt_ids must be [batch, length] with a token at least, not {list(prompt_ids.shape)}"
            )
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if block_length is not None and block_length < 1:
            raise ValueError(f"block_length is {block_length}; it must be at least 1")
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or above")
        if causal and self.config.clean_attention == "block_causal":
            raise ValueError("this model attends block-causally to clean text: it decodes with generate() only")


@dataclass
class _Blocks:
    """How blocks are decoded; see :meth:`TriModeModel.generate`."""

    size: int
    threshold: float | None
    causal_context: bool
    force_end: Callable[[Tensor, Tensor], Tensor]
    """See :func:`_force_end`."""


class _Session:
    """A batch of equally long texts, their cache, and every forward counted.

    Args:
        model: The model.
        mask_token_id: Never predicted.
    """

    def __init__(self, model: TriModeModel, mask_token_id: int) -> None:
        self.model = model
        self.mask_token_id = mask_token_id
        self.cache = DynamicCache()
        self.nfe = 0

    def crop(self, tokens: int) -> None:
        """Remove a number of tokens from the end of the cache."""
        if tokens:  # 0 would be taken for a length by some versions; all take a negative number as this
            self.cache.crop(-tokens)

    def masks(self, rows: int, length: int) -> Tensor:
        """Return [rows, length] of the mask token."""
        return torch.full((rows, length), self.mask_token_id, device=self.model.device)

    def forward(self, tokens: Tensor, block: int | None = None, last: bool = False) -> Tensor:
        """Run tokens after the cached ones, and cache them.

        Args:
            tokens: [batch, new] token ids.
            block: Positions per block, which see each other; the text is a multiple of it. None for a causal forward.
            last: Whether to return the logits of the last position alone.

        Returns:
            Logits [batch, new or 1, vocab], fp32, minus infinity for the mask token.
        """
        mask = None
        if block is not None:
            # [1, 1, new, cached + new], added to the scores: 0 where a position can attend, else the minimum.
            new, cached, dtype = tokens.shape[1], int(self.cache.get_seq_length()), self.model.dtype
            position = torch.arange(new, device=self.model.device)
            can_attend = position // block <= position[:, None] // block  # [queries, keys]
            mask = torch.zeros(1, 1, new, cached + new, dtype=dtype, device=self.model.device)
            mask[..., cached:].masked_fill_(~can_attend, torch.finfo(dtype).min)
        output = self.model(
            tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=int(last)
        )
        self.nfe += 1
        logits = output.logits.float()
        logits[..., self.mask_token_id] = -torch.inf
        return logits

    def denoise(
        self,
        block: Tensor,
        wanted: Tensor,
        threshold: float | None,
        sample_tokens: Callable[[Tensor], Tensor],
        stops: "_Stops | None" = None,
    ) -> Tensor:
        """Fill the mask tokens of a block; nothing of it stays in the cache.

        Args:
            block: [batch, size] token ids.
            wanted: [batch, size] positions to fill; mask tokens elsewhere stay.
            threshold: Probability from which a position is unmasked; None for one position per forward.
            sample_tokens: Returns tokens [batch, size] of logits [batch, size, vocab].
            stops: A row is finished once it has one of these and no mask token before it.

        Returns:
            The filled block [batch, size].
        """
        while True:
            # [batch, size]: masked positions, in rows that have one before their first stop token.
            masked = (block == self.mask_token_id) & wanted
            if stops:
                stopped = stops.among(block) & wanted  # stop tokens of the prompt end nothing
                masked &= (masked & (stopped.cumsum(1) == 0)).any(1, keepdim=True)
            if not masked.any():
                return block
            logits = self.forward(block, block.shape[1])
            self.crop(block.shape[1])
            if self.model.config.shift:
                logits = logits.roll(1, dims=1)  # the first position of a block is known and needs none
            tokens = sample_tokens(logits)
            # Unmask the positions whose token is as probable as the threshold, and the most probable one.
            confidence = logits.softmax(-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~masked, -1.0)
            unmask = confidence >= (torch.inf if threshold is None else threshold)
            unmask = unmask.scatter(1, confidence.argmax(1, keepdim=True), True)
            block = torch.where(unmask & masked, tokens, block)


class _Stops:
    """Stop tokens.

    Args:
        tokens: Tokens that end a row: one, several or None.
    """

    def __init__(self, tokens: int | Sequence[int] | None) -> None:
        self.tokens = [tokens] if isinstance(tokens, int) else list(tokens or [])

    def among(self, text: Tensor) -> Tensor:
        """Return where a text has a stop token, [batch, length]."""
        return torch.isin(text, torch.tensor(self.tokens, dtype=text.dtype, device=text.device))

    def met(self, new: Tensor) -> Tensor:
        """Return which rows have a stop token among their new tokens, [batch]."""
        return self.among(new).any(1)

    def all_met(self, new: Tensor) -> bool:
        """Return whether every row has ended."""
        return bool(self.met(new).all())

    def cut(self, new: Tensor) -> Tensor:
        """Cut new tokens after the last row's first stop token; rows that end before are padded with their own.

        Args:
            new: [batch, length].

        Returns:
            [batch, at most length].
        """
        if not new.shape[1]:
            return new
        stopped = self.among(new)
        # [batch, 1]: index of the first stop token, or of the last token; every later index becomes this one.
        first = torch.where(stopped.any(1), stopped.long().argmax(1), new.shape[1] - 1)[:, None]
        index = torch.arange(new.shape[1], device=new.device).minimum(first)
        return new.gather(1, index)[:, : int(first.max()) + 1]


def _force_end(tokens: Tensor, before: Tensor, budget: int | None, end: int | None) -> Tensor:
    """Force the token that closes the thinking where its budget is used up, in rows that have not had it.

    Args:
        tokens: [batch, k] next tokens.
        before: [batch, n] new tokens so far.
        budget: Maximum number of new tokens before ``end``; None for no limit.
        end: Token that closes the thinking; None for no limit.

    Returns:
        [batch, k] next tokens.
    """
    if budget is None or end is None:
        return tokens
    index = max(budget - before.shape[1], 0)
    if index >= tokens.shape[1]:
        return tokens
    ended = (torch.cat([before, tokens[:, :index]], dim=1) == end).any(1)
    tokens = tokens.clone()
    tokens[~ended, index] = end
    return tokens


def _length_by(criteria: Sequence[Any], text: Tensor, start: int) -> int | None:
    """Return the length, above ``start``, at which stopping criteria end the last row of a text [batch, n], or None.

    They are asked after every token, as Transformers' own decoding asks them.
    """
    done = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    for length in range(start + 1, text.shape[1] + 1) if criteria else ():
        for criterion in criteria:
            done |= torch.as_tensor(criterion(text[:, :length], None), device=text.device)
        if done.all():
            return length
    return None


def _adapter_size(file: Path) -> tuple[int, float]:
    """Return the rank and the scale of the adapters that an ``adapter_config.json`` describes.

    Raises:
        ValueError: It holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); fetch it again") from None
    settings: dict[str, Any] = content if isinstance(content, dict) else {}
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    numbers = type(rank) is int and isinstance(alpha, int | float)
    if rank is None or alpha is None or not (numbers and 0 < rank < 2**31 and 0 < alpha < 2**31):
        raise ValueError(f"{file} has r={rank!r} and lora_alpha={alpha!r}; both are numbers above 0")
    return rank, alpha / rank


def _merge_generation_config(defaults: GenerationConfig, settings: dict[str, Any]) -> GenerationConfig:
    """Return the settings of a generation, the caller's before the model's.

    Raises:
        ValueError: The caller asks for what block diffusion cannot do; what the model's file asks for is warned of.
    """
    config, plain = copy.deepcopy(defaults), GenerationConfig().to_dict()
    asked = {name for name, value in settings.items() if value not in (None, False, plain.get(name))}
    if unknown := sorted(asked - _USED - _HARMLESS):
        raise ValueError(f"block diffusion does not take {', '.join(unknown)}")
    config.update(**{name: value for name, value in settings.items() if name in _USED})
    if settings.get("max_length") is not None and settings.get("max_new_tokens") is None:
        config.max_new_tokens = None  # the caller's limit takes the place of the model's
    for name, value in config.to_dict().items():
        if name not in _USED | _HARMLESS and value is not None and value != plain.get(name):
            logger.warning_once(f"generation_config.json has {name}={value}, which block diffusion does not use")
    return config


def _sample(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return greedy or sampled token ids [batch, length] of logits [batch, length, vocab]."""
    if temperature == 0:
        return logits.argmax(-1)
    # The largest logit is 0 before the division, so that no temperature leaves the range of fp32.
    scaled = ((logits - logits.amax(-1, keepdim=True)) / temperature).flatten(0, 1)
    if top_k:
        scaled = TopKLogitsWarper(top_k)(None, scaled)
    if top_p < 1:
        scaled = TopPLogitsWarper(top_p)(None, scaled)
    return torch.multinomial(scaled.softmax(-1), 1).view(logits.shape[:2])
