"""How the problems of the tiny model are worded: questions, worked steps, functions.

Each ``*_steps`` function writes the reference chain of thought, whose length follows the reasoning effort: a line
at ``low``, the steps at ``medium``, the steps and a check at ``high``.  Steps are small enough that every token
follows from a few earlier ones, which is what lets a model of a few million weights master them.
"""

from __future__ import annotations

import calendar
import datetime
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = ("low", "medium", "high")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

ADD = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "Compute {a} + {b}.",
    "How much is {a} plus {b}?",
    "{a} + {b} = ?",
    "Please work out {a} + {b}.",
    "What is the sum of {a} and {b}?",
)
SUBTRACT = (
    "What is {a} - {b}?",
    "Subtract {b} from {a}.",
    "Compute {a} - {b}.",
    "How much is {a} minus {b}?",
    "{a} - {b} = ?",
    "Please work out {a} - {b}.",
)
SORT_UP = (
    "Sort these numbers from smallest to largest: {numbers}.",
    "Put these numbers in ascending order: {numbers}.",
    "Sort: {numbers}.",
    "Please sort {numbers} from smallest to largest.",
)
SORT_DOWN = (
    "Sort these numbers from largest to smallest: {numbers}.",
    "Put these numbers in descending order: {numbers}.",
    "Please sort {numbers} from largest to smallest.",
)
LARGEST = (
    "Which is the largest of {numbers}?",
    "What is the largest number: {numbers}?",
    "Find the maximum of {numbers}.",
)
SMALLEST = (
    "Which is the smallest of {numbers}?",
    "What is the smallest number: {numbers}?",
    "Find the minimum of {numbers}.",
)
COUNT_LETTER = (
    "How many times does the letter {letter} appear in the word {word}?",
    "How many letters {letter} are in {word}?",
    "Count the letter {letter} in {word}.",
    'How many "{letter}" are there in the word {word}?',
)
COUNT_ITEMS = (
    "How many items are in this list: {items}?",
    "Count the items in this list: {items}.",
    "How many items does the list have: {items}?",
)
REVERSE = (
    "Reverse this list: {items}.",
    "Write this list backwards: {items}.",
    "Please reverse the list {items}.",
)
WEEKDAY = (
    "What day of the week is {days} {side} {day}?",
    "Which day is {days} {side} {day}?",
    "What day comes {days} {side} {day}?",
)
DATE = (
    "What date is the day {side} {date}?",
    "Which date is one day {side} {date}?",
    "Give the date of the day {side} {date}.",
)
TOMORROW = ("What is the date tomorrow?", "What is tomorrow's date?", "Which date is tomorrow?")
YESTERDAY = ("What was the date yesterday?", "What was yesterday's date?", "Which date was yesterday?")

# Instructions that change nothing, and two that change how the answer is written.
INSTRUCTIONS = (
    ("Be brief.", "{}"),
    ("You are a helpful assistant.", "{}"),
    ("Answer the user's question.", "{}"),
    ("Put the answer in brackets.", "[{}]"),
    ("Write the answer in bold.", "**{}**"),
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ITEMS = _words(
    """
    apple pear plum fig lemon melon grape cherry banana carrot onion bread cheese milk tea cake rice soup cat dog
    fox cow hen owl bee ant horse sheep mouse rabbit cup pen book lamp chair table door key box hat shoe coat ball
    kite drum bell red blue green black white pink brown sun moon star rain snow wind tree leaf rose river hill
    stone
    """
)

WORDS = _words(
    """
    apple banana cherry strawberry orange lemon pepper tomato potato carrot coffee butter cheese cookie noodle rabbit
    parrot kitten puppy giraffe summer winter spring autumn weather balloon bottle pillow mirror hammer letter number
    paper pencil school river valley forest island desert meadow harbor street garden window kitchen planet rocket
    """
)

CITIES = _words(
    """
    Rome Paris London Berlin Madrid Vienna Prague Oslo Lima Cairo Tokyo Delhi Seoul Boston Chicago Denver Dallas
    Miami Toronto Sydney Lisbon Athens Dublin Warsaw Geneva Milan Naples Porto Bern Kyoto
    """
)
PEOPLE = _words("Tom Anna Ben Lucy Max Emma Sam Nina Leo Mia Paul Sara Jack Lily Adam Eva Carl Rosa Hugo Ida")
CURRENCIES = _words("USD EUR GBP JPY CHF CAD")
SKIES = _words("sunny cloudy rainy windy snowy foggy")


def listed(values: Iterable[object]) -> str:
    """Join values with commas."""
    return ", ".join(str(value) for value in values)


def some_date(rng: random.Random) -> datetime.date:
    """Draw a date of 2024 to 2030; one in three lies at an edge of its month."""
    year, month = rng.randint(2024, 2030), rng.randint(1, 12)
    last = calendar.monthrange(year, month)[1]
    if rng.random() < 1 / 3:
        return datetime.date(year, month, rng.choice((1, 1, last, last, last - 1)))
    return datetime.date(year, month, rng.randint(1, last))


def neighbour(day: datetime.date, after: bool) -> datetime.date:
    """Return the day after or before."""
    return day + datetime.timedelta(days=1 if after else -1)


def _digits(a: int, b: int) -> list[tuple[int, int]]:
    """Return the digit pairs of two numbers from the right, the shorter one padded with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(a // 10**i % 10, b // 10**i % 10) for i in range(width)]


def add_steps(a: int, b: int, level: str) -> str:
    """Write the steps of ``a + b``, digit by digit with the carry."""
    pairs, carry, steps = _digits(a, b), 0, []
    for i, (x, y) in enumerate(pairs, start=1):
        total = x + y + carry
        equation = f"{i}: {x}+{y}{'+1' if carry else ''}={total}"
        carry = total // 10
        if level == "low":
            steps.append(equation)
        elif i == len(pairs):
            steps.append(f"{equation}, write {total}.")
        else:
            steps.append(f"{equation}, write {total % 10}{', carry 1' if carry else ''}.")
    if level == "low":
        return ", ".join(steps)
    text = "Add the digits from the right.\n" + "\n".join(steps) + f"\nThe sum is {a + b}."
    return text if level == "medium" else f"{text}\nCheck: {a + b}-{b}={a}."


def subtract_steps(a: int, b: int, level: str) -> str:
    """Write the steps of ``a - b`` for ``a >= b``, digit by digit with the borrow."""
    borrow, steps = 0, []
    for i, (x, y) in enumerate(_digits(a, b), start=1):
        taken = f"-{y}{'-1' if borrow else ''}"
        difference = x - y - borrow
        borrow = int(difference < 0)
        # The digits stand there before it is said whether they need a borrow.
        lent = f"<0, 1{x}{taken}={difference + 10}" if borrow else f"={difference}"
        equation = f"{i}: {x}{taken}{lent}"
        steps.append(equation if level == "low" else f"{equation}{', borrow 1' if borrow else ''}.")
    if level == "low":
        return ", ".join(steps)
    text = "Subtract the digits from the right.\n" + "\n".join(steps) + f"\nThe difference is {a - b}."
    return text if level == "medium" else f"{text}\nCheck: {a - b}+{b}={a}."


def sort_steps(ordered: Sequence[int], descending: bool, level: str) -> str:
    """Write the steps of sorting: the values in order, one by one."""
    if level == "low":
        return listed(ordered)
    text = f"The {'largest' if descending else 'smallest'} is {ordered[0]}."
    text += "".join(f"\nNext is {value}." for value in ordered[1:])
    if level == "medium":
        return text
    return text + "\nCheck: " + (" > " if descending else " < ").join(str(value) for value in ordered) + "."


def extreme_steps(numbers: Sequence[int], largest: bool, level: str) -> str:
    """Write the steps of finding the largest or smallest: the best so far after each value."""
    pick: Callable[[int, int], int] = max if largest else min
    best = numbers[0]
    if level == "low":
        return listed(f"{value}: {(best := pick(best, value))}" for value in numbers)
    text = f"Start with {best}."
    for value in numbers[1:]:
        relation = "more" if value > best else "less"
        kept = pick(best, value) == best
        best = pick(best, value)
        text += f"\n{value} is {relation}, {'keep' if kept else 'take'} {best}."
    if level == "medium":
        return text
    return f"{text}\nCheck: {best} is the {'largest' if largest else 'smallest'} of {len(numbers)} numbers."


def count_letter_steps(word: str, letter: str, level: str) -> str:
    """Write the steps of counting a letter: the spelled word with a running count."""
    count, spelled = 0, []
    for character in word:
        count += character == letter
        spelled.append(f"{character} {count}" if character == letter else character)
    text = f"Spell {word}: {listed(spelled)}."
    if level == "low":
        return text
    times = "1 time" if count == 1 else f"{count} times"
    text += f"\nThe letter {letter} appears {times}."
    if level == "medium":
        return text
    found = " ".join(letter for _ in range(count)) or "none"
    return f"{text}\nCheck: {found}, so {count}."


def count_items_steps(items: Sequence[str], level: str) -> str:
    """Write the steps of counting the items of a list: each with its number."""
    numbered = listed(f"{item} {i + 1}" for i, item in enumerate(items))
    if level == "low":
        return numbered
    text = f"Count the items: {numbered}.\nThe count is {len(items)}."
    return text if level == "medium" else f"{text}\nCheck: the last is {items[-1]}, number {len(items)}."


def reverse_steps(items: Sequence[str], level: str) -> str:
    """Write the steps of reversing: number the items and read them from the end."""
    numbered = [f"{i + 1} {item}" for i, item in enumerate(items)]
    if level == "low":
        return listed(numbered)
    text = f"Number the items: {listed(numbered)}.\nFrom the end: {listed(numbered[::-1])}."
    return text if level == "medium" else f"{text}\nCheck: {items[0]} was first and is now last."


def weekday_steps(day: int, count: int, after: bool, level: str) -> str:
    """Write the steps of counting days: drop whole weeks, then walk."""
    rest, step = count % 7, 1 if after else -1
    walk = [f"{i} {DAYS[(day + step * i) % 7]}" for i in range(rest + 1)]
    if level == "low":
        return f"{count} mod 7 = {rest}: {listed(walk)}"
    weeks = count // 7
    text = f"{count} = {weeks}*7 + {rest}, so go {rest} {'forward' if after else 'back'} from {DAYS[day]}."
    text += f"\n{listed(walk)}."
    if level == "medium":
        return text
    end = DAYS[(day + step * rest) % 7]
    return f"{text}\nCheck: {DAYS[day]} is {count} days {'before' if after else 'after'} {end}."


def date_steps(day: datetime.date, after: bool, level: str) -> str:
    """Write the steps of finding the day after or before a date, with the month's length."""
    other = neighbour(day, after)
    month = day if after else other
    length = calendar.monthrange(month.year, month.month)[1]
    if other.month == day.month:
        reason = f"day {day.day:02} goes to {other.day:02}"
    elif after:
        reason = f"day {day.day:02} of {length} is the last"
    else:
        reason = f"day 01 is the first, month {month.month:02} has {length}"
    if level == "low":
        return f"{day}: {reason}"
    text = f"The date is {day}.\nMonth {month.month:02} of {month.year} has {length} days.\n"
    text += f"{reason[0].upper()}{reason[1:]}.\nSo the date is {other}."
    if level == "medium":
        return text
    return f"{text}\nCheck: the day {'before' if after else 'after'} {other} is {day}."


def call_steps(name: str, arguments: dict[str, Any], level: str) -> str:
    """Write the thought before a function call: which function, and with which arguments."""
    given = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    if level == "low":
        return f"Use {name}, {given}."
    text = f"I need {name} for this.\nArguments: {given}."
    return text if level == "medium" else f"{text}\nCheck: {name} takes {listed(arguments)}."


@dataclass(frozen=True)
class Draw:
    """One use of a tool: the argument values, and what the tool returns."""

    values: tuple[Any, ...]
    result: dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A kind of function: the names and parameter names it may have, its questions, its answer.

    Templates take the argument values by position and the result's fields by name.
    """

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[str, ...], ...]
    meanings: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str
    draw: Callable[[random.Random], Draw]


def _draw_weather(rng: random.Random) -> Draw:
    return Draw((rng.choice(CITIES),), {"sky": rng.choice(SKIES), "temperature": rng.randint(1, 39)})


def _draw_time(rng: random.Random) -> Draw:
    return Draw((rng.choice(CITIES),), {"time": f"{rng.randrange(24):02}:{rng.randrange(60):02}"})


def _draw_price(rng: random.Random) -> Draw:
    return Draw((rng.choice(ITEMS),), {"price": rng.randint(1, 99)})


def _draw_stock(rng: random.Random) -> Draw:
    return Draw((rng.choice(ITEMS),), {"count": rng.randint(2, 99)})


def _draw_phone(rng: random.Random) -> Draw:
    return Draw((rng.choice(PEOPLE),), {"phone": f"555-{rng.randrange(10000):04}"})


def _draw_age(rng: random.Random) -> Draw:
    return Draw((rng.choice(PEOPLE),), {"age": rng.randint(2, 99)})


def _draw_convert(rng: random.Random) -> Draw:
    source, target = rng.sample(CURRENCIES, 2)
    return Draw((rng.randint(2, 99), source, target), {"value": rng.randint(2, 99)})


TOOLS = (
    Tool(
        ("get_weather", "weather", "current_weather", "find_weather"),
        "Gets the weather.",
        (("city", "location", "place"),),
        ("The city",),
        ("What is the weather in {0}?", "Weather in {0}?", "How is the weather in {0} today?"),
        "It is {sky} and {temperature} degrees in {0}.",
        _draw_weather,
    ),
    Tool(
        ("get_time", "clock", "local_time"),
        "Gets the local time.",
        (("city", "location", "place"),),
        ("The city",),
        ("What time is it in {0}?", "Tell me the time in {0}.", "What is the local time in {0}?"),
        "It is {time} in {0}.",
        _draw_time,
    ),
    Tool(
        ("get_price", "price", "find_price", "lookup_price"),
        "Gets the price of an item.",
        (("item", "name", "product"),),
        ("The item",),
        ("How much does the {0} cost?", "What is the price of the {0}?", "Price of the {0}?"),
        "The {0} costs {price} dollars.",
        _draw_price,
    ),
    Tool(
        ("get_stock", "stock", "check_stock"),
        "Says how many of an item are in stock.",
        (("item", "name", "product"),),
        ("The item",),
        ("How many of the {0} are in stock?", "Check the stock of the {0}.", "Stock of the {0}?"),
        "There are {count} of the {0} in stock.",
        _draw_stock,
    ),
    Tool(
        ("get_phone", "find_phone", "lookup_phone"),
        "Finds a phone number.",
        (("name", "person"),),
        ("The person",),
        ("What is the phone number of {0}?", "Find the phone number of {0}.", "How can I call {0}?"),
        "The number of {0} is {phone}.",
        _draw_phone,
    ),
    Tool(
        ("get_age", "age", "find_age"),
        "Finds the age of a person.",
        (("name", "person"),),
        ("The person",),
        ("How old is {0}?", "What is the age of {0}?", "Find the age of {0}."),
        "The age of {0} is {age}.",
        _draw_age,
    ),
    Tool(
        ("convert", "convert_money", "exchange"),
        "Converts money.",
        (("amount", "value"), ("from", "source"), ("to", "target")),
        ("The amount", "From this currency", "To this currency"),
        ("How much is {0} {1} in {2}?", "Convert {0} {1} to {2}.", "What are {0} {1} worth in {2}?"),
        "{0} {1} is {value} {2}.",
        _draw_convert,
    ),
)


def schema(tool: Tool, name: str, parameters: Sequence[str]) -> dict[str, Any]:
    """Describe a tool under one of its names as a function with a JSON schema."""
    properties = {
        parameter: {"type": "number" if parameter in ("amount", "value") else "string", "description": meaning}
        for parameter, meaning in zip(parameters, tool.meanings, strict=True)
    }
    return {
        "name": name,
        "description": tool.description,
        "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
    }
