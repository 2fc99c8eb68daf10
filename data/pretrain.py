"""Make the small language model in `data/model/`: its tokenizer, its weights and how it came about.

python data/pretrain.py --output data/model          # about half an hour on two cores
python data/pretrain.py --output /tmp/try --steps 200
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from corpus import documents
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|end|>", "<|pad|>"
VOCAB, BLOCK, CONTEXT, SEED = 768, 256, 512, 17
PIECES = r"\n| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
OPEN_BLOCKS = 32


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit and every newline stands alone.

    Bytes make any text come back exactly; lone digits make arithmetic a matter of columns; and a
    newline that never merges keeps the end of the question a token boundary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(sequences: Iterator[list[int]], pad: int) -> Iterator[list[int]]:
    """Put whole documents into blocks of `BLOCK` tokens, each into the fullest block that takes it.

    Whole, so that every block begins where a document begins, as a prompt does at inference.
    """
    blocks: list[list[int]] = []
    for ids in sequences:
        fitting = [block for block in blocks if len(block) + len(ids) <= BLOCK]
        if fitting:
            max(fitting, key=len).extend(ids)
            continue
        blocks.append(list(ids))
        if len(blocks) > OPEN_BLOCKS:
            full = blocks.pop(max(range(len(blocks)), key=lambda i: len(blocks[i])))
            yield full + [pad] * (BLOCK - len(full))


def encoded(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Documents as token ids with end-of-text, encoded a thousand at a time (it is much faster)."""
    texts = documents(seed)
    while True:
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(islice(texts, 1000))):
            yield [*encoding.ids, tokenizer.eos_token_id]


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 1.3 million parameters, input and output embeddings tied."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM, blocks: Iterator[list[int]], steps: int, batch: int, lr: float
) -> tuple[float, int]:
    """Train on `steps` batches; return the mean loss of the last 5 % and the tokens seen."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup = max(1, min(100, steps // 10))

    def schedule(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (done - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    pad, start, tokens, losses = model.config.pad_token_id, time.monotonic(), 0, []
    model.train()
    for number in range(1, steps + 1):
        ids = torch.tensor(list(islice(blocks, batch)))
        labels = ids.masked_fill(ids == pad, -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens += int((ids != pad).sum())
        losses.append(loss.item())
        if number % 50 == 0 or number == steps:
            seconds = time.monotonic() - start
            mean = sum(losses[-50:]) / len(losses[-50:])
            left = seconds / number * (steps - number) / 60
            print(
                f"step {number}/{steps} loss {mean:.4f} {tokens / seconds:.0f} tok/s "
                f"{left:.1f} min left",
                flush=True,
            )
    last = losses[-max(1, steps // 20) :]
    return sum(last) / len(last), tokens


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, made: dict[str, object]
) -> None:
    """Write the folder transformers reads, and beside it how the model was made."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "PROVENANCE.json").write_text(json.dumps(made, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--batch", type=int, default=8, help=f"blocks of {BLOCK} tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.monotonic()
    tokenizer = train_tokenizer(islice(documents(args.seed), 20_000))
    blocks = pack(encoded(tokenizer, args.seed + 1), tokenizer.pad_token_id)
    model = make_model(tokenizer)
    loss, tokens = train(model, blocks, args.steps, args.batch, args.lr)
    made = {
        "script": "data/pretrain.py",
        "corpus": "data/corpus.py, data/problems.py, data/styles.py",
        "seed": args.seed,
        "steps": args.steps,
        "batch_blocks": args.batch,
        "block_tokens": BLOCK,
        "learning_rate": args.lr,
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "final_loss": round(loss, 4),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "threads": args.threads,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    save(model, tokenizer, args.output, made)
    print(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()
