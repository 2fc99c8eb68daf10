"""What rounding and the counting of ties do to PriFT's weights: `make bench-rounding`.

A causal language model scores every label token of a data set four times, through prift's own
tokenising and scorer: with its weights (and activations) in float32 and in bfloat16, and with its
logits in float32 and rounded to bfloat16. bfloat16 both is what the PriFT authors' code sees.

The reference is the paper's formula in float32: weights and logits in float32, ties=paper. Each
other way of deciding is compared with it, label token by label token:

    ties      share of tokens whose target has exactly the logit of another token (n_tie > 1)
    rank      share of tokens whose rank is another than in the reference
    logprob   mean |difference| of log q(y), in nats
    u         mean |difference| of the cumulative-mass score u, which lies in [0, 1]
    paper, official-code
              share of tokens whose PriFT-mass weight (1 if the score reaches tau, else 0) is
              another than in the reference, with ties counted as the paper or the authors' code
              does; for tau = 0.1, 0.5 and 0.9
    apart     share of tokens that the two ways of counting ties weigh differently

Prints two tables in Markdown; --json FILE writes these numbers and the counts behind them.
"""

import argparse
import json
from pathlib import Path

import torch

from prift.backends import hf
from prift.methods import weigher
from prift.models import load_config, locate, vocabulary_size
from prift.stats import TokenStats
from prift.store import spans
from prift.text.dataspec import DataSpec
from prift.text.examples import Examples, TextOptions

ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = str(ROOT / "data" / "model"), str(ROOT / "data" / "demo" / "train.jsonl")

REFERENCE = ("float32", "float32")
SETTINGS = (REFERENCE, ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
"""dtype of the weights and activations, dtype of the logits."""

TIES = ("paper", "official-code")
TAUS = (0.1, 0.5, 0.9)


def load(model: str, data: str, limit: int | None, max_length: int | None) -> tuple:
    """(folder, config, examples) as `prift precompute` reads them."""
    folder = locate(model)
    config = load_config(folder)
    text = TextOptions(limit=limit, max_length=max_length)
    examples, _ = DataSpec(data=(data,), text=text).load(folder, config)
    return folder, config, examples


def score(
    folder: Path,
    config,
    examples: Examples,
    setting: tuple[str, str],
    batch_tokens: int | None = None,
    device: str | None = None,
) -> tuple[TokenStats, str]:
    """(statistics of every label token in the order of the examples, name of the device).

    batch_tokens, device  as `hf.load` has them
    """
    dtype, logits_dtype = setting
    identity = hf.identify(folder, config, dtype=dtype, logits_dtype=logits_dtype, attention="auto")
    scorer = hf.load(
        folder, config, identity, batch_tokens=batch_tokens, device=device, say=lambda line: None
    )
    sequences = [example.input_ids for example in examples]
    positions = [spans.positions_of(spans.spans_of(e.label_mask)) for e in examples]
    found = dict(scorer.score(sequences, positions))
    stats = TokenStats.concatenate(found[i] for i in range(len(examples)))
    return stats, scorer.device_name


def decisions(stats: TokenStats, tau: float, ties: str) -> torch.Tensor:
    """bool [N]: which tokens PriFT-mass keeps."""
    return weigher("mass", "prior", {"threshold": str(tau), "ties": ties})(stats) > 0


def compare(stats: TokenStats, reference: TokenStats) -> dict:
    """Counts and means over all label tokens of one setting, beside the reference's.

    tied, rank_differs    tokens of n_tie > 1; tokens whose rank is another
    most_tied             the largest n_tie
    logprob, u            mean |difference|; largest_logprob, largest_u the largest
    decisions             per tau: for each way of counting ties `kept`, tokens of weight 1, and
                          `differ`, tokens of another weight than the reference's with ties=paper;
                          `apart`, tokens that the two ways of counting ties weigh differently
    """
    u, its_u = (s.log_mass_rank.double().exp() for s in (stats, reference))
    logprob = _apart(stats.logprob.double(), reference.logprob.double())
    found = {
        "tokens": len(stats.rank),
        "tied": int((stats.n_tie > 1).sum()),
        "most_tied": int(stats.n_tie.max()),
        "rank_differs": int((stats.rank != reference.rank).sum()),
        "logprob": float(logprob.mean()),
        "largest_logprob": float(logprob.max()),
        "u": float(_apart(u, its_u).mean()),
        "largest_u": float(_apart(u, its_u).max()),
        "decisions": {},
    }
    for tau in TAUS:
        truth = decisions(reference, tau, "paper")
        kept = {ties: decisions(stats, tau, ties) for ties in TIES}
        row = {
            t: {"kept": int(k.sum()), "differ": int((k != truth).sum())} for t, k in kept.items()
        }
        row["apart"] = int((kept["paper"] != kept["official-code"]).sum())
        found["decisions"][str(tau)] = row
    return found


def _apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(a == b, 0.0, (a - b).abs())  # two -inf do not differ


def measure(
    model: str = MODEL,
    data: str = DATA,
    limit: int | None = None,
    max_length: int | None = None,
) -> dict:
    """All settings of `compare`, and what was scored.

    limit       first rows of the data; None: all
    max_length  longest sequence in tokens, the rest is cut; None: the data must fit
    """
    folder, config, examples = load(model, data, limit, max_length)
    reference, device = score(folder, config, examples, REFERENCE)
    rows = []
    for setting in SETTINGS:
        stats = reference
        if setting != REFERENCE:
            stats, _ = score(folder, config, examples, setting)
        rows.append({"weights": setting[0], "logits": setting[1], **compare(stats, reference)})
    return {
        "model": folder.name,
        "data": Path(data).name,
        "vocabulary": vocabulary_size(config),
        "examples": len(examples),
        "tokens": examples.num_labels,
        "device": device,
        "torch": torch.__version__,
        "settings": rows,
    }


def tables(result: dict) -> str:
    """The numbers of `measure` as two tables in Markdown; shares in percent."""
    tokens, head = result["tokens"], f"{result['vocabulary']:,}"
    first = ["| V | weights | logits | ties | rank | logprob | u |"]
    first.append("|---:|---|---|---:|---:|---:|---:|")
    second = ["| V | weights | logits | paper | official-code | apart |"]
    second.append("|---:|---|---|---:|---:|---:|")
    for row in result["settings"]:
        begin = f"| {head} | {row['weights']} | {row['logits']} | "
        cells = [_percent([row["tied"]], tokens), _percent([row["rank_differs"]], tokens)]
        cells += [f"{row[name]:.4f}" if row[name] else "0" for name in ("logprob", "u")]
        first.append(begin + " | ".join(cells) + " |")
        at = [row["decisions"][str(tau)] for tau in TAUS]
        counts = [[a[ties]["differ"] for a in at] for ties in TIES] + [[a["apart"] for a in at]]
        second.append(begin + " | ".join(_percent(c, tokens) for c in counts) + " |")
    return "\n".join([*first, "", *second])


def _percent(counts: list[int], tokens: int) -> str:
    """As "0.17 / 0.43 / 0.39 %", a plain 0 where not one token was counted."""
    return " / ".join(f"{100 * c / tokens:.2f}" if c else "0" for c in counts) + " %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="folder of a model; default: the embedded")
    parser.add_argument("--data", default=DATA, help="data set; default: the demonstrations")
    parser.add_argument("--limit", type=int, help="first rows of the data")
    parser.add_argument("--max-length", type=int, help="longest sequence in tokens")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(options.model, options.data, options.limit, options.max_length)
    print(
        f"{result['device']}, torch {result['torch']}: {result['model']} over {result['data']}, "
        f"{result['examples']:,} examples, {result['tokens']:,} label tokens\n\n{tables(result)}"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
