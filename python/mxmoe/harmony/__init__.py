"""The harmony format: conversations to tokens, and what the model writes back to messages.

Rendering follows the ``openai-harmony`` library token for token. Parsing agrees with it on well-formed
streams and never fails on the others. No template of a checkpoint is executed.
"""

from __future__ import annotations

from mxmoe.harmony.messages import (
    CHANNELS,
    MODEL_IDENTITY,
    REASONING_EFFORTS,
    ROLES,
    Function,
    Message,
    developer_message,
    system_message,
)
from mxmoe.harmony.parser import Delta, StreamParser, parse
from mxmoe.harmony.render import render_conversation, render_message, stop_token_ids
from mxmoe.harmony.typescript import schema_to_typescript

__all__ = [
    "CHANNELS",
    "MODEL_IDENTITY",
    "REASONING_EFFORTS",
    "ROLES",
    "Delta",
    "Function",
    "Message",
    "StreamParser",
    "developer_message",
    "parse",
    "render_conversation",
    "render_message",
    "schema_to_typescript",
    "stop_token_ids",
    "system_message",
]
