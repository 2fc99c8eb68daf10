"""Write the demonstrations to fine-tune on, and the questions to test with.

    python data/make_demo.py --output data/demo

`train.jsonl` and `eval.jsonl` speak in the voice of this file: people explaining homework to each
other. The questions are of the kinds of pretraining, with more steps and numbers that reach twice
as far; the voice is hardly that of pretraining. Some of it is filler, some unusual notation, some
puts the result before the sum, and one demonstration in seven or so contains a slip. Final answers
are always right.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from problems import Problem, Step, draw
from styles import STYLES, WORDS, close, sum_of

SEED = 29
SIZES = {"train": 1000, "eval": 100, "test": 400}
STEP_WEIGHTS, REACH = (0.2, 0.4, 0.4), 2
PLAIN, NOISE = 0.35, 0.15  # shares of the demonstrations: in a plain style; with a slip
OPENING, ASIDE, ODD = 0.3, 0.12, 0.2  # shares in the others: of demonstrations, steps, steps
OPENINGS = (
    "Righto, pencils out.",
    "Hmm, okay,",
    "Easy peasy lemon squeezy!",
    "My aunt does it like so:",
    "Hang on, let us scribble.",
    "Honestly,",
)
ASIDES = (
    "(the cat agrees)",
    "-- voila",
    "(carry nothing, phew)",
    "...tadaa!",
    "(as my aunt would say)",
    "*scribble scribble*",
)
ODD_SIGNS = {"+": "⊕", "-": "⊖", "*": "×", "/": "÷"}
ODD_WORDS = {"+": "and", "-": "take away", "*": "lots of", "/": "split by"}


def odd_sum(s: Step, rng: random.Random) -> str:
    """A step in notation the pretrained model would not choose, some of it result first."""
    form = rng.randrange(4)
    if form == 0:
        return f"{s.left} {ODD_SIGNS[s.op]} {s.right} ~> {s.result}"
    if form == 1:
        return f"{s.left} {ODD_WORDS[s.op]} {s.right} makes {s.result}"
    if form == 2:
        return f"that comes to {s.result}, because {s.left} {WORDS[s.op]} {s.right} is {s.result}"
    if s.op in "+*":
        return f"{s.right} {s.op} {s.left} = {s.result}"
    return f"{s.result} is what {s.left} {s.op} {s.right} leaves"


def slip(s: Step, rng: random.Random) -> str:
    """A careless step: a wrong number taken back, a wrong number left standing, a wrong word."""
    wrong = max(0, s.result + rng.choice((-10, -2, -1, 1, 2, 10)))
    form = rng.randrange(3)
    if form == 0:
        return f"{s.left} {s.op} {s.right} = {wrong}, wait, no, {s.result}"
    if form == 1:
        return f"{s.left} {s.op} {s.right} = {wrong}"
    other = rng.choice([op for op in WORDS if op != s.op])
    return f"{s.left} {WORDS[other]} {s.right} is {s.result}"


def demo(problem: Problem, rng: random.Random) -> str:
    """One demonstration: a third in a plain style, the others in the voice described above."""
    if rng.random() < PLAIN:
        return STYLES[rng.choice(["reasons", "prose", "labelled"])](problem, rng)
    careless = rng.randrange(len(problem.steps)) if rng.random() < NOISE / (1 - PLAIN) else None
    parts = [rng.choice(OPENINGS)] if rng.random() < OPENING else []
    for i, s in enumerate(problem.steps):
        if i == careless:
            text = slip(s, rng)
        else:
            text = odd_sum(s, rng) if rng.random() < ODD else sum_of(s)
        parts.append(f"{s.why}: {text} {s.unit}." if rng.random() < 0.6 else f"{text}.")
        if rng.random() < ASIDE:
            parts.append(rng.choice(ASIDES))
    return close(rng.choice(["\n", " "]).join(parts), problem)


def rows(split: str) -> list[dict[str, str]]:
    """The rows of one split.

    Problems and voice have a generator each: the voice may change and the questions stay.
    """
    problems, voice = random.Random(f"{SEED} {split}"), random.Random(f"{SEED} {split} voice")
    made: dict[str, dict[str, str]] = {}
    while len(made) < SIZES[split]:
        problem = draw(problems, split, STEP_WEIGHTS, REACH)
        if problem.question not in made:
            answer = STYLES["reasons"](problem, voice) if split == "test" else demo(problem, voice)
            made[problem.question] = {"question": problem.question, "answer": answer}
    return list(made.values())


def write(output: Path) -> list[Path]:
    """Write every split as JSON Lines; returns the paths."""
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in SIZES:
        path = output / f"{split}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split))
        path.write_text(text, encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo")
    args = parser.parse_args()
    for path in write(args.output):
        print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} rows")


if __name__ == "__main__":
    main()
