"""benchmarks/counting.py: exact counts of small cases, by hand."""

import pytest
import torch

from benchmarks.counting import CARDS, Card, Counter

COLD = Card(bandwidth=1e9, rates={torch.float32: 1e9, torch.bfloat16: 4e9}, cache=0, start=1e-9)


def tensor(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


W, X, Y, HALF = tensor(4, 16), tensor(4, 8), tensor(8, 16), tensor(4, 8, dtype=torch.bfloat16)
CASES = {  # what, the bytes it moves, its products, and its kernels
    "a product": (lambda: X @ Y, 4 * (32 + 128 + 64), 2 * 4 * 8 * 16, 1),
    "added to in place": (lambda: W.clone().addmm_(X, Y), 4 * (2 * 64 + 32 + 128 + 2 * 64), 2 * 4 * 8 * 16, 2),
    "added to a copy": (lambda: torch.addmm(W, X, Y), 4 * (2 * 64 + 32 + 128 + 2 * 64), 2 * 4 * 8 * 16, 2),
    "added to a bias": (lambda: torch.addmm(W[0], X, Y), 4 * (16 + 32 + 128 + 64), 2 * 4 * 8 * 16, 1),
    "a sum": (lambda: W + W[:1], 4 * (64 + 16 + 64), 0, 1),
    "in place": (lambda: W.mul_(1.0), 4 * 2 * 64, 0, 1),
    "expanded": (lambda: W[:1].expand(9, 16) + 1, 4 * (16 + 9 * 16), 0, 1),
    "views": (lambda: W.T.view(4, 4, 4)[1:, None].expand(3, 5, 4, 4), 0, 0, 0),
    "no values": (lambda: torch.empty_like(W), 0, 0, 0),
    "zeros": (lambda: torch.zeros(5, 5), 4 * 25, 0, 1),
    "another dtype": (lambda: HALF.float(), 2 * 32 + 4 * 32, 0, 1),
    "overwritten": (lambda: W.copy_(W.clone()), 4 * 4 * 64, 0, 2),
    "rows picked": (lambda: W[torch.tensor([2, 0])], 4 * 2 * 2 * 16 + 2 * 8, 0, 1),
    "a list": (lambda: torch._foreach_add_([W, X], 1.0), 4 * 2 * (64 + 32), 0, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_products_and_kernels(case):
    work, moved, products, kernels = CASES[case]
    with Counter(COLD) as count:
        work()
    assert (count.bytes, count.flops.total(), count.starts) == (moved, products, kernels)


def test_a_backward_is_counted_and_each_operation_waits_for_what_takes_longest():
    x, w = HALF.clone().requires_grad_(), tensor(16, 8, dtype=torch.bfloat16)
    with Counter(COLD) as count:
        (x @ w.T).backward(W.bfloat16())
    assert count.flops == {torch.bfloat16: 2 * 2 * 4 * 8 * 16}
    moved = [2 * (32 + 128 + 64), 2 * (64 + 128 + 32)]
    to_bfloat16 = 4 * 64 + 2 * 64
    assert count.bytes == sum(moved) + to_bfloat16
    assert count.seconds == pytest.approx((sum(max(size, 2 * 4 * 8 * 16 / 4) for size in moved) + to_bfloat16) / 1e9)


def test_the_cache_keeps_what_was_used_last():
    with Counter(Card(1e9, {torch.float32: 1e9}, cache=2 * 256)) as count:
        (W + 1).mul_(2).relu()  # in the cache: what + wrote
    assert count.bytes == 4 * 64 * (2 + 0 + 1)
    with Counter(CARDS["h100"]) as count:
        torch.addmm(W, X, Y)
    assert count.bytes == 4 * (64 + 64 + 32 + 128)  # W is copied in the cache, and the copy is added to there


def test_a_floor_reads_once_writes_once_and_forgets_what_lies_between():
    with Counter(COLD) as count:
        kept = (W * 2 + W).relu()
    assert count.bytes == 4 * 64 * (2 + 3 + 2) and count.floor_bytes == 4 * 64 * 2
    assert count.floor == count.floor_bytes / 1e9 < count.seconds and kept is not None
