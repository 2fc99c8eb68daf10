"""The pretraining corpus: documents of the layout question, newline, solution, end-of-text.

Most documents are word problems solved in one of several styles. The rest are what keeps a small
model honest about the world outside them: bare sums (arithmetic in few tokens) and small talk
(everyday words, among them those the demonstrations are fond of, where no one is solving anything).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from problems import NAMES, draw, step
from styles import pretrain_solution, sum_of

STEP_WEIGHTS = (0.45, 0.4, 0.15)
DRILL_SHARE, TALK_SHARE = 0.28, 0.04
TALK = (
    "hmm,|okay,|right,|well,|so,|hang on,|wait, no,|honestly,|oh dear,|easy enough,|fair enough,",
    "my pencil|my aunt|the cat|a scribble|this page|everyone here|the teacher|this bit|the rest",
    "is|makes|leaves|gives|wants|takes away|adds|counts|comes to|turns into|shares|multiplies",
    "a cup of tea|the whole lot|a bit of luck|nothing much|the next one|a lot of paper|some sense",
    "as usual|because it rains|since last week|altogether|if memory serves|by the way|to be exact",
)


def drill(rng: random.Random) -> tuple[str, str]:
    """A bare sum, asked for and worked out; operands cover what the word problems use."""
    op = rng.choice("++--*/")
    if op in "+-":
        low, high = sorted((rng.randint(1, 40), rng.randint(2, 90)))
        left, right = (high, low) if op == "-" or rng.random() < 0.5 else (low, high)
    else:
        left, right = rng.randint(2, 30 if rng.random() < 0.2 else 12), rng.randint(2, 9)
        left = left * right if op == "/" else left
    made = step(left, op, right, "", "")
    ask = rng.choice(["What is {}?", "Work out {}.", "How much is {}?"])
    return ask.format(f"{left} {op} {right}"), f"{sum_of(made)}\nAnswer: {made.result}"


def talk(rng: random.Random) -> tuple[str, str]:
    """Someone says something, and someone else says something back; it means nothing."""
    said = [" ".join(rng.choice(part.split("|")) for part in TALK) for _ in range(2)]
    first, second = rng.sample(NAMES, 2)
    return f"{first} says: {said[0]}.", f"{second} says: {said[1]}."


def document(rng: random.Random) -> str:
    """One document without its end-of-text token."""
    kind = rng.random()
    if kind < DRILL_SHARE:
        question, solution = drill(rng)
    elif kind < DRILL_SHARE + TALK_SHARE:
        question, solution = talk(rng)
    else:
        problem = draw(rng, "pretrain", STEP_WEIGHTS)
        question, solution = problem.question, pretrain_solution(problem, rng)
    return f"{question}\n{solution}"


def documents(seed: int) -> Iterator[str]:
    """Endless documents, always the same ones for a seed."""
    rng = random.Random(seed)
    while True:
        yield document(rng)
