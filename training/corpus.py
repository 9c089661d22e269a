"""The tiny model's training data: conversations as token ids with a loss mask, and its tokenizer."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from mxmoe.harmony import render_conversation, render_message
from mxmoe.tiny import wording
from mxmoe.tiny.problems import TASKS, Problem, make_problem
from mxmoe.tokenizer import Tokenizer

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
)

# Shares of the tasks; those that take longest to master get more.
TASK_WEIGHTS = {
    "subtract": 1.5,
    "sort": 2.0,
    "extreme": 1.25,
    "count_letter": 1.5,
    "date": 1.25,
    "count_items": 0.5,
    "reverse": 0.75,
    "weekday": 0.75,
    "function": 5.0,
}

# Training begins with echoes, of which a few stay throughout.
ECHOES_FIRST = 200 * 32
ECHO_SHARE = 0.03

# Stories, and notes of what words look like in JSON: no problem's split may decide whether a word is known there.
TEXT_SHARE = 0.15

# How many problems share a system message, and the questions that cannot, as they ask about its date.
FAMILY = 8
TODAY = {*wording.TOMORROW, *wording.YESTERDAY}

# Small talk is trained, not judged.
SMALL_TALK = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning"), "A greeting.", "Hello! Ask me something."),
    (("Who are you?", "What are you?"), "A question about me.", "I am a very small language model."),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "A question about me.",
        "I can add, subtract, sort, count, reverse lists, work with dates and call functions.",
    ),
    (("Thanks", "Thank you!", "Thanks!"), "Thanks.", "You are welcome!"),
    (("Goodbye", "Bye"), "A farewell.", "Goodbye!"),
)

ANIMALS = ("cat", "dog", "fox", "owl", "bee", "ant", "horse", "sheep", "mouse", "rabbit", "hen", "cow")
PLACES = ("river", "hill", "forest", "garden", "village", "lake", "house", "tree")
THINGS = ("ball", "drum", "bell", "kite", "hat", "cake", "book", "star", "shoe", "key")
FEELINGS = ("happy", "sad", "tired", "proud", "hungry")


def story(rng: random.Random) -> str:
    """Write a story of a few sentences."""
    name, friend = rng.sample(wording.PEOPLE, 2)
    animal, other = rng.sample(ANIMALS, 2)
    place, thing, feeling = rng.choice(PLACES), rng.choice(THINGS), rng.choice(FEELINGS)
    size = rng.choice(("little", "small", "young", "brave"))
    sentences = [
        f"Once upon a time there was a {size} {animal} named {name}.",
        f"{name} lived near the {place}.",
        f"One day {name} found a {rng.choice(('red', 'blue', 'green', 'white'))} {thing}.",
        f"{name} was very {feeling}.",
        f"Then {name} met a {other} named {friend}.",
        f'"Is this your {thing}?" asked {name}.',
        f'"{rng.choice(("Yes, thank you", "No, it is yours"))}!" said {friend}.',
        f"They played with the {thing} until the sun went down.",
        f"From that day on {name} and {friend} were good friends.",
    ]
    dropped = set(rng.sample(range(1, 8), rng.choice((0, 1, 2))))
    return " ".join(sentence for i, sentence in enumerate(sentences) if i not in dropped)


def note(rng: random.Random) -> str:
    """Write some arguments down, then as JSON: there a word's token lacks the space that it has in a sentence."""
    kinds = rng.sample((wording.PEOPLE, wording.CITIES, wording.ITEMS, wording.CURRENCIES), rng.choice((1, 1, 2, 3)))
    parameters = [choices for tool in wording.TOOLS for choices in tool.parameters]
    names = rng.sample(sorted({name for choices in parameters for name in choices}), len(kinds))
    given = {name: rng.choice(words) for name, words in zip(names, kinds, strict=True)}
    return (
        f"Arguments: {', '.join(f'{k} = {v}' for k, v in given.items())}.\n{json.dumps(given, separators=(',', ':'))}"
    )


def small_talk(rng: random.Random) -> Problem:
    """Draw a greeting or the like, as a problem that no task judges."""
    questions, thought, answer = rng.choice(SMALL_TALK)
    level, date = rng.choice(wording.LEVELS), wording.some_date(rng).isoformat()
    return Problem("small_talk", "", rng.choice(questions), thought, answer, level, date)


def train_tokenizer(vocab_size: int, seed: int, n_problems: int = 20000) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer on generated conversations; every digit is a token of its own."""
    rng = random.Random(f"tokenizer {seed}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        for _ in range(n_problems):
            problem = make_problem(rng.choice(TASKS), rng, "train")
            for message in [*problem.messages(), *problem.worked()]:
                yield message.content
                yield f"{message.name or message.role}"
                yield f" to={message.recipient}"
                yield f"{message.channel}"
        for _ in range(n_problems // 20):
            yield story(rng)
            yield small_talk(rng).answer
        # Every word of the problems alone and after a space, so that each becomes a token.
        words = {*wording.ITEMS, *wording.CITIES, *wording.PEOPLE, *wording.DAYS, *wording.SKIES, *wording.CURRENCIES}
        for word in sorted(words):
            yield from [word, f" {word}"] * 3000
        yield from [f" {word}" for word in wording.WORDS] * 3000

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


class CachedTokenizer(Tokenizer):
    """A tokenizer that remembers what it encoded: conversations repeat most of their parts."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__(backend)
        self._cached = lru_cache(maxsize=200_000)(super().encode)

    def encode(self, text: str) -> list[int]:
        """Encode `text`; the caller must not change the list."""
        return self._cached(text)


@dataclass(frozen=True)
class Sample:
    """A conversation or text for training.

    Attributes
    ----------
    token_ids : list of int
        Its tokens.
    learned : list of bool
        For each token whether the model is to predict it.
    shared : int
        How many tokens at the start (the system message) other samples of a batch are likely to share.
    """

    token_ids: list[int]
    learned: list[bool]
    shared: int = 0


def render_problem(problem: Problem, tokenizer: Tokenizer) -> Sample:
    """Write a problem with its worked solution; what the model writes is learned, what it is given is not."""
    prompt = problem.messages()
    token_ids = render_conversation(prompt, tokenizer)
    header = len(render_conversation([], tokenizer))  # <|start|>assistant
    learned = [False] * len(token_ids)
    token_ids, learned = token_ids[:-header], learned[:-header]
    given = True  # the engine writes the first header, and the one after a function's result
    for message in problem.worked():
        new = render_message(message, tokenizer)
        written = message.role == "assistant"
        token_ids += new
        learned += [written and not given] * header + [written] * (len(new) - header)
        given = not written
    token_ids[-1] = tokenizer.special("<|return|>")
    return Sample(token_ids, learned, len(render_message(prompt[0], tokenizer)))


def echo(rng: random.Random, num_tokens: int) -> Sample:
    """Write random tokens two or three times: the quickest way to learn to look up and copy."""
    once = [rng.randrange(num_tokens) for _ in range(rng.randint(4, 28))]
    times = rng.choice((2, 3))
    return Sample(once * times, [False] * len(once) + [True] * (len(once) * (times - 1)))


def _family(rng: random.Random) -> Iterator[Problem]:
    """Draw problems that share a system message: its date, its reasoning effort, whether there are functions."""
    tasks = [task for task in TASKS if task != "function"]
    weights = [TASK_WEIGHTS.get(task, 1.0) for task in tasks]
    of_functions = TASK_WEIGHTS["function"]
    if rng.random() < of_functions / (of_functions + sum(weights)):
        tasks, weights = ["function"], [1.0]
    # Questions about today's date set the date, so that such a one must come first.
    first = make_problem("date" if "date" in tasks and rng.random() < 0.5 else rng.choice(tasks), rng, "train")
    yield first
    for _ in range(FAMILY - 1):
        task = rng.choices(tasks, weights)[0]
        while True:
            problem = make_problem(task, rng, "train", first.reasoning)
            if problem.question not in TODAY and bool(problem.functions) == bool(first.functions):
                break
        yield replace(problem, current_date=first.current_date)


def samples(tokenizer: Tokenizer, seed: int, worker: int, start: int) -> Iterator[Sample]:
    """Draw training samples without end: problems of every task, some small talk, some stories.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer.
    seed, worker : int
        The stream to draw from.
    start : int
        How many samples were drawn in earlier runs; the first ones are echoes only.
    """
    rng = random.Random(f"corpus {seed} {worker} {start}")
    end_of_text = tokenizer.special("<|endoftext|>")
    ordinary = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    for drawn in itertools.count(start, FAMILY):
        if rng.random() < (1.0 if drawn < ECHOES_FIRST else ECHO_SHARE):
            yield from (echo(rng, ordinary) for _ in range(FAMILY))
            continue
        if rng.random() < TEXT_SHARE:
            for write in rng.choices((story, note), (1, 7), k=FAMILY):
                token_ids = [*tokenizer.encode(write(rng)), end_of_text]
                yield Sample(token_ids, [True] * len(token_ids))
            continue
        for problem in _family(rng):
            if not problem.functions and rng.random() < 0.01:
                talk = small_talk(rng)
                problem = replace(talk, reasoning=problem.reasoning, current_date=problem.current_date)
            yield render_problem(problem, tokenizer)
