"""benchmarks/rounding.py on the embedded model: what must hold, and the naive definitions."""

import json

import numpy as np
import pytest
import torch

from benchmarks import rounding
from prift.models import load_model
from prift.text.examples import Example
from tests import references
from tests.test_docs import PAGES

SCORES = {"paper": references.mass_rank, "official-code": references.official_code_score}


@pytest.fixture(scope="module")
def measured() -> dict:
    return rounding.measure(limit=40)


@pytest.fixture(scope="module")
def rows(measured) -> dict:
    """What was counted, by (dtype of the weights, dtype of the logits)."""
    return {(row["weights"], row["logits"]): row for row in measured["settings"]}


def test_every_setting_counts_every_label_token(measured, rows):
    _, _, examples = rounding.load(rounding.MODEL, rounding.DATA, 40, None)
    assert tuple(rows) == rounding.SETTINGS
    assert {r["tokens"] for r in rows.values()} == {measured["tokens"]} == {examples.num_labels}
    assert measured["tokens"] > 1000 and measured["examples"] == 40
    assert measured["vocabulary"] == 755


def test_the_reference_differs_from_itself_nowhere(rows):
    row = rows[rounding.REFERENCE]
    assert row["rank_differs"] == row["logprob"] == row["u"] == row["largest_u"] == 0
    assert [d["paper"]["differ"] for d in row["decisions"].values()] == [0, 0, 0]


def test_rounding_logits_ties_more_tokens(rows):
    for weights in ("float32", "bfloat16"):
        exact, rounded = (rows[weights, logits]["tied"] for logits in ("float32", "bfloat16"))
        assert exact <= rounded
        assert rounded > 0.01 * rows[weights, "bfloat16"]["tokens"]


def test_rounded_logits_change_ranks_only_of_tokens_that_tie(rows):
    """Rounding keeps the order, so that what changes a rank is a competitor that becomes equal."""
    row = rows["float32", "bfloat16"]
    assert row["rank_differs"] <= row["tied"]


def test_every_rounding_moves_something(rows):
    for setting in rounding.SETTINGS[1:]:
        row = rows[setting]
        assert 0 < row["u"] <= row["largest_u"] < 1, setting
        assert 0 < row["logprob"] <= row["largest_logprob"], setting
        assert 0 < row["rank_differs"] < row["tokens"], setting


def test_counting_ties_out_only_ever_drops_tokens_that_tie(rows):
    """The authors' score is the paper's less the other tied tokens' mass."""
    seen = 0
    for row in rows.values():
        for found in row["decisions"].values():
            assert found["paper"]["kept"] - found["official-code"]["kept"] == found["apart"]
            differ = [found[ties]["differ"] for ties in rounding.TIES]
            assert abs(differ[0] - differ[1]) <= found["apart"] <= row["tied"]
            seen += found["apart"]
    assert seen > 0


def bounds(model, logits_dtype: str, example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [labels, V]: the logits of the hidden states' exact product, and the least and the
    largest that any order of summing it in float32 gives; all three rounded as asked."""
    ids = torch.tensor(example.input_ids[None].astype(np.int64))
    with torch.inference_mode():
        body = model.base_model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])
    hidden = body.last_hidden_state[0, np.flatnonzero(example.label_mask) - 1].double()
    weight = model.get_output_embeddings().weight.detach().double()
    z = hidden @ weight.T
    error = weight.shape[1] * 2.0**-24 * (hidden.abs() @ weight.abs().T)
    if logits_dtype == "bfloat16":
        return tuple(x.float().bfloat16().double().numpy() for x in (z, z - error, z + error))
    return tuple(x.numpy() for x in (z, z - error, z + error))


@pytest.mark.parametrize("setting", rounding.SETTINGS, ids="-".join)
def test_ties_and_decisions_equal_the_naive_definitions(setting):
    """Wherever the order of float32 sums leaves no doubt, which is at nearly every token."""
    folder, config, examples = rounding.load(rounding.MODEL, rounding.DATA, 10, None)
    # One sequence a batch, as in `bounds`: activations' last bits depend on the batch's shape.
    stats, _ = rounding.score(folder, config, examples, setting, batch_tokens=1, device="cpu")
    ways = [(tau, ties) for tau in rounding.TAUS for ties in rounding.TIES]
    kept = {way: rounding.decisions(stats, *way) for way in ways}
    model = load_model(folder, config, dtype=setting[0], attention="sdpa")
    n = tied = sure = decided = 0
    for example in examples:
        targets = example.input_ids[example.label_mask]
        for z, low, high, y in zip(*bounds(model, setting[1], example), targets, strict=True):
            same = (low == low[y]) & (high == high[y]) & (low == high)
            apart = (high < low[y]) | (low > high[y])
            same[y] = True
            assert same.sum() <= stats.n_tie[n] <= (~apart).sum()
            if (same | apart).all():
                truth = references.token_stats(z, y)
                assert (stats.n_tie[n], stats.rank[n]) == (truth["n_tie"], truth["rank"])
                tied, sure = tied + (truth["n_tie"] > 1), sure + 1
                q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                doubt = 2 * (q * np.expm1(high - low)).sum() + 1e-5
                for tau, ties in ways:
                    score = SCORES[ties](z, y)
                    if abs(score - tau) > doubt:
                        assert kept[tau, ties][n] == (score >= tau), (n, tau, ties)
                        decided += 1
            n += 1
    assert n == len(stats.rank) > 400
    assert sure > 0.9 * n and decided > 0.95 * len(ways) * sure
    assert tied > 5 if setting[1] == "bfloat16" else tied == 0


def test_what_it_prints_is_what_it_writes_and_what_the_page_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rounding", "--limit", "5", "--json", str(tmp_path / "x")])
    rounding.main()
    shown = capsys.readouterr().out
    written = json.loads((tmp_path / "x").read_text())
    assert rounding.tables(written) in shown and "5 examples" in shown
    for line in shown.splitlines():
        if line.startswith(("| V ", "|--")):
            assert line in PAGES["docs/precision.md"].splitlines()
