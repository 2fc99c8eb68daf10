"""The check before the first step: does the model say what the cache says that it said?

A row of a cache is found by its token ids, and whose numbers they are is a claim. Where the model
to be trained is the prior itself, nothing has been learnt yet, so the claim can be tried: a few
sequences are scored again with the model as loaded, and compared.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prift.agreement import bound
from prift.dataset import PriorDataset
from prift.errors import CacheError
from prift.fold import Fold
from prift.headcheck import evaluating
from prift.heads import body_of, head_of, run_body
from prift.identity import PriorIdentity, config_digest, weights_digest
from prift.lora import base_of
from prift.models import load_config, weight_files
from prift.ranks import from_each_rank, from_rank_zero, rank_and_size
from prift.training_data import TrainOptions

_SEQUENCES, _TOKENS = 8, 2000  # scored by each process
_SHOWN = 5  # tokens in the message


@dataclass(frozen=True, slots=True)
class _Compared:
    """What one process found: label tokens, their mean |difference|, the largest as lines."""

    tokens: int
    mean: float
    largest: list[str]


def check_start(
    model: torch.nn.Module,
    data: PriorDataset,
    prior: PriorIdentity | None,
    options: TrainOptions,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Raises CacheError, in every process, where the statistics are not those of `model`.

    Every process scores sequences of its own. Nothing happens where the loss reads no prior, where
    the prior is another model than that in `folder`, on --resume and with --skip-check.
    """
    if options.skip_check or options.resume or not _is_prior(folder, prior, options):
        return
    dtype = str(base_of(model).dtype).removeprefix("torch.")
    limit = _bound(dtype, prior)
    found = from_each_rank(lambda: _compare(model, data, prior.logits_dtype))
    for one in found:
        if not one.mean <= limit:  # NaN too
            raise CacheError(
                f"the model does not say what prior {prior.id} in {options.cache} holds: over "
                f"{one.tokens:,} label tokens logprob differs by {one.mean:.4f} on average, where "
                f"rounding explains {limit:g} ({dtype} now; {prior.dtype} when scored, logits "
                f"{prior.logits_dtype}). The largest differences:\n"
                + "\n".join(one.largest)
                + "\nUsual causes: these ids were scored with another chat template or tokenizer "
                "than they are filed under; the statistics are another model's; a column is "
                "shifted by a token. Score the data again into another --cache with prift "
                "precompute, or train on what is there with --skip-check."
            )
    tokens = sum(one.tokens for one in found)
    say(
        f"the model agrees with the prior: logprob differs by {max(one.mean for one in found):.2g} "
        f"on average over {tokens:,} label tokens"
    )


def _is_prior(folder: Path, prior: PriorIdentity | None, options: TrainOptions) -> bool:
    """Whether the loss reads statistics of the very model in `folder`."""
    if not options.reads_prior or prior is None or prior.adapter is not None:
        return False
    if options.prior is None:
        return True  # it was chosen by the digests of this model
    if prior.config != config_digest(load_config(folder, options.trust_remote_code)):
        return False
    files = weight_files(folder)
    return prior.weights == from_rank_zero(lambda: weights_digest(files))


def _bound(dtype: str, prior: PriorIdentity) -> float:
    tf32 = torch.cuda.is_available() and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return bound({dtype, prior.dtype, prior.logits_dtype} | ({"tf32"} if tf32 else set()))


def _chosen(lengths: np.ndarray, rank: int, size: int) -> list[int]:
    """Examples that this process scores: from each of several stretches of the data, which may
    have come from several caches, the first whose length is nearest to the median."""
    median = np.median(lengths)
    count = int(np.clip(_TOKENS // median, 1, _SEQUENCES)) * size
    stretches = np.array_split(np.arange(len(lengths)), min(count, len(lengths)))
    return [int(s[np.abs(lengths[s] - median).argmin()]) for s in stretches[rank::size]]


@torch.no_grad()
def _compare(model: torch.nn.Module, data: PriorDataset, logits_dtype: str) -> _Compared:
    """Scores this process's sequences, one at a time, without dropout, noise or adapters."""
    base = base_of(model)
    head, body = head_of(base), body_of(base)
    if not head.weight.any():  # FSDP may fill only a machine's first process before it wraps
        return _Compared(0, 0.0, [])
    fold = Fold(head, logits_dtype)  # rounding large logits alone may differ by more than the bound
    differences, lines = [], []
    with evaluating(model), nullcontext() if base is model else model.disable_adapter():
        for index in _chosen(data.examples.lengths, *rank_and_size()):
            item: dict[str, Any] = data.whole(index)
            ids = torch.from_numpy(item["input_ids"].astype(np.int64)).to(base.device)
            places = torch.from_numpy(item["places"]).to(base.device)
            cached = torch.from_numpy(item["prior"]["logprob"].copy())
            hidden = run_body(body, ids[None], head)[0, places - 1]
            found = fold(hidden, ids[places]).logprob.cpu()
            same = cached == found  # -inf too, whose difference is NaN
            differences.append(torch.where(same, 0.0, (cached - found).abs().double()))
            where = data.examples.where(index)
            lines += [
                f"  {where}, position {place}: cached {old:.4f}, found {new:.4f}"
                for place, old, new in zip(
                    places.tolist(), cached.tolist(), found.tolist(), strict=True
                )
            ]
    if not lines:
        return _Compared(0, 0.0, [])
    joined = torch.cat(differences)
    largest = joined.nan_to_num(torch.inf).argsort(descending=True, stable=True)[:_SHOWN]
    return _Compared(len(joined), float(joined.mean()), [lines[i] for i in largest.tolist()])
