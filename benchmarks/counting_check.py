"""The counter of benchmarks/counting.py beside a clock: ten operators and three phases, on one core of this CPU.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 OMP_NUM_THREADS=1 python benchmarks/counting_check.py

The rates are measured first, each by one operation: a copy, a product in bfloat16 and one in float32. The environment
makes a process keep the memory that it frees, as a GPU's allocator does: fresh memory costs a CPU more than a copy.
Times are the core's own (other processes hardly matter), the least of several. Of operators that keep a core busy
(softmax, SiLU) the counter knows only the bytes, which are nearly all that matters on a GPU: the head shows it here.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import low_rank  # noqa: E402
from benchmarks.counting import Card, Counter  # noqa: E402
from policy import FrozenHead, Head  # noqa: E402

RANK = 64


def seconds(work: Callable[[], object], rounds: int) -> float:
    """The least processor time of some calls, after one that warms up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(rows, columns).to(dtype).requires_grad_(requires_grad)


def this_machine(rounds: int) -> Card:
    """One core of it."""
    source, target = (torch.randn(1 << 26) for _ in range(2))
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source), rounds)
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        square = matrix(2048, 2048, dtype)
        rates[dtype] = 2 * 2048**3 / seconds(partial(torch.mm, square, square.T), rounds)
    return Card(bandwidth, rates, cache=0, start=2e-6)


def operators() -> dict[str, Callable[[], object]]:
    """Of tensors that fit in no cache."""
    n, single = 8192, torch.float32
    a, b, c = (matrix(n, n, single) for _ in range(3))
    low_a, low_b = a.bfloat16(), b.bfloat16()
    x, W, A = matrix(3072, 2048), matrix(5504, 2048), matrix(1024, 1536, single)
    return {
        "copy, bfloat16": lambda: low_a.copy_(low_b),
        "a · b, float32": lambda: torch.mul(a, b, out=c),
        "a · b, bfloat16": lambda: low_a * low_b,
        "to float32": lambda: low_a.float(),
        "to bfloat16": lambda: a.bfloat16(),
        "zeros": lambda: torch.zeros(n, n),
        "largest of each row": lambda: a.amax(-1),
        "x Wᵀ, bfloat16": lambda: F.linear(x, W),
        "x W, bfloat16": lambda: x.T @ x,
        "x Wᵀ, float32": lambda: F.linear(A, A),
    }


def phases() -> dict[str, Callable[[], object]]:
    """At a 3B's sizes."""
    x, W = matrix(2048, 2048, requires_grad=True), matrix(11008, 2048)
    A, B = matrix(RANK, 2048, torch.float32, requires_grad=True), matrix(11008, RANK, torch.float32, requires_grad=True)
    states, head = matrix(256, 2048, requires_grad=True), matrix(151936, 2048)
    dy, targets, ones = matrix(2048, 11008), torch.arange(256), torch.ones(256)

    adapters = [A.detach().repeat(256, 1).requires_grad_() for _ in range(2)]
    optimizer = torch.optim.AdamW(adapters, foreach=True)
    for parameter in adapters:
        parameter.grad = torch.ones_like(parameter)

    def layer() -> None:
        low_rank.low_rank_linear(x, W, None, A, B, 1.0, False).backward(dy)

    def score() -> None:
        FrozenHead.apply(states, Head(head), targets, 1.0, False)[0].backward(ones)

    return {
        "LoRA layer, forward and backward": layer,
        "merge": lambda: low_rank.merge(W, A.detach(), B.detach(), 1.0),
        "AdamW": optimizer.step,
        "frozen head, forward and backward": score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    card = this_machine(rounds)
    products = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {str(dtype)[6:]}" for dtype, rate in card.rates.items())
    print(f"one core: {card.bandwidth / 1e9:.1f} GB/s, {products}\n")
    print("| what | predicted, ms | measured, ms | measured / predicted |\n|---|---:|---:|---:|")
    for group in (operators(), phases()):
        for name, work in group.items():
            with Counter(card) as count:
                work()
            measured = seconds(work, rounds)
            print(f"| {name} | {count.seconds * 1e3:.1f} | {measured * 1e3:.1f} | {measured / count.seconds:.2f} |")


if __name__ == "__main__":
    main()
