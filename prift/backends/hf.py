"""The prior run by transformers: token ids in, statistics out.

Batches of like length, longest first, go through the body alone; the rows that predict a scored
position are folded against the vocabulary (fold.py). On a GPU the next batch is launched before
the last one is waited for.
"""

import functools
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prift.backends import BadLogits, TooLarge
from prift.backends.batches import Batches, Group
from prift.backends.bodies import rope_edge, tensor
from prift.backends.engine import WORTH_COMPILING, choose_sums, tell_products
from prift.backends.full import full_stats, most_tokens
from prift.backends.ways import Ways
from prift.errors import ModelError
from prift.fold import Fold
from prift.headcheck import check_causal, head_or_reason
from prift.heads import Head
from prift.identity import PriorIdentity, config_digest, quantization_of, weights_digest
from prift.memory import free_memory, is_out_of_memory
from prift.models import attention_for, checkpoint_dtype, load_model, weight_files
from prift.placement import place
from prift.stats import CORE, NotADistribution, TokenStats
from prift.store import versions

START_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Budget of a batch to begin with, in padded tokens: more makes a device no faster."""


def identify(
    folder: Path, config: Any, *, dtype: str, logits_dtype: str, attention: str
) -> PriorIdentity:
    """Identity of the prior in `folder` as this backend would run it; loads no weights.

    dtype may be 'auto' (the checkpoint's) and attention 'auto' (what the architecture needs).
    """
    return PriorIdentity(
        weights=weights_digest(weight_files(folder)),
        config=config_digest(config),
        adapter=None,
        dtype=checkpoint_dtype(folder, config) if dtype == "auto" else dtype,
        logits_dtype=logits_dtype,
        attention=attention_for(config, attention),
        quantization=quantization_of(config),
        backend="hf",
        stats_version=versions.STATS_VERSION,
    )


def load(
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    *,
    batch_tokens: int | None = None,
    compiled: bool | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = print,
) -> "HFScorer":
    """Loads the prior that `identify` described. device: see placement.place."""
    placed = place(folder, identity.dtype, device)
    model = load_model(
        folder,
        config,
        dtype=identity.dtype,
        attention=identity.attention,
        trust_remote_code=trust_remote_code,
        device_map=placed.device_map,
        max_memory=placed.max_memory,
    )
    return HFScorer(model, identity, batch_tokens=batch_tokens, compiled=compiled, say=say)


@dataclass(frozen=True)
class _Launched:
    """A batch that a device is at work on; `finish` waits for its statistics."""

    batch: list[Group]
    members: list[int]
    positions: list[np.ndarray]
    finish: Callable[[], TokenStats]

    def split(self, stats: TokenStats) -> Iterator[tuple[int, TokenStats]]:
        """Each sequence's own. Raises BadLogits."""
        ends = np.cumsum([len(p) for p in self.positions])
        try:
            stats.check()
        except NotADistribution as error:
            which = int(np.searchsorted(ends, error.row, "right"))
            position = self.positions[which][error.row - ends[which]]  # counted from the end
            raise BadLogits(self.members[which], int(position)) from error
        for index, end, where in zip(self.members, ends, self.positions, strict=True):
            begin = end - len(where)
            yield index, stats.map(lambda x, a=begin, b=end: x[a:b])


class HFScorer:
    """Scores with a transformers model that is already on its devices.

    batch_tokens  padded tokens in a batch to begin with (a longer sequence runs alone); halved
                  where memory does not suffice
    compiled      whether the sums over the vocabulary are compiled; None: where it pays
    say           told, once each, what was chosen

    Raises ModelError for a model whose tokens see those behind them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        identity: PriorIdentity,
        *,
        batch_tokens: int | None = None,
        compiled: bool | None = None,
        say: Callable[[str], None] = print,
    ):
        self.identity = identity
        self._model, self._say, self._compiled = model.eval(), say, compiled
        self._device = model.get_input_embeddings().weight.device
        self._sums: Callable[..., torch.Tensor] | None = None
        self._logits = 0  # folded so far
        check_causal(model)
        self._budget = batch_tokens or START_TOKENS.get(self._device.type, 65536)
        self._vocabulary = model.config.get_text_config().vocab_size
        self._head = self._understood()
        tell_products(model.dtype, self._device, say)
        self._ways = None if self._head is None else Ways(model, self._head, say)

    def _understood(self) -> Head | None:
        """The model's head, or None where its own logits must do. Raises ModelError."""
        head = head_or_reason(self._model)
        if isinstance(head, Head):
            return head
        if self.identity.logits_dtype == "float32" and self._model.dtype != torch.float32:
            raise ModelError(
                f"{head} Its own logits are rounded to {self.identity.dtype}. Use --dtype float32 "
                "for exact ones, or --logits-dtype bfloat16."
            )
        self._say(f"{head} Scoring from the model's full logits, which is slower.")
        self._budget = min(self._budget, most_tokens(self._device, self._vocabulary))
        return None

    @property
    def device_name(self) -> str:
        """The device's model name, for provenance."""
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return platform.processor() or platform.machine()

    def score(
        self,
        sequences: Sequence[np.ndarray],
        positions: Sequence[np.ndarray],
        names: Sequence[str] = CORE,
    ) -> Iterator[tuple[int, TokenStats]]:
        """See backends.Scorer."""
        self._choose(sum(map(len, positions)) * self._vocabulary)
        if self._ways is None:
            groups = [Group([i], [len(s)]) for i, s in enumerate(sequences)]
        else:
            groups = self._ways.groups(sequences, positions)
        batches = Batches(groups, self._budget, rope_edge(self._model.config))
        waiting = deque[_Launched]()
        while batches or waiting:
            if batches:
                batch = batches.take()
                members = [i for group in batch for i in group.members]
                where = [positions[i] for i in members]
                launch = functools.partial(
                    self._launch, batch, [sequences[i] for i in members], where, names
                )
                finish = self._attempt(batches, batch, launch)
                if finish is not None:
                    waiting.append(_Launched(batch, members, where, finish))
            # A GPU works on one batch while the next is prepared.
            if waiting and (len(waiting) > (self._device.type == "cuda") or not batches):
                landed = waiting.popleft()
                stats = self._attempt(batches, landed.batch, landed.finish)
                if stats is not None:
                    yield from landed.split(stats)

    def close(self) -> None:
        """Nothing was started."""

    def _choose(self, logits: int) -> None:
        """Once, by the first window; and again where small windows turn out to be many."""
        before, self._logits = self._logits, self._logits + logits
        many = self._device.type == "cpu" and before < WORTH_COMPILING <= self._logits
        if self._sums is None or (self._compiled is None and many):
            self._sums = choose_sums(self._device, self._logits, self._compiled, self._say)

    def _attempt(self, batches: Batches, batch: list[Group], work: Callable[[], Any]) -> Any:
        """What the work answers, or None where memory did not suffice and the batch goes back."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_memory()  # outside of `except`, whose traceback holds the batch's tensors
        if not batches.give_back(batch):
            raise TooLarge(batch[0].members[0])
        self._budget = batches.budget
        self._say(f"out of memory: going on with batches of {self._budget:,} tokens")
        return None

    @torch.inference_mode()
    def _launch(
        self,
        batch: list[Group],
        sequences: list[np.ndarray],
        positions: list[np.ndarray],
        names: Sequence[str],
    ) -> Callable[[], TokenStats]:
        """Starts a batch; the answer waits for the statistics of all positions, in order, on the
        CPU."""
        if self._ways is None:
            options = {"logits_dtype": self.identity.logits_dtype, "sums": self._sums}
            stats = full_stats(self._model, sequences, positions, names=names, **options)
            return lambda: stats.map(torch.Tensor.cpu)
        hidden_NH = self._ways.rows(batch, sequences, positions)
        targets = np.concatenate([s[p] for s, p in zip(sequences, positions, strict=True)])
        fold = Fold(self._head, self.identity.logits_dtype, names, self._sums)
        landing = fold.launch(hidden_NH, tensor(targets, hidden_NH.device))
        return torch.inference_mode()(lambda: landing().map(torch.Tensor.cpu))
