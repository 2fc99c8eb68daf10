"""Whether the sums over the vocabulary are compiled, and that it is said."""

import json
import os
import subprocess
import sys

import pytest
import torch

from prift.backends.engine import choose_sums
from prift.stats import tile_sums

CPU = torch.device("cpu")
MANY = 10**11


def test_a_small_job_does_without():
    said = []
    assert choose_sums(CPU, 10**9, None, said.append) is tile_sums
    assert said == ["statistics: not compiled, since the data are few"]


def test_not_wanted_is_not_done():
    said = []
    assert choose_sums(CPU, MANY, False, said.append) is tile_sums
    assert said == ["statistics: not compiled, as asked"]


@pytest.mark.parametrize(("logits", "wanted"), [(1, True), (MANY, None)])
def test_compiled_where_wanted_or_worth_it(logits, wanted):
    said = []
    sums = choose_sums(CPU, logits, wanted, said.append)
    assert sums is not tile_sums
    assert said == ["statistics: one compiled pass over tiles of the output projection"]
    z = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) * 5
    target, top = z[:, 3:4].clone(), z.amax(1, keepdim=True)
    expected = tile_sums(z.clone(), target, top, True)
    found = sums(z.clone(), target, top, True)
    assert torch.equal(found[3:5], expected[3:5])  # counts
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


WITHOUT_COMPILER = """
import json, torch
from prift.backends.engine import choose_sums
from prift.errors import ModelError
from prift.stats import tile_sums
said, error = [], None
plain = choose_sums(torch.device("cpu"), 10**11, None, said.append) is tile_sums
try:
    choose_sums(torch.device("cpu"), 10**11, True, said.append)
except ModelError as refused:
    error = str(refused)
print(json.dumps([plain, said, error]))
"""


def test_without_a_compiler(tmp_path):
    """Goes on without where nobody asked, and says why; fails where it was asked for."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}
    environment |= {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "empty")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    plain, said, error = json.loads(done.stdout.splitlines()[-1])
    assert plain and len(said) == 1
    reason = "torch.compile failed ("
    assert said[0].startswith("statistics: not compiled, so somewhat slower: " + reason)
    assert "compiler" in said[0].lower() and "\n" not in said[0]
    assert error.startswith(reason)
    assert error.endswith("Use --no-compile, or install a C++ compiler.")
