"""Accuracy on the tiny model's held-out problems."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mxmoe.chat import reply_batch
from mxmoe.generate import Model
from mxmoe.harmony import Message
from mxmoe.tiny.problems import Problem, check, eval_problems

__all__ = ["Evaluation", "TaskResult", "evaluate", "wilson_interval"]

# Problems that are generated side by side.
_BATCH = 32


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    p, spread = correct / n, z * z / n
    centre = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


@dataclass(frozen=True)
class TaskResult:
    """How many of a task's problems were solved."""

    correct: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return accuracy, number of problems and the 95% Wilson interval as plain data."""
        low, high = wilson_interval(self.correct, self.n)
        return {"accuracy": self.correct / self.n if self.n else 0.0, "n": self.n, "interval": [low, high]}


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`.

    Attributes
    ----------
    tasks : dict of TaskResult
    failures : list of (Problem, str)
        What was got wrong, with what the model answered.
    """

    tasks: dict[str, TaskResult]
    failures: list[tuple[Problem, str]]

    @property
    def total(self) -> TaskResult:
        """All tasks together."""
        return TaskResult(sum(t.correct for t in self.tasks.values()), sum(t.n for t in self.tasks.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the accuracies as plain data."""
        return {**self.total.to_dict(), "tasks": {name: task.to_dict() for name, task in self.tasks.items()}}


def _solve(model: Model, problems: list[Problem], max_new_tokens: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """Ask each problem; answer each right call with the function's result; return answers and calls."""
    conversations = [problem.messages() for problem in problems]
    replies = reply_batch(model, conversations, max_new_tokens)
    answers = [(r.text, r.calls) for r in replies]
    called = [i for i, r in enumerate(replies) if r.calls and problems[i].call is not None]
    follow_ups: list[list[Message]] = []
    for i in called:
        follow_ups.append([*conversations[i], *replies[i].messages, problems[i].tool_message()])
    for i, second in zip(called, reply_batch(model, follow_ups, max_new_tokens), strict=True):
        answers[i] = (second.text, answers[i][1] + second.calls)
    return answers


def evaluate(
    model: Model,
    n_per_task: int = 50,
    *,
    seed: int = 0,
    max_new_tokens: int = 400,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask a model the tiny model's held-out problems, greedily, and count the exact answers.

    Parameters
    ----------
    model : Model
    n_per_task : int
    seed : int
        Of the draw of problems.
    max_new_tokens : int
        For each turn.
    progress : callable, optional
        Called as ``progress(done, total)``.

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        The model has no tokenizer with the harmony tokens, or its context is too short.
    """
    problems = eval_problems(n_per_task, seed)
    results: dict[str, list[bool]] = {problem.task: [] for problem in problems}
    failures = []
    for begin in range(0, len(problems), _BATCH):
        batch = problems[begin : begin + _BATCH]
        for problem, (text, calls) in zip(batch, _solve(model, batch, max_new_tokens), strict=True):
            solved = check(problem, text, calls)
            results[problem.task].append(solved)
            if not solved:
                failures.append((problem, text))
        if progress is not None:
            progress(begin + len(batch), len(problems))
    return Evaluation({task: TaskResult(sum(got), len(got)) for task, got in results.items()}, failures)
