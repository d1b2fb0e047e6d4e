"""Products of symmetric and triangular matrices, against products of whole ones in float64."""

import pytest
import torch

from shardprune.solvers import triangles

SIZES = [1, 64, 65, 300, 1100]  # one panel, two, and more of which the last is narrow


def material(size, rows, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    matrix, other = (torch.randn(shape, generator=generator).to(device) for shape in ((size, size), (rows, size)))
    return matrix, other


def close(found, expected):
    return torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_panels_hold_the_lower_triangle_once(size, device):
    counts = torch.zeros(size, size, device=device)
    for panel in triangles.lower_panels(counts):
        panel += 1
    assert bool((counts.tril() == torch.ones_like(counts).tril()).all())
    assert counts.max() == 1
    assert float(counts.mean()) < 0.6 or size <= 300 or device == "cuda"


@pytest.mark.parametrize("size", SIZES)
def test_mirrored_matrix_is_symmetric_and_has_the_lower_triangle(size, device):
    matrix, _ = material(size, 1, device)
    lower = matrix.tril()
    assert triangles.mirror(matrix) is matrix
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix.tril(), lower)


@pytest.mark.parametrize("size", SIZES)
def test_square_adds_to_the_lower_triangle(size, device):
    matrix, other = material(size, 40, device)
    expected = matrix.double() - 2 * other.double().t() @ other.double()
    triangles.add_square(matrix, other.t(), alpha=-2)
    assert close(matrix.tril(), expected.tril())


@pytest.mark.parametrize("size", SIZES)
def test_products_with_triangular_matrices(size, device):
    upper, other = material(size, 40, device)
    upper = upper.triu()
    exact = upper.double(), other.double()
    into = torch.full_like(other, torch.nan)
    triangles.times_upper(other, upper, into)
    assert close(into, exact[1] @ exact[0])
    assert close(triangles.times_upper_transposed(other, upper), exact[1] @ exact[0].t())
    right = other.t().clone()
    triangles.upper_times(upper, right, alpha=-1)
    assert close(right, -exact[0] @ exact[1].t())
