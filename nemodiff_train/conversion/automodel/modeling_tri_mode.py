"""A tri-mode language model: AR decoding, block diffusion and self-speculation with one set of weights.

This file is copied into exported directories and runs there: it needs PyTorch and Transformers only.
The network is the AR family's own class from Transformers, under the family's own weight names.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tri_mode import TriModeConfig


class TriModeModel(PreTrainedModel):
    """The AR family's causal language model, and three ways to decode with it.

    Each way returns the prompt with the new tokens, and the number of forwards: every call of the model
    for the batch, the prefill included.  Names and arguments are those of NVIDIA's Nemotron-Labs-Diffusion;
    at temperature 0 so are tokens and counts, but for what is said at each method, and:

    - The mask token is never predicted.
    - ``max_new_tokens`` is an exact limit and need not be a multiple of the block.
    - Rows of a batch do not influence each other.  A row that has ended is filled up with its stop token.
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
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The plain causal model: place i predicts token i + 1.

        Args:
            input_ids: [batch, length] token ids.
            attention_mask: [batch, length], 0 at padding; or [batch, 1, length, keys] to add to the scores.
            labels: [batch, length] the same ids, -100 where nothing is to be predicted.
            logits_to_keep: Give the logits of so many last places only; 0 for all.
            kwargs: What else the family's model takes: ``position_ids``, ``past_key_values``, ``inputs_embeds``, ...

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
        """One token a forward.

        The batch ends when every row has had a stop token, not only when all have one at the same place.

        Args:
            prompt_ids: [batch, length] token ids.
            max_new_tokens: Limit on the new tokens of a row, the stop token included.
            temperature: 0 is greedy; above, tokens are drawn from softmax(logits / temperature).
            eos_token_id: Token or tokens that end a row; None for none.
            max_thinking_tokens: New tokens after which ``end_think_token_id`` is forced unless it has come.
            end_think_token_id: Token that closes the thinking.

        Returns:
            Prompt and new tokens [batch, length + new], and the forwards: as many as new tokens.

        Raises:
            ValueError: An argument that cannot be, or a model whose clean half is not causal.
        """
        self._check(prompt_ids, max_new_tokens, temperature, causal=True)
        session = _Session(self, self.config.mask_token_id)
        stops, thinking = _Stops(eos_token_id), _Thinking(max_thinking_tokens, end_think_token_id)
        new = prompt_ids[:, :0]
        while new.shape[1] < max_new_tokens and not stops.all_met(new):
            logits = session.forward(new[:, -1:] if new.shape[1] else prompt_ids, last=True)
            new = torch.cat([new, thinking.closed(_choose(logits, temperature), new)], dim=1)
        return torch.cat([prompt_ids, stops.cut(new)], dim=1), session.nfe

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        max_new_tokens: int = 128,
        block_length: int | None = None,
        threshold: float | None = None,
        causal_context: bool = True,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        max_thinking_tokens: int | None = None,
        end_think_token_id: int | None = None,
    ) -> tuple[Tensor, int]:
        """Block diffusion: a block at a time, several tokens a forward.

        A block starts where the text ends, with one token that the AR prediction gives.  Each denoising
        forward sees the text and the whole block, and fixes the places whose token is sure enough, but at
        least the surest.  One more forward puts a full block into the cache.

        NVIDIA's code counts that forward for the last block too, where it has no use, and does not count the
        prefill; here it is the other way round, which is the same number.  The last block is denoised no
        further than ``max_new_tokens``.

        A model with a block-causal clean half has its blocks counted from the start of the text, and a
        token given in advance only if it was trained with the shift.

        Args:
            prompt_ids: [batch, length] token ids.
            max_new_tokens: Limit on the new tokens of a row, the stop token included.
            block_length: Positions of a block; None for what the model was trained with.
            threshold: Probability from which a place is fixed; None fixes one place a forward.
            causal_context: Whether the AR prediction gives a block's first token; otherwise it is a mask too.
            temperature: 0 is greedy; above, tokens are drawn from softmax(logits / temperature).
            eos_token_id: Token or tokens that end a row; None for none.
            max_thinking_tokens: New tokens after which ``end_think_token_id`` is put unless it has come.
            end_think_token_id: Token that closes the thinking.

        Returns:
            Prompt and new tokens [batch, length + new], and the forwards.

        Raises:
            ValueError: An argument that cannot be.
        """
        self._check(prompt_ids, max_new_tokens, temperature, block_length)
        size = block_length or self.config.block_size
        whole_blocks = self.config.clean_attention == "block_causal"
        if self.config.shift and not causal_context:
            raise ValueError("causal_context=False: a model with the shift predicts no first token of a block itself")
        seeded = self.config.shift or (causal_context and not whole_blocks)
        session = _Session(self, self.config.mask_token_id)
        stops, thinking = _Stops(eos_token_id), _Thinking(max_thinking_tokens, end_think_token_id)

        text, length = prompt_ids, prompt_ids.shape[1]
        end = length + max_new_tokens
        start = length // size * size if whole_blocks else length
        todo = prompt_ids[:, :start]  # in the text, but not in the cache
        while True:
            block = session.masks(len(text), size)
            if todo.shape[1]:
                logits = session.forward(todo, size if whole_blocks else None, last=True)
                if seeded:
                    block[:, :1] = _choose(logits, temperature)
            known = text.shape[1] - start  # of a first whole block: the prompt's end
            block[:, :known] = text[:, start:]
            block[:, known:] = thinking.closed(block[:, known:], text[:, length:])
            place = torch.arange(size, device=text.device)
            wanted = (place >= known) & (place < end - start) & ~stops.met(text[:, length:])[:, None]
            todo = session.denoise(block, wanted, threshold, temperature, stops)
            text = torch.cat([text[:, :start], todo], dim=1)[:, :end]
            start += size
            if start >= end or stops.all_met(text[:, length:]):
                return torch.cat([prompt_ids, stops.cut(text[:, length:])], dim=1), session.nfe

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
        """Linear self-speculation: block diffusion drafts, one causal forward verifies.

        The tokens are those of :meth:`ar_generate`: every one is the causal model's own choice, or draw,
        behind those before it.  A cycle keeps the drafted tokens that this choice agrees with and one more.

        A forced ``end_think_token_id`` is part of the output, which NVIDIA's code leaves out.

        Args:
            prompt_ids: [1, length] token ids.
            max_new_tokens: Limit on the new tokens, the stop token included.
            block_length: Positions of a draft, its known first one included; None for the model's block size.
            temperature: 0 is greedy; above, drafts and tokens are drawn from softmax(logits / temperature).
            mask_token_id: Another mask token than the model's.
            eos_token_id: Token or tokens that end the text; None for none.
            max_thinking_tokens: New tokens after which ``end_think_token_id`` is forced unless it has come.
            end_think_token_id: Token that closes the thinking.
            threshold: Probability from which a drafting forward fixes a place; 0 drafts all in one forward.

        Returns:
            Prompt and new tokens [1, length + new], and the forwards: with a threshold of 0, one and two a cycle.

        Raises:
            ValueError: An argument that cannot be, more than one row, or a model whose clean half is not causal.
        """
        self._check(prompt_ids, max_new_tokens, temperature, block_length, causal=True)
        if len(prompt_ids) != 1:
            raise ValueError(f"linear_spec_generate takes one row, not {len(prompt_ids)}; call it for each")
        size = block_length or self.config.block_size
        session = _Session(self, self.config.mask_token_id if mask_token_id is None else mask_token_id)
        stops, thinking = _Stops(eos_token_id), _Thinking(max_thinking_tokens, end_think_token_id)
        wanted = torch.ones(1, size, dtype=torch.bool, device=prompt_ids.device)

        new = prompt_ids[:, :0]
        new = thinking.closed(_choose(session.forward(prompt_ids, last=True), temperature), new)
        while new.shape[1] < max_new_tokens and not stops.all_met(new):
            block = torch.cat([new[:, -1:], session.masks(1, size - 1)], dim=1)
            draft = session.denoise(block, wanted, threshold, temperature)[:, 1:]
            chosen = _choose(session.forward(torch.cat([new[:, -1:], draft], dim=1)), temperature)
            own = thinking.closed(chosen, new)
            # A token that was put in place of the model's choice ends the cycle, as a wrong draft does.
            agreed = (chosen[:, :-1] == draft) & (own == chosen)[:, :-1]
            count = int(agreed.long().cumprod(1).sum()) + 1
            session.forget(size - count)
            new = torch.cat([new, own[:, :count]], dim=1)
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
            raise ValueError("this model was trained with a block-causal clean half: it decodes with generate() only")


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

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def forget(self, tokens: int) -> None:
        """Remove so many tokens from the end of the cache."""
        if tokens:  # 0 would be taken for a length by some versions; all take a negative number as this
            self.cache.crop(-tokens)

    def masks(self, rows: int, places: int) -> Tensor:
        """[rows, places] of the mask token."""
        return torch.full((rows, places), self.mask_token_id, device=self.model.device)

    def forward(self, tokens: Tensor, block: int | None = None, last: bool = False) -> Tensor:
        """Run tokens behind the cached ones, and cache them.

        Args:
            tokens: [batch, new] token ids.
            block: Positions that see each other, of which the text is a multiple; None for a causal forward.
            last: Whether the logits of the last place are enough.

        Returns:
            Logits [batch, new or 1, vocab], fp32, minus infinity for the mask token.
        """
        mask = None if block is None else self._block_mask(tokens.shape[1], block)
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
        temperature: float,
        stops: "_Stops | None" = None,
    ) -> Tensor:
        """Fill the masks of a block; nothing of it stays in the cache.

        Args:
            block: [batch, places] token ids.
            wanted: [batch, places] what is asked for; masks elsewhere are left.
            threshold: Probability from which a place is fixed; None for one place a forward.
            temperature: Of the draws.
            stops: A row is left alone once it has one of these and no mask before it.

        Returns:
            The filled block.
        """
        while True:
            hidden = (block == self.mask_token_id) & wanted
            if stops:
                stopped = stops.among(block) & wanted  # in the prompt's end it means nothing
                hidden &= (hidden & (stopped.cumsum(1) == 0)).any(1, keepdim=True)
            if not hidden.any():
                return block
            logits = self.forward(block, block.shape[1])
            self.forget(block.shape[1])
            if self.model.config.shift:
                logits = logits.roll(1, dims=1)  # of a block's first place nobody asks: it is known
            chosen = _choose(logits, temperature)
            confidence = logits.softmax(-1).gather(-1, chosen[..., None])[..., 0].masked_fill(~hidden, -1.0)
            fixed = confidence >= (torch.inf if threshold is None else threshold)
            fixed = fixed.scatter(1, confidence.argmax(1, keepdim=True), True)
            block = torch.where(fixed & hidden, chosen, block)

    def _block_mask(self, new: int, block: int) -> Tensor:
        """[1, 1, new, cached + new] to add to the scores: 0 where a place may look, else the lowest number."""
        dtype, device = self.model.dtype, self.model.device
        place = torch.arange(new, device=device)
        seen = place // block <= place[:, None] // block
        mask = torch.zeros(new, self.cached + new, dtype=dtype, device=device)
        mask[:, self.cached :].masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[None, None]


class _Stops:
    """The tokens that end a row.

    Args:
        tokens: One, several or none.
    """

    def __init__(self, tokens: int | Sequence[int] | None) -> None:
        self.tokens = [tokens] if isinstance(tokens, int) else list(tokens or [])

    def among(self, text: Tensor) -> Tensor:
        """[batch, places] where a text has a stop token."""
        return torch.isin(text, torch.tensor(self.tokens, dtype=text.dtype, device=text.device))

    def met(self, new: Tensor) -> Tensor:
        """[batch] rows whose new tokens hold a stop token."""
        return self.among(new).any(1)

    def all_met(self, new: Tensor) -> bool:
        """Whether every row has ended."""
        return bool(self.met(new).all())

    def cut(self, new: Tensor) -> Tensor:
        """New tokens up to the last row's first stop token; rows that end before are filled with their own.

        Args:
            new: [batch, places].

        Returns:
            [batch, at most places].
        """
        if not new.shape[1]:
            return new
        found = self.among(new)
        first = torch.where(found.any(1), found.long().argmax(1), new.shape[1] - 1)[:, None]
        place = torch.arange(new.shape[1], device=new.device).minimum(first)
        return new.gather(1, place)[:, : int(first.max()) + 1]


class _Thinking:
    """A limit on the tokens before a closing one.

    Args:
        budget: New tokens that may come before it; None for no limit.
        end: The closing token; None for no limit.
    """

    def __init__(self, budget: int | None, end: int | None) -> None:
        self.budget, self.end = budget, end

    def closed(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Tokens with the closing one where the budget is used up, in the rows that have not had it.

        Args:
            tokens: [batch, k] next tokens.
            before: [batch, n] new tokens so far.
        """
        if self.budget is None or self.end is None:
            return tokens
        place = max(self.budget - before.shape[1], 0)
        if place >= tokens.shape[1]:
            return tokens
        had = (torch.cat([before, tokens[:, :place]], dim=1) == self.end).any(1)
        tokens = tokens.clone()
        tokens[~had, place] = self.end
        return tokens


def _choose(logits: Tensor, temperature: float) -> Tensor:
    """Greedy or drawn token ids [batch, places] of logits [batch, places, vocab]."""
    if temperature == 0:
        return logits.argmax(-1)
    # The largest is 0 before it is divided, so that no temperature leaves the range of fp32.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    return torch.multinomial(scaled.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])
