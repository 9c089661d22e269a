"""The ``mxmoe`` command."""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["app", "main"]

app = typer.Typer(
    name="mxmoe",
    help="Run and inspect OpenAI's gpt-oss models on this machine. Without --model, commands use the small model "
    "that comes with the package.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Options that every command that loads a model takes.
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Folder of a checkpoint, a name on the Hugging Face hub, or 'tiny'."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to run: cpu, or cuda for an NVIDIA GPU.")]
DenseOption = Annotated[str | None, typer.Option("--dense", help="Dense weights: bf16 or int8.")]
KvOption = Annotated[str | None, typer.Option("--kv", help="KV cache: float32, bf16 or int8.")]
ActivationsOption = Annotated[
    str | None, typer.Option("--activations", help="Rounding of activations: bf16, float32 or int8.")
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", help="Folder of a LoRA adapter, as PEFT saves it.", show_default=False)
]
ThreadsOption = Annotated[int, typer.Option("--threads", "-t", help="Threads; 0 for all CPUs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _load(
    model: str,
    device: str,
    dense: str | None,
    kv: str | None,
    activations: str | None,
    adapter: Path | None,
    threads: int,
) -> Any:
    from mxmoe.loading import load

    options: dict[str, Any] = {"device": device, "dense": dense, "kv": kv, "activations": activations}
    return load(model, adapter=adapter, num_threads=threads, **options)


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")


@app.command(
    epilog="Examples:  mxmoe generate --prompt 'What is 17 + 25?'   |   "
    "mxmoe generate -m gpt-oss-20b --reasoning high --prompt 'Why is the sky blue?' --max-new-tokens 2000   |   "
    "mxmoe generate --raw --prompt 'Once upon a time'"
)
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The user's turn; with --raw, text to continue.")],
    model: ModelOption = "tiny",
    reasoning: Annotated[str, typer.Option(help="Reasoning effort: low, medium or high.")] = "medium",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without harmony.")] = False,
    instructions: Annotated[str | None, typer.Option(help="Instructions of the developer.")] = None,
    functions: Annotated[
        Path | None,
        typer.Option(help="JSON file: a list of functions (name, description, parameters) the model may call."),
    ] = None,
    date: Annotated[str | None, typer.Option(help="Current date told to the model, YYYY-MM-DD; today's.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many new tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many of the likeliest tokens; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens with this share of the likeliest's probability.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="With --raw: a string that ends the text.")] = None,
    device: DeviceOption = "cpu",
    dense: DenseOption = None,
    kv: KvOption = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a question, showing the chain of thought apart from the answer, or continue a text."""
    from mxmoe.commands import generate as command

    chat_only = {"instructions": instructions, "functions": functions, "date": date}
    if raw and any(value is not None for value in chat_only.values()):
        name = next(name for name, value in chat_only.items() if value is not None)
        raise ValueError(f"--{name} is for a conversation; wanted none with --raw")
    if stop and not raw:
        raise ValueError("--stop is for plain text; wanted --raw with it")
    request = command.Request(
        prompt, reasoning, instructions, functions, date, max_new_tokens, tuple(stop or ()),
        {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed},
    )  # fmt: skip
    request.check()
    loaded = _load(model, device, dense, kv, activations, adapter, threads)
    result = command.run(loaded, request, raw=raw, show=not as_json)
    if as_json:
        _print_json(result)


@app.command(epilog="Example:  mxmoe bench -m gpt-oss-20b -p 512 -n 64 -t 2")
def bench(
    model: ModelOption = "tiny",
    prompt_tokens: Annotated[int, typer.Option("-p", help="Tokens to prefill.")] = 512,
    new_tokens: Annotated[int, typer.Option("-n", help="Tokens to decode.")] = 64,
    depth: Annotated[int, typer.Option("--depth", "-d", help="Tokens in the cache before either.")] = 0,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences that decode together.")] = 1,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="The medians of so many count.")] = 3,
    device: DeviceOption = "cpu",
    dense: DenseOption = None,
    kv: KvOption = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode in tokens per second, and what share of this machine's ceilings that is."""
    from mxmoe.commands import bench as command

    plan = command.Plan(prompt_tokens, new_tokens, depth, batch, repetitions)
    plan.check()
    loaded = _load(model, device, dense, kv, activations, adapter, threads)
    result = command.run(loaded, plan, progress=sys.stderr.isatty())
    _print_json(result) if as_json else command.show(result)


@app.command(epilog="Example:  mxmoe info -m gpt-oss-20b")
def info(
    model: ModelOption = "tiny",
    device: DeviceOption = "cpu",
    dense: DenseOption = None,
    kv: KvOption = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show a model's sizes, dtypes, bytes by component, and the memory that each context length takes."""
    from mxmoe.commands import info as command

    loaded = _load(model, device, dense, kv, activations, adapter, threads)
    result = command.run(loaded)
    _print_json(result) if as_json else command.show(result)


@app.command(epilog="Examples:  mxmoe doctor   |   MXMOE_ISA=avx2 mxmoe doctor --json")
def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine can run, which kernel each op takes, and why."""
    from mxmoe.commands import doctor as command

    result = command.run()
    _print_json(result) if as_json else command.show(result)


@app.command("eval", epilog="Example:  mxmoe eval --activations int8 --json")
def evaluate(
    model: ModelOption = "tiny",
    n_per_task: Annotated[int, typer.Option("--n-per-task", help="Problems of each task.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the draw of problems.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="For each turn.")] = 400,
    device: DeviceOption = "cpu",
    dense: DenseOption = None,
    kv: KvOption = None,
    activations: ActivationsOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Ask the tiny model's held-out problems and show the accuracy by task with its 95% interval."""
    from mxmoe.commands import evaluate as command

    if n_per_task < 1:
        raise ValueError(f"--n-per-task is {n_per_task}; wanted 1 or more")
    loaded = _load(model, device, dense, kv, activations, adapter, threads)
    result = command.run(loaded, n_per_task, seed, max_new_tokens, quiet=as_json)
    _print_json(result) if as_json else command.show(result)


def _version(show: bool) -> None:
    if show:
        from mxmoe import __version__

        typer.echo(f"mxmoe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _one_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _run(arguments: list[str] | None) -> int:
    """Run the command; return the exit code. Errors become one sentence on stderr."""
    try:
        result = app(arguments, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # Whoever read our output has gone: nothing to say, and nobody to say it to.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends
        return 1
    except Exception as error:
        usage = getattr(error, "format_message", None)  # the command line parser's own errors
        message = usage() if callable(usage) else _one_sentence(error)
        if not message.strip():  # help was asked for by giving nothing
            return 2
        print(f"mxmoe: error: {message}", file=sys.stderr)
        wrong_input = callable(usage) or isinstance(error, (ValueError, TypeError, FileNotFoundError))
        return 2 if wrong_input else 1


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mxmoe: warning: {_one_sentence(message) if isinstance(message, Warning) else message}", file=sys.stderr)


def _wait_for(work: Callable[[], int]) -> int:
    """Do the work in another thread, so that Ctrl-C reaches this one at once even while a kernel runs."""
    outcome: list[int] = []
    worker = threading.Thread(target=lambda: outcome.append(work()), daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(0.05)  # not without a limit: on some systems that cannot be interrupted
    return outcome[0] if outcome else 1


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad usage or input, 1 anything else, 130 after Ctrl-C."""
    warnings.showwarning = _show_warning
    try:
        code = _wait_for(lambda: _run(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h")  # a progress bar may have hidden the cursor
        print("mxmoe: interrupted", file=sys.stderr, flush=True)
        # The worker is somewhere in a kernel; there is nothing to clean up that the system does not.
        os._exit(130)
    sys.exit(code)
