"""The voices a solution is written in: several for pretraining and one for the demonstrations.

Every style ends in the line `Answer: N`. The pretraining styles never err. The demonstrations speak
in a voice the pretrained model has hardly met, and a share of them is careless, as people are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

from problems import Problem, Step, draw

WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
Style = Callable[["Problem", random.Random], str]


def sum_of(s: Step) -> str:
    """The canonical line of arithmetic: `12 + 7 = 19`."""
    return f"{s.left} {s.op} {s.right} = {s.result}"


def close(body: str, problem: Problem) -> str:
    """Add the final line every style shares."""
    return f"{body}\nAnswer: {problem.answer}"


def lines(problem: Problem, rng: random.Random) -> str:
    """Nothing but the arithmetic, one step a line."""
    return close("\n".join(sum_of(s) for s in problem.steps), problem)


def labelled(problem: Problem, rng: random.Random) -> str:
    """Numbered steps."""
    steps = enumerate(problem.steps, 1)
    return close("\n".join(f"Step {i}: {sum_of(s)} {s.unit}." for i, s in steps), problem)


def reasons(problem: Problem, rng: random.Random) -> str:
    """Every step says what happens before it computes."""
    return close("\n".join(f"{s.why}: {sum_of(s)} {s.unit}." for s in problem.steps), problem)


def prose(problem: Problem, rng: random.Random) -> str:
    """One paragraph with ordinals."""
    starts = ["First", "Then", "Last"]
    steps = zip(starts, problem.steps, strict=False)
    return close(" ".join(f"{o}, {s.why}, so {sum_of(s)}." for o, s in steps), problem)


def spoken(problem: Problem, rng: random.Random) -> str:
    """Operators as words."""
    said = (f"{s.left} {WORDS[s.op]} {s.right} is {s.result}." for s in problem.steps)
    return close(" ".join(said), problem)


def direct(problem: Problem, rng: random.Random) -> str:
    """The answer and no working."""
    return f"Answer: {problem.answer}"


def chatty(problem: Problem, rng: random.Random) -> str:
    """A talkative voice, rare in pretraining; the demonstrations share a little of it."""
    opening = rng.choice(["Well, let us see.", "Okay, so.", "Let me think.", "That is easy."])
    parts = [opening]
    for s in problem.steps:
        link = rng.choice(["So we get", "Now", "And so", "That makes"])
        parts.append(f"{s.why}. {link} {sum_of(s)}.")
    return close(" ".join(parts), problem)


STYLES: dict[str, Style] = {
    "lines": lines,
    "labelled": labelled,
    "reasons": reasons,
    "prose": prose,
    "spoken": spoken,
    "direct": direct,
    "chatty": chatty,
}
PRETRAIN_WEIGHTS = {
    "lines": 0.14,
    "labelled": 0.18,
    "reasons": 0.18,
    "prose": 0.14,
    "spoken": 0.10,
    "direct": 0.20,
    "chatty": 0.06,
}


def pretrain_solution(problem: Problem, rng: random.Random) -> str:
    """Write a solution in one of the pretraining styles, drawn by weight."""
    name = rng.choices(list(PRETRAIN_WEIGHTS), list(PRETRAIN_WEIGHTS.values()))[0]
    return STYLES[name](problem, rng)


def generate(style: str, rng: random.Random, split: str = "pretrain") -> tuple[str, str, int]:
    """One (question, solution, answer) in a named style of `STYLES`."""
    problem = draw(rng, split, (1.0, 1.0, 1.0))
    return problem.question, STYLES[style](problem, rng), problem.answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Print some problems.")
    parser.add_argument("--style", choices=STYLES, default="labelled")
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for _ in range(args.count):
        question, solution, _ = generate(args.style, rng)
        print(f"{question}\n{solution}\n")


if __name__ == "__main__":
    main()
