"""The check before the first step: an honest cache passes whatever its dtype, others do not."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

from prift.cache import list_priors
from prift.errors import CacheError
from tests.lab import Lab
from tests.refiled import AGREES, DIFFERS, changed, refile, rows_of, shifted, values_of

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "--max_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 4"
DEMO = {"max_length": 200, "limit": 32}


@pytest.fixture(scope="module", params=[("float32", "float32"), ("bfloat16", "bfloat16")])
def demo(request, tmp_path_factory) -> Lab:
    """The embedded model, its demonstrations and a cache in each precision."""
    lab = Lab(tmp_path_factory.mktemp("demo"))
    lab.model, lab.data = str(ROOT / "data/model"), str(ROOT / "data/demo/train.jsonl")
    dtype, logits = request.param
    lab.precompute(text=DEMO, dtype=dtype, logits_dtype=logits)
    return lab


def stopped(lab: Lab, cache: str, text: dict | None = None, **options) -> str:
    """Asserts that training from this cache stops before the first step, and goes on with
    --skip-check; returns the message."""
    place = Path(cache)
    with pytest.raises(CacheError, match=DIFFERS) as error:
        lab.train(f"{place.name}-no", "prift-mass", FLAGS, text=text, cache=cache, **options)
    assert not (lab.root / f"{place.name}-no" / "trainer_state.json").exists()
    name = f"{place.name}-yes"
    lab.train(name, "prift-mass", FLAGS, text=text, cache=cache, skip_check=True, **options)
    assert lab.history(name)
    return str(error.value)


def mean_of(message: str) -> float:
    return float(re.search(r"differs by ([\d.]+) on average", message)[1])


def bound_of(message: str) -> float:
    return float(re.search(r"rounding explains ([\d.]+)", message)[1])


def test_an_honest_prior_passes_in_one_line(demo):
    for dtype in ("float32", "bfloat16"):
        said = []
        demo.train(f"honest-{dtype}", "prift-mass", FLAGS, text=DEMO, dtype=dtype, said=said)
        (line,) = [one for one in said if "agrees" in one]
        assert re.fullmatch(AGREES + r": logprob differs by \S+ on average over \d+ .*", line)


def test_statistics_shifted_by_a_token(demo):
    message = stopped(demo, changed(demo, demo.root / "shifted", shifted, DEMO), DEMO)
    assert mean_of(message) > 10 * bound_of(message)
    assert "another chat template or tokenizer" in message and "--skip-check" in message
    keys, _, spans = rows_of(demo, DEMO)
    honest = values_of(demo.cache, keys, spans)
    found = re.findall(
        r"^  train\.jsonl:(\d+), position (\d+): cached (\S+), found (\S+)$", message, re.MULTILINE
    )
    assert len(found) == 5
    for line, position, cached, new in found:
        assert abs(float(cached) - float(new)) > 2 * mean_of(message)  # the largest are shown
        row, place = int(line) - 1, int(position) - int(spans[int(line) - 1][0])
        assert float(cached) == pytest.approx(shifted(honest[row]["logprob"])[place], abs=1e-4)
        assert float(new) == pytest.approx(honest[row]["logprob"][place], abs=1.0)


def test_statistics_scored_under_another_template(demo, tmp_path):
    """The same answers, behind other words than their ids say."""
    other = Lab(tmp_path)
    other.model = demo.model
    text = Path(demo.data).read_text()
    Path(other.data).write_text(text.replace('"question": "', '"question": "User: '))
    (identity,) = list_priors(demo.cache).values()
    precision = {"dtype": identity.dtype, "logits_dtype": identity.logits_dtype}
    other.precompute(text=DEMO, **precision)
    keys, _, spans = rows_of(other, DEMO)
    assert not set(keys) & set(rows_of(demo, DEMO)[0])
    filed = refile(demo, demo.root / "template", values_of(other.cache, keys, spans), DEMO)
    stopped(demo, filed, DEMO)


def test_statistics_of_a_neighbouring_checkpoint(demo):
    """The same model after a short fine-tuning, filed as the model before it."""
    flags = "--max_steps 30 --learning_rate 3e-4 --per_device_train_batch_size 8"
    demo.train("further", "sft", flags, text=DEMO)
    further = Lab(demo.root / "neighbour-lab")
    further.model, further.data = str(demo.root / "further"), demo.data
    (identity,) = list_priors(demo.cache).values()
    further.precompute(text=DEMO, dtype=identity.dtype, logits_dtype=identity.logits_dtype)
    keys, _, spans = rows_of(demo, DEMO)
    filed = refile(demo, demo.root / "neighbour", values_of(further.cache, keys, spans), DEMO)
    message = stopped(demo, filed, DEMO)
    assert mean_of(message) > 2 * bound_of(message)


def test_in_float32_a_model_two_percent_away_is_another(lab, tmp_path):
    near = tf.AutoModelForCausalLM.from_pretrained(lab.model)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in near.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight)
    near.save_pretrained(tmp_path / "near")
    tf.AutoTokenizer.from_pretrained(lab.model).save_pretrained(tmp_path / "near")
    other = Lab(tmp_path)
    other.model, other.data = str(tmp_path / "near"), lab.data
    other.precompute()
    keys, _, spans = rows_of(lab)
    message = stopped(lab, refile(lab, tmp_path / "c", values_of(other.cache, keys, spans)))
    assert mean_of(message) > 5 * bound_of(message)


def test_large_logits_are_rounded_as_the_prior_rounded_them(tmp_path):
    """Those near 100 are multiples of a half in bfloat16: far more than other rounding does."""
    lab = Lab(tmp_path)
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model)
    model.lm_head.weight.data *= 60
    model.save_pretrained(lab.model)
    lab.precompute(logits_dtype="bfloat16")
    keys, _, spans = rows_of(lab)
    rounded = values_of(lab.cache, keys, spans)
    exact = Lab(tmp_path / "exact")
    exact.model, exact.data = lab.model, lab.data
    exact.precompute()
    apart = [
        np.abs(a["logprob"] - b["logprob"])
        for a, b in zip(rounded, values_of(exact.cache, keys, spans), strict=True)
    ]
    assert np.concatenate(apart).mean() > 0.1
    lab.train("large", "prift-mass", FLAGS)
