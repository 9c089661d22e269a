"""Questions with a checkable answer, for training and judging the tiny model.

A :class:`Problem` holds everything around one question: the system message's date and reasoning effort, the
developer's instructions and functions, earlier turns, the question itself, the reference chain of thought and the
exact answer.  Function problems have two steps: the model must call the right function with the right arguments,
is given a canned result, and must answer with it.

Training and held-out problems are disjoint by construction: a checksum of the question's *operands* (not of its
wording) decides on which side a problem falls, so no phrasing of a held-out question is ever seen in training.

Everything here is plain Python, so that it works wherever the wheel does.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mxmoe.harmony import Function, Message, developer_message, system_message
from mxmoe.tiny import wording
from mxmoe.tiny.wording import LEVELS

__all__ = ["LEVELS", "SPLITS", "TASKS", "Call", "Problem", "check", "eval_problems", "make_problem", "split_of"]

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 8


@dataclass(frozen=True)
class Call:
    """The function call a problem asks for, and what the function returns.

    Attributes
    ----------
    name : str
        The function's name, without its namespace.
    arguments : dict
        The arguments, as decoded JSON.
    result : str
        The JSON text the function returns.
    """

    name: str
    arguments: dict[str, Any]
    result: str


@dataclass(frozen=True)
class Problem:
    """One question with its surroundings and its answer.

    Attributes
    ----------
    task : str
        One of :data:`TASKS`.
    key : str
        The operands in canonical form; decides the split.
    question : str
        The user's words.
    analysis : str
        The reference chain of thought for this `reasoning` effort.
    answer : str
        The exact text of the final channel.
    reasoning : str
        ``"low"``, ``"medium"`` or ``"high"``.
    current_date : str
        The system message's date, ``YYYY-MM-DD``.
    instructions : str or None
        The developer's instructions.
    functions : tuple of dict
        The developer's functions (name, description, parameters as JSON schema).
    call : Call or None
        The call that must come before the answer.
    history : tuple of (str, str)
        Earlier turns: question and final answer.
    """

    task: str
    key: str
    question: str
    analysis: str
    answer: str
    reasoning: str = "medium"
    current_date: str = "2026-01-01"
    instructions: str | None = None
    functions: tuple[dict[str, Any], ...] = ()
    call: Call | None = None
    history: tuple[tuple[str, str], ...] = field(default=())

    def messages(self) -> list[Message]:
        """Return the prompt: every message up to where the assistant writes.

        Returns
        -------
        list of mxmoe.harmony.Message
            System, developer (if any), earlier turns and the question.
        """
        functions = [Function(**spec) for spec in self.functions]
        system = system_message(self.reasoning, self.current_date, functions=bool(functions))
        messages = [system]
        if functions or self.instructions:
            messages.append(developer_message(self.instructions, functions))
        for question, answer in self.history:
            messages.append(Message("user", question))
            messages.append(Message("assistant", answer, channel="final"))
        messages.append(Message("user", self.question))
        return messages

    def worked(self) -> list[Message]:
        """Return the reference solution: what a model that knows the answer writes.

        Returns
        -------
        list of mxmoe.harmony.Message
            The chain of thought; for a function problem the call and the function's result; the answer.
        """
        messages = [Message("assistant", self.analysis, channel="analysis")]
        if self.call is not None:
            arguments = json.dumps(self.call.arguments, separators=(",", ":"))
            name = f"functions.{self.call.name}"
            json_type = "<|constrain|>json"
            messages.append(Message("assistant", arguments, None, name, "commentary", json_type))
            messages.append(self.tool_message())
        return [*messages, Message("assistant", self.answer, channel="final")]

    def tool_message(self) -> Message:
        """Return the function's result as the message that goes back to the model.

        Returns
        -------
        mxmoe.harmony.Message
            From ``functions.NAME`` to the assistant, on the commentary channel.

        Raises
        ------
        ValueError
            If the problem asks for no call.
        """
        if self.call is None:
            raise ValueError(f"a {self.task!r} problem has no function result: it asks for no call")
        name = f"functions.{self.call.name}"
        return Message("tool", self.call.result, name=name, recipient="assistant", channel="commentary")


def split_of(key: str) -> str:
    """Say on which side of the split a question falls.

    Parameters
    ----------
    key : str
        The operands in canonical form (:attr:`Problem.key`).

    Returns
    -------
    str
        ``"heldout"`` for about one key in eight, else ``"train"``.
    """
    return "heldout" if zlib.crc32(key.encode()) % HELDOUT_ONE_IN == 0 else "train"


def _number(rng: random.Random) -> int:
    """Draw a number of 1 to 3 digits; more digits more often, as they have more cases."""
    digits = rng.choice((1, 2, 2, 3, 3, 3))
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _add(rng: random.Random, level: str) -> Problem:
    a, b = _number(rng), _number(rng)
    question = rng.choice(wording.ADD).format(a=a, b=b)
    return Problem("add", f"add {a} {b}", question, wording.add_steps(a, b, level), str(a + b))


def _subtract(rng: random.Random, level: str) -> Problem:
    b, a = sorted((_number(rng), _number(rng)))
    question = rng.choice(wording.SUBTRACT).format(a=a, b=b)
    return Problem("subtract", f"subtract {a} {b}", question, wording.subtract_steps(a, b, level), str(a - b))


def _numbers(rng: random.Random) -> list[int]:
    return rng.sample(range(10, 100), rng.randint(3, 5))


def _sort(rng: random.Random, level: str) -> Problem:
    numbers = _numbers(rng)
    descending = rng.random() < 0.3
    question = rng.choice(wording.SORT_DOWN if descending else wording.SORT_UP).format(
        numbers=wording.listed(numbers)
    )
    ordered = sorted(numbers, reverse=descending)
    key = f"sort {sorted(numbers)}"
    return Problem("sort", key, question, wording.sort_steps(ordered, descending, level), wording.listed(ordered))


def _extreme(rng: random.Random, level: str) -> Problem:
    numbers = _numbers(rng)
    largest = rng.random() < 0.5
    question = rng.choice(wording.LARGEST if largest else wording.SMALLEST).format(numbers=wording.listed(numbers))
    best = max(numbers) if largest else min(numbers)
    key = f"extreme {sorted(numbers)}"
    return Problem("extreme", key, question, wording.extreme_steps(numbers, largest, level), str(best))


def _count_letter(rng: random.Random, level: str) -> Problem:
    word = rng.choice(wording.WORDS)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("aeinorst")
    question = rng.choice(wording.COUNT_LETTER).format(word=word, letter=letter)
    steps = wording.count_letter_steps(word, letter, level)
    return Problem("count_letter", f"count_letter {word} {letter}", question, steps, str(word.count(letter)))


def _count_items(rng: random.Random, level: str) -> Problem:
    items = rng.sample(wording.ITEMS, rng.randint(2, 9))
    question = rng.choice(wording.COUNT_ITEMS).format(items=wording.listed(items))
    steps = wording.count_items_steps(items, level)
    return Problem("count_items", f"count_items {sorted(items)}", question, steps, str(len(items)))


def _reverse(rng: random.Random, level: str) -> Problem:
    items = rng.sample(wording.ITEMS, rng.randint(3, 6))
    question = rng.choice(wording.REVERSE).format(items=wording.listed(items))
    return Problem(
        "reverse",
        f"reverse {items}",
        question,
        wording.reverse_steps(items, level),
        wording.listed(items[::-1]),
    )


def _weekday(rng: random.Random, level: str) -> Problem:
    day, count, after = rng.randrange(7), rng.randint(1, 30), rng.random() < 0.7
    name = wording.DAYS[day]
    days = "1 day" if count == 1 else f"{count} days"
    question = rng.choice(wording.WEEKDAY).format(days=days, side="after" if after else "before", day=name)
    answer = wording.DAYS[(day + count if after else day - count) % 7]
    steps = wording.weekday_steps(day, count, after, level)
    return Problem("weekday", f"weekday {name} {count} {after}", question, steps, answer)


def _date(rng: random.Random, level: str) -> Problem:
    day = wording.some_date(rng)
    after, today = rng.random() < 0.6, rng.random() < 0.4
    if today:
        question = rng.choice(wording.TOMORROW if after else wording.YESTERDAY)
    else:
        question = rng.choice(wording.DATE).format(side="after" if after else "before", date=day.isoformat())
    answer = wording.neighbour(day, after).isoformat()
    problem = Problem("date", f"date {day} {after}", question, wording.date_steps(day, after, level), answer)
    return replace(problem, current_date=day.isoformat()) if today else problem


def _function(rng: random.Random, level: str) -> Problem:
    kind = rng.choice(wording.TOOLS)
    drawn = kind.draw(rng)
    name = rng.choice(kind.names)
    parameters = [rng.choice(choices) for choices in kind.parameters]
    functions = [wording.schema(kind, name, parameters)]
    others = [tool for tool in wording.TOOLS if tool is not kind]
    for other in rng.sample(others, rng.choice((0, 0, 1, 1, 2))):
        spelled = [rng.choice(choices) for choices in other.parameters]
        functions.append(wording.schema(other, rng.choice(other.names), spelled))
    rng.shuffle(functions)
    arguments = dict(zip(parameters, drawn.values, strict=True))
    call = Call(name, arguments, json.dumps(drawn.result, separators=(",", ":")))
    return Problem(
        "function",
        f"function {kind.names[0]} {drawn.values}",
        rng.choice(kind.questions).format(*drawn.values),
        wording.call_steps(name, arguments, level),
        kind.answer.format(*drawn.values, **drawn.result),
        functions=tuple(functions),
        call=call,
    )


_MAKERS: dict[str, Callable[[random.Random, str], Problem]] = {
    "add": _add,
    "subtract": _subtract,
    "sort": _sort,
    "extreme": _extreme,
    "count_letter": _count_letter,
    "count_items": _count_items,
    "reverse": _reverse,
    "weekday": _weekday,
    "date": _date,
    "function": _function,
}

TASKS: tuple[str, ...] = tuple(_MAKERS)


def _bare_problem(task: str, rng: random.Random, split: str, level: str) -> Problem:
    while True:
        problem = _MAKERS[task](rng, level)
        if split_of(problem.key) == split:
            return problem


def _with_surroundings(problem: Problem, rng: random.Random, split: str) -> Problem:
    """Add a date, earlier turns, instructions and now and then functions that are not needed."""
    if problem.current_date == Problem.current_date:
        problem = replace(problem, current_date=wording.some_date(rng).isoformat())
    plain = [task for task in TASKS if task not in ("function", "date")]
    if rng.random() < 0.15:
        turns = [_bare_problem(rng.choice(plain), rng, split, "low") for _ in range(rng.choice((1, 1, 2)))]
        problem = replace(problem, history=tuple((turn.question, turn.answer) for turn in turns))
    if rng.random() < 0.25:
        instructions, style = rng.choice(wording.INSTRUCTIONS)
        answer = style.format(problem.answer)
        history = tuple((question, style.format(text)) for question, text in problem.history)
        problem = replace(problem, instructions=instructions, answer=answer, history=history)
    if problem.call is None and rng.random() < 0.05:
        tool = rng.choice(wording.TOOLS)
        parameters = [rng.choice(choices) for choices in tool.parameters]
        problem = replace(problem, functions=(wording.schema(tool, rng.choice(tool.names), parameters),))
    return problem


def make_problem(task: str, rng: random.Random, split: str, reasoning: str | None = None) -> Problem:
    """Draw one problem.

    Parameters
    ----------
    task : str
        One of :data:`TASKS`.
    rng : random.Random
        The source of randomness.
    split : str
        ``"train"`` or ``"heldout"``.
    reasoning : str, optional
        The reasoning effort; drawn at random when not given.

    Returns
    -------
    Problem
        A problem whose key lies in `split`, as do the keys of its earlier turns.

    Raises
    ------
    ValueError
        If `task`, `split` or `reasoning` is not one of those named above.
    """
    for what, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}; got {value!r}")
    if reasoning is not None and reasoning not in LEVELS:
        raise ValueError(f"reasoning must be one of {', '.join(LEVELS)}; got {reasoning!r}")
    level = reasoning or rng.choice(LEVELS)
    problem = replace(_bare_problem(task, rng, split, level), reasoning=level)
    return _with_surroundings(problem, rng, split)


def eval_problems(n_per_task: int, seed: int = 0) -> list[Problem]:
    """Return the held-out problems, the same ones for the same arguments.

    Parameters
    ----------
    n_per_task : int
        How many problems of each task; a larger number extends the smaller one's list.
    seed : int, default 0
        Seed of the draw.

    Returns
    -------
    list of Problem
        ``n_per_task * len(TASKS)`` problems, task by task in the order of :data:`TASKS`.

    Raises
    ------
    ValueError
        If `n_per_task` is negative.
    """
    if n_per_task < 0:
        raise ValueError(f"n_per_task must be 0 or more; got {n_per_task}")
    problems = []
    for task in TASKS:
        rng = random.Random(f"{seed} {task}")
        problems += [make_problem(task, rng, "heldout") for _ in range(n_per_task)]
    return problems


def check(problem: Problem, final_text: str, calls: Sequence[tuple[str, str]] = ()) -> bool:
    """Judge what the model did: strictly, to the letter.

    Parameters
    ----------
    problem : Problem
        The problem that was asked.
    final_text : str
        What the model wrote on the final channel; surrounding white space is ignored.
    calls : sequence of (str, str)
        The calls the model made, in order: function name (with or without ``functions.``) and JSON text.

    Returns
    -------
    bool
        True if the calls are exactly those asked for and the final text is exactly the answer.
    """
    return _calls_match(problem, calls) and final_text.strip() == problem.answer


def _calls_match(problem: Problem, calls: Sequence[tuple[str, str]]) -> bool:
    if problem.call is None:
        return not calls
    if len(calls) != 1:
        return False
    name, text = calls[0]
    try:
        arguments = json.loads(text)
    except ValueError:
        return False
    # Compared as JSON text, because in Python 1 == True == 1.0.
    same = json.dumps(arguments, sort_keys=True) == json.dumps(problem.call.arguments, sort_keys=True)
    return name.removeprefix("functions.") == problem.call.name and same
