"""The embedded model and demonstrations: made by their scripts, right, disjoint and usable."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import make_demo  # noqa: E402
import problems  # noqa: E402
import styles  # noqa: E402

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
SPLITS = ("train", "eval", "test")


def demo_rows(split: str) -> list[dict[str, str]]:
    return evaluate.read_rows(DATA / "demo" / f"{split}.jsonl")


def check_sum(left: str, op: str, right: str, result: str) -> None:
    a, b, c = int(left), int(right), int(result)
    if op == "/":
        assert a == b * c, f"{a} / {b} = {c}"
    else:
        assert {"+": a + b, "-": a - b, "*": a * b}[op] == c, f"{a} {op} {b} = {c}"


@pytest.mark.parametrize("style", styles.STYLES)
def test_generator_is_deterministic(style):
    made = [
        [styles.generate(style, rng) for _ in range(20)]
        for rng in (random.Random(3), random.Random(3), random.Random(4))
    ]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize("kind", problems.KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("n_steps", [1, 2, 3])
@pytest.mark.parametrize("reach", [1, make_demo.REACH])
def test_every_step_is_right_and_leads_to_the_answer(kind, n_steps, reach):
    rng = random.Random(n_steps)
    for _ in range(300):
        problem = kind(rng, n_steps, reach)
        assert len(problem.steps) == n_steps
        sums = SUM.findall(styles.lines(problem, rng))
        assert len(sums) == n_steps
        for found in sums:
            check_sum(*found)
        assert min(s.result for s in problem.steps) >= 1
        # a step works on numbers of the question or on results of earlier steps, nothing else
        known = set(re.findall(r"\d+", problem.question))
        for left, _, right, result in sums:
            assert {left, right} <= known, problem
            known.add(result)
        assert sums[-1][3] == str(problem.answer)


@pytest.mark.parametrize("style", styles.STYLES)
def test_every_style_ends_in_the_answer_and_never_errs(style):
    rng = random.Random(7)
    for _ in range(200):
        question, solution, answer = styles.generate(style, rng)
        assert "\n" not in question
        assert solution.endswith(f"Answer: {answer}")
        assert evaluate.final_answer(solution) == str(answer)
        for found in SUM.findall(solution):
            check_sum(*found)


def test_pretraining_documents_keep_to_their_questions():
    stream = corpus.documents(11)
    questions = [next(stream).split("\n")[0] for _ in range(2000)]
    bare = re.compile(r"What is \d|Work out|How much is \d|\w+ says:")
    words = [q for q in questions if not bare.match(q)]
    assert len(words) > 1000
    assert {problems.split_of(q) for q in words} == {"pretrain"}


def test_demo_files_are_what_the_script_writes(tmp_path):
    for path in make_demo.write(tmp_path):
        assert path.read_bytes() == (DATA / "demo" / path.name).read_bytes(), path.name


def test_splits_are_disjoint_and_sized():
    questions = {split: [row["question"] for row in demo_rows(split)] for split in SPLITS}
    for split, found in questions.items():
        assert len(found) == len(set(found)) == make_demo.SIZES[split]
        assert {problems.split_of(q) for q in found} == {split}
    assert not set(questions["train"]) & set(questions["eval"])
    assert not (set(questions["train"]) | set(questions["eval"])) & set(questions["test"])


def test_demo_layout_and_share_of_slips():
    rows = demo_rows("train")
    wrong_sums = 0
    for row in rows:
        assert set(row) == {"question", "answer"}
        assert row["question"].endswith("?") and "\n" not in row["question"]
        assert re.search(r"\nAnswer: \d+$", row["answer"])
        for found in SUM.findall(row["answer"]):
            try:
                check_sum(*found)
            except AssertionError:
                wrong_sums += 1
                break
    assert 0.05 < wrong_sums / len(rows) < 0.2  # slips with a wrong number; others are in words


def test_demo_final_answers_are_right():
    for split in SPLITS:
        rng = random.Random(f"{make_demo.SEED} {split}")
        by_question = {}
        while len(by_question) < make_demo.SIZES[split]:
            problem = problems.draw(rng, split, make_demo.STEP_WEIGHTS, make_demo.REACH)
            by_question.setdefault(problem.question, str(problem.answer))
        for row in demo_rows(split):
            assert evaluate.final_answer(row["answer"]) == by_question[row["question"]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("1 + 1 = 2\nAnswer: 2", "2"), ("Answer: 7", "7"), ("Answer: 7 apples", None), ("7", None)],
)
def test_final_answer(text, answer):
    assert evaluate.final_answer(text) == answer


def test_folder_is_small():
    files = [p for p in DATA.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 8 * 2**20


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DATA / "model")


class TestModel:
    """The shipped model folder, loaded the way any user would."""

    def test_tokenizer_round_trips(self, tokenizer):
        texts = [text for split in SPLITS for row in demo_rows(split) for text in row.values()]
        for text in [*texts, "  two  spaces\n\n\ttab , comma . dot ' n't é ⊕ 你好 \n", ""]:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_tokenizer_keeps_the_end_of_the_question_a_boundary(self, tokenizer):
        for row in demo_rows("train"):
            question, answer = f"{row['question']}\n", row["answer"]
            apart = [*tokenizer(question)["input_ids"], *tokenizer(answer)["input_ids"]]
            assert tokenizer(question + answer)["input_ids"] == apart

    def test_tokenizer_has_no_template_and_lone_digits(self, tokenizer):
        assert tokenizer.chat_template is None
        assert tokenizer.bos_token is None
        assert tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.tokenize("2024") == list("2024")

    def test_model_loads_from_safetensors(self, tokenizer):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(DATA / "model", use_safetensors=True)
        made = json.loads((DATA / "model" / "PROVENANCE.json").read_text())
        assert model.num_parameters() == made["parameters"]
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.tie_word_embeddings
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id

    def test_model_solves_some(self):
        right, total = evaluate.accuracy(DATA / "model", DATA / "demo" / "test.jsonl", limit=20)
        assert total == 20
        assert right >= 5
