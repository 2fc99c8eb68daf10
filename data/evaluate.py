"""Greedy exact match of the final answer.

python data/evaluate.py MODEL_DIR data/demo/test.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prift.threads import one_thread

FINAL = re.compile(r"^Answer: (-?\d+)$", re.MULTILINE)
MAX_NEW_TOKENS, BATCH = 160, 64


def final_answer(text: str) -> str | None:
    """The number of the last `Answer: N` line, or None where there is none."""
    found = FINAL.findall(text)
    return found[-1] if found else None


def read_rows(path: str | Path, limit: int | None = None) -> list[dict[str, str]]:
    """The rows of a JSON Lines file, at most `limit` of them."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file][:limit]


@torch.inference_mode()
def complete(
    model_dir: str | Path,
    prompts: list[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = BATCH,
) -> list[str]:
    """Continue every prompt greedily until end-of-text, in float32.

    Prompts of like length share a batch, padded on the left; the attention mask tells the model
    (and `generate`, which counts position ids from it) what is padding.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen],
            padding=True,
            add_special_tokens=False,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        output = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        for i, text in zip(
            chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[i] = text
    return texts


def judge(
    model_dir: str | Path, test_jsonl: str | Path, limit: int | None = None
) -> list[tuple[dict[str, str], str, bool]]:
    """For every row: the row, what the model wrote, and whether its final answer is right."""
    rows = read_rows(test_jsonl, limit)
    # The newline is what prift's question/answer format puts between the two.
    with one_thread():  # the products of a model this small are too short to share
        texts = complete(model_dir, [row["question"] + "\n" for row in rows])
    return [
        (row, text, final_answer(text) == final_answer(row["answer"]))
        for row, text in zip(rows, texts, strict=True)
    ]


def accuracy(
    model_dir: str | Path, test_jsonl: str | Path, limit: int | None = None
) -> tuple[int, int]:
    """How many final answers are exactly right, and of how many."""
    judged = judge(model_dir, test_jsonl, limit)
    return sum(right for _, _, right in judged), len(judged)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("test_jsonl", type=Path)
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--show", type=int, default=0, help="print this many completions")
    args = parser.parse_args()
    start = time.monotonic()
    judged = judge(args.model_dir, args.test_jsonl, args.limit)
    right, total = sum(good for _, _, good in judged), len(judged)
    for row, text, good in judged[: args.show]:
        wanted = final_answer(row["answer"])
        print(f"--- {'right' if good else f'wrong, wants {wanted}'}\n{row['question']}\n{text}")
    print(f"{right} of {total} right ({right / total:.1%}) in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
