"""How far the backends are apart in bfloat16, and quantised priors from those they were made of.

The embedded model over the demonstrations, all label tokens, through both backends' scorers. For
each pair of priors, as in benchmarks/rounding.py: mean and largest |difference| of log q(y) in
nats, mean |difference| of the cumulative-mass score u, and the share of tokens whose PriFT-mass
weight is another, for three thresholds. `ties`: targets with exactly the logit of another token.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.quantised import quantise
from benchmarks.rounding import DATA, MODEL, TAUS, compare, load
from prift.errors import PriftError, first_line
from prift.request import request
from prift.stats import TokenStats
from prift.store.spans import positions_of
from tests.vllm.scorers import scorer

_BFLOAT16 = {"backend": "vllm", "dtype": "bfloat16"}
PRIORS: dict[str, dict[str, Any]] = {
    "hf, float32": {},
    "hf, bfloat16": {"dtype": "bfloat16"},
    "vllm, float32": {"backend": "vllm"},
    "vllm, bfloat16": _BFLOAT16,
    "vllm, bfloat16, logits too": {**_BFLOAT16, "logits_dtype": "bfloat16"},
    "vllm, fp8 per channel": {**_BFLOAT16, "quantization": "fp8_per_channel"},
    "vllm, fp8": {**_BFLOAT16, "quantization": "fp8"},
    "vllm, int8 weights only": {**_BFLOAT16, "quantization": "int8_per_channel_weight_only"},
    "vllm, int8 (W8A8)": {**_BFLOAT16, "stored": "int8"},
    "vllm, int4 (W4A16)": {**_BFLOAT16, "stored": "int4"},
}
"""Options of the scorer; `stored`: the folder is quantised so, see benchmarks/quantised.py."""

PAIRS = (
    ("vllm, float32", "hf, float32"),
    ("hf, bfloat16", "hf, float32"),
    ("vllm, bfloat16", "hf, float32"),
    ("vllm, bfloat16", "hf, bfloat16"),
    ("vllm, bfloat16, logits too", "hf, float32"),
    ("vllm, fp8 per channel", "vllm, bfloat16"),
    ("vllm, fp8", "vllm, bfloat16"),
    ("vllm, int8 weights only", "vllm, bfloat16"),
    ("vllm, int8 (W8A8)", "vllm, bfloat16"),
    ("vllm, int4 (W4A16)", "vllm, bfloat16"),
)


def measure(limit: int, model: str = MODEL, data: str = DATA) -> list[dict]:
    """A row for each of PAIRS over the first rows of the data; `error` where vLLM does not run
    it."""
    folder, _, examples = load(model, data, limit, None)
    sequences = [example.input_ids for example in examples]
    positions = [positions_of(spans) for spans in request(examples).spans]

    @functools.cache
    def stats(name: str) -> TokenStats:
        options = dict(PRIORS[name])
        with tempfile.TemporaryDirectory() as place:
            stored = options.pop("stored", None)
            source = quantise(folder, stored, Path(place) / "model") if stored else str(folder)
            with scorer(source, **options) as one:
                found = dict(one.score(sequences, positions))
        return TokenStats.concatenate(found[i] for i in range(len(sequences)))

    rows = []
    for one, other in PAIRS:
        row: dict[str, Any] = {"prior": one, "than": other}
        try:
            rows.append({**row, **compare(stats(one), stats(other))})
        except PriftError as error:
            rows.append({**row, "error": first_line(error)})
    return rows


def tables(rows: list[dict]) -> str:
    """In Markdown; shares in percent."""
    taus = " / ".join(map(str, TAUS))
    lines = [
        f"| prior | compared with | logprob, mean | largest | u, mean | PriFT-mass, tau = {taus} |"
        " ties |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        begin = f"| {row['prior']} | {row['than']} | "
        if "error" in row:
            lines.append(f"{begin}not measured: {row['error']} |")
            continue
        differ = [row["decisions"][str(tau)]["paper"]["differ"] for tau in TAUS]
        shares = " / ".join(f"{100 * n / row['tokens']:.2f}" for n in differ)
        lines.append(
            f"{begin}{row['logprob']:.2g} | {row['largest_logprob']:.2g} | {row['u']:.2g} | "
            f"{shares} % | {100 * row['tied'] / row['tokens']:.2f} % |"
        )
    tokens = next((row["tokens"] for row in rows if "tokens" in row), 0)
    threads = torch.get_num_threads()
    return "\n".join([f"{tokens:,} label tokens, {threads} threads", "", *lines])
