"""When the check before the first step compares, what it leaves alone, and several processes."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from prift.cache import list_priors
from prift.errors import CacheError
from prift.lora import with_lora
from prift.stepcheck import _chosen, _compare, check_start
from prift.store.writer import CacheWriter
from tests import cli_fixtures as cli
from tests.lab import Lab
from tests.refiled import AGREES, DIFFERS, changed, loaded, rows_of, shifted, values_of

FLAGS = "--max_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 4"


def test_resuming_compares_nothing(lab, tmp_path):
    """The model has learnt by then; and the cache may have moved."""
    flags = FLAGS + " --save_strategy steps --save_steps 1"
    wrong = changed(lab, tmp_path / "cache", shifted)
    lab.train("resumed", "prift-mass", flags)
    (lab.root / "resumed" / "model.safetensors").unlink()
    shutil.rmtree(lab.root / "resumed" / "checkpoint-2")
    said = []
    lab.train("resumed", "prift-mass", flags, resume=True, cache=wrong, said=said)
    assert (lab.root / "resumed" / "model.safetensors").exists()
    assert not [line for line in said if "agrees" in line]


def test_a_rule_without_the_prior_compares_nothing(lab, tmp_path):
    wrong = changed(lab, tmp_path / "cache", shifted)
    for name, cache in (("no-cache", None), ("not-read", wrong)):
        for method in ("sft", "dft"):
            said = []
            lab.train(f"{method}-{name}", method, FLAGS, cache=cache, said=said)
            assert not [line for line in said if "agrees" in line]


def test_only_the_prior_itself_is_compared(lab, tmp_path):
    """--prior decides which statistics; the digests of --model, whether it must agree with them."""
    wrong = changed(lab, tmp_path / "wrong", shifted)
    ((prior_id, _),) = list_priors(lab.cache).items()
    copy = str(shutil.copytree(lab.model, tmp_path / "copy"))
    for prior in (prior_id, copy):
        with pytest.raises(CacheError, match=DIFFERS):
            lab.train(f"own-{len(prior)}", "prift-prob", FLAGS, cache=wrong, prior=prior)
        said = []
        lab.train(f"right-{len(prior)}", "prift-prob", FLAGS, prior=prior, said=said)
        assert [line for line in said if "agrees" in line]
    reconfigured = Path(shutil.copytree(lab.model, tmp_path / "reconfigured"))
    config = tf.AutoConfig.from_pretrained(reconfigured)
    config.rms_norm_eps = 1e-3  # the same weights, other numbers
    config.save_pretrained(reconfigured)
    other = Lab(tmp_path / "other", seed=1).model
    for number, (prior, trained) in enumerate(
        [(prior_id, other), (copy, other), (prior_id, str(reconfigured))]
    ):
        said, name = [], f"another{number}"
        lab.train(name, "prift-prob", FLAGS, cache=wrong, model=trained, prior=prior, said=said)
        assert not [line for line in said if "agrees" in line]


def test_a_prior_with_an_adapter_is_not_the_bare_model(lab, tmp_path):
    """Its weights and config are the model's, its numbers are not."""
    (identity,) = list_priors(lab.cache).values()
    keys, lengths, spans = rows_of(lab)
    with CacheWriter(tmp_path, replace(identity, adapter="a" * 64), {"prift": "{}"}) as writer:
        rows = zip(keys, lengths, spans, values_of(lab.cache, keys, spans), strict=True)
        for key, length, runs, own in rows:
            own = {n: shifted(v) for n, v in own.items()}
            writer.add(key.ljust(16, b"\0"), int(length), runs, own)
    (adapted,) = list_priors(tmp_path)
    lab.train("adapted-prior", "prift-mass", FLAGS, cache=str(tmp_path), prior=adapted)
    assert lab.history("adapted-prior")


def test_an_adapter_that_starts_at_something_is_off(lab, tmp_path):
    pytest.importorskip("peft")
    rest, model = loaded(lab, lab.cache)
    adapted = with_lora(model, 4, None, 0.1, "all-linear")
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.train()
    check_start(adapted, *rest, lambda line: None)
    assert adapted.training and all(m.training for m in adapted.modules())
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted.eval()
    with torch.no_grad():
        with adapted.disable_adapter():
            without = adapted(ids).logits
        assert (adapted(ids).logits - without).abs().max() > 0.1  # and is on again
    rest, _ = loaded(lab, changed(lab, tmp_path / "cache", shifted))
    with pytest.raises(CacheError, match=DIFFERS):
        check_start(adapted, *rest, lambda line: None)


def test_dropout_and_noise_are_off_and_chance_is_left_alone(tmp_path):
    """GPT-2 drops out a tenth; with the check and without it the same model comes out."""
    lab = Lab(tmp_path, family="gpt2")
    lab.precompute()
    rest, model = loaded(lab, lab.cache)
    assert model.config.resid_pdrop == model.config.embd_pdrop == 0.1
    check_start(model.train(), *rest, lambda line: None)
    assert model.training
    flags = FLAGS + " --neftune_noise_alpha 5"
    for name, skip in (("checked", False), ("unchecked", True)):
        lab.train(name, "prift-prob", flags, skip_check=skip)
    checked, unchecked = (
        load_file(tmp_path / n / "model.safetensors") for n in ("checked", "unchecked")
    )
    assert all(torch.equal(checked[n], unchecked[n]) for n in checked)


def test_a_token_that_the_prior_excludes(tmp_path):
    """-inf against -inf is no difference, against anything else it is one without bound."""
    lab = Lab(tmp_path, family="phi")  # its output projection has a bias
    tokenizer = tf.AutoTokenizer.from_pretrained(lab.model)
    model = tf.AutoModelForCausalLM.from_pretrained(lab.model)
    with torch.no_grad():
        model.lm_head.bias[tokenizer(" car").input_ids] = -torch.inf
    model.save_pretrained(lab.model)
    lab.precompute()
    keys, _, spans = rows_of(lab)
    values = values_of(lab.cache, keys, spans)
    assert sum(np.isinf(row["logprob"]).sum() for row in values) > 9
    rest, model = loaded(lab, lab.cache)
    check_start(model, *rest, lambda line: None)
    finite = changed(lab, tmp_path / "finite", lambda v: np.maximum(v, np.array(-30, v.dtype)))
    rest, model = loaded(lab, finite)
    with pytest.raises(CacheError, match=r"by inf on average(.|\n)*cached -30.0000, found -inf"):
        check_start(model, *rest, lambda line: None)


def test_weights_that_are_yet_to_come_are_not_compared(lab):
    """FSDP may leave them zero in all processes of a machine but its first until it wraps."""
    (data, prior, *rest), model = loaded(lab, lab.cache)
    assert _compare(model, data, "float32").tokens > 9
    for weight in model.parameters():
        weight.data.zero_()
    assert _compare(model, data, "float32").tokens == 0
    check_start(model, data, prior, *rest, lambda line: None)


def test_what_is_scored_is_little_of_everything():
    lengths = np.random.default_rng(0).integers(20, 400, 10_000)
    ours = _chosen(lengths, 0, 1)
    assert len(ours) == 8 and lengths[ours].sum() < 2000 and ours == _chosen(lengths, 0, 1)
    assert all(abs(lengths[i] - np.median(lengths)) < 5 for i in ours)
    assert np.all(np.diff(ours) > 0) and ours[0] < 1250 and ours[-1] >= 8750  # all parts of it
    ranks = [_chosen(lengths, rank, 4) for rank in range(4)]
    assert {len(r) for r in ranks} == {8} and len({i for r in ranks for i in r}) == 32
    assert len(_chosen(np.full(50, 32_000), 0, 1)) == 1  # long ones: one
    assert _chosen(np.array([7]), 0, 2) == [0] and _chosen(np.array([7]), 1, 2) == []


def test_the_command_line(model, data, tmp_path):
    cli.succeeded(cli.precompute(model, data, tmp_path / "cache"))
    lab = Lab(tmp_path / "lab")
    lab.model, lab.data, lab.cache = model, data, str(tmp_path / "cache")
    wrong = changed(lab, tmp_path / "wrong", shifted)
    more = ["--method", "prift-mass", "--cache"]
    said = cli.succeeded(cli.train(model, data, tmp_path / "right", *more, tmp_path / "cache"))
    assert said.count("agrees with the prior") == 1
    message = cli.refused(cli.train(model, data, tmp_path / "out", *more, wrong), DIFFERS)
    assert "rows.jsonl:" in message and "--skip-check" in message
    assert not list((tmp_path / "out").iterdir())
    again = cli.succeeded(cli.train(model, data, tmp_path / "out", *more, wrong, "--skip-check"))
    assert "agrees" not in again and (tmp_path / "out" / "model.safetensors").exists()


EACH = """
import os, sys
from pathlib import Path
from prift_cli import main
try:
    main(sys.argv[2:])
    code = 0
except SystemExit as end:
    code = end.code
Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(str(code))
"""

AN_ERROR = """
import sys
from pathlib import Path
import torch.distributed as dist
from prift.errors import DataError
from prift.ranks import from_each_rank
dist.init_process_group("gloo")
rank = dist.get_rank()
assert from_each_rank(lambda: 10 + rank) == [10, 11]
def fail():
    if rank == 1:
        raise DataError("of one")
try:
    from_each_rank(fail)
except DataError as error:
    Path(sys.argv[1], f"rank{rank}").write_text(str(error))
dist.destroy_process_group()
"""


def on_two_ranks(script: str, folder: Path, *args: str) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(script)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*words, str(folder / "script.py"), str(folder), *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_an_error_of_one_rank_is_raised_in_both(tmp_path):
    result = on_two_ranks(AN_ERROR, tmp_path)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["of one"] * 2


@pytest.mark.parametrize("faulty", [None, 1])
def test_what_one_rank_finds_stops_both(lab, tmp_path, faulty):
    lengths = rows_of(lab)[1]
    rows = [_chosen(lengths, rank, 2) for rank in (0, 1)]
    assert not set(rows[0]) & set(rows[1])
    only = [] if faulty is None else rows[faulty]
    cache = changed(lab, tmp_path / "cache", shifted, only=only)
    # fmt: off
    command = [
        "train", "--model", lab.model, "--data", lab.data, "--cache", cache, "--max-length", "60",
        "--method", "prift-prob", "--output", str(tmp_path / "out"), "--", "--max_steps", "1",
    ]
    # fmt: on
    result = on_two_ranks(EACH, tmp_path, *command)
    codes = [(tmp_path / f"rank{r}").read_text() for r in (0, 1)]
    assert codes == (["0", "0"] if faulty is None else ["1", "1"]), result.stderr
    assert (DIFFERS in result.stderr) == (faulty is not None)
    assert (AGREES in result.stderr) == (faulty is None)
