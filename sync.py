"""Handing the policy to the sampler as an adapter, and making sure that it arrived, however it was sent."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, cycle, islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fsdp_utils
import lora
from policy import Policy, pack
from rollout import Engine

PROBE_TOKENS = 512  # scored by both sides to see whether they have the same weights
MOST_NOISE = 0.1  # nats per token that two bfloat16 implementations may differ by
LEAST_NOISE = 1e-4
MOST_MISSING = 0.25  # of an update, beyond what noise explains
NOISE_GROWTH = 3.0  # a trained policy is sharper than its base, which makes the same rounding weigh more


def send_adapter(policy: Policy, engine: Engine) -> dict[str, float]:
    """Hands vLLM an adapter by a folder in memory, written by one rank of each host; W stays as it is."""
    with fsdp_utils.shared_folder() as folder:
        write = fsdp_utils.first_on_host()
        lora.save_adapter(policy.model, folder, gather=fsdp_utils.gather, write=write)
        dist.barrier()  # written
        engine.load_adapter(str(folder))
    adapters = [layer.adapters[lora.POLICY] for _, layer in lora.lora_layers(policy.model)]
    return {"sync/bytes": sum(p.nbytes for adapter in adapters for p in adapter.parameters())}


# ---- Did it arrive? -------------------------------------------------------------------------------------------


class Verifier:
    """Scores fixed texts in the trainer and in vLLM, and compares.

    Both run in the model's dtype with their own kernels, so they never agree exactly. How far they are apart after the
    first sync, before this process has trained, is what later differences are measured by. An update too
    small to stand out of that noise in any one logprob does so in all together: the second check asks how far along
    the way from the base to the policy vLLM is.
    """

    def __init__(self, texts: list[list[int]], merged: bool):
        self.texts, self.merged = texts, merged
        self.noise: float | None = None

    @torch.no_grad()
    def expect(self, policy: Policy, device: torch.device) -> tuple[Tensor, Tensor]:
        """The texts' logprobs as vLLM should find them, and those of the base; needs as much memory as training."""
        packed = pack([text[:1] for text in self.texts], [text[1:] for text in self.texts], device)
        with rounded(policy.model) if self.merged else nullcontext():
            expected = policy(packed).logprobs
        with lora.disabled(policy.model):
            base = policy(packed).logprobs
        return expected, base

    def check(self, engine: Engine, expected: Tensor, base: Tensor) -> dict[str, float]:
        """Raises RuntimeError, on all ranks, unless vLLM finds for the texts what was to be expected."""
        found = [logprob for text in self.texts for logprob in engine.logprobs(text)]
        found = torch.tensor(found, device=expected.device)
        difference = (expected - found).abs().mean()
        arrived, error = least_squares(found - base, expected - base)
        worst = torch.stack([difference, (arrived - 1).abs() - 4 * error])
        dist.all_reduce(worst, dist.ReduceOp.MAX)  # each engine was checked by its own ranks
        difference, missing = worst.tolist()
        limit = MOST_NOISE if self.noise is None else max(self.noise * NOISE_GROWTH, LEAST_NOISE)
        if not (difference < limit and missing < MOST_MISSING):
            raise RuntimeError(
                f"vLLM does not run the trained weights: logprobs of the same {len(found)} tokens differ by "
                f"{difference:.4f} on average, expected at most {limit:.4f}; {missing:.0%} of the update's effect is "
                f"wrong or not there, beyond what noise explains, expected at most {MOST_MISSING:.0%}"
            )
        if self.noise is None:
            self.noise = difference
        return {"sync/verified_diff": difference, "sync/arrived": arrived.item()}


def least_squares(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """The factor by which `expected` comes closest to `found` (least squares), and its standard error."""
    square = expected.square().sum()
    if square == 0:  # nothing is expected, and nothing can be missing
        return torch.ones_like(square), torch.zeros_like(square)
    factor = (found * expected).sum() / square
    return factor, ((found - factor * expected).square().mean() / square).sqrt()


def probe_texts(prompts: list[list[int]], length: int, total: int = PROBE_TOKENS) -> list[list[int]]:
    """Fixed texts of `length` tokens: prompts one after the other, from the start again if they are too few.

    At least two, or nobody would notice a model that mixes sequences of one row.
    """
    tokens = cycle(chain.from_iterable(prompts))
    return [list(islice(tokens, length)) for _ in range(max(2, -(-total // length)))]


@contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Within it, LoRA layers run what vLLM has, W + s·B A rounded to W's dtype, instead of the two terms apart."""
    adapters = [layer.adapters[lora.POLICY] for _, layer in lora.lora_layers(model)]
    before = [adapter.merged for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.merged = True
        yield
    finally:
        for adapter, merged in zip(adapters, before):
            adapter.merged = merged
