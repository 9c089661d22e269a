"""mxmoe beside llama.cpp and ik_llama.cpp: the same weights, tokens and threads, run in turn, in one table.

    python bench/make_checkpoint.py --size 20b --gguf 20b.gguf 20b
    python bench/peers.py --model 20b --gguf 20b.gguf -t 2 --peer-python peers/bin/python
    python bench/peers.py --model 20b --gguf 20b.gguf -t 2 --peer-python peers/bin/python --check

The other two are best built for the machine, in an environment of their own:

    python -m venv peers
    CMAKE_ARGS="-DGGML_NATIVE=ON" peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    CMAKE_ARGS="-DGGML_NATIVE=ON" peers/bin/pip install --no-binary ik-llama-cpp-python ik-llama-cpp-python==0.1.5

The source archive of the last one lacks a file that its CMake wants (common/cmake/build-info-gen-cpp.cmake); install
the wheel then, build the targets `ggml` and `llama` of vendor/ik_llama.cpp with CMake and -DGGML_NATIVE=ON
-DBUILD_SHARED_LIBS=ON, and copy the two libraries into ik_llama_cpp/lib.

Every program runs in a process of its own. In each round all of them read a prompt and decode, one after the other,
with the machine's ceilings measured in between; medians over the rounds count. Where memory does not hold all models
at once, a program is loaded and warmed up anew in every round. `--check` compares logits instead: an opinion on the
correctness of each from the others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import mxmoe
from mxmoe.ceilings import CeilingMeter, Ceilings
from mxmoe.config import ModelConfig
from mxmoe.costs import Costs

PEERS = ("llama.cpp", "ik_llama.cpp")
_SPARE_BYTES = 3 << 30  # caches, working memory, the ceilings' buffer


class PeerError(RuntimeError):
    """A program that could not be started, or failed."""


class Worker:
    """A program in a process of its own."""

    def __init__(self, name: str, python: str, verbose: bool, setup: dict[str, Any]) -> None:
        self.name = name
        worker = str(Path(__file__).with_name("peer_worker.py"))
        self._process = subprocess.Popen(
            [python, worker, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if verbose else subprocess.DEVNULL,
            text=True,
        )
        try:
            self.ask(**setup)
        except PeerError:
            self.close()
            raise

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{self.name} ended with status {self._process.wait()}; --verbose shows what it said")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@dataclass
class Plan:
    """What all programs run."""

    prompt: list[int]
    steps: list[int]
    depth: list[int]
    repetitions: int

    @property
    def max_tokens(self) -> int:
        """Tokens that a context must hold."""
        return len(self.depth) + max(len(self.prompt), len(self.steps))

    def command(self, part: str) -> dict[str, Any]:
        """Return the command of one part."""
        return {"do": part, "depth_ids": self.depth, "ids": self.prompt if part == "prefill" else self.steps}


@dataclass
class Timed:
    """Seconds of one program, by part."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


class Programs:
    """The programs that can be had, kept running where memory allows, else started for every use."""

    def __init__(self, args: argparse.Namespace, max_tokens: int) -> None:
        self.args, self.max_tokens = args, max_tokens
        self.names = ["mxmoe", *args.peers]
        self.keep = not args.restart and _fits(args)
        self._stack = ExitStack()
        self._running: dict[str, Worker] = {}

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _start(self, name: str) -> Worker:
        args, ours = self.args, name == "mxmoe"
        modes = {key: getattr(args, key) for key in ("dense", "kv", "activations")}
        options = modes if ours else {"repack_tensors": True} if name == "ik_llama.cpp" and args.ik_repack else {}
        setup = {"model": str(args.model if ours else args.gguf), "threads": args.threads, "options": options}
        python = sys.executable if ours else args.peer_python
        return Worker(name, python, args.verbose, setup | {"max_tokens": self.max_tokens})

    @contextmanager
    def get(self, name: str, warm_up: dict[str, Any]) -> Iterator[Worker]:
        """Give a program that has touched all its weights."""
        worker = self._running.get(name)
        if worker is None:
            worker = self._start(name)
            if self.keep:
                self._running[name] = worker
                self._stack.callback(worker.close)
            worker.ask(**warm_up)
        try:
            yield worker
        finally:
            if not self.keep:
                worker.close()


def _fits(args: argparse.Namespace) -> bool:
    """Whether memory holds our model and the peers' file, which they share, at once."""
    ours = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    theirs = args.gguf.stat().st_size * (2 if args.ik_repack else 1) if args.peers else 0
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return ours + theirs + _SPARE_BYTES < available


def measure(args: argparse.Namespace, plan: Plan, console: Console) -> tuple[dict[str, Timed], CeilingMeter]:
    """Run everything in turn; leave out, with a word, what cannot be run."""
    meter = CeilingMeter(args.threads)
    times: dict[str, Timed] = {}
    with Programs(args, plan.max_tokens) as programs:
        if not programs.keep:
            console.print("Memory does not hold all models at once: each is loaded anew in every round.")
        meter.sample()
        for _ in range(plan.repetitions):
            for name in list(programs.names):
                try:
                    with programs.get(name, plan.command("prefill")) as worker:
                        for part in ("prefill", "decode"):
                            seconds = worker.ask(**plan.command(part))["seconds"]
                            getattr(times.setdefault(name, Timed()), part).append(seconds)
                            meter.sample()
                except PeerError as problem:
                    if name == "mxmoe":
                        raise
                    console.print(f"Left out: {problem}", highlight=False, markup=False)
                    programs.names.remove(name)
                    times.pop(name, None)
    return times, meter


def figures(name: str, timed: Timed, plan: Plan, costs: Costs, ceilings: Ceilings, peak: float) -> dict[str, Any]:
    """Speeds of one program, and their shares of the ceilings."""
    depth, new = len(plan.depth), len(plan.steps)
    prefill, decode = statistics.median(timed.prefill), statistics.median(timed.decode)
    read = sum(costs.decode_bytes(depth + i) for i in range(new))
    return {
        "program": name,
        "prefill_tokens_per_s": len(plan.prompt) / prefill,
        "share_of_peak": costs.prefill_operations(len(plan.prompt), depth) / prefill / 1e9 / peak,
        "decode_tokens_per_s": new / decode,
        "share_of_bandwidth": read / decode / 1e9 / ceilings.read_gb_s,
    }


def report(args: argparse.Namespace, config: ModelConfig, plan: Plan, console: Console) -> dict[str, Any]:
    """Measure and put together what ``--json`` prints."""
    times, meter = measure(args, plan, console)
    ceilings = meter.median()
    rows = []
    for name, timed in times.items():
        ours = name == "mxmoe"
        # The others round activations to int8 and keep keys and values in two bytes.
        costs = Costs(config, args.dense, args.kv) if ours else Costs(config, args.gguf_dense, "bf16")
        peak = ceilings.peak(args.activations) if ours else ceilings.int8_gop_s
        rows.append(figures(name, timed, plan, costs, ceilings, peak))
    for row in rows:
        row["mxmoe_prefill_ratio"] = rows[0]["prefill_tokens_per_s"] / row["prefill_tokens_per_s"]
        row["mxmoe_decode_ratio"] = rows[0]["decode_tokens_per_s"] / row["decode_tokens_per_s"]
    sizes = {"prompt_tokens": len(plan.prompt), "new_tokens": len(plan.steps), "depth": len(plan.depth)}
    modes = {"dense": args.dense, "kv": args.kv, "activations": args.activations, "threads": args.threads}
    return {"programs": rows, "ceilings": vars(ceilings), **sizes, **modes, "repetitions": plan.repetitions}


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table."""
    ceilings = result["ceilings"]
    console.print(
        f"{result['threads']} threads, prompt {result['prompt_tokens']}, decode {result['new_tokens']} at depth "
        f"{result['depth']}; mxmoe: dense {result['dense']}, kv {result['kv']}, activations {result['activations']}; "
        f"read {ceilings['read_gb_s']:.1f} GB/s, int8 {ceilings['int8_gop_s']:.0f} GOP/s, "
        f"bf16 {ceilings['bf16_gflop_s']:.0f} GFLOP/s",
        highlight=False,
    )
    table = Table("program", "prefill t/s", "of the peak", "mxmoe is", "decode t/s", "of the bandwidth", "mxmoe is")
    for row in result["programs"]:
        table.add_row(
            row["program"],
            f"{row['prefill_tokens_per_s']:.1f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['mxmoe_prefill_ratio']:.2f}x",
            f"{row['decode_tokens_per_s']:.2f}",
            f"{row['share_of_bandwidth']:.0%}",
            f"{row['mxmoe_decode_ratio']:.2f}x",
        )
    console.print(table)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def agreement(a: NDArray[np.floating], b: NDArray[np.floating]) -> dict[str, float]:
    """How alike the logits of two programs are: medians and means over the tokens.

    The weights are random, and so are the routers' near ties: a token whose experts differ by a rounding is far off
    in any program, so medians tell more than means.
    """
    left, right = a.astype(np.float64), b.astype(np.float64)
    correlation = [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(left, right, strict=True)]
    p, q = log_softmax(a), log_softmax(b)
    there, back = (np.exp(p) * (p - q)).sum(axis=-1), (np.exp(q) * (q - p)).sum(axis=-1)
    return {
        "correlation_median": float(np.median(correlation)),
        "correlation_mean": float(np.mean(correlation)),
        "kl_there_median": float(np.median(there)),
        "kl_there_mean": float(there.mean()),
        "kl_back_median": float(np.median(back)),
        "kl_back_mean": float(back.mean()),
        "same_top_token": float((a.argmax(axis=-1) == b.argmax(axis=-1)).mean()),
    }


@contextmanager
def rounded_range(folder: Path) -> Iterator[Path]:
    """Give the same checkpoint with YaRN's correction range rounded to whole dimensions.

    llama.cpp always rounds it; gpt-oss says that it is not to be rounded.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for path in folder.iterdir():
            if path.name != "config.json":
                (Path(temporary) / path.name).symlink_to(path.resolve())
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["truncate"] = True
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        yield Path(temporary)


def check(args: argparse.Namespace, ids: list[int], console: Console) -> dict[str, Any]:
    """Compare the logits of all programs, two at a time."""
    logits: dict[str, NDArray[Any]] = {}
    with tempfile.TemporaryDirectory() as temporary, rounded_range(args.model) as folder:
        for name, model in {"mxmoe": args.model, "mxmoe rounded": folder, **dict.fromkeys(args.peers, None)}.items():
            changed = argparse.Namespace(**vars(args) | {"restart": True} | ({"model": model} if model else {}))
            command = {"do": "logits", "ids": ids, "to": str(Path(temporary) / "logits.npy")}
            try:
                with Programs(changed, len(ids)).get(name.split()[0], command):
                    logits[name] = np.load(command["to"])  # what the warm-up saved
            except PeerError as problem:
                if name.startswith("mxmoe"):
                    raise
                console.print(f"Left out: {problem}", highlight=False, markup=False)
    names = list(logits)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {"tokens": len(ids), "pairs": [{"a": a, "b": b, **agreement(logits[a], logits[b])} for a, b in pairs]}


def show_check(result: dict[str, Any], console: Console) -> None:
    """Print how alike the programs are."""
    console.print(f"{result['tokens']} tokens; KL in nats; 'rounded': YaRN's range as llama.cpp takes it")
    table = Table("a", "b", "correlation, median (mean)", "KL(a, b)", "KL(b, a)", "same top token")
    for pair in result["pairs"]:
        cells = [f"{pair[f'{k}_median']:.3g} ({pair[f'{k}_mean']:.3g})" for k in ("kl_there", "kl_back")]
        correlation = f"{pair['correlation_median']:.6f} ({pair['correlation_mean']:.6f})"
        table.add_row(pair["a"], pair["b"], correlation, *cells, f"{pair['same_top_token']:.1%}")
    console.print(table)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="checkpoint of random weights")
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the same weights as GGUF")
    parser.add_argument(
        "--gguf-dense", choices=("int8", "bf16"), default="int8", help="its dense weights (Q8_0: int8)"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="where they are installed")
    parser.add_argument("--ik-repack", action="store_true", help="let ik_llama.cpp repack weights while loading")
    parser.add_argument("-t", "--threads", type=int, default=mxmoe.doctor().num_threads)
    parser.add_argument("-p", dest="prompt", type=int, default=512, help="tokens to prefill")
    parser.add_argument("-n", dest="new", type=int, default=32, help="tokens to decode")
    parser.add_argument("--depth", type=int, default=0, help="tokens in the cache before either")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--dense", choices=("bf16", "int8"), default="int8")
    parser.add_argument("--kv", choices=("float32", "bf16", "int8"), default="bf16")
    parser.add_argument("--activations", choices=("float32", "bf16", "int8"), default="int8")
    parser.add_argument("--restart", action="store_true", help="never hold two models at once")
    parser.add_argument("--check", action="store_true", help="compare logits instead of speeds")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="let the programs write to stderr")
    args = parser.parse_args()
    lowest = {"-p": (args.prompt, 1), "-n": (args.new, 1), "--depth": (args.depth, 0), "-r": (args.repetitions, 1)}
    for name, (value, low) in lowest.items():
        if value < low:
            parser.error(f"{name} is {value}; wanted {low} or more")
    if not args.gguf.is_file():
        parser.error(f"--gguf: {args.gguf} is not a file")
    return args


def main() -> int:
    """Run the command line."""
    args = parse()
    console = Console(stderr=args.json, width=140)
    try:
        config = ModelConfig.from_folder(args.model)
        rng = np.random.default_rng(0)
        draw = [rng.integers(0, config.vocab_size, count).tolist() for count in (args.prompt, args.new, args.depth)]
        if args.check:
            result = check(args, draw[0], console)
        else:
            result = report(args, config, Plan(*draw, args.repetitions), console)
    except (PeerError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result))
    else:
        (show_check if args.check else show)(result, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
