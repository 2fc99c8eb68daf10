"""--packing: losses, gradients, metrics and parameters of the same batches padded.

On the CPU, with the kernel of tests/varlen.py, which is the one thing that is not as on CUDA.
"""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from prift.arguments import training_arguments
from prift.dataset import PriorDataset, collate
from prift.errors import ModelError, OptionError
from prift.forward import LabelTokens, Weighted, install
from prift.methods import METHODS, weigher
from prift.packcheck import check_packing
from prift.packing import NAME, varlen_attention
from prift.train import _check_kernel
from prift.weigher import RULES, Rule, Weigher
from tests import cli_fixtures as cli
from tests import cutting
from tests.cutting import BATCH, KEPT, NOTHING_TO_RUN, STEPS
from tests.families import CONFIGS, tiny
from tests.lab import Lab
from tests.test_cutting import assert_equal, two_ranks
from tests.test_packing import PACKED
from tests.test_request import examples
from tests.test_wherever import CHECKPOINTS, FLAGS
from tests.test_wherever import assert_equal as assert_same
from tests.varlen import on_the_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel here is the CPU's")


@pytest.fixture
def kernel():
    with on_the_cpu():
        yield


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_on_packed_batches_is_the_naive_training(tmp_path, method, accumulation):
    ours = cutting.run(tmp_path, method, accumulation, packed=True)
    assert_equal(ours, method, accumulation)
    starts = range(0, STEPS * accumulation * BATCH, BATCH)
    tokens = [sum(map(len, KEPT[i : i + BATCH])) for i in starts]
    if METHODS[method][1] == "prior":  # the first is run whole, for nll and drift
        cut = [sum(max(k.rfind("1"), 0) for k in KEPT[i : i + BATCH]) for i in starts]
        tokens = [tokens[0], *(max(n, 1) for n in cut[1:])]
        assert tokens[NOTHING_TO_RUN] == 1
    assert ours["shapes"] == [(1, n) for n in tokens]


@pytest.mark.parametrize("method", [pytest.param("dft", marks=pytest.mark.slow), "prift-mass"])
def test_two_ranks_one_of_which_has_nothing_to_run(tmp_path, method):
    ours = two_ranks(tmp_path, method, 1, "packed")
    assert {height for shapes in ours["shapes"] for height, _ in shapes} == {1}
    if method == "prift-mass":
        assert ours["shapes"][0][1] == [1, 1]
    assert_equal(ours, method, 2, ranks=2)


def random_data(seed: int = 0) -> PriorDataset:
    """Six sequences of 2 to 50 tokens, without cuts."""
    random, rows = np.random.RandomState(seed), []
    for length in (9, 50, 2, 33, 17, 24):
        prompt = length // 3 or 1
        rows.append((random.randint(3, 300, length), "0" * prompt + "1" * (length - prompt)))
    data = examples(*rows)
    return PriorDataset(data, {"logprob": -random.uniform(0.1, 4, data.num_labels).astype("f4")})


def gradients(model, data: PriorDataset, packed: bool) -> tuple[torch.Tensor, dict, dict]:
    """(loss with the balance of experts, what else is answered, gradients)."""
    batch = collate([data[i] for i in range(len(data))], packed)
    weighted = Weighted(LabelTokens(**batch.pop("tokens")), batch.pop("prior"))
    count, _ = batch.pop("num_labels"), batch.pop("index")
    out = model(**batch, weighted=weighted)
    loss = out["loss"] / count + out["auxiliary"]
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), out, grads


def assert_packs(model, chosen: Weigher) -> None:
    """Loss, weights and gradients packed are those padded."""
    install(model, chosen)
    data = random_data()
    wanted, padded, expected = gradients(model, data, False)
    with on_the_cpu(), varlen_attention(model):
        found, packed, grads = gradients(model, data, True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    for name in ("nll", "weights", "auxiliary"):
        torch.testing.assert_close(packed[name], padded[name], rtol=1e-4, atol=1e-5)
    size = torch.stack([g.norm() for g in expected.values()]).norm()
    missed = torch.stack([(grads[n] - g).norm() for n, g in expected.items()]).norm()
    assert size > 1e-3 and missed <= 1e-5 * size


@pytest.mark.parametrize("family", PACKED)
def test_every_family_has_the_padded_gradient(family, kernel):
    model = tiny(family)
    if family != "gpt2":  # whose attention drops, where the config says nothing else
        check_packing(model)
    assert_packs(model, weigher("prob", "prior", {}))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "olmoe"])
def test_experts_are_balanced_over_the_same_tokens(family):
    model = tiny(family)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 0.5
    assert_packs(model, weigher("prob", "prior", {}))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_turn_by_the_longest_sequence(kind, monkeypatch):
    """Of the batch, not of the row."""
    rope = {
        "longrope": {
            "original_max_position_embeddings": 32, "factor": 2.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
        },
        "dynamic": {"factor": 4.0},
    }[kind]  # fmt: skip
    config = CONFIGS["llama"]()
    config.max_position_embeddings = 64 if kind == "longrope" else 16
    config.rope_parameters = {"rope_type": kind, "rope_theta": 1e4, **rope}
    monkeypatch.setitem(CONFIGS, "turning", lambda: config)
    assert_packs(tiny("turning"), weigher("prob", "prior", {}))


def test_rules_of_sequence_scope_see_whose_each_token_is():
    def likelihood(stats, sequence_N):
        total = torch.zeros(6).index_add_(0, sequence_N, stats.logprob)
        return total.mul(0.01).exp()[sequence_N]

    assert_packs(
        tiny("llama"), Weigher.of(Rule("l", ("logprob",), likelihood, "sequence"), "prior")
    )
    assert_packs(
        tiny("llama"), Weigher.of(Rule("l", ("logprob",), likelihood, "sequence"), "online")
    )


EVALUATES = "--eval_strategy steps --eval_steps 2"


def outcome(lab: Lab, name: str, flags: str = "", **options) -> tuple[list, dict]:
    """(everything logged, what was saved) of prift-mass."""
    lab.train(name, "prift-mass", f"{FLAGS} {EVALUATES} {flags}", eval_data=(lab.data,), **options)
    kind = "adapter_model" if options.get("lora_r") else "model"
    return lab.history(name), load_file(lab.root / name / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def padded(lab):
    """Outcomes without --packing: full fine-tuning, and an adapter."""
    known = {}

    def of(**options) -> tuple[list, dict]:
        key = tuple(options)
        if key not in known:
            known[key] = outcome(lab, f"padded-{len(key)}", **options)
        return known[key]

    return of


@pytest.fixture
def shapes():
    """Of the ids that are embedded in training."""
    seen = []

    def note(module, inputs):
        if isinstance(module, torch.nn.Embedding) and module.training:
            seen.append(tuple(inputs[0].shape))

    hook = register_module_forward_pre_hook(note)
    yield seen
    hook.remove()


LORA = {"lora_r": 4}


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        (CHECKPOINTS[0], {}),
        (CHECKPOINTS[1], {}),
        (CHECKPOINTS[0], LORA),
        (CHECKPOINTS[1], LORA),
        pytest.param("--torch_compile_backend eager", {}, marks=pytest.mark.slow),
        ("--dataloader_num_workers 2", {}),
    ],
    ids=["plain", "reentrant", "not", "reentrant-lora", "not-lora", "compiled", "workers"],
)
def test_trainer_does_the_same(lab, padded, kernel, shapes, flags, options, request):
    """Loss, metrics and evaluation of every step, and the parameters."""
    expected = padded(**options)
    shapes.clear()
    name = re.sub(r"\W", "-", request.node.name)
    torch.compiler.reset()
    found = outcome(lab, name, flags, packing=True, **options)
    compiled = "compile" in flags  # its wrapper is what has the hooks
    assert compiled or (len(shapes) >= 8 and {height for height, _ in shapes} == {1})
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if not re.search("runtime|per_second|flos", key):
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log, _ in (found, expected)]
    assert_same((losses[0], found[1]), (losses[1], expected[1]))
    assert NAME not in (lab.root / name).joinpath("prift.yaml").read_text()
    for file in (lab.root / name).glob("*config.json"):
        assert NAME not in file.read_text()


def test_under_bfloat16_autocast_attention_is_in_bfloat16(lab, monkeypatch):
    """Rotary embeddings widen queries and keys, for which torch has no kernel."""
    with on_the_cpu():
        one, _ = outcome(lab, "packed-bf16", "--bf16", packing=True)
    other, _ = outcome(lab, "padded-bf16", "--bf16")
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (one, other)]
    np.testing.assert_allclose(*losses, rtol=2**-7)


def test_a_broken_weight_names_its_token(lab, kernel, monkeypatch):
    """The same as padded."""

    def broken(stats):
        known = stats.logprob.tolist()
        return torch.tensor([torch.nan if one == min(known) else 1.0 for one in known])

    monkeypatch.setitem(RULES, "broken", Rule("broken", ("logprob",), broken, "batch"))
    monkeypatch.setitem(METHODS, "broken", ("broken", "prior"))
    messages = []
    for packing in (False, True):
        with pytest.raises(Exception, match="weighs token") as error:
            lab.train(f"broken-{packing}", "broken", FLAGS, packing=packing)
        messages.append(re.search(r"token \d+ of \S+", str(error.value))[0])
    assert messages[0] == messages[1]


def test_another_attention_is_refused(lab, kernel):
    with pytest.raises(ModelError, match="it runs with --attention eager"):
        lab.train("eager", "sft", FLAGS, packing=True, attention="eager")


def test_without_a_kernel_it_is_refused_before_the_data_are_read(lab, tmp_path):
    done = cli.train(lab.model, "./absent.jsonl", tmp_path / "out", "--packing")
    cli.refused(done, "--packing needs torch's variable-length attention", "float32 on this cpu")
    cli.refused(done, "-- --bf16", "leave --packing out")
    for flags in ("--bf16", ""):
        with pytest.raises(OptionError, match="bfloat16" if flags else "float32"):
            lab.train("refused", "sft", flags, packing=True)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_wrappers_that_were_never_tried_are_refused(lab, kernel, variable, monkeypatch):
    arguments = training_arguments(str(lab.root / "wrapped"), {}, [], False)[0]
    monkeypatch.setenv(variable, "true")
    with pytest.raises(OptionError, match="--packing was never tried with --fsdp and --deepspeed"):
        _check_kernel(arguments, "float32")


def test_resuming_may_change_how_batches_are_laid_out(lab, kernel):
    steps = FLAGS + "--save_strategy steps --save_steps 2 "
    lab.train("whole", "prift-mass", steps)
    lab.train("halves", "prift-mass", steps, packing=True)
    for name in ("model.safetensors", "trainer_state.json"):
        (lab.root / "halves" / name).unlink()
    checkpoint = lab.root / "halves" / "checkpoint-4"
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
    lab.train("halves", "prift-mass", steps, resume=True)
    one, two = (load_file(lab.root / n / "model.safetensors") for n in ("whole", "halves"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    assert json.loads((lab.root / "halves" / "config.json").read_text())["model_type"] == "llama"
