"""The vLLM engine inside the training processes: generate, score, receive weights.

Every rank of torchrun builds an `Engine`. Ranks that share one engine (tensor parallelism) are neighbours and pass
it the same requests; engines divide the requests among them, and afterwards every rank holds all completions.
"""

import quiet  # noqa: F401, I001  before torch

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must run inside this process
if not torch.cuda.is_available():
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or vLLM compiles a line of its own in C++: 2 s, and needs g++

import vllm  # noqa: E402  most of it comes with its first use, which --help and a misspelt option do not wait for
from vllm.lora.request import LoRARequest  # noqa: E402

import lora  # noqa: E402
from progress_bar import progress_bar  # noqa: E402

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that its LoRA kernels are made for; others take the next larger


@dataclass(frozen=True)
class Request:
    prompt_ids: list[int]
    samples: int
    temperature: float  # 0: greedy
    seed: int  # sample i uses seed + i, so the same request always gives the same tokens
    adapter: str = lora.POLICY  # of those given to `load_adapter`; the policy may be merged into the weights instead


@dataclass(frozen=True)
class Completion:
    request: int  # index of the request it answers
    prompt_ids: list[int]  # which had this prompt
    token_ids: list[int]  # with the end-of-sequence token, if it was reached
    logprobs: list[float]  # of those tokens, under the sampler, at the sampling temperature
    truncated: bool  # cut off at max_completion_length


class Engine:
    """vLLM under torchrun, one per `tensor_parallel_size` ranks."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        max_completion_length: int,
        tensor_parallel_size: int = 1,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.4,
        kv_cache_gb: float = 0.0,
        enforce_eager: bool = False,
        sleep_level: int = 0,
        max_lora_rank: int = 0,
        max_loras: int = 1,
        seed: int = 0,
    ):
        """`load_adapter` takes up to `max_loras` adapters of rank `max_lora_rank` or less; 0: none."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size {tensor_parallel_size} does not divide the number of processes, {world_size}"
            )
        self.max_completion_length = max_completion_length
        self.engines = world_size // tensor_parallel_size
        self.index, self.tensor_parallel_rank = divmod(rank, tensor_parallel_size)
        self.sleep_level, self.asleep, self.adapters = sleep_level, set(), {}
        on_cpu = not torch.cuda.is_available()
        self.copies_at_once = not on_cpu  # see load_weights
        if on_cpu and tensor_parallel_size > 1:
            forget_killed_engines()
        if on_cpu and max_lora_rank:
            from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

            PunicaWrapperCPU.add_lora_linear = add_lora_linear
        self.llm = vllm.LLM(
            model,
            dtype=dtype,
            load_format="safetensors",  # never pickles; and no code that comes with a model
            trust_remote_code=False,
            seed=seed,  # the same on every rank: the ranks of one engine must agree
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=int((kv_cache_gb or on_cpu) * 2**30) or None,
            enforce_eager=enforce_eager or on_cpu,
            enable_sleep_mode=sleep_level > 0 and not on_cpu,  # vLLM's allocator for it is CUDA's
            enable_chunked_prefill=not on_cpu,  # half a prompt of a seeded request needs a CUDA generator's offset
            enable_lora=max_lora_rank > 0,
            max_lora_rank=next(rank for rank in VLLM_RANKS if rank >= max_lora_rank),
            max_loras=max_loras,
            logprobs_mode="processed_logprobs",  # with the temperature in them, as the trainer's are
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the adapters beside them."""
        return self.llm.llm_engine.model_config.dtype

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens of all sequences together that the engine has room for."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return cache.num_gpu_blocks * cache.block_size

    def generate(self, requests: list[Request], label: str = "rollout") -> list[Completion]:
        """All ranks pass the same requests and get all completions, in the order of the requests.

        `label`: what a terminal calls this while it runs.
        """
        mine = range(self.index, len(requests), self.engines)
        params = [
            vllm.SamplingParams(
                n=requests[i].samples,
                temperature=requests[i].temperature,
                seed=requests[i].seed,
                max_tokens=self.max_completion_length,
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,
                detokenize=False,
            )
            for i in mine
        ]
        prompts = [vllm.TokensPrompt(prompt_token_ids=requests[i].prompt_ids) for i in mine]
        adapters = [self.adapter(requests[i].adapter) for i in mine]
        if prompts:
            self.llm.enqueue(prompts, params, lora_request=adapters, use_tqdm=False)
        outputs = self.finish(label)
        completions = [
            Completion(
                request=i,
                prompt_ids=requests[i].prompt_ids,
                token_ids=list(sample.token_ids),
                logprobs=list(sample.logprobs.logprobs),
                truncated=sample.finish_reason == "length",
            )
            for i, output in zip(mine, outputs)
            for sample in output.outputs
        ]
        shares: list[list[Completion]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(shares, completions if self.tensor_parallel_rank == 0 else [])
        return sorted(chain.from_iterable(shares), key=lambda completion: completion.request)

    def finish(self, label: str) -> list["vllm.RequestOutput"]:
        """Runs the engine until nothing is left to do: the outputs of all requests, in their order.

        As `LLM.wait_for_completion` does, whose progress bar only moves when a request has all of its samples.
        """
        engine, outputs = self.llm.llm_engine, []
        sequences = engine.get_num_unfinished_requests()
        label += f" (engine 1 of {self.engines})" if self.engines > 1 else ""  # the first rank shows its own
        with progress_bar(label, sequences, "sequences") as bar:
            while engine.has_unfinished_requests():
                outputs += [output for output in engine.step() if output.finished]
                bar.update(sequences - engine.get_num_unfinished_requests() - bar.n)
        return sorted(outputs, key=lambda output: int(output.request_id))

    def logprobs(self, token_ids: list[int], adapter: str = lora.POLICY) -> list[float]:
        """Logprob of every token after the first, under the weights in vLLM, at temperature 1."""
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        prompt = vllm.TokensPrompt(prompt_token_ids=token_ids)
        (output,) = self.llm.generate([prompt], params, lora_request=self.adapter(adapter), use_tqdm=False)
        return [entry[token].logprob for token, entry in zip(token_ids[1:], output.prompt_logprobs[1:])]

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces weights by a stream of (Hugging Face name, whole tensor); ranks of one engine pass the same.

        Weights that are not in the stream stay as they are. Parts of one fused module must follow each other: a GPU's
        weights are written in place (`copies_at_once`), but a CPU's are packed, a module at a time when it is complete.
        """
        if self.copies_at_once:
            self.llm.apply_model(lambda model: model.load_weights(stream))
        else:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.with_tied_head(stream)})
        self.forget_prefixes()

    def with_tied_head(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stream, with a tied embedding under the head's name too: on a CPU, vLLM packs a copy for the head."""
        tied = self.llm.llm_engine.model_config.hf_config.tie_word_embeddings
        for name, tensor in stream:
            yield name, tensor
            if tied and name.endswith("embed_tokens.weight"):
                yield "lm_head.weight", tensor

    def load_adapter(self, folder: str, name: str = lora.POLICY) -> None:
        """Gives vLLM a peft folder, anew if it has an adapter of that name; vLLM has read it when this returns."""
        known = self.adapters.get(name)
        number = known.lora_int_id if known else len(self.adapters) + 1
        self.llm.llm_engine.add_lora(LoRARequest(name, number, folder, load_inplace=True))
        self.adapters[name] = LoRARequest(name, number, folder)  # not to be read again with every request
        self.forget_prefixes()

    @torch.inference_mode()
    def read(self, name: str, columns: list[int]) -> "Held | None":
        """Columns of a weight, a bias, or an adapter's matrix (`....lora_A`), as vLLM holds what was sent by this name.

        None for what does not belong to a linear (norms, embeddings): only linears are read.
        """
        path, _, kind = name.rpartition(".")
        linear = self.linears.get(path)
        if linear is None:
            return None
        if kind == "weight":
            return linear.weight(columns)
        if kind == "bias":
            return linear.bias()
        worker = self.llm.collective_rpc(lambda worker: worker)[0]
        slots = worker.model_runner.lora_manager._adapter_manager.lora_index_to_id
        return linear.adapter_matrix(kind, slots.index(self.adapters[lora.POLICY].lora_int_id), columns)

    @cached_property
    def linears(self) -> "dict[str, HeldLinear]":
        """The checkpoint's linears, by name."""
        (model,) = self.llm.apply_model(lambda model: model)
        fused, found = getattr(model, "packed_modules_mapping", {}), {}
        for path, layer in model.named_modules():
            if hasattr(getattr(layer, "base_layer", layer), "output_partition_sizes"):
                parent, _, name = path.rpartition(".")
                for index, part in enumerate(fused.get(name, [name])):
                    found[f"{parent}.{part}"] = HeldLinear(layer, index)
        return found

    def forget_prefixes(self) -> None:
        """Drops the keys and values of earlier prompts, which are those of the old weights."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM still uses keys and values of the old weights")

    def adapter(self, name: str) -> LoRARequest | None:
        """What vLLM calls an adapter; None for a policy that is in the weights. Raises ValueError for others."""
        if name not in self.adapters and name != lora.POLICY:
            raise ValueError(f"vLLM has no adapter {name!r}; there are: {', '.join(self.adapters) or 'none'}")
        return self.adapters.get(name)

    def sleep(self) -> None:
        """Leaves the GPU's memory to training: the KV cache goes, the weights move to the host (level 1) or go (2)."""
        if self.sleep_level and not self.asleep:
            self.llm.sleep(level=self.sleep_level)
            self.asleep = {"weights", "kv_cache"}

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes the memory of one part back. After level 2 the weights are undefined until they are loaded."""
        if part in self.asleep:
            self.llm.wake_up([part])
            self.asleep.remove(part)


# ---- What vLLM holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """This rank's part of a matrix: a slice of its rows, at some of the columns that were asked for."""

    rows: slice
    places: list[int]  # in the list of those columns
    values: Tensor  # (rows, places)


class HeldLinear:
    """A linear of the checkpoint inside vLLM: alone or fused with others by rows, whole or one rank's share of it."""

    def __init__(self, layer: nn.Module, index: int):
        """layer: vLLM's, perhaps around a base layer to which it adds adapters. index: among those that are fused."""
        self.layer, self.linear, self.index = layer, getattr(layer, "base_layer", layer), index
        sizes = self.linear.output_partition_sizes
        self.rows_of_layer = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
        rank = self.linear.tp_rank if sum(sizes) < self.linear.output_size else 0
        if index:  # keys and values: several ranks may share a head
            rank //= getattr(self.linear, "num_kv_head_replicas", 1)
        self.rows = slice(rank * sizes[index], (rank + 1) * sizes[index])
        inputs = getattr(self.linear, "input_size_per_partition", self.linear.input_size)
        first = self.linear.tp_rank * inputs if inputs < self.linear.input_size else 0
        self.inputs = range(first, first + inputs)

    def weight(self, columns: list[int]) -> Held:
        """Column j is W e_j, with a unit vector e_j: bit for bit, however vLLM has packed W (on CPUs it has)."""
        places, own = self.owned(columns)
        weight = next(self.linear.parameters())  # packed ones keep their dtype and device
        if not own:
            return Held(self.rows, [], weight.new_empty(self.rows.stop - self.rows.start, 0))
        units = F.one_hot(torch.tensor(own), len(self.inputs)).to(weight)
        values = self.linear.quant_method.apply(self.linear, units, None)
        return Held(self.rows, places, values.T[self.rows_of_layer])

    def bias(self) -> Held:
        return Held(self.rows, [0], self.linear.bias[self.rows_of_layer, None])

    def adapter_matrix(self, kind: str, slot: int, columns: list[int]) -> Held:
        """lora_A (r, in) or lora_B (out, r) of vLLM's slot; the rank may be padded with zeros."""
        if kind == "lora_B":
            return Held(
                self.rows, list(range(len(columns))), self.layer.lora_b_stacked[self.index][slot, 0][:, columns]
            )
        places, own = self.owned(columns)
        values = self.layer.lora_a_stacked[self.index][slot, 0][:, own]
        return Held(slice(0, len(values)), places, values)

    def owned(self, columns: list[int]) -> tuple[list[int], list[int]]:
        """The places of the columns that this rank has, and the columns as it counts them."""
        places = [place for place, column in enumerate(columns) if column in self.inputs]
        return places, [columns[place] - self.inputs.start for place in places]


def add_lora_linear(
    self, y: Tensor, x: Tensor, lora_a_stacked, lora_b_stacked, scale: float, output_slices, **_
) -> None:
    """y (T, out) += scale · x Aᵀ Bᵀ, each token with its own adapter; stands for the method of vLLM's PunicaWrapperCPU.

    vLLM's copies A and B once per token, ten times the time of all the rest. This takes two products per adapter in the
    batch, rounded where the trainer's are. A stack is (adapters, 1, r, in) or (adapters, 1, out, r), one per fused
    linear, whose outputs are `output_slices` wide.
    """
    indices = self.token_lora_indices
    for slot in indices.unique().tolist():
        if slot < 0:  # tokens without an adapter
            continue
        rows = (indices == slot).nonzero()[:, 0]
        everyone, start = len(rows) == len(y), 0
        for A, B, width in zip(lora_a_stacked, lora_b_stacked, output_slices):
            target = y[:, start : start + width]
            low = (x if everyone else x[rows]) @ A[slot, 0].T
            if everyone:
                target.addmm_(low, B[slot, 0].T, alpha=scale)
            else:
                target.index_add_(0, rows, low @ B[slot, 0].T, alpha=scale)
            start += width


def forget_killed_engines() -> None:
    """Removes the shared memory that killed engines of several CPU ranks left, or no further one could be built.

    Under torchrun vLLM has one name for all of them; one that is running does not need its name any more.
    """
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
        left.unlink(missing_ok=True)
    dist.barrier()
