"""A small byte-level BPE tokenizer with the harmony special tokens, trained on the spot."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
    "<|message|>", "<|call|>",
]  # fmt: skip
TEXTS = [
    "You are a large language model. Reasoning: low medium high",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "system developer user assistant to=functions.get_weather json code python",
    "naïve Grüße 日本語 日本 🦀🦀 مرحبا <|start|> <|end|> <|message|>",
]


def backend(special: list[str] = SPECIAL, vocab_size: int = 400) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made
