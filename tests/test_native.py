"""The native product of a CPU against float64, where it is built, and what happens where not."""

import os
import subprocess
import sys

import pytest
import torch

from prift import native
from prift.products import project

BUILDS = native.compiler() is not None and sys.platform == "linux"
SHAPES = [(1, 2, 2), (2, 1, 64), (7, 49, 96), (128, 48, 256), (129, 65, 258), (300, 1000, 1100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocabulary", "width"), SHAPES)
def test_product_is_that_of_its_operands(rows, vocabulary, width, dtype):
    """No rounding but float32's, in every corner: 4 units per product of a chain at the most."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    bound = hidden.double().abs() @ weight.double().abs().T * 2**-24 * 32
    for out in (None, torch.full((rows, vocabulary), torch.nan)):
        found = project(hidden, weight, out)
        assert found.dtype == torch.float32 and (out is None or found is out)
        assert ((found.double() - hidden.double() @ weight.double().T).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(2, 2, 1), (129, 258, 65), (700, 51, 96)])
def test_the_products_of_gradients_are_added(rows, inner, columns, dtype):
    """out += a @ b and out += a.T @ b; an odd inner size included where a is turned."""
    if not native.supports(dtype):
        return  # test_it_is_built_where_there_is_a_compiler says whether that may be
    torch.manual_seed(0)
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
    exact = 1 + a.double() @ b.double()
    bound = (1 + a.double().abs() @ b.double().abs()) * 2**-24 * 32
    turned = native.add_turned(torch.ones(rows, columns), a.T.contiguous(), b)
    assert ((turned.double() - exact).abs() <= bound).all()
    if inner % 2 == 0 or dtype == torch.float32:
        plain = native.add_product(torch.ones(rows, columns), a, b)
        assert ((plain.double() - exact).abs() <= bound).all()


def test_it_is_built_where_there_is_a_compiler():
    assert (native.library() is not None) == BUILDS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_alone_is_that_of_many_to_the_bit(dtype):
    """What the fold's guess of the target's logit rests on for speed."""
    if not native.supports(dtype):
        assert not BUILDS or dtype == torch.bfloat16  # a processor may lack the instructions
        return
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 896).to(dtype), torch.randn(3000, 896).to(dtype)
    whole = native.project(hidden, weight)
    for rows, columns in (((3, 40), (1000, 1064)), ((0, 70), (2990, 3000)), ((69, 70), (7, 8))):
        part = native.project(hidden[slice(*rows)], weight[slice(*columns)])
        assert torch.equal(part, whole[slice(*rows), slice(*columns)])


def test_other_dtypes_are_not_taken():
    assert not native.supports(torch.float16) and not native.supports(torch.float64)


REFUSED = """
import torch
from prift import native
assert not native.supports(torch.bfloat16)
a, b = torch.ones(400, 64).bfloat16(), torch.ones(64, 1000).bfloat16()
products = (
    lambda: native.project(a, b.T.contiguous()),
    lambda: native.add_turned(torch.zeros(400, 1000), a.T.contiguous(), b),
)
for product in products:
    try:
        product()
    except RuntimeError as error:
        assert str(error).startswith("native product: ") and len(str(error)) > 30, error
    else:
        raise AssertionError("nothing was raised")
torch.testing.assert_close(native.project(a.float(), b.T.float()), torch.full((400, 1000), 64.0))
print("right")
"""


@pytest.mark.skipif(not BUILDS, reason="nothing is built without a C++ compiler on Linux")
def test_what_a_processor_lacks_is_an_exception_and_no_crash():
    """In threads too, out of which an exception would end the process."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr


WITHOUT = """
import torch
from prift import native
from prift.products import project
assert native.library() is None and not native.supports(torch.bfloat16)
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    h, w = torch.randn(30, 64).to(dtype), torch.randn(9000, 64).to(dtype)
    exact = h.double() @ w.double().T
    torch.testing.assert_close(project(h, w).double(), exact, rtol=1e-5, atol=1e-4)
print("right")
"""


@pytest.mark.parametrize("compiler", [None, "/bin/false"])
def test_without_a_compiler_or_with_a_broken_one_products_are_still_right(compiler, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PATH", "CXX")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/nonexistent"}
    if compiler:
        environment["CXX"] = compiler
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "right\n", done.stderr
