"""How far each mode is from the float64 reference, on the tiny model's held-out conversations.

    python bench/accuracy.py [--conversations N] [--n-per-task N] [--modes bf16,bf16,bf16 ...]

For every combination of dense, kv and activations: the mean KL divergence of the next-token distribution to the
float64 reference's in nats and the share of positions with the same likeliest token, both where the model writes (in
the worked solutions; it was not trained to predict prompts); and, with --n-per-task, the accuracy of `mxmoe eval`.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import mxmoe
from mxmoe.evaluation import evaluate
from mxmoe.reference import model as reference
from mxmoe.tiny.problems import eval_problems

DENSE, KV, ACTIVATIONS = ("bf16", "int8"), ("float32", "bf16", "int8"), ("float32", "bf16", "int8")


def conversations(tokenizer: mxmoe.Tokenizer, count: int) -> list[tuple[list[int], slice]]:
    """Tokens of some held-out problems with their solutions, every task in turn, and where the model writes."""
    problems = eval_problems(count, seed=1)
    spread = problems[:: max(1, len(problems) // count)][:count]
    result = []
    for p in spread:
        prompt = mxmoe.harmony.render_conversation(p.messages(), tokenizer)
        whole = mxmoe.harmony.render_conversation([*p.messages(), *p.worked()], tokenizer, next_role=None)
        result.append((whole, slice(len(prompt) - 1, len(whole) - 1)))
    return result


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conversations", type=int, default=40, metavar="N")
    parser.add_argument("--n-per-task", type=int, default=0, metavar="N", help="also run mxmoe eval")
    parser.add_argument("--modes", nargs="*", metavar="DENSE,KV,ACTIVATIONS", help="default: all combinations")
    args = parser.parse_args()
    modes = [tuple(m.split(",")) for m in args.modes or ()] or list(itertools.product(DENSE, KV, ACTIVATIONS))

    first = mxmoe.load("tiny")
    assert first.tokenizer is not None
    texts = conversations(first.tokenizer, args.conversations)
    checkpoint = mxmoe.Checkpoint.open(first.path)
    truth = [log_softmax(reference.forward(checkpoint, ids)[written]) for ids, written in texts]
    table = Table("dense", "kv", "activations", "mean KL (nats)", "same top token", "mxmoe eval")
    for dense, kv, activations in modes:
        model = mxmoe.load("tiny", dense=dense, kv=kv, activations=activations)
        divergence, same = [], []
        for (ids, written), want in zip(texts, truth, strict=True):
            got = log_softmax(model.forward(ids)[written])
            divergence.append((np.exp(want) * (want - got)).sum(axis=-1))
            same.append(want.argmax(axis=-1) == got.argmax(axis=-1))
        accuracy = f"{evaluate(model, args.n_per_task).total.to_dict()['accuracy']:.1%}" if args.n_per_task else "-"
        kl, agreement = np.concatenate(divergence).mean(), np.concatenate(same).mean()
        table.add_row(dense, kv, activations, f"{kl:.2e}", f"{agreement:.2%}", accuracy)
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
