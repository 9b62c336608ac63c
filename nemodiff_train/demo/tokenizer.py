"""The demo's tokenizer: byte-level BPE, one token per digit."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
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


def byte_level_bpe(texts: Iterable[str], vocab_size: int, special: list[str], *splits: PreTokenizer) -> Tokenizer:
    """Train byte-level byte-pair encoding, which writes any text and decodes losslessly.

    Args:
        texts: Text that will be read; frequent words become single tokens.
        vocab_size: Number of tokens, the 256 bytes and the special ones included.
        special: The special tokens, whose ids are the first.
        splits: What cuts a text before its bytes are looked at.
    """
    bpe = Tokenizer(models.BPE())
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, by_bytes]) if splits else by_bytes
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all bytes: any text can be written
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train the demo's tokenizer, and write it as a Hugging Face directory.

    Args:
        texts: Text that the model will read.
        vocab_size: Number of tokens, as for :func:`byte_level_bpe`.
        directory: Created if it does not exist.
    """
    # One token per digit, so that a number's length shows and its digits line up for arithmetic.
    digits = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocab_size, [END_OF_TEXT, MASK], digits),
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # the clean-up would drop spaces before punctuation
    )
    tokenizer.save_pretrained(directory)
    rename_for_transformers_4(directory)
