"""The GPU's own kernels against plain torch in float32. Needs a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional

from microserve.engine.model.kernels import rotate
from microserve.kv.pool import PagePool, PageShape
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "positions"),
    [
        (32, 8, 128, None, [0, 1, 15, 16, 17, 127, 128, 129, 600, 5000]),
        (8, 8, 64, None, [5, 1000]),
        (7, 1, 80, None, [40, 3]),
        (6, 2, 192, None, [9000, 0, 2000]),
        (16, 1, 64, None, [3000]),
        (32, 1, 128, None, [700]),
        (8, 2, 64, 50, [0, 48, 49, 50, 51, 333]),
        (8, 2, 64, 900, [2000] * 12),
        (4, 1, 128, None, [300 + i for i in range(70)]),
        (16, 8, 64, None, [500 + 7 * i for i in range(40)]),
    ],
)
def test_decodes_store_their_token_and_attend_to_all_before_it(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None, positions: list[int]
) -> None:
    from microserve.engine.cuda_decode import DecodeAttention

    torch.manual_seed(0)
    page, layers, rows = 16, 2, len(positions)
    used = [position // page + 1 for position in positions]
    pool = PagePool(sum(used), PageShape(kv_heads, layers, page, head_dim, dtype), device=DEVICE)
    pool.tensor.normal_()
    angles = torch.rand(max(positions) + 1, 1, head_dim // 2, device=DEVICE).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    table = torch.randperm(sum(used), device=DEVICE).int()
    indptr = torch.tensor([0, *used], device=DEVICE).cumsum(0).int()
    where = torch.tensor(positions, device=DEVICE)
    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, device=DEVICE).to(dtype)
    turning, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    attention = DecodeAttention(pool, heads, window, cos, sin, rows)
    guards = []
    for name in ("_sums", "_scales"):
        size = getattr(attention, name).numel()
        guarded = torch.full((size + 8192,), 7.0, device=DEVICE)
        setattr(attention, name, guarded[:size])
        guards.append(guarded[size:])
    # What was left in a page behind the last token must not matter.
    for row, position in enumerate(positions):
        pool.tensor[table[indptr[row + 1] - 1], :, :, :, position % page + 1 :] = float("nan")
    for layer in (1, 0, 1):
        out = torch.full((rows, heads, head_dim), float("nan"), dtype=dtype, device=DEVICE)
        attention.attend(layer, turning, value, where.int(), indptr, table, out)
        turned = rotate(turning.float(), cos[where].float(), sin[where].float())
        keys, values = (side.float() for side in pool.layer_views(layer))
        for row, position in enumerate(positions):
            pages = table[int(indptr[row]) : int(indptr[row + 1])].long()
            first = 0 if window is None else max(0, position - window + 1)
            key, seen = (side[pages].transpose(0, 1).flatten(1, 2) for side in (keys, values))
            assert relative_error(key[:, position], turned[row, heads:]) < TOLERANCE[dtype]
            assert torch.equal(seen[:, position], value[row].float())
            key, seen = key[:, first : position + 1], seen[:, first : position + 1]
            query = turned[row, :heads].view(kv_heads, -1, head_dim)
            exact = functional.scaled_dot_product_attention(query, key, seen).view(heads, head_dim)
            assert relative_error(out[row], exact) < TOLERANCE[dtype], (layer, position)
    assert all(bool((guard == 7).all()) for guard in guards), "it wrote beyond its own"


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("ahead", [0, 128])
def test_products_of_few_rows(rows: int, parts: int, ahead: int) -> None:
    from microserve.engine.model.cuda_skinny import Tiling, gated, linear, linear_add_norm

    torch.manual_seed(0)
    tiling = Tiling(32, 128, parts=parts, ahead=ahead)
    x, residual = (torch.randn(rows, 1024, device=DEVICE).bfloat16() for _ in range(2))
    weight = (torch.randn(1024, 1024, device=DEVICE) / 32).bfloat16()
    bias, norm = torch.randn(1024, device=DEVICE).bfloat16(), torch.rand(1024, device=DEVICE).bfloat16()
    exact = functional.linear(x.float(), weight.float())
    assert relative_error(linear(x, weight, None, tiling), exact) < 1e-2
    assert relative_error(linear(x, weight, bias, tiling), exact + bias.float()) < 1e-2
    gate, up = exact.chunk(2, dim=-1)
    assert relative_error(gated(x, weight, tiling), functional.silu(gate) * up) < 1e-2
    total = exact + residual.float()
    normed, kept = linear_add_norm(x, weight, residual, norm, 1e-5, tiling)
    assert kept is residual
    assert relative_error(kept, total) < 1e-2
    assert relative_error(normed, functional.rms_norm(total, (1024,), norm.float(), 1e-5)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 8, 8), (128, 128, 64), (1037, 14336, 4096), (3000, 1000, 264)])
def test_gate_and_up_of_many_rows(dtype: torch.dtype, rows: int, out: int, width: int) -> None:
    import flashinfer

    from microserve.engine.model.cuda_gated import fits, gated

    torch.manual_seed(0)
    x = torch.randn(rows, width, device=DEVICE).to(dtype)
    weight = (torch.randn(2 * out, width, device=DEVICE) / width**0.5).to(dtype)
    assert fits(x, weight)
    ours = gated(x, weight)
    gate, up = functional.linear(x.float(), weight.float()).chunk(2, dim=-1)
    assert relative_error(ours, functional.silu(gate) * up) < TOLERANCE[dtype]
    # No worse at any place than two kernels are: a tile that was read too early would show.
    apart = flashinfer.activation.silu_and_mul(functional.linear(x, weight))
    assert float((ours.float() - apart.float()).abs().max()) <= 8 * torch.finfo(dtype).eps * float(apart.abs().max())
    for _ in range(20):
        assert torch.equal(gated(x, weight), ours)


def test_what_the_copy_engine_cannot_read_is_not_for_it() -> None:
    from microserve.engine.model.cuda_gated import fits

    x, weight = torch.empty(4, 64, dtype=torch.bfloat16), torch.empty(32, 64, dtype=torch.bfloat16)
    assert fits(x, weight)
    assert not fits(x[:, :60], weight[:, :60])
    assert not fits(x, weight[:20])
    assert not fits(x.float(), weight.float())
    assert not fits(torch.empty(4, 128, dtype=torch.bfloat16)[:, :64], weight)
    assert not fits(torch.empty(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64), weight)


def test_gate_and_up_are_one_kernel_from_1024_rows_on_and_two_where_it_does_not_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from microserve.engine.model import cuda_gated
    from microserve.engine.model.cuda_kernels import CudaKernels

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it is for Hopper")
    torch.manual_seed(0)
    weight = (torch.randn(512, 256, device=DEVICE) / 16).bfloat16()
    many, fewer = (torch.randn(rows, 256, device=DEVICE).bfloat16() for rows in (1024, 1023))
    real, seen = cuda_gated.gated, list[int]()

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(x))
        return real(x, weight)

    kernels = CudaKernels(torch.bfloat16, torch.device(DEVICE, 0))
    monkeypatch.setattr(cuda_gated, "gated", counted)
    fused = kernels.gated(many, weight, None)
    kernels.gated(fewer, weight, None)
    assert seen == [1024]

    def broken(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("another Triton")

    monkeypatch.setattr(cuda_gated, "gated", broken)
    apart = CudaKernels(torch.bfloat16, torch.device(DEVICE, 0)).gated(many, weight, None)
    assert relative_error(fused, apart.float()) < 1e-2


def test_a_matrix_that_a_tiling_does_not_divide_is_not_for_it() -> None:
    from microserve.engine.model.cuda_skinny import Tiling, fits

    weight = torch.empty(96, 256, device="meta")
    assert fits(weight, Tiling(32, 128, parts=2))
    assert not fits(weight, Tiling(64, 128))
    assert not fits(weight, Tiling(32, 128, parts=4))
    assert not fits(weight, Tiling(32, 128), gated=True)


DRAWN = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5, top_k=7),
    SamplingParams(temperature=2.0, top_p=0.6, min_p=0.02),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.95),
    SamplingParams(temperature=1.3, min_p=0.1),
    SamplingParams(temperature=1e-30, top_p=0.5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, top_p=0.999, top_k=500),
    SamplingParams(temperature=3.0, top_k=10**6),
)


def draw_rows(logits: Tensor, settings: list[SamplingParams], seeds: list[int]) -> Tensor:
    """The tokens of `draw`, whose slots are its rows backwards."""
    from microserve.engine.cuda_sampler import Draws
    from microserve.engine.model.cuda_draw import draw

    rows = len(logits)
    draws = Draws(rows)
    for row, (sampling, seed) in enumerate(zip(settings, seeds, strict=True)):
        draws.start(rows - 1 - row, sampling, seed)
    slots = np.arange(rows, dtype=np.int32)[::-1].copy()
    columns = torch.from_numpy(draws.columns(slots, [4] * rows)).to(DEVICE)
    best, ids = logits.max(dim=-1)
    tokens = torch.where(torch.isfinite(best), ids, -1).int()
    last = torch.full((rows,), -5, device=DEVICE)
    drawn = tokens >= 0
    draw(logits, columns, tokens, last)
    assert torch.equal(last.flip(0)[drawn], tokens[drawn].long())
    assert (last.flip(0)[~drawn] == -5).all()
    return tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("vocab", "spread", "at"), [(128256, 1, 0), (128256, 6, 20), (1000, 3, -5), (8192, 0.01, 5), (8193, 0, 0)]
)
def test_a_draw_is_that_of_the_cpu_ties_and_thresholds_included(
    dtype: torch.dtype, vocab: int, spread: float, at: float
) -> None:
    from microserve.engine.sampler import _draw, uniforms

    torch.manual_seed(0)
    rows = 8 * len(DRAWN)
    logits = (torch.randn(rows, vocab, device=DEVICE) * spread + at).to(dtype)
    logits[1::4, :10] = 0.0
    logits[1::4, 10:20] = -0.0
    logits[2::4, 5:600] = -torch.inf
    settings = [DRAWN[row % len(DRAWN)] for row in range(rows)]
    ours = draw_rows(logits, settings, list(range(rows))).tolist()
    exact = _draw(logits.float().cpu(), settings, uniforms(range(rows), [4] * rows))
    wrong = [row for row in range(rows) if ours[row] != exact[row]]
    # Sums of 128,256 float32 differ in their last digits: a number that falls between two tokens may go either way.
    assert len(wrong) <= 1, [(ours[row], exact[row], settings[row]) for row in wrong]


def test_a_row_is_drawn_alike_whatever_it_is_drawn_with() -> None:
    torch.manual_seed(0)
    rows = 300
    logits = torch.randn(rows, 1000, device=DEVICE).bfloat16() * 3
    settings, seeds = [DRAWN[row % 5] for row in range(rows)], list(range(rows))
    together = draw_rows(logits, settings, seeds)
    alone = [draw_rows(logits[row : row + 1], settings[row : row + 1], seeds[row : row + 1]) for row in range(rows)]
    assert torch.equal(together, torch.cat(alone))
    best = logits[1::5].float().topk(7).indices
    assert (together[1::5, None] == best).any(dim=1).all()
    assert len(set(together.tolist())) > rows / 3


def test_a_row_that_is_no_numbers_draws_nothing_and_leaves_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 1000, device=DEVICE).bfloat16()
    whole = draw_rows(logits, [DRAWN[3]] * 3, [1, 2, 3]).tolist()
    for broken in (torch.nan, torch.inf):
        logits[1, 77] = broken
        assert draw_rows(logits, [DRAWN[3]] * 3, [1, 2, 3]).tolist() == [whole[0], -1, whole[2]]
