"""NF4: a weight in four bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E).

Every 64 values of a row are divided by the largest magnitude among them, and each is replaced by the nearest of 16
values that split a normal distribution evenly. Those magnitudes are quantised in turn ("double quantisation"): to
eight bits, in 255ths of the row's largest. A row never looks at another, so rows can be spread over ranks, and a
rank quantises, dequantises and merges its own.

Shapes of a weight (out, in), with K = ceil(in / 64) blocks a row; 0.516 bytes a weight and 4 a row:

    packed (out, 32 K) uint8      two codes a byte, the first in the high half, as bitsandbytes has them
    absmax (out, K) uint8         a block's largest magnitude / scale, rounded
    scale  (out, 1) float32       the row's largest magnitude / 255
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
CODEBOOK = torch.tensor(  # as bitsandbytes publishes it; tests derive it from the quantiles of the normal distribution
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
# Elements processed at a time; each needs up to 20 bytes. On a CPU, parts that fit in the cache are twice as fast.
PROCESSED_AT_ONCE = 1 << (26 if torch.cuda.is_available() else 20)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) of any float dtype -> packed, absmax, scale."""
    parts = [quantize_rows(weight[rows].float()) for rows in slices(weight)] or [quantize_rows(weight.float())]
    packed, absmax, scale = (torch.cat(part) for part in zip(*parts))
    return packed, absmax, scale


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize`, for a few rows in float32."""
    blocks = F.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))  # (out, K, 64)
    largest = blocks.abs().amax(2)
    midpoints = ((CODEBOOK[1:] + CODEBOOK[:-1]) / 2).to(weight.device)
    unit = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(unit, midpoints, out_int32=True).to(torch.uint8).flatten(1)
    packed = codes[:, ::2] << 4 | codes[:, 1::2]
    scale = largest.amax(1, keepdim=True) / 255
    absmax = (largest / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.uint8)
    return packed, absmax, scale


def dequantize(packed: Tensor, absmax: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """packed, absmax, scale -> (out, in); computed in float32 and rounded once."""
    weight = torch.empty(len(packed), in_features, dtype=dtype, device=packed.device)
    for rows in slices(weight):
        unit = F.embedding(packed[rows].int(), pairs(packed.device)).view(-1, absmax.shape[1], BLOCK)
        weight[rows] = unit.mul_((absmax[rows] * scale[rows])[..., None]).flatten(1)[:, :in_features]
    return weight


def slices(weight: Tensor, elements: int = PROCESSED_AT_ONCE) -> Iterator[slice]:
    """Slices of a tensor's rows, each of about `elements` elements."""
    step = max(1, elements // math.prod(weight.shape[1:]))
    return (slice(start, start + step) for start in range(0, len(weight), step))


@cache
def pairs(device: torch.device) -> Tensor:
    """(256, 2): the two values that each byte stands for."""
    byte = torch.arange(256)
    return torch.stack([CODEBOOK[byte >> 4], CODEBOOK[byte & 15]], dim=1).to(device)


class NF4Weight(nn.Module):
    """Replaces a linear's `weight`; calling it dequantises the weight, each time anew, in its original dtype."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        for name, tensor in zip(("packed", "absmax", "scale"), quantize(weight.detach())):  # also on the meta device
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self) -> Tensor:
        return dequantize(self.packed, self.absmax, self.scale, self.shape[1], self.dtype)


class NF4Linear(torch.autograd.Function):
    """x Wᵀ + b for a frozen NF4 weight, which is dequantised again in the backward instead of being saved."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(), bias)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy @ ctx.weight(), None, None
