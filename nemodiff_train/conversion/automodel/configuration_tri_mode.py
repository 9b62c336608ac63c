"""Configuration of a tri-mode model: the AR family's own, and how its blocks are decoded.

This file is copied into exported directories and runs there: it needs PyTorch and Transformers only.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig


class TriModeConfig(PretrainedConfig):
    """Configuration of :class:`TriModeModel`.

    Args:
        text_config: Configuration of the AR family, or its dictionary with a ``model_type``.
        mask_token_id: Row of the embedding that stands for a token still to be found.
        block_size: Positions of a block in training, and of a block or draft unless asked otherwise.
        shift: Place i of a block predicts token i + 1, as an AR model does; otherwise token i.
        clean_attention: What text that is already there sees: ``causal``, or ``block_causal``, its whole block too.
        kwargs: Settings of any Transformers model.
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
        """Rows of the embedding."""
        return int(self.text_config.vocab_size)

    @property
    def max_position_embeddings(self) -> int:
        """Most positions of a text."""
        return int(self.text_config.max_position_embeddings)
