"""The weighted loss and its gradients against the naive full-logit computation in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prift import loss as loss_module
from prift.heads import Head
from prift.loss import weighted_loss
from prift.methods import weigher
from prift.stats import TokenStats, token_stats
from prift.weigher import Rule, Weigher
from prift.wholechunk import Passes, WholeChunk
from tests import references

H, V = 16, 203


def case(rows: int, seed: int, dtype=torch.float32, bias=True):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * 0.7).to(dtype).requires_grad_()
    bias_V = torch.randn(V).to(dtype).requires_grad_() if bias else None
    return hidden, weight, bias_V, torch.randint(0, V, (rows,))


def given_weights(values: torch.Tensor) -> tuple[Weigher, TokenStats]:
    """A weigher that gives these weights, whatever they are."""
    rule = Rule("given", ("logprob",), lambda stats: stats.logprob)
    return Weigher.of(rule, "prior"), TokenStats(logprob=values)


def naive(hidden, weight, bias, targets, weights, scale=1.0, softcap=None, anchor=None):
    """Loss and gradients of sum(w * nll) in float64, with every logit in memory.

    anchor  (factor, log q [N]): plus factor * k3 of each token
    """
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    z = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    z = z * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    if callable(weights):
        weights = weights(z.detach(), targets)
    loss = (nll * weights.double()).sum()
    if anchor is not None:
        pairs = zip(anchor[1].tolist(), nll, strict=True)
        loss = loss + anchor[0] * sum(references.k3(log_q, -one) for log_q, one in pairs)
    loss.backward()
    return loss.detach(), nll.detach(), [leaf.grad for leaf in leaves]


def check(hidden, weight, bias, targets, ours, expected, tolerance):
    loss, nll, gradients = expected
    ours.loss.backward()
    assert float((ours.loss.detach().double() - loss).abs()) <= tolerance * max(1, float(nll.sum()))
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    for leaf, wanted in zip(leaves, gradients, strict=True):
        error = (leaf.grad.double() - wanted).norm()
        assert error <= tolerance * wanted.norm() + 1e-12


@pytest.fixture(params=["tiles", "whole"])
def way(request, monkeypatch):
    """How the chunks are made: as on a CPU, or as on a GPU."""
    if request.param == "whole":
        monkeypatch.setattr(
            loss_module, "_chunk", lambda head, h, y, *_: WholeChunk(head, h, y, Passes())
        )
    return request.param


@pytest.mark.parametrize("weights", ["random", "ones", "zeros", "one", "negative", "sparse"])
@pytest.mark.parametrize("head", [(1.0, None), (0.5, None), (1.0, 4.0)])
def test_gradients_equal_the_naive_ones(weights, head, monkeypatch, way):
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))  # odd chunk edges
    hidden, weight, bias, targets = case(40, seed=len(weights))
    values = {
        "random": torch.rand(40), "ones": torch.ones(40), "zeros": torch.zeros(40),
        "one": torch.eye(40)[3], "negative": torch.randn(40),
        "sparse": torch.rand(40) * (torch.rand(40) < 0.3),
    }[weights]  # fmt: skip
    chosen, prior = given_weights(values)
    ours = weighted_loss(hidden, Head(weight, bias, *head), targets, chosen, prior)
    expected = naive(hidden, weight, bias, targets, values, *head)
    check(hidden, weight, bias, targets, ours, expected, 1e-5)
    assert torch.equal(ours.weights, values)


@pytest.mark.parametrize("name", ["prob", "mass"])
def test_online_rules_weigh_with_the_models_own_statistics(name, monkeypatch, way):
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))
    hidden, weight, bias, targets = case(40, seed=5)
    chosen = weigher(name, "online", {})

    def weights(z, y):
        return chosen(token_stats(z.float(), y))

    expected = naive(hidden, weight, bias, targets, weights)
    ours = weighted_loss(hidden, Head(weight, bias), targets, chosen, None)
    check(hidden, weight, bias, targets, ours, expected, 1e-5)
    torch.testing.assert_close(ours.nll.double(), expected[1], rtol=1e-5, atol=1e-5)


def test_a_rule_that_looks_at_the_whole_batch_takes_two_passes(monkeypatch):
    """Weight 1 above the batch's median entropy: no chunk could tell."""
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))
    hidden, weight, bias, targets = case(41, seed=8)
    uncertain = Rule(
        "uncertain", ("entropy",), lambda stats: stats.entropy > stats.entropy.median(), "batch"
    )
    chosen = Weigher.of(uncertain, "online")

    def weights(z, y):
        return chosen(token_stats(z.float(), y))

    expected = naive(hidden, weight, bias, targets, weights)
    ours = weighted_loss(hidden, Head(weight, bias), targets, chosen, None)
    check(hidden, weight, bias, targets, ours, expected, 1e-5)
    assert ours.weights.sum() == 20


def test_a_rule_that_looks_at_sequences_takes_two_passes(monkeypatch):
    """Each token weighs its sequence's probability: chunks cut sequences, and sequences mix."""
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))
    hidden, weight, bias, targets = case(41, seed=12)
    sequence = torch.randint(5, (41,), generator=torch.Generator().manual_seed(4))

    def likelihood(stats, sequence_N):
        total = torch.zeros(5).index_add_(0, sequence_N, stats.logprob)
        return total.mul(0.01).exp()[sequence_N]

    chosen = Weigher.of(Rule("likelihood", ("logprob",), likelihood, "sequence"), "online")

    def weights(z, y):
        logprob = torch.log_softmax(z.double(), -1).gather(1, y[:, None])[:, 0]
        each = [logprob[sequence == s].sum() for s in sequence.tolist()]
        return torch.stack(each).mul(0.01).exp()

    expected = naive(hidden, weight, bias, targets, weights)
    ours = weighted_loss(hidden, Head(weight, bias), targets, chosen, None, sequence_N=sequence)
    check(hidden, weight, bias, targets, ours, expected, 1e-5)
    assert len(ours.weights.unique()) == 5


def test_bfloat16_is_no_worse_than_naive_bfloat16(way):
    hidden, weight, bias, targets = case(64, seed=9, dtype=torch.bfloat16)
    values = torch.rand(64)
    chosen, prior = given_weights(values)
    truth = naive(hidden, weight, bias, targets, values)[2]
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    z = (leaves[0] @ leaves[1].T + leaves[2]).float()
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    (nll * values).sum().backward()
    weighted_loss(hidden, Head(weight, bias), targets, chosen, prior).loss.backward()
    for ours, plain, exact in zip((hidden, weight, bias), leaves, truth, strict=True):
        budget = (plain.grad.double() - exact).norm()
        assert (ours.grad.double() - exact).norm() <= budget * 1.05


def test_by_hand():
    # Two equally likely tokens: nll = log 2 = 0.693 each; weights 1 and 0.5 give 1.5 log 2.
    chosen, prior = given_weights(torch.tensor([1.0, 0.5]))
    head = Head(torch.zeros(2, H))
    out = weighted_loss(torch.zeros(2, H), head, torch.tensor([0, 1]), chosen, prior)
    assert float(out.loss) == pytest.approx(1.0397207708, rel=1e-6)


def test_rows_of_weight_zero_are_not_run_unless_asked():
    hidden, weight, bias, targets = case(6, seed=2)
    chosen, prior = given_weights(torch.tensor([1.0, 0, 0, 2, 0, 1]))
    head = Head(weight, bias)
    lean = weighted_loss(hidden, head, targets, chosen, prior)
    assert lean.nll.isnan().tolist() == [False, True, True, False, True, False]
    full = weighted_loss(hidden, head, targets, chosen, prior, every_nll=True)
    assert torch.equal(full.loss, lean.loss)
    torch.testing.assert_close(
        full.nll.double(), naive(hidden, weight, bias, targets, torch.ones(6))[1],
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_no_label_token_at_all(way):
    hidden, weight, bias, targets = case(0, seed=3)
    out = weighted_loss(hidden, Head(weight, bias), targets, *given_weights(torch.zeros(0)))
    out.loss.backward()
    assert float(out.loss.detach()) == 0 and float(weight.grad.abs().sum()) == 0


def test_gradients_that_nobody_needs_are_not_made():
    hidden, weight, _, targets = case(9, seed=4, bias=False)
    head = Head(weight.detach())
    out = weighted_loss(hidden, head, targets, weigher("uniform", None, {}), None)
    assert out.loss.grad_fn.grads[1] is None
    out.loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        out = weighted_loss(hidden, head, targets, weigher("uniform", None, {}), None)
    assert not out.loss.requires_grad


def test_evaluation_makes_no_gradient(monkeypatch):
    """An autograd function is not told of no_grad: parameters still look as if they wanted one."""
    hidden, weight, bias, targets = case(9, seed=4)
    head, sft = Head(weight, bias), weigher("uniform", None, {})
    made = []
    monkeypatch.setattr(loss_module.Gradients, "add", lambda *_: made.append(1))
    with torch.no_grad():
        weighted_loss(hidden, head, targets, sft, None)
    assert not made
    weighted_loss(hidden, head, targets, sft, None)
    assert made


def test_a_diverged_model_gives_nan_and_no_exception(way):
    hidden, weight, bias, targets = case(9, seed=4)
    with torch.no_grad():
        hidden[2] = torch.nan
    out = weighted_loss(hidden, Head(weight, bias), targets, weigher("mass", "online", {}), None)
    assert out.loss.isnan() and out.nll.isnan().sum() == 1


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients(way):
    hidden, weight, bias, targets = case(30, seed=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = weighted_loss(hidden, Head(weight, bias), targets, weigher("uniform", None, {}), None)
    out.loss.backward()
    assert weight.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in (hidden, weight, bias)]
    exact = naive(*rounded, targets, torch.ones(30))
    torch.testing.assert_close(out.nll.double(), exact[1], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 1000))
def test_any_chunking_gives_the_same_loss(rows, chunk, seed):
    hidden, weight, bias, targets = case(rows, seed)
    chosen, prior = given_weights(torch.rand(rows) - 0.3)
    losses = []
    for size in ((chunk, chunk), (64, 1024)):
        kept, loss_module._CHUNK_ROWS = loss_module._CHUNK_ROWS, size
        try:
            losses.append(weighted_loss(hidden, Head(weight, bias), targets, chosen, prior).loss)
        finally:
            loss_module._CHUNK_ROWS = kept
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", [1e-3, 1e-6, 1e3, "mixed"])
def test_float16_keeps_small_weights_and_large_ones(slope, monkeypatch, way):
    """The products are of float16, and the factor of --fp16 reaches the loss behind them. Budget:
    two roundings to float16, of the gradient at the logits and of the sum."""
    monkeypatch.setattr(loss_module, "_CHUNK_ROWS", (1, 7))
    hidden, weight, bias, _ = case(40, seed=3, dtype=torch.float16)
    targets = (hidden @ weight.T + bias).argmax(1)  # of sure tokens all gradients are small
    values = torch.rand(40) + 0.5
    values *= (
        10.0 ** torch.arange(-20, 20).div(4, rounding_mode="floor") if slope == "mixed" else slope
    )
    chosen, prior = given_weights(values)
    expected = naive(hidden, weight, bias, targets, values)
    factor = 1024.0 / float(values.max())  # a loss scale: what the leaves get is of float16
    ours = weighted_loss(hidden, Head(weight, bias), targets, chosen, prior)
    (ours.loss * factor).backward()
    for leaf, wanted in zip((hidden, weight, bias), expected[2], strict=True):
        assert (leaf.grad.double() / factor - wanted).norm() <= 2 * 2**-11 * wanted.norm()
    others = torch.ones(V, dtype=torch.bool)
    others[targets] = False  # of the vocabulary, each of which is rather unlikely
    found, wanted = weight.grad[others].double() / factor, expected[2][1][others]
    assert (found - wanted).norm() <= 2 * 2**-11 * wanted.norm()


def test_float16_bears_an_anchor_that_pulls_hard(way):
    """Tokens that the model gave up: a slope of a million is beyond float16."""
    hidden, weight, bias, targets = case(9, seed=4, dtype=torch.float16)
    logits = hidden.double() @ weight.double().T + bias.double()
    log_p = logits.log_softmax(1)[torch.arange(9), targets].detach()
    log_q = (log_p + torch.arange(9.0) + 6).float()
    prior = TokenStats(logprob=log_q)
    expected = naive(hidden, weight, bias, targets, torch.ones(9), anchor=(1.0, log_q))
    chosen = weigher("uniform", None, {})
    ours = weighted_loss(hidden, Head(weight, bias), targets, chosen, prior, anchor=1.0)
    (ours.loss * 2.0**-10).backward()
    for leaf, wanted in zip((hidden, weight, bias), expected[2], strict=True):
        assert (leaf.grad.double() * 2**10 - wanted).norm() <= 2 * 2**-11 * wanted.norm()
