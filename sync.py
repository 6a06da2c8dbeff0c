"""The policy's way to the sampler, and the proof that what vLLM runs is what was trained.

`WeightSync.update_weights` sends the policy: W + s·B A, merged on the way (fsdp_utils.py, `summon_layers`), or the
adapter alone, as a folder in memory. Two checks prove that it arrived, and each finds what the other cannot
(docs/fidelity.md has the faults that they were tried against):

    read back   After every sync, a few columns of every tensor that was sent are read out of vLLM's own linears. They
                must be equal bit for bit, however small the update was. This finds tensors that were lost, late or
                misplaced. It does not find a wrong tensor that was sent correctly, or weights that vLLM ignores.
    probe       At the start and every `VERIFY_EVERY` steps, a random adapter takes the policy's place for one sync,
                and both sides score fixed texts with it. Its effect is `EFFECT` times the noise between the two
                implementations, which is measured first. This finds a wrong scale, and an adapter or a layer that
                vLLM ignores. It does not find one stale tensor among hundreds.

The probe stands on the frozen base, not on the policy, so its effect is the same at every check: a run that passed its
first check does not fail a later one because its policy has become sharp or has hardly changed.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain, cycle, islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fsdp_utils
import lora
from configs.base import Config
from policy import Policy
from rollout import Engine
from runtime.adapter_files import save_adapter
from runtime.generators import AnyEngine
from runtime.packing import CONVOLUTIONS, pack
from runtime.shared_memory import first_on_host, shared_folder

HEADERS = 1 << 20, 1 << 8  # bytes: more than an adapter's folder takes beside its tensors, and for each of them
PARTS = {"in_proj_qkv": 3}  # how many parts of vLLM's fused linear a checkpoint's linear is; all others are one
VERIFY_EVERY = 50  # steps between checks with the probe
COLUMNS = 8  # of each tensor, read back after a sync; every sync reads others
DENORMAL = 1e-30  # below this, bfloat16 instructions of some CPUs take a value for zero
PROBE_TOKENS = 512  # scored by both sides
MAX_NOISE = 0.06  # of the mean logprob: how far two bfloat16 implementations of one model may differ
EFFECT = 30.0  # of the probe, in multiples of the noise
MIN_EFFECT = 0.1  # of the probe, in nats per token: the floor where there is hardly any noise (float32)
MAX_ERROR = 3.0  # of the probe in vLLM, in multiples of the noise
MIN_ERROR = 0.12  # of the probe in vLLM, as a share of its effect: smaller differences are never an error


class WeightSync:
    """Sends the policy to vLLM, and verifies that it arrived."""

    def __init__(
        self, policy: Policy, engine: AnyEngine, config: Config, prompts: list[list[int]], device: torch.device
    ):
        """prompts: token ids, of which the texts that both sides score are made."""
        self.policy, self.engine, self.config, self.device = policy, engine, config, device
        self.count = 0
        length = min(
            config.max_model_len - 1, PROBE_TOKENS
        )  # a rank runs a whole text by itself: long ones would need its memory
        texts, merged = probe_texts(prompts, length), not config.sends_adapter
        self.probe = Probe(policy, engine, self.send, texts, device, config.adapters, merged)

    def update_weights(self, verify: bool = False, everything: bool = False) -> dict[str, float]:
        """Wakes vLLM with the policy's weights; with `verify`, the probe is checked first. Collective.

        Sends what training changes (adapters, merged or alone), or with `everything` all weights. Returns `sync/*`
        metrics. Raises RuntimeError, on all ranks, if vLLM does not hold or does not run what was sent.
        """
        verified = self.probe.check(everything) if verify else {}
        return self.send(everything) | verified

    def send(self, everything: bool = False) -> dict[str, float]:
        """One transfer of the policy's weights into vLLM, which is awake afterwards."""
        self.engine.finish_rollout()
        start = time.perf_counter()
        fsdp_utils.reshard(self.policy)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # memory that torch keeps cached is not free for vLLM
        self.engine.wake("weights")
        self.count += 1
        read_back = ReadBack(self.count)
        if self.config.sends_adapter:
            metrics = send_adapters(self.policy, self.engine, self.config.adapters, read_back)
        else:
            everything = everything or self.engine.sleep_level == 2
            modules, stats = fsdp_utils.to_send(self.policy.model, everything), fsdp_utils.SyncStats()
            self.engine.load_weights(read_back.recording(self.weights(modules, stats)))
            metrics = stats.metrics()
        self.engine.wake("kv_cache")
        metrics |= read_back.check(self.engine)
        return metrics | {"sync/seconds": time.perf_counter() - start}

    def weights(
        self, modules: set[str] | None = None, stats: fsdp_utils.SyncStats | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The policy's merged weights, as vLLM runs them; see `summon_layers`."""
        return fsdp_utils.summon_layers(
            self.policy.model,
            self.device,
            modules=modules,
            stats=stats,
            dtype=None if self.config.lora_rank else getattr(torch, self.config.compute_dtype),
            release=self.engine.copies_at_once,
        )


def send_adapters(policy: Policy, engine: AnyEngine, names: list[str], read_back: "ReadBack") -> dict[str, float]:
    """Sends the adapters of these names alone. One rank per host writes each to a folder in memory. vLLM reads it from
    there; where processes only generate, the first trainer sends them its files.
    """
    paths: dict[Tensor, str] = {}
    for name in names:
        for path, layer in lora.lora_layers(policy.model, name):
            adapter = layer.adapters[name]
            paths |= {matrix: f"{path}.adapters.{name}.{kind}" for kind, matrix in adapter.named_parameters()}
    scale = adapter.scale  # all adapters have the same

    def gather(parameter: Tensor) -> Tensor:
        whole, path = fsdp_utils.gather(parameter), paths[parameter]
        if whole.ndim == 2:  # experts' are not read back
            rounded = whole.detach().to(engine.dtype)
            # vLLM stores B times the scale
            read_back.record(path, rounded * scale if path.endswith("lora_B") else rounded)
        return whole

    size = sum(parameter.nbytes for parameter in paths)
    matrices = sum(math.prod(parameter.shape[:-2]) for parameter in paths)
    with shared_folder(size + HEADERS[0] * len(names) + HEADERS[1] * matrices) as folder:
        for name in names:
            save_adapter(policy.model, folder / name, name=name, gather=gather, write=first_on_host())
        dist.barrier()  # written
        for name in names:
            engine.load_adapter(str(folder / name), name)
    return {"sync/bytes": size}


# ---- Read back ------------------------------------------------------------------------------------------------


class ReadBack:
    """A few columns of every tensor that one sync sends, to be compared with what vLLM then holds."""

    def __init__(self, sync: int):
        """sync: its number, which decides the columns."""
        self.generator = torch.Generator().manual_seed(sync)
        self.samples: dict[str, tuple[list[int], Tensor]] = {}

    def record(self, name: str, tensor: Tensor) -> None:
        """Keeps columns of a tensor (rows, columns); all of a vector."""
        matrix = tensor if tensor.ndim > 1 else tensor[:, None]
        columns = torch.randint(matrix.shape[1], (min(COLUMNS, matrix.shape[1]),), generator=self.generator).tolist()
        self.samples[name] = columns, matrix[:, columns].detach()

    def recording(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same stream; every tensor that passes is recorded."""
        for name, tensor in stream:
            self.record(name, tensor)
            yield name, tensor
            del tensor  # this generator must not keep it while the next one is gathered

    def check(self, engine: AnyEngine) -> dict[str, float]:
        """Raises RuntimeError, on all ranks, if vLLM holds other values. Collective."""
        found = engine.run(compare_held, self.samples)
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        for _, difference in chain.from_iterable(everywhere):
            if difference:
                raise RuntimeError(f"vLLM does not hold the weights that were sent: {difference} differ")
        return {"sync/read_back_frac": found[0][0] / max(1, len(self.samples))}


def compare_held(engine: Engine, samples: dict[str, tuple[list[int], Tensor]]) -> tuple[int, str | None]:
    """How many of the tensors were read out of an engine, and the first that differs from its sample; None: none."""
    held, read, difference = held_weights(engine), 0, None
    for name, (columns, values) in samples.items():
        part = held.read(name, columns)
        if part is None:
            continue
        read += 1
        expected = values[[row for row in part.rows if row < len(values)]][:, part.places]
        found = part.values[: len(expected)].to(expected.device)  # without zeros that pad a rank or a vocabulary
        wrong = ~((expected - found).abs() <= DENORMAL)  # True for NaN, too
        if wrong.any() and not difference:
            difference = f"{wrong.sum()} of {wrong.numel()} values of {name}"
    return read, difference


@dataclass(frozen=True)
class HeldPart:
    """The part of a matrix that this rank's vLLM holds: some of its rows, at some of the requested columns."""

    rows: list[int]
    places: list[int]  # indices into the list of requested columns
    values: Tensor  # (rows, places)


class HeldWeights:
    """vLLM's weights under the checkpoint's names."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @torch.inference_mode()
    def read(self, name: str, columns: list[int]) -> HeldPart | None:
        """Columns of a weight, a bias or an adapter's matrix (`....adapters.policy.lora_A`); `name` is the one it was
        sent under.

        None for tensors that do not belong to a linear (norms, embeddings): only linears are read.
        """
        path, _, kind = self.own_name(name).rpartition(".")
        path, _, adapter = path.partition(".adapters.")
        linear = self.linears.get(path)
        if linear is None:
            return None
        if kind == "weight":
            return linear.weight(columns)
        if kind == "bias" and linear.linear.bias is None:
            raise RuntimeError(f"vLLM has no {name}, which the model's checkpoint has: it runs another model")
        if kind == "bias":
            return linear.bias()
        return linear.adapter_matrix(kind, self.engine.adapter_slot(adapter), columns)

    def own_name(self, name: str) -> str:
        """vLLM's name for what the checkpoint calls `name`."""
        for prefix, own in self.prefixes.items():
            if own and name.startswith(prefix):
                name = own + name.removeprefix(prefix)
        return name

    def tensor(self, name: str, rows: int) -> Tensor | None:
        """The first rows of a whole parameter, as a view of vLLM's own tensor, which may be padded.

        None: vLLM has none of that name, or has packed it, so that it has no rows.
        """
        path, _, kind = self.own_name(name).rpartition(".")
        if linear := self.linears.get(path):
            fused = getattr(linear.linear, kind, None)
            return None if fused is None else fused.data[linear.rows_of_layer][:rows]
        parameter = self.parameters.get(f"{path}.{kind}")
        return None if parameter is None else parameter.data[:rows]

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """vLLM's, without what wrappers for adapters add to the names."""
        return {name.replace(".base_layer.", "."): parameter for name, parameter in self.model.named_parameters()}

    @cached_property
    def model(self) -> nn.Module:
        (model,) = self.engine.llm.apply_model(lambda model: model)
        return model

    @cached_property
    def prefixes(self) -> dict[str, str | None]:
        """Prefixes of names in the checkpoint -> what vLLM has in their place."""
        return getattr(getattr(self.model, "hf_to_vllm_mapper", None), "orig_to_new_prefix", {})

    @cached_property
    def linears(self) -> "dict[str, HeldLinear]":
        """The checkpoint's linears, under vLLM's names, without convolutions."""
        fused, found = getattr(self.model, "packed_modules_mapping", {}), {}
        for path, layer in self.model.named_modules():
            sizes = getattr(getattr(layer, "base_layer", layer), "output_partition_sizes", None)
            if sizes and not path.endswith(CONVOLUTIONS):  # which vLLM has as linears, but does not run as such
                found[path] = HeldLinear(layer, range(len(sizes)))  # fused in the checkpoint, too, or alone
                parent, _, name = path.rpartition(".")
                ends = list(accumulate((PARTS.get(part, 1) for part in fused.get(name, [])), initial=0))
                if ends[-1] == len(sizes):
                    for part, first, last in zip(fused[name], ends, ends[1:]):
                        found[f"{parent}.{part}"] = HeldLinear(layer, range(first, last))
        return found


held_weights = cache(HeldWeights)  # its linears never change


class HeldLinear:
    """A linear of the checkpoint inside vLLM: alone or fused with others by rows, whole or one rank's share."""

    def __init__(self, layer: nn.Module, parts: range):
        """layer: vLLM's linear, or its LoRA wrapper. parts: which parts of that fused linear this one is."""
        self.layer, self.linear, self.parts = layer, getattr(layer, "base_layer", layer), parts
        sizes = self.linear.output_partition_sizes
        self.rows_of_layer = slice(sum(sizes[: parts.start]), sum(sizes[: parts.stop]))
        self.rows: list[int] = []
        first = 0  # row of the part in the checkpoint's linear
        for part in parts:
            rank, ranks = 0, 1
            if sum(sizes) < self.linear.output_size:
                # Keys and values: several ranks may share a head.
                sharing = getattr(self.linear, "num_kv_head_replicas", 1) if part else 1
                rank, ranks = self.linear.tp_rank // sharing, self.linear.tp_size // sharing
            self.rows += range(first + rank * sizes[part], first + (rank + 1) * sizes[part])
            first += ranks * sizes[part]
        inputs = getattr(self.linear, "input_size_per_partition", self.linear.input_size)
        first = self.linear.tp_rank * inputs if inputs < self.linear.input_size else 0
        self.inputs = range(first, first + inputs)

    def weight(self, columns: list[int]) -> HeldPart:
        """Column j is W e_j for a unit vector e_j: exact, however vLLM has packed W (on CPUs it has)."""
        places, own = self.owned(columns)
        weight = next(self.linear.parameters())  # packed ones keep their dtype and device
        if not own:
            return HeldPart(self.rows, [], weight.new_empty(len(self.rows), 0))
        units = F.one_hot(torch.tensor(own), len(self.inputs)).to(weight)
        values = self.linear.quant_method.apply(self.linear, units, None)
        return HeldPart(self.rows, places, values.T[self.rows_of_layer])

    def bias(self) -> HeldPart:
        return HeldPart(self.rows, [0], self.linear.bias[self.rows_of_layer, None])

    def adapter_matrix(self, kind: str, slot: int, columns: list[int]) -> HeldPart:
        """lora_A (r, in) or lora_B (out, r) of vLLM's slot; the rank may be padded with zeros."""
        stacks = self.parts if len(self.layer.lora_b_stacked) > 1 else range(1)
        if kind == "lora_B":
            values = torch.cat([self.layer.lora_b_stacked[stack][slot, 0] for stack in stacks])
            return HeldPart(self.rows, list(range(len(columns))), values[:, columns])
        places, own = self.owned(columns)
        values = self.layer.lora_a_stacked[stacks.start][slot, 0][:, own]
        return HeldPart(list(range(len(values))), places, values)

    def owned(self, columns: list[int]) -> tuple[list[int], list[int]]:
        """The indices of the columns that this rank holds, and their numbers within its share."""
        places = [place for place, column in enumerate(columns) if column in self.inputs]
        return places, [columns[place] - self.inputs.start for place in places]


# ---- The probe ------------------------------------------------------------------------------------------------


class Probe:
    """A random adapter that both sides score. vLLM must be asleep before a check, if it sleeps, and is asleep after.

    With several adapters, each gets a random adapter of its own in its place, and scores its own texts.
    """

    def __init__(
        self,
        policy: Policy,
        engine: AnyEngine,
        send: Callable[[bool], object],
        texts: list[list[int]],
        device: torch.device,
        names: list[str],
        merged: bool = False,
    ):
        """`send(everything)` wakes vLLM with the policy's weights as they are, or with every weight of the model.

        merged: vLLM gets merged weights, so the trainer scores the probe with them, too.
        """
        self.policy, self.engine, self.send, self.device, self.names = policy, engine, send, device, names
        self.merged = merged
        self.texts = [text for text in texts for _ in names]
        self.adapters = [
            (layer, layer.adapters[name]) for name in names for _, layer in lora.lora_layers(policy.model, name)
        ]
        self.noise: float | None = None  # nats per token, on the base

    @torch.no_grad()
    def check(self, everything: bool = False) -> dict[str, float]:
        """Raises RuntimeError, on all ranks, if the probe's effect in vLLM differs from the trainer's. Collective.

        The policy is bit for bit unchanged afterwards; vLLM still holds the probe. Without adapters there is no probe:
        the first check compares the two implementations, and later checks do nothing.
        """
        with restored([adapter for _, adapter in self.adapters]):
            if self.noise is None:
                self.calibrate(everything)
            if not self.adapters:
                return {"sync/noise": self.noise}
            self.set_adapters(self.strength)
            effect = distance(self.expected, self.base)
            error, limit = distance(self.sampler_logprobs(), self.expected) / effect, MAX_ERROR * self.noise / effect
        if not error < max(limit, MIN_ERROR):
            raise RuntimeError(
                f"vLLM does not run the trained weights: {error:.0%} of the effect of a test adapter is wrong or "
                f"missing there, of which noise explains {limit:.0%}"
            )
        return {"sync/noise": self.noise, "sync/probe_error": error}

    def calibrate(self, everything: bool) -> None:
        """Measures the noise on the base, then scales the probe until its effect is large against the noise."""
        with lora.disabled(self.policy.model):
            self.base = self.trainer_logprobs()
        self.set_adapters(0.0)
        self.noise, size = distance(self.sampler_logprobs(everything), self.base), self.base.abs().mean().item()
        if not self.noise < MAX_NOISE * size:
            raise RuntimeError(
                f"vLLM and the trainer do not compute the same model: with the same weights they differ by "
                f"{self.noise:.3f} nats per token, {self.noise / size:.0%} of the mean logprob, expected less than "
                f"{MAX_NOISE:.0%}"
            )
        if self.adapters:
            self.find_strength(max(EFFECT * self.noise, MIN_EFFECT))

    def find_strength(self, target: float) -> None:
        """Finds a strength whose effect is 1 to 2 times `target`, in nats per token, or the nearest of 8 trials."""
        strength, nearest = 0.1, math.inf
        weak, strong = 0.0, math.inf  # tried strengths, on either side of the one to find
        for _ in range(8):
            self.set_adapters(strength)
            expected = self.trainer_logprobs()
            ratio = max(distance(expected, self.base), 1e-9) / (1.4 * target)
            if abs(math.log(ratio)) < nearest:
                nearest, self.strength, self.expected = abs(math.log(ratio)), strength, expected
            if nearest < math.log(1.4):
                break
            weak, strong = (strength, strong) if ratio < 1 else (weak, strength)
            strength /= min(max(ratio, 0.3), 3.0)
            if not weak < strength < strong:  # the effect grows faster than the strength
                strength = math.sqrt(max(weak, strong / 9) * strong)
        if not nearest < math.log(4):
            raise RuntimeError(f"no strength of the test adapter changes the trainer's logprobs by {target:.3g} nats")

    def set_adapters(self, strength: float) -> None:
        """Overwrites the policy's adapters with a random update, `strength` times as large as each W."""
        generator = torch.Generator().manual_seed(0)
        for (layer, adapter), rms in zip(self.adapters, self.weight_sizes):
            A = lora.fresh_A(adapter.lora_A.shape, generator)  # its entries have variance 1 / (3 in)
            B = torch.randn(adapter.lora_B.shape, generator=generator)
            size = strength * rms * (3 * layer.in_features / adapter.rank) ** 0.5 / adapter.scale
            fsdp_utils.fill(adapter.lora_A, A)
            fsdp_utils.fill(adapter.lora_B, B * size)
            adapter.merged = self.merged  # as vLLM has it: what merging rounds away is not vLLM's error

    @cached_property
    def weight_sizes(self) -> list[float]:
        """The root mean square of each layer's W, which never changes."""
        return [weight_rms(layer) for layer, _ in self.adapters]

    def trainer_logprobs(self) -> Tensor:
        """(adapters, tokens) of the texts, by the trainer; needs as much memory as training."""
        places = [place % len(self.names) for place in range(len(self.texts))]
        prompts, completions = [text[:1] for text in self.texts], [text[1:] for text in self.texts]
        return self.by_adapter(self.policy(pack(prompts, completions, self.device, adapters=places)).logprobs)

    def sampler_logprobs(self, everything: bool = False) -> Tensor:
        """(engines, adapters, tokens) of the texts, by each vLLM, after sending it the policy's current weights."""
        self.send(everything)
        found = self.engine.run(score, self.texts, self.names)
        self.engine.sleep()
        return self.by_adapter(torch.tensor(found, device=self.device))

    def by_adapter(self, logprobs: Tensor) -> Tensor:
        """(..., R) -> (..., adapters, R / adapters): `distance` is then that of the worst one, not the mean of all."""
        tokens = len(self.texts[0]) - 1  # of each text; the adapters take turns
        return logprobs.unflatten(-1, (-1, len(self.names), tokens)).transpose(-3, -2).flatten(-2)


def score(engine: Engine, texts: list[list[int]], names: list[str]) -> list[float]:
    """Logprobs of all texts' tokens, by an engine, whose adapters of these names take turns."""
    return [logprob for text, name in zip(texts, cycle(names)) for logprob in engine.logprobs(text, name)]


def distance(found: Tensor, expected: Tensor) -> float:
    """Mean absolute difference over the last dimension: the largest of all engines and ranks. Collective."""
    mean = (found - expected).abs().mean(-1).max()
    dist.all_reduce(mean, dist.ReduceOp.MAX)
    return mean.item()


def weight_rms(layer: lora.LoRALayer) -> float:
    """Root mean square of W, over the shards of all ranks. Collective."""
    rows = fsdp_utils.local_rows(layer.weight)
    sums = torch.stack([rows.float().square().sum(), torch.tensor(float(rows.numel()), device=rows.device)])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).sqrt().item()


@contextmanager
def restored(adapters: list[lora.Adapter]) -> Iterator[None]:
    """Restores the adapters' values at the end, bit for bit, and whether they are merged."""
    shards = [fsdp_utils.local(parameter) for adapter in adapters for parameter in adapter.parameters()]
    values, merged = [shard.detach().clone() for shard in shards], [adapter.merged for adapter in adapters]
    try:
        yield
    finally:
        for adapter, usual in zip(adapters, merged):
            adapter.merged = usual
        with torch.no_grad():
            for shard, value in zip(shards, values):
                shard.copy_(value)


def probe_texts(prompts: list[list[int]], length: int, total: int = PROBE_TOKENS) -> list[list[int]]:
    """Texts of `length` tokens: prompts one after the other, repeated if they are too few.

    There are at least two texts, so that a model that mixes sequences of one row is noticed.
    """
    tokens = cycle(chain.from_iterable(prompts))
    return [list(islice(tokens, length)) for _ in range(max(2, -(-total // length)))]
