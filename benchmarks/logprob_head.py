"""Logprobs and entropy of completions, and the gradient of the hidden states: four heads, in one process.

    python benchmarks/logprob_head.py [--rows 1024] [--hidden 896] [--vocab 151936] [--rounds 7]

The defaults are the head of Qwen2.5-0.5B. The head is frozen, as it is with LoRA, and bfloat16. Heads take turns
within each round, so that a slow moment of the machine hits all of them; medians over the rounds. `extra` is the
peak of memory over what inputs and weights take. `error` is that of the gradient, relative, against float64.
TRL's and Liger's functions are their own, where installed (pip install --no-deps trl liger-kernel); neither needs
Triton. Liger's has no entropy. Everything runs on the GPU if there is one.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import DEVICE, clock  # noqa: E402
from policy import FrozenHead, Head  # noqa: E402
from runtime.tracking import peak_memory, reset_peak_memory  # noqa: E402

TEMPERATURE = 0.9


class Timing(NamedTuple):
    forward: float  # seconds, median
    backward: float
    total: float
    extra: int  # bytes at the peak, beyond inputs and weights
    error: float  # of the gradient of the hidden states, relative


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in float32, and autograd through them."""
    logp = (hidden @ weight.T).float().div(TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        torch.special.entr(logp.exp()).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return FrozenHead.apply(hidden, Head(weight), targets, TEMPERATURE, False)[0]


def trls(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size

    options = (None, 1.0, ("log_probs", "entropy"))  # no softcap, no scale; what GRPOTrainer asks for
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, TEMPERATURE, size, *options)[0]


def ligers(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import fused_linear_ppo as liger

    size = liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return liger._ChunkedSelectiveLogProbFunction.apply(hidden, weight, targets, None, TEMPERATURE, size)


def measure(head: Callable, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, float, int, Tensor]:
    """Seconds forward and backward, peak extra bytes, and the gradient of the hidden states."""
    hidden = hidden.detach().requires_grad_()
    reset_peak_memory()
    before, start = peak_memory(), clock()
    logprobs = head(hidden, weight, targets)
    middle = clock()
    logprobs.backward(torch.ones_like(logprobs))
    end = clock()
    return middle - start, end - middle, peak_memory() - before, hidden.grad


def exact_gradient(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(W_y - p W) / τ in float64, a few rows at a time."""
    wide, parts = weight.double(), []
    for rows, drawn in zip(hidden.double().split(64), targets.split(64)):
        p = (rows @ wide.T / TEMPERATURE).softmax(-1)
        parts.append((wide[drawn] - p @ wide) / TEMPERATURE)
    return torch.cat(parts)


def compare(rows: int, hidden_size: int, vocabulary: int, rounds: int) -> dict[str, Timing]:
    """Every head that is installed."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device=DEVICE).bfloat16()
    weight = (torch.randn(vocabulary, hidden_size, device=DEVICE) * hidden_size**-0.5).bfloat16()
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    exact = exact_gradient(hidden[:64], weight, targets[:64])

    heads = {"full logits, float32": full_logits, "ours": ours}
    heads |= {"TRL": trls} if find_spec("trl") else {}
    heads |= {"Liger": ligers} if find_spec("liger_kernel") else {}
    times: dict[str, list[tuple]] = {name: [] for name in heads}
    extra, errors = dict.fromkeys(heads, 0), {}
    for round in range(rounds + 1):
        for name, head in heads.items():
            forward, backward, peak, gradient = measure(head, hidden, weight, targets)
            if round:  # the first one warms up
                times[name].append((forward, backward, forward + backward))
                extra[name] = max(extra[name], peak)
            errors[name] = ((gradient[:64].double() - exact).norm() / exact.norm()).item()
    return {
        name: Timing(*(statistics.median(column) for column in zip(*times[name])), extra[name], errors[name])
        for name in heads
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    timings = compare(arguments.rows, arguments.hidden, arguments.vocab, arguments.rounds)
    print(f"{arguments.rows} tokens, {arguments.hidden} -> {arguments.vocab}, bfloat16, {DEVICE.type}")
    print(f"| {'head':<22} | forward s | backward s |  total | extra MiB | error |")
    print(f"|{'-' * 24}|----------:|-----------:|-------:|----------:|------:|")
    for name, timing in timings.items():
        ratio = timing.total / timings["ours"].total
        print(
            f"| {name:<22} | {timing.forward:9.3f} | {timing.backward:10.3f} | {ratio:5.2f}x "
            f"| {timing.extra / 2**20:9.0f} | {timing.error:.3f} |"
        )


if __name__ == "__main__":
    main()
