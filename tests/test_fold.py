"""Fold: hidden states in, statistics out, against the float64 product and its naive statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from prift import fold as fold_module
from prift.fold import Fold, compiled_sums
from prift.heads import Head
from prift.stats import CORE, EXTENDED, TokenStats, tile_sums
from tests import references
from tests.paths import DEVICES

ALL = CORE + EXTENDED
FLOATS = ("logprob", "log_mass_rank", "entropy")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.125},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "scale": 2.5, "softcap": 8.0},
}


def sums_of(name: str, device: str = "cpu"):
    return compiled_sums(device) if name == "compiled" else tile_sums


def case(kind: str, vocabulary: int, dtype: str, device: str, rows: int = 40, width: int = 96):
    """(hidden, head, targets, exact float64 logits): half of the targets are likely ones."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(rows, width, generator=generator).to(getattr(torch, dtype))
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(hidden.dtype)
    options = dict(HEADS[kind])
    bias = None
    if options.pop("bias", False):
        bias = torch.randn(vocabulary, generator=generator).to(hidden.dtype)
    head = Head(weight, bias, **options)
    exact = hidden.double() @ weight.double().T
    exact = replace(head, weight=weight).finish(exact + (0 if bias is None else bias.double()))
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    likely = torch.distributions.Categorical(logits=exact[: rows // 2]).sample()
    targets[: rows // 2] = likely
    moved = replace(head, weight=weight.to(device), bias=None if bias is None else bias.to(device))
    return hidden.to(device), moved, targets.to(device), exact.numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sums", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("vocabulary", [301, 5000])
def test_error_budget(kind, vocabulary, dtype, sums, device):
    """No further from float64 than float32 code on the same product, near-ties aside."""
    hidden, head, targets, exact = case(kind, vocabulary, dtype, device)
    with torch.inference_mode():
        fold = Fold(head, "float32", CORE, sums_of(sums, device))
        found = fold(hidden, targets).map(torch.Tensor.cpu)
        naive_logits = head.logits(hidden).cpu().numpy()
    decided = 0
    for i, target in enumerate(targets.tolist()):
        truth = references.token_stats(exact[i], target)
        naive = references.naive_float32(naive_logits[i], target)
        near = (np.abs(exact[i] - exact[i, target]) < 1e-4).sum() > 1
        for name in FLOATS[::2] if near else FLOATS:
            budget = abs(naive[name] - truth[name]) + 1e-5 * max(1, abs(truth[name]))
            assert abs(float(getattr(found, name)[i]) - truth[name]) <= budget, name
        if not near:
            assert (found.rank[i], found.n_tie[i]) == (truth["rank"], 1)
            decided += 1
    assert decided > len(targets) // 3


@pytest.mark.parametrize("names", [CORE, (*CORE, "collision"), ALL])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HEADS)
def test_tiles_equal_whole_rows(kind, dtype, logits_dtype, names):
    """Folded over tiles or taken from whole rows of logits: the same numbers, ties included."""
    hidden, head, targets, _ = case(kind, 5000, dtype, "cpu", rows=600)
    fold = Fold(head, logits_dtype, names)
    with torch.inference_mode():
        folded, whole = fold(hidden, targets), fold._whole_rows(hidden, targets)
    assert folded.names() == whole.names()
    differing = (folded.rank != whole.rank) | (folded.n_tie != whole.n_tie)
    # The two cut the product differently, so its last bits, and with them near-ties, may differ.
    assert differing.sum() <= (0.02 if logits_dtype == "float32" else 0.1) * len(targets)
    for name in set(names) - {"rank", "n_tie"}:
        a, b = getattr(folded, name)[~differing], getattr(whole, name)[~differing]
        loose = 1e-5 if logits_dtype == "float32" else 0.02
        torch.testing.assert_close(a, b, rtol=loose, atol=loose)
    if logits_dtype == "bfloat16":
        assert (folded.n_tie > 1).float().mean() > 0.05  # which is what the rounding does


def test_rounded_logits_are_counted_as_they_are():
    """bfloat16 logits: every statistic is that of the rounded row, target included."""
    hidden, head, targets, _ = case("plain", 3000, "bfloat16", "cpu", rows=100)
    with torch.inference_mode():
        found = Fold(head, "bfloat16")(hidden, targets)
        rounded = head.rounded(hidden)
    assert rounded.dtype == torch.bfloat16
    agreeing = 0
    for i, target in enumerate(targets.tolist()):
        truth = references.token_stats(rounded[i].float().numpy(), target)
        agreeing += (int(found.rank[i]), int(found.n_tie[i])) == (truth["rank"], truth["n_tie"])
        assert float(found.entropy[i]) == pytest.approx(truth["entropy"], abs=2e-3)
    assert agreeing >= 95  # a tile's product may round single logits the other way


@pytest.mark.parametrize("sums", ["eager", "compiled"])
def test_twins_in_the_projection_tie(sums):
    """Equal rows of the projection have equal logits, whichever tile they fall into, but for single
    ones that torch's product rounds the other way."""
    hidden, head, targets, _ = case("plain", 9000, "float32", "cpu", rows=64)
    twin = (targets + 4001) % 9000
    head.weight[twin] = head.weight[targets]
    with torch.inference_mode():
        found = Fold(head, "float32", CORE, sums_of(sums))(hidden, targets)
        logits = head.logits(hidden)
    own = logits.gather(1, targets[:, None])
    assert (found.n_tie >= 2).float().mean() > 0.9
    assert (found.n_tie == (logits == own).sum(1)).float().mean() > 0.9


def test_a_wrong_guess_of_the_targets_logit_changes_nothing(monkeypatch):
    """Rows whose guess is off by a bit are done again: only speed rests on the guess."""
    hidden, head, targets, _ = case("plain", 5000, "float32", "cpu")
    fold = Fold(head)
    honest = fold._target_logits(hidden, targets)
    right = fold(hidden, targets)
    off = honest.clone()
    off[::3] = torch.nextafter(off[::3], torch.tensor(torch.inf))
    monkeypatch.setattr(Fold, "_target_logits", lambda *_: off)
    sure = fold.block(hidden, targets).stats()[1]
    assert sure.tolist() == [i % 3 != 0 for i in range(len(targets))]
    found = fold(hidden, targets)
    for name in CORE:
        torch.testing.assert_close(getattr(found, name), getattr(right, name), rtol=1e-5, atol=1e-5)


def test_rows_out_of_range_of_their_reference_are_done_again():
    """A largest logit far above the first tile's, and a target far below: still exact."""
    z = torch.zeros(4, 9000)
    z[0, 8000], z[1, 8500], z[2, :] = 200.0, 90.0, torch.linspace(0, 150, 9000)
    z[3, 4000] = -150.0
    targets = torch.tensor([5, 8500, 10, 4000])
    fold = Fold(Head(z.T.contiguous()))
    hidden = torch.eye(4)
    assert not fold.block(hidden, targets).stats()[1][[0, 2, 3]].any()
    found = fold(hidden, targets)
    for i, target in enumerate(targets.tolist()):
        truth = references.token_stats(z[i].numpy(), target)
        assert (int(found.rank[i]), int(found.n_tie[i])) == (truth["rank"], truth["n_tie"])
        for name in FLOATS:
            assert float(getattr(found, name)[i]) == pytest.approx(truth[name], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("sums", ["eager", "compiled"])
@pytest.mark.parametrize("rows", [0, 1, 2, 511, 512, 513, 1025])
def test_any_number_of_rows(rows, sums):
    hidden, head, targets, _ = case("plain", 301, "float32", "cpu", rows=1025)
    fold = Fold(head, "float32", CORE, sums_of(sums))
    some = fold(hidden[:rows], targets[:rows])
    whole = fold(hidden, targets)
    assert len(some.rank) == rows
    torch.testing.assert_close(some.logprob, whole.logprob[:rows], rtol=1e-5, atol=1e-5)


def test_the_same_rows_twice_give_the_same_bits():
    hidden, head, targets, _ = case("softcap", 5000, "bfloat16", "cpu", rows=700)
    one, two = (Fold(head)(hidden, targets) for _ in range(2))
    assert all(torch.equal(getattr(one, n), getattr(two, n)) for n in CORE)


def test_compiling_does_not_go_on_for_ever():
    """Rows, tiles, dtypes and strides of all kinds share a handful of compiled forms."""
    from torch._dynamo.utils import counters

    def run(rows: int, vocabulary: int, dtype: str) -> TokenStats:
        hidden, head, targets, _ = case("plain", vocabulary, dtype, "cpu", rows=rows)
        logits_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
        with torch.inference_mode():
            return Fold(head, logits_dtype, CORE, compiled_sums())(hidden, targets)

    for dtype in ("float32", "bfloat16"):
        run(5, 301, dtype), run(40, 5000, dtype), run(512, 2048, dtype)
    before = counters["stats"]["unique_graphs"]
    for rows in (3, 17, 100, 513):
        for vocabulary in (37, 700, 6000):
            for dtype in ("float32", "bfloat16"):
                run(rows, vocabulary, dtype)
    assert counters["stats"]["unique_graphs"] - before <= 2
    assert not [k for k in counters["graph_break"] if "recompile" in k]


def test_blocks_keep_to_their_bytes():
    V = 151_936
    fold = Fold(Head(torch.empty(V, 2)))
    assert fold._rows() * V * 4 <= 24 << 20
    assert fold_module._ROWS * fold_module._TILE_COLUMNS[True] * 4 <= 8 << 20
