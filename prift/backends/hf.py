"""The prior run by transformers: token ids in, statistics out.

Sequences are sorted by length, longest first (memory trouble comes early), and cut into batches
under a token budget. Batches are padded on the right with explicit position ids, whatever a
tokenizer would say, so position t of a sequence is position t of the model. The body runs alone;
only the rows that predict a scored position meet the vocabulary, a block at a time.
"""

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prift.backends import BadLogits
from prift.heads import Head, body_of, check_head, head_of
from prift.identity import PriorIdentity, config_digest, quantization_of, weights_digest
from prift.models import attention_for, checkpoint_dtype, load_model, weight_files
from prift.stats import STATS_VERSION, NotADistribution, TokenStats, token_stats

_LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of a float32 block; statistics take 3 more
DEFAULT_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}


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
        stats_version=STATS_VERSION,
    )


def load(
    folder: Path,
    config: Any,
    identity: PriorIdentity,
    *,
    batch_tokens: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> "HFScorer":
    """Loads the prior that `identify` described. device: default CUDA where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(
        folder,
        config,
        dtype=identity.dtype,
        attention=identity.attention,
        trust_remote_code=trust_remote_code,
    )
    return HFScorer(model.to(device), identity, batch_tokens=batch_tokens)


class HFScorer:
    """Scores with a transformers model that is already on its device.

    batch_tokens  padded tokens in a batch (a longer sequence runs alone); default by device
    """

    def __init__(
        self, model: torch.nn.Module, identity: PriorIdentity, *, batch_tokens: int | None = None
    ):
        self.identity = identity
        self._model = model.eval()
        self._body, self._head = body_of(model), head_of(model)
        self._device = self._head.weight.device
        self._batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS.get(self._device.type, 32768)
        check_head(model, self._head)

    @property
    def device_name(self) -> str:
        """The device's model name, for provenance."""
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return platform.processor() or platform.machine()

    def score(
        self, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, TokenStats]]:
        """See backends.Scorer."""
        for batch in batches_by_length([len(s) for s in sequences], self._batch_tokens):
            where = [positions[i] for i in batch]
            ends = np.cumsum([len(p) for p in where])
            try:
                stats = self._score_batch([sequences[i] for i in batch], where)
            except NotADistribution as error:
                which = int(np.searchsorted(ends, error.row, "right"))
                position = where[which][error.row - ends[which]]  # counted from the end
                raise BadLogits(batch[which], int(position)) from error
            for index, end, size in zip(batch, ends, map(len, where), strict=True):
                yield index, stats.map(lambda x, a=end - size, b=end: x[a:b])

    @torch.inference_mode()
    def _score_batch(self, sequences: list[np.ndarray], positions: list[np.ndarray]) -> TokenStats:
        """Statistics of all positions of all sequences, joined in order, on the CPU."""
        rows = np.repeat(np.arange(len(sequences)), [len(p) for p in positions])
        targets = np.concatenate([s[p] for s, p in zip(sequences, positions, strict=True)])
        hidden_BTH = self._hidden(sequences)
        # Position t is predicted by the hidden state of position t - 1.
        hidden_NH = hidden_BTH[self._tensor(rows), self._tensor(np.concatenate(positions) - 1)]
        del hidden_BTH
        targets_N = self._tensor(targets)
        return stats_of_rows(hidden_NH, self._head, targets_N, self.identity.logits_dtype)

    def _hidden(self, sequences: list[np.ndarray]) -> torch.Tensor:
        """Hidden states [B, T, H] after the final norm, sequences padded on the right.

        No attention mask: a causal model's tokens never see the padding behind them, and without
        a mask attention takes its fast causal path.
        """
        longest = max(len(s) for s in sequences)
        ids_BT = np.zeros((len(sequences), longest), np.int64)
        for b, sequence in enumerate(sequences):
            ids_BT[b, : len(sequence)] = sequence
        place_BT = np.tile(np.arange(longest), (len(sequences), 1))
        return self._body(
            input_ids=self._tensor(ids_BT),
            position_ids=self._tensor(place_BT),
            use_cache=False,
        ).last_hidden_state

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.int64, device=self._device)


def batches_by_length(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches, longest sequences first; longest x size of a batch <= budget tokens."""
    batch: list[int] = []
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def stats_of_rows(
    hidden_NH: torch.Tensor, head: Head, targets_N: torch.Tensor, logits_dtype: str
) -> TokenStats:
    """Statistics [N] on the CPU, from hidden states; a block of rows x vocabulary at a time.

    logits_dtype 'bfloat16' rounds the logits as the PriFT authors' code does.
    Raises NotADistribution.
    """
    budget = _LOGITS_BYTES.get(hidden_NH.device.type, 256 << 20)
    block = max(1, budget // (4 * head.weight.shape[0]))
    found = []
    for i in range(0, len(targets_N), block):
        try:
            found.append(
                _block_stats(hidden_NH[i : i + block], head, targets_N[i : i + block], logits_dtype)
            )
        except NotADistribution as error:
            raise NotADistribution(i + error.row) from error
    return TokenStats.concatenate(found)


def _block_stats(
    hidden_RH: torch.Tensor, head: Head, targets_R: torch.Tensor, logits_dtype: str
) -> TokenStats:
    """One block's; its logits are gone before the next block's are made."""
    z_RV = head.logits(hidden_RH)
    if logits_dtype == "bfloat16":
        z_RV = z_RV.bfloat16().float()
    return token_stats(z_RV, targets_R).map(torch.Tensor.cpu)
