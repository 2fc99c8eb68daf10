"""Grade-school word problems made from a seed, each with the steps that solve it.

A `Problem` holds its question and arithmetic; `styles.py` turns the steps into text. The two are
apart so that pretraining and the demonstrations can share the arithmetic and differ in the voice.

    python data/styles.py --style labelled --count 3
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    "Mia Ben Ana Tom Eva Leo Zoe Max Ida Sam Lea Jon Uma Kai Nora Finn Ruth Omar Lina Hugo".split()
)
ITEMS = (
    "apples pens books shells cards stones stamps eggs coins cups beads buttons plums "
    "marbles cookies tickets flowers toys".split()
)
GOODS = "pen book cup hat lamp toy cake ball bag drum kite map".split()
PLACES = ("boxes", "bags", "jars", "baskets", "rows", "drawers")
SPLITS = ("test", "eval", "train", "pretrain")
HELD_OUT_BUCKETS = 5


@dataclass(frozen=True)
class Step:
    """One line of arithmetic: `why` says what happens, `unit` what is being counted."""

    left: int
    op: str
    right: int
    result: int
    why: str
    unit: str


@dataclass(frozen=True)
class Problem:
    """A question and the steps that solve it; the last result is the answer."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result


def step(left: int, op: str, right: int, why: str, unit: str) -> Step:
    """Compute one step; division must come out exactly, as in a first arithmetic book."""
    if op == "/" and left % right:
        raise ValueError(f"{left} / {right} leaves a remainder")
    results = {"+": left + right, "-": left - right, "*": left * right}
    return Step(left, op, right, results.get(op, left // right), why, unit)


def event(
    rng: random.Random, have: int, name: str, other: str, item: str, reach: int
) -> tuple[str, Step]:
    """One thing that changes how many `item` a person has: a sentence and its step."""
    kind = rng.choice("++--*" if 3 <= have <= 30 * reach else "+--" if have >= 3 else "+")
    if kind == "+":
        n = rng.randint(2, 30 * reach)
        why = rng.choice(
            [f"{name} buys {n} more", f"{name} finds {n} more", f"{other} gives {name} {n} more"]
        )
    elif kind == "-":
        n = rng.randint(1, min(have - 1, 30 * reach))
        why = rng.choice(
            [f"{name} gives {n} to {other}", f"{name} loses {n}", f"{name} sells {n} of them"]
        )
    else:
        n = rng.randint(2, 3)
        why = f"{name} then gets {n} times as many"
    return f"{rng.choice(['', 'Then ', 'Later '])}{why}.", step(have, kind, n, why, item)


def chain(rng: random.Random, n_steps: int, reach: int = 1) -> Problem:
    """A person has some things, and things happen, one after the other."""
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    have = rng.randint(4, 60 * reach)
    text = [rng.choice([f"{name} has {have} {item}.", f"At first {name} has {have} {item}."])]
    steps: list[Step] = []
    for _ in range(n_steps):
        sentence, new = event(rng, have, name, other, item, reach)
        text.append(sentence)
        steps.append(new)
        have = new.result
    ask = [f"How many {item} does {name} have now?", f"How many {item} are there in the end?"]
    return Problem(" ".join([*text, rng.choice(ask)]), tuple(steps))


def groups(rng: random.Random, n_steps: int, reach: int = 1) -> Problem:
    """Equal groups of things, then up to two events."""
    name, other = rng.sample(NAMES, 2)
    item, place = rng.choice(ITEMS), rng.choice(PLACES)
    k, n = rng.randint(2, 9), rng.randint(2, 12 * reach)
    why = f"{k} {place} of {n}"
    steps = [step(k, "*", n, why, item)]
    text = [
        rng.choice(
            [
                f"{name} has {k} {place} with {n} {item} each.",
                f"There are {n} {item} in each of the {k} {place} of {name}.",
            ]
        )
    ]
    for _ in range(n_steps - 1):
        sentence, new = event(rng, steps[-1].result, name, other, item, reach)
        text.append(sentence)
        steps.append(new)
    text.append(f"How many {item} does {name} have{' now' if n_steps > 1 else ''}?")
    return Problem(" ".join(text), tuple(steps))


def shopping(rng: random.Random, n_steps: int, reach: int = 1) -> Problem:
    """Prices: what it costs (1), the change from a note (2), or two kinds of goods (3)."""
    name = rng.choice(NAMES)
    first, second = rng.sample(GOODS, 2)
    p, n = rng.randint(2, 12 * reach), rng.randint(2, 9)
    cost = step(n, "*", p, f"{n} {first}s at {p} dollars", "dollars")
    ask = rng.choice(["How much is that?", f"How many dollars does {name} pay?"])
    if n_steps == 1:
        return Problem(f"A {first} costs {p} dollars. {name} buys {n} {first}s. {ask}", (cost,))
    if n_steps == 2:
        paid = cost.result + rng.randint(1, 20 * reach)
        change = step(paid, "-", cost.result, f"{name} pays with {paid} dollars", "dollars")
        ask = rng.choice(["How much change is there?", f"How much does {name} get back?"])
        text = f"{name} buys {n} {first}s for {p} dollars each and pays with {paid} dollars. {ask}"
        return Problem(text, (cost, change))
    p2, n2 = rng.randint(2, 9 * reach), rng.randint(2, 6)
    more = step(n2, "*", p2, f"{n2} {second}s at {p2} dollars", "dollars")
    both = step(cost.result, "+", more.result, f"{name} pays for both", "dollars")
    text = (
        f"A {first} costs {p} dollars and a {second} costs {p2} dollars. "
        f"{name} buys {n} {first}s and {n2} {second}s. {ask}"
    )
    return Problem(text, (cost, more, both))


def compare(rng: random.Random, n_steps: int, reach: int = 1) -> Problem:
    """Two people, one with more or fewer or some times as many; then together; then shared out."""
    name, other = rng.sample(NAMES, 2)
    item, have = rng.choice(ITEMS), rng.randint(4, 30 * reach)
    op = rng.choice("+-*")
    n = rng.randint(2, 4) if op == "*" else rng.randint(1, have - 1)
    how = {"+": f"{n} more", "-": f"{n} fewer", "*": f"{n} times as many"}[op]
    as_than = f"{how} {'as' if op == '*' else 'than'} {name}"
    text = f"{name} has {have} {item}. {other} has {as_than}."
    steps = [step(have, op, n, f"{other} has {how}", item)]
    if n_steps == 1:
        return Problem(f"{text} How many {item} does {other} have?", tuple(steps))
    steps.append(step(have, "+", steps[0].result, f"{name} and {other} together", item))
    if n_steps == 2:
        return Problem(f"{text} How many {item} do they have together?", tuple(steps))
    used = rng.randint(1, min(steps[1].result - 1, 30 * reach))
    steps.append(step(steps[1].result, "-", used, f"They give away {used}", item))
    text += f" Together they give away {used}. How many {item} do they keep?"
    return Problem(text, tuple(steps))


def sharing(rng: random.Random, n_steps: int, reach: int = 1) -> Problem:
    """Something is shared out equally, after zero, one or two events that make it come out."""
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    friends, each = rng.randint(2, 9), rng.randint(2, 10 * reach)
    whole = friends * each
    steps = [step(whole, "/", friends, f"{name} shares with {friends} friends", item)]
    text = [f"{name} shares them equally among {friends} friends. How many does each friend get?"]
    for _ in range(n_steps - 1):  # backwards: what must there have been before?
        n = rng.randint(1, 20 * reach)
        if rng.random() < 0.5 or n > whole - 2:
            why = rng.choice([f"{name} loses {n}", f"{name} keeps {n} apart"])
            whole += n
            steps.insert(0, step(whole, "-", n, why, item))
        else:
            why = rng.choice([f"{other} adds {n} more", f"{name} buys {n} more"])
            whole -= n
            steps.insert(0, step(whole, "+", n, why, item))
        text.insert(0, f"{why}.")
    text.insert(0, f"{name} has {whole} {item}.")
    return Problem(" ".join(text), tuple(steps))


KINDS: tuple[Callable[[random.Random, int, int], Problem], ...] = (
    chain,
    groups,
    shopping,
    compare,
    sharing,
)


def split_of(question: str) -> str:
    """The one split a question may appear in, decided by its checksum.

    Because the text alone decides, pretraining, demonstrations and test cannot overlap, whatever
    the seeds, and no script has to read another script's output to keep clear of it.
    """
    bucket = zlib.crc32(question.encode()) % HELD_OUT_BUCKETS
    return SPLITS[min(bucket, len(SPLITS) - 1)]


def draw(
    rng: random.Random, split: str, step_weights: tuple[float, float, float], reach: int = 1
) -> Problem:
    """Draw problems until one belongs to `split`.

    `step_weights` are for 1, 2 and 3 steps; `reach` multiplies how large the numbers get.
    """
    while True:
        n_steps = rng.choices((1, 2, 3), step_weights)[0]
        problem = rng.choice(KINDS)(rng, n_steps, reach)
        if split_of(problem.question) == split:
            return problem
