"""The reference against closed forms, written out with loops, sums and inverses, in float64.

Everything else in the package is tested against the reference, so it must stand on something of its own.
"""

import math

import pytest
import torch

from fastpeft import functional, reference

EPS = torch.finfo(torch.float64).eps


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_rounding_only(actual, expected, terms, scale=None):
    """Equal up to the rounding of sums of so many terms; scale bounds the sum of a result's terms in magnitude."""
    scale = max(1.0, float(expected.abs().max())) if scale is None else scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=terms * EPS * scale)


# LoRA

LINEAR_SHAPES = [
    # out, in, r
    pytest.param(5, 3, 2, id="odd"),
    pytest.param(7, 13, 3, id="prime-wide"),
    pytest.param(17, 4, 1, id="tall-rank-one"),
    pytest.param(1, 9, 4, id="one-output"),
    pytest.param(6, 1, 2, id="one-input"),
    pytest.param(3, 5, 8, id="rank-above-both"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_out, d_in, r", LINEAR_SHAPES)
def test_lora_is_its_sums(d_out, d_in, r, bias):
    x, W, A, B = randn(4, d_in, seed=1), randn(d_out, d_in, seed=2), randn(r, d_in, seed=3), randn(d_out, r, seed=4)
    b = randn(d_out, seed=5) if bias else None
    s = 1.75
    expected, magnitude = torch.empty(4, d_out, dtype=torch.float64), 0.0
    for t in range(4):
        for i in range(d_out):
            terms = [float(W[i, j] * x[t, j]) for j in range(d_in)]
            terms += [s * float(B[i, k] * A[k, j] * x[t, j]) for k in range(r) for j in range(d_in)]
            terms += [float(b[i])] if bias else []
            expected[t, i] = math.fsum(terms)
            magnitude = max(magnitude, math.fsum(map(abs, terms)))
    actual = reference.lora.lora_linear(x, W, b, A, B, s)
    assert_rounding_only(actual, expected, terms=d_in + r + 4, scale=magnitude)


@pytest.mark.parametrize("r, alpha", [(1, 1), (8, 16), (7, 3.5), (64, 16)])
def test_lora_scaling(r, alpha):
    assert reference.lora.lora_scaling(r, alpha, use_rslora=False) == alpha / r
    assert reference.lora.lora_scaling(r, alpha, use_rslora=True) == pytest.approx(alpha * r**-0.5, rel=4 * EPS)


# MoS


@pytest.mark.parametrize(
    "d_out, d_in, r, shards, pool",
    [
        pytest.param(6, 9, 2, 3, 7, id="odd"),
        pytest.param(5, 7, 3, 1, 4, id="prime-one-shard"),  # l = 1: a shard is a whole row
        pytest.param(10, 4, 5, 2, 3, id="more-shards-read-than-held"),  # so shards are read twice
        pytest.param(7, 7, 1, 7, 20, id="shards-of-one-number"),
    ],
)
def test_mos_matrices_shard_by_shard(d_out, d_in, r, shards, pool):
    pool_A, pool_B = randn(pool, d_in // shards, seed=1), randn(pool, d_out // shards, seed=2)
    generator = torch.Generator().manual_seed(3)
    index_A = torch.randint(pool, (r, shards), generator=generator)
    index_B = torch.randint(pool, (r, shards), generator=generator)
    A, B = torch.full((r, d_in), math.nan).double(), torch.full((d_out, r), math.nan).double()
    width_A, width_B = d_in // shards, d_out // shards
    for j in range(r):
        for k in range(shards):
            for i in range(width_A):
                A[j, k * width_A + i] = pool_A[index_A[j, k], i]
            for i in range(width_B):
                B[k * width_B + i, j] = pool_B[index_B[j, k], i]
    actual_A, actual_B = reference.mos.mos_matrices(pool_A, index_A, pool_B, index_B)
    assert torch.equal(actual_A, A) and torch.equal(actual_B, B)

    delta = 0.5 * sum(torch.outer(B[:, j], A[j]) for j in range(r))
    assert_rounding_only(reference.mos.mos_weight(pool_A, index_A, pool_B, index_B, 0.5), delta, terms=4 * r)
    x, W, b = randn(3, d_in, seed=4), randn(d_out, d_in, seed=5), randn(d_out, seed=6)
    y = reference.mos.mos_linear(x, W, b, pool_A, index_A, pool_B, index_B, 0.5)
    assert_rounding_only(y, x @ (W + delta).T + b, terms=4 * (d_in + r))


# BOFT


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17])  # 1: S = 0 and Q = 1; odd sizes have an axis that stays
@pytest.mark.parametrize(
    "strength", [1e-3, 1.0, 30.0]
)  # near the identity, usual, near the −1 that Cayley never reaches
def test_cayley(size, strength):
    raw = strength * randn(4, size, size, seed=size)
    S = (raw - raw.mT) / 2
    Q = reference.boft.cayley(S)
    identity = torch.eye(size, dtype=torch.float64)
    # κ(I + S) = √(1 + ‖S‖²): I + S is normal, and its eigenvalues are 1 + iλ.
    condition = math.sqrt(1 + float(torch.linalg.matrix_norm(S, 2).max()) ** 2)
    assert_rounding_only(Q, (identity - S) @ torch.linalg.inv(identity + S), terms=8 * size, scale=condition)
    assert_rounding_only(Q @ Q.mT, identity.expand_as(Q), terms=8 * size, scale=condition)
    assert_rounding_only(torch.linalg.det(Q), torch.ones(4).double(), terms=8 * size**2, scale=condition)
    # The map is its own inverse, where Q + I can be inverted (κ again, for the second solve).
    assert_rounding_only(reference.boft.cayley(Q), S, terms=8 * size, scale=condition**2)


def test_cayley_of_two_by_two_is_a_rotation():
    # S = [[0, −t], [t, 0]] gives the rotation by −2·atan(t): which pins the sign.
    t = 0.3
    Q = reference.boft.cayley(torch.tensor([[0, -t], [t, 0]], dtype=torch.float64))
    angle = -2 * math.atan(t)
    expected = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    assert_rounding_only(Q, torch.tensor(expected, dtype=torch.float64), terms=8)


BUTTERFLIES = [
    # features, block size, factors
    pytest.param(8, 4, 2, id="one-window"),
    pytest.param(24, 4, 2, id="three-windows"),
    pytest.param(24, 6, 3, id="half-of-three"),  # halves of odd size, and a window that spans everything
    pytest.param(40, 10, 3, id="half-of-five"),
    pytest.param(16, 2, 4, id="half-of-one"),  # the classical butterfly
    pytest.param(56, 14, 2, id="prime-halves"),
]
ODD_BLOCKS = [
    pytest.param(15, 5, 1, id="odd"),
    pytest.param(7, 7, 1, id="one-prime-block"),
    pytest.param(11, 1, 1, id="blocks-of-one"),
]


@pytest.mark.parametrize("features, block_size, factors", BUTTERFLIES + ODD_BLOCKS)
def test_butterfly_permutation(features, block_size, factors):
    for factor in range(factors):
        actual = reference.boft.butterfly_permutation(features, block_size, factor)
        if factor == 0:
            assert actual.tolist() == list(range(features))
            continue
        half, window_halves = block_size // 2, 2 * 2**factor
        expected = []
        for place in range(features):
            window, inside = divmod(place // half, window_halves)
            # The first half of a window takes the half-blocks 0, 2, 4 …, the second 1, 3, 5 …
            source = 2 * inside if inside < window_halves // 2 else 2 * inside - window_halves + 1
            expected.append((window * window_halves + source) * half + place % half)
        assert actual.tolist() == expected
        assert sorted(expected) == list(range(features))


@pytest.mark.parametrize("features, block_size, factors", BUTTERFLIES)
def test_butterfly_permutation_is_pefts(features, block_size, factors):
    layer = pytest.importorskip("peft.tuners.boft.layer")
    for factor in range(factors):
        n_blocks = features // block_size
        theirs = layer.BOFTLayer.block_butterfly_perm(
            None, features, n_blocks // 2**factor, block_size // 2, factors - 1
        )
        assert torch.equal(reference.boft.butterfly_permutation(features, block_size, factor), theirs)


def orthogonal_blocks(features, block_size, factors, seed=0):
    return reference.boft.boft_blocks(randn(factors, features // block_size, block_size, block_size, seed=seed))


@pytest.mark.parametrize("features, block_size, factors", BUTTERFLIES + ODD_BLOCKS)
def test_butterfly_matrix(features, block_size, factors):
    blocks = orthogonal_blocks(features, block_size, factors)
    R = reference.boft.butterfly_matrix(blocks)
    identity = torch.eye(features, dtype=torch.float64)
    assert_rounding_only(R @ R.T, identity, terms=8 * features)
    assert_rounding_only(torch.linalg.det(R), torch.ones(()).double(), terms=8 * features**2)

    # B̃_i = P_i diag(Q_i) P_iᵀ with the permutations as matrices, (P v)[j] = v[permutation[j]].
    product = identity
    for factor in range(factors):
        P = identity[reference.boft.butterfly_permutation(features, block_size, factor)]
        product = P @ torch.block_diag(*blocks[factor]) @ P.T @ product
    assert_rounding_only(R, product, terms=8 * block_size * factors)

    x = randn(3, features, seed=1)
    assert_rounding_only(reference.boft.butterfly(x, blocks), x @ product, terms=8 * features)


@pytest.mark.parametrize("features, block_size, factors", BUTTERFLIES)
def test_butterfly_reaches_a_whole_window(features, block_size, factors):
    """Factor i pairs half-blocks 2^i apart: with m factors every feature mixes with the b · 2^(m−1) of its window."""
    window = block_size << (factors - 1)
    R = reference.boft.butterfly_matrix(orthogonal_blocks(features, block_size, factors))
    expected = torch.block_diag(*[torch.ones(window, window)] * (features // window))
    assert torch.equal(R != 0, expected != 0)


@pytest.mark.parametrize("features, block_size, factors", ODD_BLOCKS)
def test_one_factor_is_block_diagonal(features, block_size, factors):
    blocks = orthogonal_blocks(features, block_size, factors)
    assert torch.equal(reference.boft.butterfly_matrix(blocks), torch.block_diag(*blocks[0]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "d_out, d_in, block_size, factors",
    [
        pytest.param(7, 15, 5, 1, id="odd-blocks"),
        pytest.param(13, 12, 6, 2, id="half-of-three"),
        pytest.param(1, 8, 2, 3, id="one-output"),
    ],
)
def test_boft_linear(d_out, d_in, block_size, factors, bias):
    boft_R, boft_s = randn(factors, d_in // block_size, block_size, block_size, seed=1), randn(d_out, 1, seed=2)
    x, W = randn(2, 3, d_in, seed=3), randn(d_out, d_in, seed=4)
    b = randn(d_out, seed=5) if bias else None
    S = (boft_R - boft_R.mT) / 2
    identity = torch.eye(block_size, dtype=torch.float64)
    R = reference.boft.butterfly_matrix((identity - S) @ torch.linalg.inv(identity + S))
    y = ((x @ R) @ W.T) * boft_s[:, 0]  # s scales the product and not the bias
    y = y + b if bias else y
    condition = math.sqrt(1 + float(torch.linalg.matrix_norm(S, 2).max()) ** 2)
    scale = condition * max(1.0, float(y.abs().max()))
    assert_rounding_only(reference.boft.boft_linear(x, W, b, boft_R, boft_s), y, terms=8 * d_in * factors, scale=scale)
    # Only the skew part of the trained blocks counts, and zeros are the identity.
    symmetric = boft_R + boft_R.mT
    assert_rounding_only(
        reference.boft.boft_linear(x, W, b, boft_R + symmetric, boft_s), y, terms=16 * d_in * factors, scale=scale
    )
    still = reference.boft.boft_linear(x, W, b, torch.zeros_like(boft_R), torch.ones_like(boft_s))
    assert_rounding_only(still, torch.nn.functional.linear(x, W, b), terms=8 * d_in)


# FourierFT

SPECTRA = [
    # out, in, n
    pytest.param(7, 5, 6, id="prime"),
    pytest.param(1, 1, 1, id="one-entry"),  # its only frequency is zero: ΔW = α c
    pytest.param(8, 6, 48, id="full-even"),  # every place, with the middles of both axes
    pytest.param(9, 15, 135, id="full-odd"),  # every place, no middles
    pytest.param(2, 13, 9, id="two-rows"),
    pytest.param(13, 2, 9, id="two-columns"),
    pytest.param(1, 12, 5, id="one-row"),
    pytest.param(31, 4, 1, id="one-frequency"),
]


def spectrum_of(d_out, d_in, n):
    generator = torch.Generator().manual_seed(n)
    places = torch.randperm(d_out * d_in, generator=generator)[:n]
    return randn(n, seed=n), places // d_in, places % d_in


@pytest.mark.parametrize("d_out, d_in, n", SPECTRA)
def test_fourier_weight_is_a_sum_of_cosines(d_out, d_in, n):
    c, rows, cols = spectrum_of(d_out, d_in, n)
    alpha = 2.5
    expected = torch.empty(d_out, d_in, dtype=torch.float64)
    for p in range(d_out):
        for q in range(d_in):
            # The angle's fraction of a turn is exact, so that large products cost no digits.
            turns = [
                ((int(u) * p * d_in + int(v) * q * d_out) % (d_out * d_in)) / (d_out * d_in)
                for u, v in zip(rows, cols, strict=True)
            ]
            expected[p, q] = math.fsum(float(ck) * math.cos(2 * math.pi * t) for ck, t in zip(c, turns, strict=True))
    expected *= alpha / (d_out * d_in)
    scale = alpha * float(c.abs().sum()) / (d_out * d_in)
    assert_rounding_only(
        reference.fourierft.fourier_weight(c, rows, cols, (d_out, d_in), alpha), expected, terms=32, scale=scale
    )


@pytest.mark.parametrize("d_out, d_in, n", SPECTRA)
def test_fourier_linear_is_a_sum_of_cosines(d_out, d_in, n):
    c, rows, cols = spectrum_of(d_out, d_in, n)
    x, W, b = randn(2, 3, d_in, seed=1), randn(d_out, d_in, seed=2), randn(d_out, seed=3)
    delta = reference.fourierft.fourier_weight(c, rows, cols, (d_out, d_in), 2.5)
    for bias in (b, None):
        y = reference.fourierft.fourier_linear(x, W, bias, c, rows, cols, 2.5)
        assert_rounding_only(y, torch.nn.functional.linear(x, W, bias) + x @ delta.T, terms=8 * d_in)


@pytest.mark.parametrize("d_out, d_in, n", SPECTRA)
def test_fourier_through_transforms_of_the_activations(d_out, d_in, n):
    """The identity that the fast form rests on, forward and backward, in whole complex transforms."""
    c, rows, cols = spectrum_of(d_out, d_in, n)
    alpha, x, g = 2.5, randn(4, d_in, seed=1), randn(4, d_out, seed=2)
    c.requires_grad_()
    x.requires_grad_()
    y = x @ reference.fourierft.fourier_weight(c, rows, cols, (d_out, d_in), alpha).T
    dc, dx = torch.autograd.grad(y, (c, x), g)
    terms = 16 * (d_out + d_in)
    with torch.no_grad():
        # delta(x) = (α / d2) · Re ifft(S), S[u_k] += c_k · conj(X[v_k])
        def through_transforms(x, d_out, d_in, rows, cols):
            X, S = torch.fft.fft(x), torch.zeros(len(x), d_out, dtype=torch.complex128)
            for k in range(n):
                S[:, rows[k]] += c[k] * X[:, cols[k]].conj()
            return alpha / d_in * torch.fft.ifft(S).real

        # Magnitudes of the terms: n coefficients times sums over d1 or d2 numbers.
        size = alpha * float(c.abs().sum()) / (d_out * d_in)
        assert_rounding_only(
            through_transforms(x, d_out, d_in, rows, cols), y, terms, size * float(x.abs().sum(1).max())
        )
        # ∂L/∂x: the same operator on g with (u, d1) and (v, d2) exchanged
        assert_rounding_only(
            through_transforms(g, d_in, d_out, cols, rows), dx, terms, size * float(g.abs().sum(1).max())
        )
        # ∂L/∂c_k = α / (d1 d2) · Re Σ_t fft(g_t)[u_k] · fft(x_t)[v_k]
        G, X = torch.fft.fft(g), torch.fft.fft(x)
        expected = alpha / (d_out * d_in) * (G[:, rows] * X[:, cols]).real.sum(0)
        scale = alpha / (d_out * d_in) * float((g.abs().sum(1) * x.abs().sum(1)).sum())
        assert_rounding_only(dc, expected, terms, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cayley_of_a_batch_of_large_matrices(dtype):
    """Which PyTorch's own batched solve gets wrong on several threads."""
    skew = torch.randn(3, 160, 160, generator=torch.Generator().manual_seed(0)).to(dtype) / 10
    skew = skew - skew.mT
    for q in (reference.boft.cayley(skew), functional.cayley(skew)):
        error = q @ q.mT - torch.eye(160, dtype=dtype)
        assert error.abs().max() < 160 * torch.finfo(dtype).eps
