"""The training benchmark compares equal work: the same loss, by other means, the same gradient."""

import pytest
import torch

from benchmarks import rules, steps, train
from benchmarks.gpu_train import Way, end_to_end, flops
from benchmarks.peers import TRL, Padded
from benchmarks.trainers import BATCH, FIXED, Whole
from prift.forward import Weighted
from prift.methods import METHODS
from prift.packing import varlen_attention
from prift.roles import RESPONSE
from prift.weigher import RULES
from tests.varlen import on_the_cpu

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
V = 211

trl = pytest.mark.skipif(not TRL, reason="TRL is not installed: pip install -e '.[bench]'")


@pytest.fixture(scope="module")
def tiny():
    """(model, batch, what the model itself thinks of it); the logits are spread, so ranks vary."""
    model, batch, _ = steps.case(V, "float32", 3, 24, **SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 4 if weight.dim() > 1 else 1
    return model, batch, steps.prior_of(model, batch)


def gradient(variant: str, given) -> tuple[float, torch.Tensor]:
    """(loss, the gradient of all parameters in one vector)."""
    model = given[0]
    loss = steps.step(variant, *given)()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return loss.item(), found.double()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("sft", "plain-sft"),
        ("prift-mass", "online-mass"),  # the reference is the model, and no logits tie
        ("prift-prob", "dft"),  # so is the prior, here
        pytest.param("sft", "trl-nll", marks=trl),
        pytest.param("dft", "trl-dft", marks=trl),
    ],
)
def test_equal_losses_and_gradients(tiny, ours, theirs):
    loss, grad = gradient(ours, tiny)
    expected, wanted = gradient(theirs, tiny)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (grad - wanted).norm() <= 1e-5 * wanted.norm()
    assert wanted.norm() > 1e-3


def test_weights_differ_where_methods_do(tiny):
    """Else the equalities above would say nothing of weights."""
    norms = {float(gradient(method, tiny)[1].norm()) for method in ("sft", "dft", "prift-mass")}
    assert len(norms) == 3
    kept = tiny[2]["log_mass_rank"][tiny[1]["labels"] != -100].exp() >= 0.5
    assert 0.1 < kept.float().mean() < 0.9


@pytest.mark.parametrize("length", [512, 64])
def test_a_quarter_of_the_label_tokens_weighs_zero(length):
    batch = steps.random_batch(V, 2, length)
    labelled = batch["labels"] != -100
    prior = steps.drawn_prior(batch["labels"])
    weights = prior["log_mass_rank"][labelled] >= torch.tensor(0.5).log()
    assert int((~weights).sum()) * 4 == len(weights)
    assert 0.6 <= labelled.float().mean() <= 0.7


def test_every_variant_is_timed(monkeypatch, capsys):
    real = steps.case
    monkeypatch.setattr(steps, "case", lambda v, d: real(v, d, 2, 16, **SHAPE))
    monkeypatch.setattr(steps, "memory", lambda *_: 1.0)
    rows = train.with_ratios(train.step_rows(V, "bfloat16", 1, threads=1))
    train.show_steps(rows)
    assert [row["variant"] for row in rows] == list(steps.VARIANTS)
    assert rows[0]["ratio"] == rows[0]["ratio2"] == 1 and all(row["ratio"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n") == len(rows) + 2
    assert bool(train.goals(rows)) == bool(TRL)  # of a small vocabulary only TRL's best is asked


def test_memory_is_the_steps_own():
    """A step of full logits holds several copies of them; the bound is one."""
    assert steps.memory("plain-sft", 8000, "float32") > 2 * 512 * 8000 * 4 / 2**20


@pytest.mark.parametrize("variant", ["plain-sft", "online-mass", *TRL[:1], *METHODS])
def test_whole_trainers_count_their_tokens(variant, tmp_path):
    """All process as many examples; only padding differs."""
    whole = Whole(variant, 512, "float32", 2, **SHAPE).train(str(tmp_path))
    assert whole.seconds > 0 and whole.wall > 0
    if variant == "online-mass":
        assert whole.run == 2 * BATCH * FIXED
    else:  # prift leaves out what no weight comes from, and pads less
        assert 0.8 * whole.tokens < whole.run < 3 * whole.tokens


def test_padding_to_a_fixed_length():
    items = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = Padded()(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    cut = Padded(2)(items)
    assert cut["input_ids"].tolist() == [[5, 6], [8, 0]]


def test_the_gpu_benchmark_runs_without_one(tiny):
    model, batch, _ = tiny
    prior = steps.drawn_prior(batch["labels"])
    way = Way("prift-mass", model, batch, prior)
    way.take(counted=True)
    assert 0 < way.seconds < float("inf")
    flat = end_to_end(batch, prior)
    loss = steps.step("prift-mass", model, batch, prior)()
    with on_the_cpu():
        packed = Way("prift-mass packed", model, batch, prior)
        packed.take(counted=True)
        assert 0 < packed.seconds < float("inf")
        with varlen_attention(model):
            packed = steps.step("prift-mass", model, *flat)()
    assert packed.item() == pytest.approx(loss.item(), rel=1e-5)
    body = sum(p.numel() for p in model.parameters()) - V * 32
    labels = int((batch["labels"] != -100).sum())
    attention = 2 * 32 * 2 * 3 * 24 * 25 / 2
    assert flops(model, batch) == 6 * (body * 72 + V * 32 * labels + attention)


def test_the_cost_of_every_rule_is_measured(monkeypatch):
    monkeypatch.setitem(rules.SHAPES, "tiny", rules.SHAPES["tiny"] | {"vocab_size": V})
    found = rules.measure("tiny", "cpu", 1)
    assert {row["rule"] for row in found} == set(RULES) and found[0]["ratio"] == 1
    assert all(row["ratio"] > 0 for row in found)
    needs = {(row["rule"], row["source"]): row["needs"] for row in found}
    assert needs["mass", "online"] == "core" and needs["eaft", "online"] == "extended"
    assert needs["prob", "online"] == "logprob" and needs["prob", "prior"] == "weights"


def test_labels_alone_are_a_responses_words():
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    tokens = Weighted.of(labels, {}).tokens
    assert tokens.role.tolist() == [RESPONSE] * 3
    roles = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.uint8)
    assert Weighted.of(labels, {}, roles).tokens.role.tolist() == [1, 2, 5]
