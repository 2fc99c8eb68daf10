"""A chunk's cross-entropy and gradient, over several tiles and whole, compiled and not; extreme
logits too."""

import functools

import pytest
import torch

from prift.chunk import Chunk
from prift.heads import Head
from prift.stats import STATISTICS
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


def test_statistics_of_the_rows(made):
    """As rules online ask for them, whole rows and all."""
    torch.manual_seed(0)
    hidden, head = torch.randn(6, H), Head(torch.randn(V, H) * 0.5, torch.randn(V), 0.7)
    targets = torch.randint(0, V, (6,))
    found = made(head, hidden, targets).stats(STATISTICS["extended"])
    logits = head.logits(hidden).numpy()
    for row, (z, y) in enumerate(zip(logits, targets.tolist(), strict=True)):
        for name, wanted in naive_stats(z, y).items():
            assert getattr(found, name)[row].item() == pytest.approx(wanted, rel=2e-5, abs=2e-6)
