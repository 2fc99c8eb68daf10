"""`prift precompute --backend vllm` from end to end: what is stored, resume, shards, training."""

import json

import numpy as np
import pytest
import transformers as tf

from prift.cache import list_priors
from tests import cli_fixtures as cli
from tests.test_precompute import stored
from tests.vllm import brackets
from tests.vllm.lab import VLLMLab, at_row
from tests.vllm.parity import THRESHOLDS


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Scored by two runs, of a share each."""
    lab = VLLMLab(tmp_path_factory.mktemp("lab"), rows=40)
    lab.results = []
    for share in ("0/2", "1/2"):
        done = lab.run("--shard", share, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        lab.results.append(json.loads(done.stdout))
        lab.said = done.stderr
    return lab


def examples_of(lab):
    return lab.spec().load(lab.model, tf.AutoConfig.from_pretrained(lab.model))[0]


def test_shares_are_the_whole(lab):
    """And a run over the whole then starts no engine."""
    scored = [result["scored"] for result in lab.results]
    assert min(scored) > 5 and sum(scored) == lab.rows()
    assert "vLLM 0." in lab.said and "statistics from its workers" in lab.said
    done = lab.run("--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["scored"], result["left_out"], result["sequences"]) == (0, 0, sum(scored))
    assert "vLLM 0." not in done.stderr


def test_what_is_stored_is_what_transformers_says(lab):
    (identity,) = list_priors(lab.cache).values()
    assert (identity.backend, identity.dtype, identity.logits_dtype) == (
        "vllm", "float32", "float32",
    )  # fmt: skip
    examples = examples_of(lab)
    found = {name: np.asarray(column, np.float64) for name, column in stored(lab).items()}
    begin = compared = 0
    sequences = [example.input_ids for example in examples]
    for example, allowed in zip(examples, brackets.of_model(lab.model, sequences), strict=True):
        rows = np.flatnonzero(example.label_mask) - 1
        own = {name: column[begin : begin + len(rows)] for name, column in found.items()}
        chosen = allowed.rows(rows)
        brackets.check(own, chosen)
        middle = (chosen.mass_least + chosen.mass_most) / 2
        compared += brackets.check_decisions(own["log_mass_rank"], middle, chosen, THRESHOLDS)
        begin += len(rows)
    assert begin == examples.num_labels > 100 and compared > 0.95 * begin * len(THRESHOLDS)


def test_the_cache_is_sound_and_trains_prift_mass(lab):
    """Training compares the model with the cache before its first step, and would stop."""
    cli.succeeded(cli.prift("cache", "verify", "--cache", lab.cache))
    said = []
    half = float(np.exp(np.median(stored(lab)["log_mass_rank"])))  # so that weights are 0 and 1
    arguments = {"threshold": repr(half)}
    lab.train("out", "prift-mass", "--max_steps 2", said=said, rule_args=arguments)
    assert any("the model agrees with the prior" in line for line in said)
    steps = [line for line in lab.history("out") if "loss" in line]
    assert len(steps) == 2 and all(step["loss"] > 0 for step in steps)
    assert all(0.1 < step["zero_share"] < 0.9 for step in steps), steps


def test_it_goes_on_where_it_was_killed(tmp_path):
    """The engine's process by SIGKILL, then prift's: what was visible is kept, no process is left,
    the next run scores the rest, and one after that nothing."""
    lab = VLLMLab(tmp_path, rows=900)
    small = ("--max-num-batched-tokens", "64", "--part-seconds", "0")
    engine = "[os.kill(p.pid, signal.SIGKILL) for p in multiprocessing.active_children()]"
    died = lab.run(*small, program=at_row(120, engine))
    assert died.returncode == 1 and "Traceback" not in died.stderr, died.stderr
    for words in ("Error: vLLM gave up:", "killed", "What was scored is kept", "run the same"):
        assert words in died.stderr, died.stderr
    assert 120 <= (kept := lab.rows()) < 600
    own = "os.kill(os.getpid(), signal.SIGKILL)"
    killed = lab.run(*small, program=at_row(100, own, stored=True))
    assert killed.returncode == -9
    before, kept = kept, lab.rows()
    assert before + 50 < kept < 800
    done = lab.run(*small, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["scored"] == result["sequences"] - kept > 0
    assert lab.rows() == result["sequences"]
    again = lab.run(*small)
    assert again.returncode == 0 and again.stdout.startswith("0 sequences scored"), again.stdout
