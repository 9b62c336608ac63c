"""Configuration of a tri-mode model: that of its AR family, and how its blocks are decoded.

This file is copied into exported directories and runs there: it needs PyTorch and Transformers only.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig


class TriModeConfig(PretrainedConfig):
    """Configuration of :class:`TriModeModel`.

    Args:
        text_config: Configuration of the AR family, or its dictionary with a ``model_type``.
        mask_token_id: Id of the mask token.
        block_size: Positions per block in training; the default of a block or draft.
        shift: Whether position i of a block predicts token i + 1, as an AR model does, instead of token i.
        clean_attention: What a clean position sees: ``causal``, those before it; ``block_causal``, its block too.
        kwargs: Settings that every Transformers model has.
    """

    model_type = "tri_mode"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any],
        mask_token_id: int,
        block_size: int = 32,
        shift: bool = False,
        clean_attention: str = "causal",
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.mask_token_id = mask_token_id
        self.block_size = block_size
        self.shift = shift
        self.clean_attention = clean_attention
        self.tie_word_embeddings = text_config.tie_word_embeddings
        super().__init__(**{**kwargs, "tie_word_embeddings": text_config.tie_word_embeddings})

    @property
    def vocab_size(self) -> int:
        """Return the number of rows of the embedding."""
        return int(self.text_config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """Return the largest number of positions."""
        return int(self.text_config.max_position_embeddings)
