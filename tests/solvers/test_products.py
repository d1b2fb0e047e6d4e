"""Products against float64; 3xTF32 where a processor has it, and on the CPU with its rounding emulated."""

import sys

import pytest
import torch

from shardprune.solvers import products, sparsegpt
from shardprune.solvers.factor import factorise
from shardprune.solvers.methods import DAMPING
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.products import add_product
from shardprune.solvers.statistics import InputStatistics, output_error


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def cut(values):
    """Values as the tensor cores read them: ten bits of mantissa, the others ignored."""
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def cut_product(left, right):
    """The product of tensor cores, which cut the running sum after every eight terms: its last bits go towards zero."""
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64)
    for first, second in zip(cut(left).double().split(8, 1), cut(right).double().split(8), strict=True):
        exact = total + first @ second
        nearest = exact.float().double()
        beyond = nearest.abs() > exact.abs()
        total = torch.where(beyond, torch.nextafter(nearest.float(), torch.zeros(())).double(), nearest)
    return total.float()


class OnTensorCores:
    """A target whose products are those of tensor cores."""

    def __init__(self, target):
        self.target = target

    def addmm_(self, left, right, alpha=1.0, beta=1.0):
        self.target.copy_(alpha * cut_product(left, right) + (beta * self.target if beta else 0))


def split_product(target, left, right, alpha=1.0, beta=1.0):
    """`add_split_product` on tensor cores."""
    products.add_split_product(OnTensorCores(target), left, right, alpha, beta)
    return target


def tf32_product(target, left, right, alpha=1.0, beta=1.0):
    return target.copy_(alpha * cut(left) @ cut(right) + (beta * target if beta else 0))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5])
def test_product_adds_to_views_of_any_strides(beta, device):
    whole, left, right = tensors((40, 60), (30, 20), (30, 25))
    expected = beta * whole.double()[5:25, 10:35] + 2 * left.double().t() @ right.double()
    whole = whole.to(device)
    if beta == 0:
        whole[5:25, 10:35] = torch.nan  # as memory may hold that nothing was written to
    view = whole[5:25, 10:35]
    assert add_product(view, left.to(device).t(), right.to(device), 2, beta).data_ptr() == view.data_ptr()
    assert torch.allclose(view.cpu().double(), expected, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_halves_are_as_exact_as_tf32_allows(transposed):
    (matrix,) = tensors((50, 70))
    matrix = matrix.mul(10.0 ** torch.arange(-20, 15).repeat(2))
    if transposed:
        matrix = matrix.t().contiguous().t()
    first, rest, second = products.terms(matrix, "hlh").split(70, dim=1)
    assert torch.equal(first, second)
    assert all(map(torch.equal, (rest, first), products.terms(matrix, "lh").split(70, dim=1)))
    assert torch.equal(first, cut(first))
    assert torch.equal(first.double() + rest.double(), matrix.double())
    assert bool((rest.abs() <= 2**-11 * matrix.abs()).all())  # half of the last place of ten bits


@pytest.mark.parametrize("run", [7, 512])
def test_split_product_is_the_product(run, monkeypatch):
    """In pieces and runs too; the flag of TF32 does not matter to a CPU, and is left as it was."""
    monkeypatch.setattr(products, "PIECE", 2000)
    monkeypatch.setattr(products, "RUN", run)
    target, left, right = tensors((70, 50), (70, 60), (60, 50))
    expected = target.double() - left.double() @ right.double()
    before = torch.backends.cuda.matmul.allow_tf32
    products.add_split_product(target, left, right, -1.0, 1.0)
    assert torch.allclose(target.double(), expected, atol=1e-5)
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_error_does_not_grow_with_the_terms_of_a_sum(monkeypatch):
    """Sums that the tensor cores cut lose with every term; a few hundred at a time lose no more than float32."""
    left, right = tensors((16, 4096), (4096, 16))
    exact = left.double() @ right.double()

    def distance():
        found = split_product(torch.zeros(16, 16), left, right)
        return float((found.double() - exact).norm() / exact.norm())

    assert distance() < 2e-6
    monkeypatch.setattr(products, "RUN", 4096)
    assert distance() > 4e-6


def everywhere(monkeypatch, replacement):
    """Make all solvers' products go through a replacement."""
    for name, module in list(sys.modules.items()):
        if name.startswith("shardprune.solvers.") and hasattr(module, "add_product"):
            monkeypatch.setattr(module, "add_product", replacement)


def spectrum(decay, cols=512):
    """Statistics of inputs whose directions shrink, with two massive features; the Hessian's condition is up to 1e5."""
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(cols, cols, generator=generator, dtype=torch.float64))
    tokens = torch.randn(2048, cols, generator=generator, dtype=torch.float64)
    tokens = (tokens * torch.arange(1, cols + 1).double() ** -decay) @ basis
    tokens[:, 7] *= 50
    tokens[:, 100] *= 20
    statistics = InputStatistics.empty("gram", cols)
    statistics.add(tokens.float(), 16)
    return statistics


def exact_steps(statistics, damping):
    hessian = statistics.hessian.double()
    ridge = damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian + ridge)).t()
    return upper / upper.diagonal().unsqueeze(1), float(torch.linalg.cond(hessian + ridge))


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_factor_by_split_products_is_as_accurate_as_by_float32(decay, monkeypatch):
    statistics = spectrum(decay)
    exact, condition = exact_steps(statistics, DAMPING)
    assert decay == 0 or condition > 1e4

    def distance():
        steps = factorise(statistics.sums, DAMPING, statistics.scale).steps
        return float((steps.double() - exact).norm() / exact.norm())

    plain = distance()
    everywhere(monkeypatch, split_product)
    split = distance()
    assert split < 6 * plain  # a CPU's float32, which sums in several parts; a GPU's is three times as far off
    everywhere(monkeypatch, tf32_product)
    assert factorise(statistics.sums, DAMPING, statistics.scale).retries or distance() > 20 * split


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_masks_and_errors_by_split_products_are_those_by_float32(decay, monkeypatch):
    (weight,) = tensors((128, 256))
    statistics = spectrum(decay, 256)
    plain = sparsegpt.prune(weight, statistics, Unstructured(), 0.5)
    everywhere(monkeypatch, split_product)
    statistics.forget_factors()
    split = sparsegpt.prune(weight, statistics, Unstructured(), 0.5)
    assert float((split.mask == plain.mask).double().mean()) > 0.9999
    errors = [output_error(weight, one.weight, statistics) for one in (plain, split)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)  # TF32 is ten times as far off


def test_small_and_narrow_products_are_not_split():
    assert products.in_three(8192, 2048, 128)  # an update of the columns to the right of a block
    assert not products.in_three(8192, 256, 128)  # of few columns
    assert not products.in_three(8192, 512, 8192)  # narrow: splitting the other operand takes longer
    assert products.in_three(14336, 14336, 14336)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "cols", "inner"), [(4096, 4096, 4096), (8192, 8192, 128), (2048, 1536, 9000)])
def test_large_products_on_a_gpu_are_as_accurate_as_by_float32(rows, cols, inner):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    target, left, right = (one.cuda() for one in tensors((rows, cols), (inner, rows), (inner, cols)))
    assert products.in_three(rows, cols, inner)
    exact = target.double() - left.t().double() @ right.double()
    plain = target.clone().addmm_(left.t(), right, alpha=-1)
    found = [add_product(target.clone(), left.t(), right, alpha=-1) for _ in range(2)]
    assert torch.equal(*found)
    assert not torch.backends.cuda.matmul.allow_tf32
    distances = [float((one.double() - exact).norm() / exact.norm()) for one in (found[0], plain)]
    assert distances[0] < 4 * distances[1]
    assert distances[0] < 2e-6
