"""The products of LoRA and their gradients: y = x Wᵀ + s (x Aᵀ) Bᵀ of a linear or of experts, and W + s·B A.

W (out, in) is frozen, may be NF4 (nf4.py), and never gets a gradient; A (r, in) and B (out, r) are float32. T tokens
have x (..., in) of any leading dimensions. Of E experts, each token chooses k: S = T·k pairs of a token and an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nf4 import NF4Weight, slices

# Elements of W + s·B A that are merged at a time. W is copied and then added to: parts stay in the cache meanwhile.
# A GPU needs larger ones, since launching a kernel should not take longer than the kernel.
MERGED_AT_ONCE = 1 << (23 if torch.cuda.is_available() else 20)


# ---- A linear -------------------------------------------------------------------------------------------------


def low_rank_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    merged: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """x (..., in), weight (out, in), A (r, in), B (out, r), mask (T, r) -> (..., out); see `LowRankLinear`."""
    same, low, saved = Inputs.apply(x, A, B, scale, merged, mask)
    return LowRankLinear.apply(same if x.requires_grad else x, low, weight, bias, A, B, scale, merged, mask, saved)


class Inputs(torch.autograd.Function):
    """Saves x, A, B and low = s x Aᵀ (T, r) before `LowRankLinear` multiplies them by W; x is returned as it is.

    A checkpointed block is recomputed only until its last saved tensor exists, and a function saves its tensors after
    its forward. The last ones belong to `down_proj`: saved here, they exist before its product with W, the block's
    largest, which is then not repeated. `merged` needs `low` in the backward alone, and forms it there.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, A: Tensor, B: Tensor, scale: float, merged: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, "Inputs"]:
        """x (..., in), A (r, in), B (out, r), mask (T, r) -> x, low (T, r), and the keeper of both."""
        low = None if merged else scaled_product(x.reshape(-1, x.shape[-1]), A.to(x.dtype).T, scale, mask)
        ctx.save_for_backward(x, A, B, low)
        ctx.set_materialize_grads(False)  # of `low`
        if low is not None:
            ctx.mark_non_differentiable(low)
        return x.view_as(x), low, ctx

    @staticmethod
    def backward(ctx, dx: Tensor, *_):
        return dx, None, None, None, None, None


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + low Bᵀ, with low, x, A and B kept by `Inputs` alone; W's gradient is never formed, nor is BA.

    With low = s x Aᵀ and g = s dy B:   dA = gᵀ x    dB = dyᵀ low    dx = dy W + g A

    `mask`, of 0 and 1: which of the r a token has. It multiplies low and g, so other tokens add exact zeros to dA, dB.

    `merged`: forward and dx instead use M = W + s·B A rounded to W's dtype, the very weight that the sampler runs;
    dA and dB stay the same, straight through the rounding. M is formed anew in the backward, not kept.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        low: Tensor | None,
        weight: Tensor | NF4Weight,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        merged: bool,
        mask: Tensor | None,
        saved: Inputs,
    ) -> Tensor:
        """x (..., in), weight (out, in), A (r, in), B (out, r), mask (T, r) -> (..., out), in the dtype of x."""
        ctx.saved = saved
        ctx.weight = weight  # not saved: FSDP frees W after the forward and refills the same tensor
        ctx.scale, ctx.merged, ctx.mask = scale, merged, mask
        if merged:
            return F.linear(x, merge(dense(weight), A, B, scale), bias)
        y = F.linear(low, B.to(x.dtype), bias)
        y.addmm_(x.reshape(-1, x.shape[-1]), dense(weight).T)  # the large product adds to y: y is not read once more
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor):
        """dy (..., out) -> gradients of x, A and B; those of A and B in float32."""
        x, A, B, low = ctx.saved.saved_tensors
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        a, b = A.to(x.dtype), B.to(x.dtype)
        low = scaled_product(rows, a.T, ctx.scale, ctx.mask) if low is None else low
        g = scaled_product(dy_rows, b, ctx.scale, ctx.mask)  # (T, r)
        # The large matrix is the right factor of both, the small one a copy: half the time of dyᵀ low on a CPU.
        dA = (g.T.contiguous() @ rows).to(A.dtype)
        dB = (low.T.contiguous() @ dy_rows).T.to(B.dtype, memory_format=torch.contiguous_format)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.merged:
                dx = dy_rows @ merge(dense(ctx.weight), A, B, ctx.scale)
            else:
                dx = (g @ a).addmm_(dy_rows, dense(ctx.weight))
            dx = dx.view(x.shape)
        return dx, None, None, None, dA, dB, None, None, None, None


def scaled_product(left: Tensor, right: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """s · left right, times the mask if there is one. The product itself scales, before it rounds."""
    product = left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scale)
    return product if mask is None else product.mul_(mask)


def dense(weight: Tensor | NF4Weight) -> Tensor:
    """The weight as a matrix; an NF4 weight is dequantised."""
    return weight() if isinstance(weight, NF4Weight) else weight


# ---- Experts --------------------------------------------------------------------------------------------------


class GroupedLinear(torch.autograd.Function):
    """`LowRankLinear` of many experts, each applied to its own rows of x; without A and B, the frozen W alone."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        scale: float,
        merged: bool,
    ) -> Tensor:
        """x (S, in), weight (E, out, in), ends (E,), A (E, r, in), B (E, out, r) -> (S, out), in the dtype of x."""
        ctx.save_for_backward(x, ends, A, B)
        ctx.weight, ctx.scale, ctx.merged = weight, scale, merged  # as in `LowRankLinear`
        if A is None or merged:
            return grouped_mm(x, (weight if A is None else merge(weight, A, B, scale)).mT, ends)
        a, b = padded(A, B * scale, x.dtype)
        return grouped_mm(x, weight.mT, ends).add_(grouped_mm(grouped_mm(x, a.mT, ends), b.mT, ends))

    @staticmethod
    def backward(ctx, dy: Tensor):
        """dy (S, out) -> gradients of x, A and B; those of A and B in float32."""
        x, ends, A, B = ctx.saved_tensors
        dy = dy.contiguous()  # of gate_proj and up_proj, it is a half of wider rows
        if A is None:
            return grouped_mm(dy, ctx.weight, ends), *[None] * 6
        a, b = padded(A, B * ctx.scale, x.dtype)
        g, low = grouped_mm(dy, b, ends), grouped_mm(x, a.mT, ends)  # (S, r), g with s in it
        dA = grouped_outer(g, x, ends)[:, : A.shape[1]].to(A.dtype)
        dB = grouped_outer(dy, low, ends)[..., : A.shape[1]].to(B.dtype).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.merged:
                dx = grouped_mm(dy, merge(ctx.weight, A, B, ctx.scale), ends)
            else:
                dx = grouped_mm(dy, ctx.weight, ends).add_(grouped_mm(g, a, ends))
        return dx, None, None, dA, dB, None, None


def padded(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in that dtype, with zeros up to a rank that is a multiple of 8, see `has_kernel`."""
    missing = -A.shape[1] % 8
    return F.pad(A.to(dtype), (0, 0, 0, missing)), F.pad(B.to(dtype), (0, missing))


def grouped_mm(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows of x times its matrix: (S, m), (E, m, n) -> (S, n)."""
    if has_kernel(x, matrices):
        return F.grouped_mm(x, matrices, offs=ends)
    return torch.cat([rows @ matrix for rows, matrix in zip(groups(x, ends), matrices)])


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """leftᵀ right over each expert's rows: (S, m), (S, n) -> (E, m, n); 0 for an expert that no token chose."""
    if has_kernel(left, right):
        chosen = ends.diff(prepend=ends.new_zeros(1)) > 0  # some kernels do not write the others: pytorch issue 172439
        return F.grouped_mm(left.mT, right, offs=ends).masked_fill_(~chosen[:, None, None], 0)
    return torch.stack([rows.T @ others for rows, others in zip(groups(left, ends), groups(right, ends))])


def has_kernel(*factors: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: rows of a multiple of 16 bytes, and no float64."""
    return all(f.dtype != torch.float64 and max(f.stride()[-2:]) * f.itemsize % 16 == 0 for f in factors)


def groups(x: Tensor, ends: Tensor) -> list[Tensor]:
    """The rows of each expert."""
    return list(x.tensor_split(ends[:-1].tolist()))


# ---- W + s·B A ------------------------------------------------------------------------------------------------


def merge(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + s·B A (out, in), in W's dtype; of all experts (E, out, in)."""
    if weight.ndim == 3:
        return torch.stack([merge(*expert, scale) for expert in zip(weight, A, B)])
    left, right = factors(A, B, weight.dtype)
    merged = torch.empty_like(weight)
    for rows in slices(weight, MERGED_AT_ONCE):
        add_product(weight[rows], left[rows], right, scale, out=merged[rows])
    return merged


def factors(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, k) and (k, in), whose product is B A: what `add_product` adds to a W of that dtype.

    For bfloat16, k = 3 r: both are split into two bfloat16 numbers, high + low, which keep 16 bits of each, and
    [B_high B_high B_low] [A_high; A_low; A_high] differs from B A by at most 2⁻¹⁶ |B| |A|. Else k = r, in float32 or
    wider.
    """
    if dtype != torch.bfloat16:
        wide = torch.promote_types(dtype, A.dtype)
        return B.to(wide), A.to(wide)
    left = torch.empty(B.shape[0], 3, B.shape[1], dtype=dtype, device=B.device)
    right = torch.empty(3, *A.shape, dtype=dtype, device=A.device)
    left[:, :2], right[::2] = B[:, None], A
    torch.sub(B, left[:, 0], out=left[:, 2])
    torch.sub(A, right[0], out=right[1])
    return left.flatten(1), right.flatten(0, 1)


def add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """Writes W + s · left · right into `out`, summed in at least float32 and rounded once.

    Rows are independent: a shard of W's rows and the same shard of B's give that shard of the sum.
    """
    if weight.dtype == left.dtype == out.dtype:
        torch.addmm(weight, left, right, alpha=scale, out=out)  # one product adds W, too, before it rounds
    else:
        out.copy_(weight.to(left.dtype).addmm_(left, right, alpha=scale))
