"""Train the tiny gpt-oss that ships in the wheel.

A mixture of experts of 5 layers and 4 million weights learns to answer the questions of ``mxmoe.tiny.problems`` in
the harmony format.  It is trained on the values that the checkpoint will hold (experts rounded to MXFP4, all else to
bf16) from the first step, so that exporting costs nothing.  One command, from the root of the repository::

    PYTHONPATH=python python training/train_tiny.py --out build/tiny &&
    PYTHONPATH=python python training/export_tiny.py --run build/tiny --out python/mxmoe/tiny

It runs on the CPU, one process a core, and goes on from its last checkpoint when started again with the same folder;
another ``--steps`` moves the end, and with it the start of the final fall of the learning rate.  Data and first
weights follow from ``--seed``.

The shipped weights saw 11500 steps, some two and a half hours on two Zen 5 cores, in stages: the wording of the
problems was refined at steps 3000 and 11000, and each stage ended with a fall of the rate.  They solve 98.6% of 1000
held-out problems (``mxmoe eval --n-per-task 100``).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from corpus import CachedTokenizer, Sample, render_problem, samples, train_tokenizer
from muon import Muon
from network import Group, Layout, TinyConfig, TinyModel
from torch import Tensor

from mxmoe.tiny.problems import TASKS, Problem, eval_problems

GROUP_SIZE = 8
LENGTH_TILE = 16
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages: fewer page faults for the activations
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",  # the shapes vary, and compiling a kernel costs more than its run
}


@dataclass(frozen=True)
class Batch:
    """Conversations laid out for the network.

    Attributes
    ----------
    token_ids : Tensor
        int64 ``(num_tokens,)``.
    layout : Layout
        Where the conversations lie.
    rows : Tensor
        int64: the tokens whose successor the model is to predict.
    targets : Tensor
        int64: those successors.
    owners : Tensor
        int64: the conversation of each of `rows`.
    """

    token_ids: Tensor
    layout: Layout
    rows: Tensor
    targets: Tensor
    owners: Tensor


def make_batch(batch: Sequence[Sample]) -> Batch:
    """Lay conversations out: system messages once, the rest sorted by length and padded to its group's longest."""
    token_ids: list[int] = []
    positions: list[int] = []
    groups: list[Group] = []
    rows: list[tuple[int, int, int]] = []
    for shared in sorted({sample.shared for sample in batch}):
        members = [i for i, sample in enumerate(batch) if sample.shared == shared]
        members.sort(key=lambda i: len(batch[i].token_ids))
        beginnings = {tuple(batch[i].token_ids[:shared]): None for i in members}
        parents = {beginning: row for row, beginning in enumerate(beginnings)}
        prefix = Group(len(token_ids), len(parents), shared) if shared else None
        groups += [prefix] if prefix else []
        for beginning in beginnings:
            token_ids += beginning
            positions += range(shared)
        for first in range(0, len(members), GROUP_SIZE):
            chosen = members[first : first + GROUP_SIZE]
            # Whole tiles: few distinct matrix shapes, few kernels to compile.
            length = -(-(len(batch[chosen[-1]].token_ids) - shared) // LENGTH_TILE) * LENGTH_TILE
            index = torch.tensor([parents[tuple(batch[i].token_ids[:shared])] for i in chosen])
            groups.append(Group(len(token_ids), len(chosen), length, prefix, index))
            for i in chosen:
                sample, offset = batch[i], len(token_ids) - shared
                # Padding comes last, where causal attention keeps it out of sight.
                token_ids += sample.token_ids[shared:] + [0] * (length + shared - len(sample.token_ids))
                positions += range(shared, shared + length)
                learned = (j for j in range(shared + 1, len(sample.token_ids)) if sample.learned[j])
                rows += [(offset + j - 1, sample.token_ids[j], i) for j in learned]
    layout = Layout(groups, torch.tensor(positions))
    return Batch(torch.tensor(token_ids), layout, *torch.tensor(rows).unbind(1))


@torch.no_grad()
def solved(model: TinyModel, tokenizer: CachedTokenizer, problems: Sequence[Problem]) -> list[bool]:
    """Say which problems greedy decoding solves exactly as the worked solution does.

    One forward pass decides: greedy decoding reproduces the solution if and only if each of its tokens is the most
    likely one after those before it.
    """
    right = [True] * len(problems)
    for first in range(0, len(problems), 4 * GROUP_SIZE):
        chosen = problems[first : first + 4 * GROUP_SIZE]
        batch = make_batch([render_problem(problem, tokenizer) for problem in chosen])
        logits, _ = model(batch.token_ids, batch.layout, batch.rows)
        for owner in batch.owners[logits.argmax(-1) != batch.targets].tolist():
            right[first + owner] = False
    return right


def report_solved(model: TinyModel, tokenizer: CachedTokenizer, n_per_task: int, worker: int, workers: int) -> str:
    """Evaluate on held-out problems, shared out among the workers; return a line to print."""
    problems = eval_problems(n_per_task)[worker::workers]
    counts = torch.zeros(len(TASKS), 2)
    for problem, right in zip(problems, solved(model, tokenizer, problems), strict=True):
        counts[TASKS.index(problem.task)] += torch.tensor([float(right), 1.0])
    if workers > 1:
        dist.all_reduce(counts)
    shares = (counts[:, 0] / counts[:, 1]).tolist()
    line = " ".join(f"{task} {share:.3f}" for task, share in zip(TASKS, shares, strict=True))
    return f"  solved {line} | all {sum(shares) / len(shares):.4f}"


def average_gradients(model: TinyModel, workers: int) -> None:
    """Average the gradients over the workers."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= workers
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def optimizers(model: TinyModel, lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for all else."""
    named = dict(model.named_parameters())
    matrices = {n for n in named if n.endswith(("_proj.weight", "gate_up_proj", "down_proj"))}
    others = [p for n, p in named.items() if n not in matrices]
    return [
        Muon([named[n] for n in sorted(matrices)], lr=lr),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int, decay: float, warmup: int = 50) -> float:
    """Warm up, stay, then fall linearly to 0 over the last `decay` share of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def _resume(model: TinyModel, optims: Sequence[torch.optim.Optimizer], saved: Path) -> int:
    if not saved.exists():
        return 0
    state = torch.load(saved)
    model.load_state_dict(state["model"])
    for optim, values in zip(optims, state["optimizers"], strict=True):
        optim.load_state_dict(values)
    return int(state["step"])


def _save(model: TinyModel, optims: Sequence[torch.optim.Optimizer], saved: Path, step: int) -> None:
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optims], "step": step}
    partial = saved.with_suffix(".tmp")
    torch.save(state, partial)
    partial.rename(saved)


def train(worker: int, args: argparse.Namespace) -> None:
    """Train as one of several workers, and write checkpoints that training can go on from."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    if args.workers > 1:
        dist.init_process_group("gloo", f"file://{args.rendezvous}", rank=worker, world_size=args.workers)
    tokenizer = CachedTokenizer(tokenizers.Tokenizer.from_file(str(args.out / "tokenizer.json")))
    model = TinyModel(TinyConfig(vocab_size=tokenizer.vocab_size))
    optims = optimizers(model, args.lr, args.adam_lr)
    rates = [optim.param_groups[0]["lr"] for optim in optims]
    saved = args.out / "training.pt"
    first = _resume(model, optims, saved)
    share = args.batch // args.workers
    data = samples(tokenizer, args.seed, worker, first * share)
    log = Log(args.report if worker == 0 else 0)
    for step in range(first, args.steps):
        batch = make_batch([next(data) for _ in range(share)])
        logits, balance = model(batch.token_ids, batch.layout, batch.rows)
        loss = F.cross_entropy(logits.float(), batch.targets)
        (loss + args.balance * balance).backward()
        if args.workers > 1:
            average_gradients(model, args.workers)
        factor = schedule(step, args.steps, args.decay)
        for optim, rate in zip(optims, rates, strict=True):
            optim.param_groups[0]["lr"] = rate * factor
            optim.step()
            optim.zero_grad(set_to_none=True)
        log.add(step, loss.item(), balance.item(), factor, batch.token_ids.numel() * args.workers)
        if (step + 1) % args.evaluate == 0 or step + 1 == args.steps:
            line = report_solved(model, tokenizer, args.problems, worker, args.workers)
            if worker == 0:
                print(line, flush=True)
                _save(model, optims, saved, step + 1)


class Log:
    """Prints the mean loss and the speed every so many steps; never if `every` is 0."""

    def __init__(self, every: int) -> None:
        self.every, self.losses, self.tokens, self.clock = every, [0.0], 0, time.perf_counter()

    def add(self, step: int, loss: float, balance: float, factor: float, tokens: int) -> None:
        """Take note of a step."""
        self.losses.append(loss)
        self.tokens += tokens
        if self.every and (step + 1) % self.every == 0:
            mean = sum(self.losses[1:]) / len(self.losses[1:])
            rate = self.tokens / (time.perf_counter() - self.clock)
            print(
                f"step {step + 1} loss {mean:.4f} balance {balance:.3f} lr x{factor:.3f} {rate:.0f} tokens/s",
                flush=True,
            )
            self.losses, self.tokens, self.clock = [0.0], 0, time.perf_counter()


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json and training.pt")
    parser.add_argument("--steps", type=int, default=11500)
    parser.add_argument("--batch", type=int, default=64, help="conversations a step, over all workers")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--decay", type=float, default=0.35, help="share of the steps over which the rate falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, a core each")
    parser.add_argument("--report", type=int, default=20, help="steps between lines of the log")
    parser.add_argument("--evaluate", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--problems", type=int, default=20, help="held-out problems a task at each checkpoint")
    args = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # read by the workers as they start
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(TinyConfig().vocab_size, args.seed).save(str(tokenizer_file))
    with tempfile.TemporaryDirectory() as folder:
        args.rendezvous = Path(folder) / "rendezvous"
        if args.workers > 1:
            mp.spawn(train, (args,), args.workers)
        else:
            train(0, args)


if __name__ == "__main__":
    main()
