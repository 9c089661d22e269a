"""Harmony as text, for its tests: special tokens stand in it as such."""

from __future__ import annotations

import re

from mxmoe import harmony
from mxmoe.harmony import Message
from mxmoe.tokenizer import Tokenizer
from small_tokenizer import SPECIAL, backend

TOKENIZER = Tokenizer(backend())
TOKENS = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")


def tokens(text):
    """Encode a text in which special tokens are meant as such."""
    special = TOKENIZER.special_tokens
    parts = [part for part in TOKENS.split(text) if part]
    return [i for p in parts for i in ([special[p]] if p in special else TOKENIZER.encode(p))]


def rendered(messages, **options):
    return TOKENIZER.decode(harmony.render_conversation(messages, TOKENIZER, **options))


def parsed(text, role="assistant"):
    return harmony.parse(tokens(text), TOKENIZER, role)


def said(content, channel=None, recipient=None, content_type=None):
    return Message("assistant", content, None, recipient, channel, content_type)
