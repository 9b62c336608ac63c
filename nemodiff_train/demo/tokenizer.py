"""The demo's tokenizer: byte-level BPE, one token per digit."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nemodiff_train.data.tokenizer_files import rename_for_transformers_4

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
# Conversations read as the demo's problems do, so that its models can be talked to.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Question: {{ message.content }}\n"
    "{% else %}Answer: {{ message.content }}<|endoftext|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a tokenizer that decodes losslessly, and write it as a Hugging Face directory.

    Args:
        texts: Text that the model will read; frequent words become single tokens.
        vocab_size: Number of tokens, the 256 bytes and the two special ones included.
        directory: Created if it does not exist.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        # One token per digit, so that a number's length shows and its digits line up for arithmetic.
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes: any text can be written
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # the clean-up would drop spaces before punctuation
    )
    tokenizer.save_pretrained(directory)
    rename_for_transformers_4(directory)
