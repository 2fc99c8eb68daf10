"""A chunk's cross-entropy and gradient, over several tiles and whole, compiled and not; extreme
logits too."""

import functools
import subprocess
import sys

import pytest
import torch

from prift import chunk as chunk_module
from prift.chunk import Chunk, sums_for
from prift.heads import Head
from prift.native import compiler
from prift.stats import STATISTICS, tile_sums
from prift.wholechunk import Passes, WholeChunk, passes
from tests.references import token_stats as naive_stats

V, H = 5000, 24
MADE = {
    "tiles": Chunk,
    "whole": functools.partial(WholeChunk, made=Passes()),
    "whole-compiled": lambda *given: WholeChunk(*given, made=passes("cpu")),
}


@pytest.fixture(params=MADE)
def made(request):
    return MADE[request.param]


def naive(head: Head, hidden, targets, weights):
    """(nll, gradient of sum(weights * nll) at the raw projection), float64, every logit at once."""
    raw = hidden.double() @ head.weight.double().T
    raw = (raw + (0 if head.bias is None else head.bias.double())).requires_grad_()
    z = raw * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (nll * weights.double()).sum().backward()
    return nll.detach(), raw.grad


def gradient(chunk, weights) -> torch.Tensor:
    """The tiles side by side."""
    return torch.cat([g.clone() for _, g in chunk.gradients(weights)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.3}, {"softcap": 4.0}, {"softcap": 9.0, "scale": 2.0}]
)
@pytest.mark.parametrize("rows", [1, 2, 37])
def test_nll_and_gradient_are_the_naive_ones(made, rows, options, dtype):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, H).to(dtype)
    head = Head((torch.randn(V, H) * 0.5).to(dtype), torch.randn(V).to(dtype), **options)
    targets, weights = torch.randint(0, V, (rows,)), torch.randn(rows)
    targets[0] = V - 1
    nll, wanted = naive(head, hidden, targets, weights)
    chunk = made(head, hidden, targets)
    torch.testing.assert_close(chunk.nll_C.double(), nll, rtol=1e-5, atol=1e-5)
    found = gradient(chunk, weights).double()
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    if made is Chunk:
        without = Chunk(head, hidden, targets, keep=False)
        assert torch.equal(without.nll_C, chunk.nll_C)


@pytest.mark.parametrize("top", [50.0, 70.0, 80.0, 87.0, 95.0, 3000.0])
def test_a_largest_logit_far_above_the_first_tile(made, top):
    """Exponentials overflow around the first tile's largest logit, and are made anew."""
    z = torch.zeros(3, V)
    z[0, 4000], z[1, 4999], z[2, 2500] = top, top, -top
    hidden, head = torch.eye(3), Head(z.T.contiguous())
    targets, weights = torch.tensor([4000, 7, 2500]), torch.tensor([1.0, 1e-6, 2.0])
    nll, wanted = naive(head, hidden, targets, weights)
    chunk = made(head, hidden, targets)
    torch.testing.assert_close(chunk.nll_C.double(), nll, rtol=1e-6, atol=1e-6)
    assert (gradient(chunk, weights).double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_logits_of_minus_infinity_have_no_gradient(made):
    hidden = torch.randn(4, H)
    bias = torch.zeros(V)
    bias[::2] = -torch.inf
    head = Head(torch.randn(V, H), bias)
    targets = torch.tensor([1, 3, 5, 4999])
    nll, wanted = naive(head, hidden, targets, torch.ones(4))
    chunk = made(head, hidden, targets)
    torch.testing.assert_close(chunk.nll_C.double(), nll, rtol=1e-5, atol=1e-5)
    found = gradient(chunk, torch.ones(4)).double()
    assert (found[:, ::2] == 0).all() and (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_nan_stays_nan(made):
    """A broken model shows, in the loss and nowhere as a plausible number."""
    hidden = torch.randn(2, H)
    hidden[1, 3] = torch.nan
    chunk = made(Head(torch.randn(V, H)), hidden, torch.tensor([1, 2]))
    assert chunk.nll_C.isnan().tolist() == [False, True]


def assert_naive(found, head, hidden, targets) -> None:
    logits = head.logits(hidden).numpy()
    for row, (z, y) in enumerate(zip(logits, targets.tolist(), strict=True)):
        wanted = naive_stats(z, y)
        for name in found.names():
            value = getattr(found, name)[row].item()
            assert value == pytest.approx(wanted[name], rel=2e-5, abs=2e-6), (row, name)


ASKED = {
    "core": ("log_mass_rank", "rank", "n_tie", "entropy"),
    "squares": ("collision",),
    "top": ("entropy_top20", "logprob"),
    "all": STATISTICS["extended"],
}


@pytest.mark.parametrize("names", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("vocabulary", [7, 100, 2048, 4096, V])
def test_statistics_of_the_rows(made, vocabulary, names):
    """As rules online ask for them: one tile, several, and one that is no whole one."""
    torch.manual_seed(0)
    head = Head(torch.randn(vocabulary, H) * 0.5, torch.randn(vocabulary), 0.7)
    hidden, targets = torch.randn(6, H), torch.randint(0, vocabulary, (6,))
    found = asked(made, head, hidden, targets, names)
    assert set(names) <= set(found.names())
    assert_naive(found, head, hidden, targets)


def asked(made, head, hidden, targets, names):
    if made is Chunk:
        return Chunk(head, hidden, targets, names=names).stats(names)
    return made(head, hidden, targets).stats(names)


FAR = {
    "42 above the first tile's": (4000, 42.0),  # in float32's range, and not sure
    "3000 above": (4999, 3000.0),  # done again around the largest
    "far below": (17, -150.0),
}


@pytest.mark.parametrize("names", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("column, logit", FAR.values(), ids=FAR)
@pytest.mark.parametrize("target", [3, 4998, "there"])
def test_ties_and_far_logits_in_the_statistics(made, target, column, logit, names):
    """Integer logits tie, in other tiles too; one is far away, and each row may be done again."""
    torch.manual_seed(1)
    z = torch.randint(-3, 4, (3, V)).float()
    z[1, column] = logit
    targets = torch.tensor([5, column if target == "there" else target, 4998])
    hidden, head = torch.eye(3), Head(z.T.contiguous())
    found = asked(made, head, hidden, targets, names)
    assert_naive(found, head, hidden, targets)


@pytest.mark.parametrize("names", ASKED.values(), ids=ASKED)
def test_logits_of_minus_infinity_in_the_statistics(made, names):
    torch.manual_seed(2)
    bias = torch.zeros(V)
    bias[::3] = -torch.inf
    hidden, head = torch.randn(4, H), Head(torch.randn(V, H), bias)
    targets = torch.tensor([1, 2, 4, 4999])
    assert_naive(asked(made, head, hidden, targets, names), head, hidden, targets)


@pytest.mark.parametrize("names", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("keep", [True, False])
def test_statistics_do_not_touch_the_gradient(keep, names):
    """They are taken while it is made ready, and without it where only they are wanted."""
    torch.manual_seed(2)
    hidden, head = torch.randn(9, H), Head(torch.randn(V, H))
    targets, weights = torch.randint(0, V, (9,)), torch.randn(9)
    plain = Chunk(head, hidden, targets)
    chunk = Chunk(head, hidden, targets, keep, names)
    assert_naive(chunk.stats(names), head, hidden, targets)
    assert torch.equal(chunk.nll_C, plain.nll_C)
    if keep:
        assert torch.equal(gradient(chunk, weights), gradient(plain, weights))


def test_only_what_was_announced_may_be_asked_for():
    chunk = Chunk(Head(torch.randn(V, H)), torch.randn(2, H), torch.tensor([0, 1]))
    assert chunk.stats(["rank"]).rank.shape == (2,)
    with pytest.raises(AssertionError):
        chunk.stats(["collision"])


needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("names", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_a_large_vocabulary_is_compiled_and_nothing_else_changes(rows, names):
    torch.manual_seed(3)
    V = 8 * 2048 + 1  # the last tile is one column
    hidden, head = torch.randn(rows, H), Head(torch.randn(V, H) * 0.5)
    targets, weights = torch.randint(0, V, (rows,)), torch.randn(rows)
    targets[0] = V - 1
    nll, wanted = naive(head, hidden, targets, weights)
    compiled, refusal = sums_for(V)
    assert refusal is None and compiled is not tile_sums
    chunk = Chunk(head, hidden, targets, names=names)
    torch.testing.assert_close(chunk.nll_C.double(), nll, rtol=1e-5, atol=1e-5)
    assert_naive(chunk.stats(names), head, hidden, targets)
    assert (gradient(chunk, weights).double() - wanted).norm() <= 1e-5 * wanted.norm()


@needs_compiler
def test_what_is_tried_at_start_is_what_a_step_runs():
    """In a process of its own: after the trial no step compiles the sums again."""
    code = """
import torch
from torch._dynamo.utils import counters
from prift.chunk import sums_for
from prift.heads import Head
from prift.loss import weighted_loss
from prift.methods import weigher
V, rows = 16_384, 300
assert sums_for(V)[1] is None
before = counters["stats"]["unique_graphs"]
hidden = torch.randn(rows, 64, requires_grad=True)
head = Head(torch.randn(V, 64, requires_grad=True))
targets = torch.randint(V, (rows,))
weighted_loss(hidden, head, targets, weigher("entropy", "online", {}), None).loss.backward()
print(counters["stats"]["unique_graphs"] - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]


def test_without_a_compiler_the_sums_are_torchs_own(monkeypatch):
    def refused():
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(chunk_module, "compiled_sums", refused)
    sums_for.cache_clear()
    try:
        sums, refusal = sums_for(20_000)
        assert sums is tile_sums
        assert refusal == "torch.compile failed (RuntimeError: no compiler)"
    finally:
        sums_for.cache_clear()
