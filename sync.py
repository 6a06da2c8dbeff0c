"""Handing the policy to the sampler as an adapter, and proving that what the sampler runs is what was trained.

Two checks, each blind where the other sees (docs/fidelity.md has what they were tried against):

    read back   After every sync, a few columns of every tensor that was sent are read out of vLLM's own linears. They
                must be equal bit for bit, however small the update was. Finds whatever was lost, late or misplaced
                on the way; does not know whether what was sent was right, or whether vLLM uses what it holds.
    probe       At the start and every `verify_every` syncs, a random adapter takes the policy's place for one sync,
                and both sides score fixed texts with it. It is scaled until its effect is `EFFECT` times the noise
                between the two implementations, which is measured first. Finds a wrong scale, an adapter or a layer
                that is ignored; does not see a single stale tensor among hundreds.

The probe's effect is the same at every check, since it stands on the frozen base and not on the policy: a run whose
first check passed is not stopped by a later one because its policy has become sharp, or has hardly changed.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, cycle, islice

import torch
import torch.distributed as dist
from torch import Tensor

import fsdp_utils
import lora
import nf4
from policy import Policy, pack
from rollout import Engine

COLUMNS = 8  # of each tensor, read back after a sync; every sync takes others
DENORMAL = 1e-30  # below this, bfloat16 instructions of some CPUs take a value for zero
PROBE_TOKENS = 512  # scored by both sides
MOST_NOISE = 0.06  # of the mean logprob: how far two bfloat16 implementations of one model may be apart
EFFECT = 30.0  # of the probe, in multiples of that noise;
LEAST_EFFECT = 0.1  # and in nats per token at least, where there is hardly any noise (float32)
MOST_ERROR = 3.0  # of what vLLM shows of the probe, in multiples of the noise;
LEAST_ERROR = 0.1  # and of the effect, below which nothing is called an error


def send_adapter(policy: Policy, engine: Engine, sent: "Sent") -> dict[str, float]:
    """Hands vLLM an adapter by a folder in memory, written by one rank of each host; W stays as it is."""
    names: dict[Tensor, str] = {}
    for path, layer in lora.lora_layers(policy.model):
        adapter = layer.adapters[lora.POLICY]
        names |= {parameter: f"{path}.{kind}" for kind, parameter in adapter.named_parameters()}

    def gather(parameter: Tensor) -> Tensor:
        whole, name = fsdp_utils.gather(parameter), names[parameter]
        rounded = whole.detach().to(engine.dtype)
        sent.note(name, rounded * adapter.scale if name.endswith("lora_B") else rounded)  # as vLLM stores them
        return whole

    with fsdp_utils.shared_folder() as folder:
        write = fsdp_utils.first_on_host()
        lora.save_adapter(policy.model, folder, gather=gather, write=write)
        dist.barrier()  # written
        engine.load_adapter(str(folder))
    return {"sync/bytes": sum(parameter.nbytes for parameter in names)}


# ---- Read back ------------------------------------------------------------------------------------------------


class Sent:
    """A few columns of every tensor that one sync sends, to be found in vLLM afterwards."""

    def __init__(self, number: int):
        """Syncs of another number look at other columns."""
        self.generator = torch.Generator().manual_seed(number)
        self.samples: dict[str, tuple[list[int], Tensor]] = {}

    def note(self, name: str, tensor: Tensor) -> None:
        """Remembers columns of a tensor (rows, columns); all of a vector."""
        matrix = tensor if tensor.ndim > 1 else tensor[:, None]
        columns = torch.randint(matrix.shape[1], (min(COLUMNS, matrix.shape[1]),), generator=self.generator).tolist()
        self.samples[name] = columns, matrix[:, columns].detach()

    def noting(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same stream."""
        for name, tensor in stream:
            self.note(name, tensor)
            yield name, tensor
            del tensor  # or it would live on while the next one is gathered

    def check(self, engine: Engine) -> dict[str, float]:
        """Raises RuntimeError, on all ranks, if vLLM holds anything else. Collective."""
        read, complaint = 0, None
        for name, (columns, values) in self.samples.items():
            held = engine.read(name, columns)
            if held is None:
                continue
            read += 1
            expected = values[held.rows][:, held.places]
            found = held.values[: len(expected)].to(expected.device)  # without the zeros that pad a rank
            wrong = ~((expected - found).abs() <= DENORMAL)  # NaN is wrong, too
            if wrong.any() and not complaint:
                complaint = f"{wrong.sum()} of {wrong.numel()} values of {name}"
        complaints: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(complaints, complaint)
        if any(complaints):
            raise RuntimeError(
                f"vLLM does not hold the weights that were sent: {next(filter(None, complaints))} differ"
            )
        return {"sync/read_back_frac": read / max(1, len(self.samples))}


# ---- The probe ------------------------------------------------------------------------------------------------


class Verifier:
    """Sends the probe and compares; vLLM has to be asleep (if it sleeps at all) before and is so afterwards."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        send: Callable[[bool], object],
        texts: list[list[int]],
        device: torch.device,
    ):
        """`send(everything)` wakes vLLM with the policy's weights as they are, or with every weight of the model."""
        self.policy, self.engine, self.send, self.texts, self.device = policy, engine, send, texts, device
        self.layers = list(lora.lora_layers(policy.model))
        self.noise: float | None = None  # nats per token, on the base

    @torch.no_grad()
    def check(self, everything: bool = False) -> dict[str, float]:
        """Raises RuntimeError, on all ranks, if the probe's effect in vLLM is not the trainer's. Collective.

        The policy is then bit for bit as before, and vLLM still holds the probe. Without adapters there is no probe:
        the first check compares the two implementations, and later ones do nothing.
        """
        with kept([layer.adapters[lora.POLICY] for _, layer in self.layers]):
            if self.noise is None:
                self.calibrate(everything)
            if not self.layers:
                return {"sync/noise": self.noise}
            self.plant(self.strength)
            effect = distance(self.expected, self.base)
            error, limit = distance(self.ask(), self.expected) / effect, MOST_ERROR * self.noise / effect
        if not error < max(limit, LEAST_ERROR):
            raise RuntimeError(
                f"vLLM does not run the trained weights: {error:.0%} of the effect of a test adapter is wrong or "
                f"missing there, of which noise explains {limit:.0%}"
            )
        return {"sync/noise": self.noise, "sync/probe_error": error}

    def calibrate(self, everything: bool) -> None:
        """Measures the noise on the base, and scales the probe until its effect is large against it."""
        with lora.disabled(self.policy.model):
            self.base = self.score()
        self.plant(0.0)
        self.noise, size = distance(self.ask(everything), self.base), self.base.abs().mean().item()
        if not self.noise < MOST_NOISE * size:
            raise RuntimeError(
                f"vLLM and the trainer do not compute the same model: with the same weights they differ by "
                f"{self.noise:.3f} nats per token, {self.noise / size:.0%} of the mean logprob, expected less than "
                f"{MOST_NOISE:.0%}"
            )
        if self.layers:
            self.scale_probe(max(EFFECT * self.noise, LEAST_EFFECT))

    def scale_probe(self, target: float) -> None:
        """Finds a strength whose effect is `target` to twice that, in nats per token, or as near as can be."""
        strength, nearest = 0.1, math.inf
        for _ in range(8):
            self.plant(strength)
            expected = self.score()
            ratio = max(distance(expected, self.base), 1e-9) / (1.4 * target)
            if abs(math.log(ratio)) < nearest:
                nearest, self.strength, self.expected = abs(math.log(ratio)), strength, expected
            if nearest < math.log(1.4):
                break
            strength /= min(max(ratio, 0.3), 3.0)

    def plant(self, strength: float) -> None:
        """Gives the policy's adapters the probe's values: a random update, `strength` times as large as each W."""
        generator = torch.Generator().manual_seed(0)
        for _, layer in self.layers:
            adapter = layer.adapters[lora.POLICY]
            A = lora.fresh_A(adapter.rank, layer.in_features, generator)  # its entries have variance 1 / (3 in)
            B = torch.randn(adapter.lora_B.shape, generator=generator)
            size = strength * weight_rms(layer) * (3 * layer.in_features / adapter.rank) ** 0.5 / adapter.scale
            fsdp_utils.fill(adapter.lora_A, A)
            fsdp_utils.fill(adapter.lora_B, B * size)

    def score(self) -> Tensor:
        """The texts' logprobs in the trainer; needs as much memory as training."""
        packed = pack([text[:1] for text in self.texts], [text[1:] for text in self.texts], self.device)
        return self.policy(packed).logprobs

    def ask(self, everything: bool = False) -> Tensor:
        """The texts' logprobs in vLLM, with the policy's present weights."""
        self.send(everything)
        found = [logprob for text in self.texts for logprob in self.engine.logprobs(text)]
        self.engine.sleep()
        return torch.tensor(found, device=self.device)


def distance(found: Tensor, expected: Tensor) -> float:
    """Mean absolute difference; the largest of all ranks, as each engine is checked by its own. Collective."""
    mean = (found - expected).abs().mean()
    dist.all_reduce(mean, dist.ReduceOp.MAX)
    return mean.item()


def weight_rms(layer: lora.LoRALinear) -> float:
    """Root of the mean square of W, over the shards of all ranks. Collective."""
    weight = layer.weight
    if isinstance(weight, nf4.NF4Weight):
        rows = nf4.dequantize(*map(fsdp_utils.local, weight.parameters()), weight.shape[1], weight.dtype)
    else:
        rows = fsdp_utils.local(weight)
    sums = torch.stack([rows.float().square().sum(), torch.tensor(float(rows.numel()), device=rows.device)])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).sqrt().item()


@contextmanager
def kept(adapters: list[lora.Adapter]) -> Iterator[None]:
    """Restores the adapters' values at the end, bit for bit."""
    shards = [fsdp_utils.local(parameter) for adapter in adapters for parameter in adapter.parameters()]
    values = [shard.detach().clone() for shard in shards]
    try:
        yield
    finally:
        with torch.no_grad():
            for shard, value in zip(shards, values):
                shard.copy_(value)


def probe_texts(prompts: list[list[int]], length: int, total: int = PROBE_TOKENS) -> list[list[int]]:
    """Fixed texts of `length` tokens: prompts one after the other, from the start again if they are too few.

    At least two, or nobody would notice a model that mixes sequences of one row.
    """
    tokens = cycle(chain.from_iterable(prompts))
    return [list(islice(tokens, length)) for _ in range(max(2, -(-total // length)))]
