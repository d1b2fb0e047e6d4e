import pytest
import torch

from shardprune.solvers import magnitude, sparsegpt, triangles, wanda
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics, add_gram, gram_norm, output_error


def test_sums_over_waves_and_replicas_are_those_of_all_tokens(device):
    x = torch.randn(8, 20, 12, generator=torch.Generator().manual_seed(0))
    parts = []
    for share in (x[:5], x[5:]):
        part = InputStatistics.empty("gram", 12, device)
        for wave in share.to(device).split(2):
            part.add(wave, len(wave))
        parts.append(part)
    total, other = parts
    total.merge([None, other.part()])
    tokens = x.double().reshape(-1, 12)
    assert total.samples == 8
    assert torch.allclose(total.hessian.cpu().double(), 2 / 8 * tokens.T @ tokens, rtol=1e-5, atol=1e-5)
    assert torch.allclose(total.mean_squares.cpu().double(), (tokens**2).sum(0) / 8, rtol=1e-5)


def test_merged_sums_do_not_depend_on_who_merges(device):
    """To the bit: replicas are added in their order, wherever that happens."""
    x = 1e3 * torch.randn(3, 50, 12, generator=torch.Generator().manual_seed(0)).pow(3)
    merged = []
    for taker in range(3):
        replicas = [InputStatistics.empty("gram", 12, device) for _ in range(3)]
        for replica, share in zip(replicas, x, strict=True):
            replica.add(share.to(device), 1)
        replicas[taker].merge([None if place == taker else one.part() for place, one in enumerate(replicas)])
        merged.append(replicas[taker])
    assert torch.equal(merged[0].gram, merged[1].gram)
    assert torch.equal(merged[0].gram, merged[2].gram)
    assert [one.samples for one in merged] == [3, 3, 3]


def test_half_precision_inputs_are_summed_in_float32(device):
    x = (torch.randn(4, 500, 16, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    statistics = InputStatistics.empty("gram", 16, device)
    statistics.add(x.to(device), len(x))
    tokens = x.double().reshape(-1, 16)
    assert statistics.sums.dtype == torch.float32
    assert torch.allclose(statistics.gram.cpu().double(), tokens.T @ tokens, rtol=1e-4)


def test_replicas_exchange_little_more_than_the_lower_triangle():
    statistics = InputStatistics.empty("gram", 1024)
    statistics.add(torch.randn(1, 50, 1024, generator=torch.Generator().manual_seed(0)), 1)
    sums, samples = statistics.part()
    assert sum(tensor.numel() for tensor in sums.values()) == 9 / 16 * 1024**2
    assert all(tensor.is_contiguous() for tensor in sums.values())
    other = InputStatistics.empty("gram", 1024)
    other.merge([(sums, samples)])
    assert torch.equal(other.gram, statistics.gram)
    assert torch.equal(other.gram, other.gram.t())


@pytest.mark.parametrize("cols", [10, 300, 1100])
def test_norm_of_outputs_is_that_by_a_gram_matrix(cols, device):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, cols, generator=generator) + 1, torch.randn(7, cols, generator=generator)
    gram = (x.T @ x).tril() + torch.full((cols, cols), torch.nan).triu(triangles.CUDA_GRAIN)
    found = gram_norm(weight.to(device), gram.to(device))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(float((x.double() @ weight.double().T).square().sum()), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [200, 5000])  # one panel; five, the last of them narrow
def test_16_bit_products_leave_a_gpu_as_float32_sums(cols, dtype):
    """Into panels, whose rows are not contiguous."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    x = (torch.randn(2, 700, cols, generator=torch.Generator().manual_seed(0)) + 1).to(dtype).cuda()
    gram = torch.zeros(cols, cols, device="cuda")
    for tokens in x:
        add_gram(gram, tokens)
    exact = sum(tokens.double().t() @ tokens.double() for tokens in x)
    assert torch.allclose(gram.tril().double(), exact.tril(), rtol=1e-5, atol=1e-3)
    again = torch.zeros_like(gram)
    for tokens in x:
        add_gram(again, tokens)
    assert torch.equal(again, gram)


@pytest.mark.parametrize("kind", ["gram", "squares"])
def test_mean_squares_are_the_same_for_both_kinds(kind):
    x = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics.empty(kind, 6)
    statistics.add(x, len(x))
    assert torch.allclose(statistics.mean_squares, x.square().sum((0, 1)) / 4, rtol=1e-5)


def test_output_error_is_that_of_the_outputs(device):
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn(4, 30, 10, generator=generator), torch.randn(7, 10, generator=generator)
    pruned = dense * (torch.rand(7, 10, generator=generator) > 0.5)
    statistics = InputStatistics.empty("gram", 10, device)
    statistics.add(x.to(device), len(x))
    tokens = x.reshape(-1, 10)
    expected = float((tokens @ (dense - pruned).T).square().sum() / (tokens @ dense.T).square().sum())
    assert output_error(dense.to(device), pruned.to(device), statistics) == pytest.approx(expected, rel=1e-4)


def test_an_input_of_which_nothing_is_known_counts_alike_everywhere(device):
    """Its solution is that of magnitudes; no sequence need have been there."""
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(device)
    pattern = parse_pattern("unstructured").at(0.5)
    expected = magnitude.prune(weight, None, pattern, 0.5).mask
    rows = wanda.prune(weight, _alike(24, device), pattern, 0.5).mask
    for samples in (0, 7):
        for kind in ("gram", "squares"):
            statistics = InputStatistics.empty(kind, 24, device)
            statistics.samples = samples
            statistics.settle()
            assert statistics.finite
            assert torch.equal(wanda.prune(weight, statistics, pattern, 0.5).mask, rows)
            if kind == "gram":
                assert torch.isfinite(statistics.hessian).all()
                assert torch.equal(sparsegpt.prune(weight, statistics, pattern, 0.5).mask, expected)
        empty = InputStatistics("gram", torch.zeros(24, 24, device=device), samples)
        assert torch.equal(sparsegpt.prune(weight, empty, pattern, 0.5).mask, expected)


def _alike(cols, device):
    return InputStatistics("squares", torch.ones(cols, device=device), 1)


def test_inputs_that_are_known_stay_as_they_are(device):
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0))
    x[..., 4] = 0
    statistics = InputStatistics.empty("gram", 12, device)
    statistics.add(x.to(device), 3)
    before = statistics.sums.clone()
    statistics.settle()
    assert torch.equal(statistics.sums, before)


def test_tokens_are_counted_over_replicas(device):
    x = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0)).to(device)
    parts = [InputStatistics.empty("squares", 12, device, counting=True) for _ in range(2)]
    for part, share in zip(parts, (x[:1], x[1:]), strict=True):
        part.add(share, len(share))
    parts[0].merge([None, parts[1].part()])
    assert (parts[0].tokens, parts[0].samples) == (20, 4)
    assert InputStatistics.empty("squares", 12, device).tokens is None


@pytest.mark.parametrize("kind", ["gram", "squares"])
@pytest.mark.parametrize("held_out", [0, 30])
def test_an_input_known_from_held_out_windows_alone_is_what_they_say(kind, held_out, device):
    x = torch.randn(2, held_out // 2, 12, generator=torch.Generator().manual_seed(0)).to(device)
    statistics = InputStatistics.empty(kind, 12, device, counting=True)
    statistics.samples = 7
    statistics.held_out = InputStatistics.empty("gram", 12, device, counting=True)
    statistics.held_out.add(x, 2)
    statistics.settle()
    assert (statistics.tokens, statistics.tokens_in_all) == (0, held_out)
    statistics.take_in_held_out()
    assert (statistics.tokens, statistics.tokens_in_all) == (held_out, held_out)
    tokens = x.flatten(0, 1)
    expected = tokens.t() @ tokens if held_out else 7 * torch.eye(12, device=device)
    found = statistics.gram if kind == "gram" else statistics.sums
    assert torch.allclose(found, expected if kind == "gram" else expected.diagonal(), atol=1e-4)


def test_few_tokens_are_damped_more(device):
    statistics = InputStatistics.empty("gram", 12, device, counting=True)
    statistics.add(torch.ones(23, 12, device=device), 1)
    assert [statistics.least_damping(damping) for damping in (0.01, 0.3)] == [0.1, 0.3]
    statistics.add(torch.ones(1, 12, device=device), 1)
    assert statistics.least_damping(0.01) == 0.01
