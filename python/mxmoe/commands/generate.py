"""``mxmoe generate``."""

from __future__ import annotations

import datetime
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxmoe import harmony
from mxmoe.chat import Reply, reply
from mxmoe.generate import Model
from mxmoe.sampling import SamplingParams

__all__ = ["Request", "run"]


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    prompt: str
    reasoning: str
    instructions: str | None
    functions: Path | None
    date: str | None
    max_new_tokens: int
    stop: tuple[str, ...]
    sampling: dict[str, Any]

    def check(self) -> None:
        """Find what is wrong before a model is loaded; ValueError says what."""
        if not self.prompt:
            raise ValueError("--prompt is empty; wanted at least one character")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens is {self.max_new_tokens}; wanted 1 or more")
        if self.reasoning not in harmony.REASONING_EFFORTS:
            wanted = ", ".join(harmony.REASONING_EFFORTS)
            raise ValueError(f"--reasoning is {self.reasoning!r}; wanted one of {wanted}")
        SamplingParams(**{name: value for name, value in self.sampling.items() if name != "seed"})
        if self.date is not None:
            datetime.date.fromisoformat(self.date)
        self.load_functions()

    def load_functions(self) -> list[harmony.Function]:
        """Read the functions that the model may call."""
        if self.functions is None:
            return []
        try:
            specs = json.loads(self.functions.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"--functions {self.functions} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"--functions {self.functions} is not JSON: {error}") from None
        wanted = "a list of objects with name, description and, optionally, parameters"
        if not isinstance(specs, list) or not all(isinstance(spec, dict) for spec in specs):
            raise ValueError(f"--functions {self.functions} holds something else; wanted {wanted}")
        try:
            return [harmony.Function(**spec) for spec in specs]
        except TypeError as error:
            raise ValueError(f"--functions {self.functions}: {error}; wanted {wanted}") from None

    def messages(self) -> list[harmony.Message]:
        """Return the conversation up to the model's turn."""
        functions = self.load_functions()
        date = self.date or datetime.date.today().isoformat()
        messages = [harmony.system_message(self.reasoning, date, functions=bool(functions))]
        if functions or self.instructions:
            messages.append(harmony.developer_message(self.instructions, functions))
        return [*messages, harmony.Message("user", self.prompt)]


class _Screen:
    """Prints a reply as it streams: each kind of message under a heading of its own."""

    def __init__(self) -> None:
        self._index: int | None = None
        self._dim = sys.stdout.isatty()

    def __call__(self, delta: harmony.Delta) -> None:
        if delta.index != self._index:
            self.end()
            self._index = delta.index
            heading = self._heading(delta)
            sys.stdout.write(f"\x1b[2m{heading}\x1b[0m\n" if self._dim else f"{heading}\n")
        thinking = delta.channel == "analysis" and self._dim
        sys.stdout.write(f"\x1b[2m{delta.text}\x1b[0m" if thinking else delta.text)
        sys.stdout.flush()

    @staticmethod
    def _heading(delta: harmony.Delta) -> str:
        if delta.recipient is not None:
            return f"[call {delta.recipient}]"
        return "[answer]" if delta.channel in ("final", None) else f"[{delta.channel}]"

    def end(self) -> None:
        """End the line of the message before."""
        if self._index is not None:
            sys.stdout.write("\n")
            sys.stdout.flush()


def _converse(model: Model, request: Request, show: bool) -> dict[str, Any]:
    screen = _Screen() if show else None
    result: Reply = reply(model, request.messages(), request.max_new_tokens, on_delta=screen, **request.sampling)
    if screen is not None:
        screen.end()
    return {
        "text": result.text,
        "analysis": result.analysis,
        "calls": [{"recipient": name, "arguments": arguments} for name, arguments in result.calls],
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
    }


def _continue(model: Model, request: Request, show: bool) -> dict[str, Any]:
    if model.tokenizer is None:
        raise ValueError(f"{model.path} has no tokenizer.json; wanted one to read a prompt")
    if show:
        sys.stdout.write(request.prompt)

    def on_step(_: int, __: object, text: str) -> None:
        if show:
            sys.stdout.write(text)
            sys.stdout.flush()

    [result] = model.generate_batch(
        [request.prompt], request.max_new_tokens, stop=request.stop, on_step=on_step, **request.sampling
    )
    if show:
        sys.stdout.write("\n")
    return {
        "text": result.text,
        "analysis": "",
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(model.tokenizer.encode(request.prompt)),
    }


def run(model: Model, request: Request, *, raw: bool, show: bool) -> dict[str, Any]:
    """Generate; print as it comes if `show`; return what ``--json`` prints."""
    begin = time.perf_counter()
    result = (_continue if raw else _converse)(model, request, show)
    seconds = time.perf_counter() - begin
    result["tokens_per_s"] = len(result["token_ids"]) / seconds
    if show:
        count = len(result["token_ids"])
        print(
            f"{result['prompt_tokens']} prompt tokens, {count} new ones in {seconds:.2f} s "
            f"({result['tokens_per_s']:.1f} tokens/s)",
            file=sys.stderr,
        )
    return result
