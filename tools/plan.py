"""Does a configuration fit, before anything is rented or downloaded: memory per phase of a step and GPU.

    python tools/plan.py --config configs/qwen2_5_72b_gsm8k.py --gpus 8 --gpu_memory_gb 80
    python tools/plan.py --config configs/qwen2_5_7b_gsm8k.py --gpus 4 --gpu_memory_gb 24 --tokens_per_microbatch 4096

Any field of the configuration can be given, too. The model's shapes come from its config.json, are known here for
the Qwen2.5 sizes that configs/ names, or are given: `--hidden_size 4096 --num_hidden_layers 32 ...`.

The trainer's part is counted, not guessed: the real model, adapters and FSDP2 make a forward, a backward and an
optimizer step among fake ranks, with tensors that have shapes and no memory. vLLM's part is arithmetic: its weights,
its share of the GPU, and a KV cache in what that leaves. GB are 10⁹ bytes; a GPU that is sold as one of 80 has 85.
"""

import argparse
import copy
import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType, _FSDPState
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the root's modules are found

import fsdp_utils
import lora
from configs.base import Config
from policy import Critic, Policy, PolicyOutput
from runtime import checkpoint, models, setup
from runtime.command_line import parse_config
from runtime.models import PromptHead
from runtime.optimize import make_optimizer
from runtime.packing import Packed, pack, recurrent_layers
from runtime.sequence_parallel import neighbours
from runtime.shared_base import shares_base
from runtime.shared_memory import use_shm

GB = 1e9
HERE = torch.device("cpu")  # shapes and lifetimes are those of a GPU
RESERVED = 2.5 * GB  # CUDA contexts, NCCL's buffers, kernels' workspaces, and what torch cannot use of its blocks
CUDA_GRAPHS = 1.0 * GB  # vLLM's, which stay where they are while it sleeps

FEW = 3  # layers that are run, or a few more; deeper models are extrapolated from two such runs

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "tie_word_embeddings"),
)
SHAPES = {  # from the models' config.json
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-72B-Instruct": (8192, 29568, 80, 64, 8, 152064, False),
}
KNOBS = {  # the table's rows, and what makes each smaller, in the order to try
    "base shard": "offload all, dtype nf4, or more GPUs; SHARE_BASE=1 (docs/memory.md)",
    "adapters": "a smaller lora_rank",
    "gradients": "a smaller lora_rank",
    "optimizer": "offload optimizer",
    "critic": "offload all",
    "gathered weights": "nothing: it is the largest block, and embedding and head",
    "activations": "gradient_checkpointing full, a smaller tokens_per_microbatch, then sequence_parallel_size",
    "logprob chunk": "a smaller policy.LOGITS_AT_ONCE",
    "vLLM weights": "a larger tensor_parallel_size; outside of the rollout: sleep_level 1 or 2",
    "vLLM working memory": "fewer sequences at once: of a rollout and of an evaluation",
    "vLLM CUDA graphs": "nothing",
    "KV cache": "a smaller gpu_memory_utilization; outside of the rollout: sleep_level 1",
    "streamed weights": "sleep_level 1 in place of 2",
    "reserved": "nothing",
}
LABELS = {  # the tracker's, and the rows they are counted in; shards are counted apart
    "gradients": (_FSDPRefType.SHARDED_GRAD, _FSDPRefType.UNSHARDED_GRAD, _FSDPRefType.REDUCE_SCATTER),
    "optimizer": (_FSDPRefType.OPT,),
    "gathered weights": (_FSDPRefType.UNSHARDED_PARAM, _FSDPRefType.ALL_GATHER),
    "activations": (_FSDPRefType.ACT, _FSDPRefType.TEMP, _FSDPRefType.BUFFER),
    "logprob chunk": (_FSDPRefType.INP,),  # inputs are a few kB and not tracked: their label is free
}

Ledger = dict[str, float]  # row -> bytes of one GPU


# ---- The trainer ----------------------------------------------------------------------------------------------


@dataclass
class Learner:
    """What one rank holds of the policy or of the critic, in bytes."""

    base: float  # shards
    adapters: float
    trained: float  # shards of whatever is trained
    forward: dict[str, Ledger]  # moments of a forward without gradients, each at its peak
    update: dict[str, Ledger]  # and of a forward, a backward and an optimizer step


@dataclass
class Trainer:
    """What one rank of the trainer holds, and what it gives to vLLM, in bytes."""

    policy: Learner
    critic: Learner | None  # with PPO
    model: float  # whole, as vLLM has it
    active: float  # of that, what a token passes through: some of the experts, and all else
    engine: float  # one GPU's share of that
    streamed: float  # by a sync
    streamed_peak: float  # of that, at a time


class Tracker(FSDPMemTracker):
    """Torch's tracker, which follows every tensor's memory; here with two more labels, and a peak for each moment.

    A moment is a decoder block's forward or backward, or what is before, between and after the blocks.
    """

    def __init__(self, module: Policy | Critic, optimizer: torch.optim.Optimizer):
        super().__init__(module, optimizer)
        self.vocabulary, self.layers = module.model.config.vocab_size, len(module.model.get_decoder().layers)
        self.moments: dict[str, Ledger] = {}
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):  # it is vLLM's, and counted there
                self._update_and_maybe_create_winfos(parameter, _FSDPRefType.SHARDED_PARAM)

    def _track(self, label: _FSDPRefType, tensor: Tensor) -> None:
        if tensor.shape[-1:] == (self.vocabulary,):
            label = _FSDPRefType.INP
        elif self._fsdp_state in (_FSDPState.PRE_FW, _FSDPState.PRE_BW):  # nothing but FSDP runs then
            label = _FSDPRefType.UNSHARDED_PARAM
        super()._track(label, tensor)

    def _update_peak_stats(self, state) -> None:  # after each operation
        super()._update_peak_stats(state)
        (snapshot,) = self._curr_mem_snap.values()
        ledger = {row: sum(snapshot[label] for label in labels) for row, labels in LABELS.items()}
        block = next(filter(None, (re.search(r"layers\.(\d+)$", path) for path in self._mod_tracker.parents)), None)
        if block:  # counted from the end, but for the first: the same block has the same name in deeper models
            where = f"block {int(block[1]) - self.layers if int(block[1]) else 0}"
        else:
            where = "optimizer" if self._in_opt else "head" if ledger["logprob chunk"] else "between"
        moment = f"{where}, {'backward' if self._mod_tracker.is_bw else 'forward'}"
        if sum(ledger.values()) > sum(self.moments.get(moment, {}).values()):
            self.moments[moment] = ledger


class RMSNormOnGPU(torch.autograd.Function):
    """Moves what a GPU's kernels for `F.rms_norm` without a weight move; a CPU makes it of many small operations."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return dy + x


class GatedOnGPU(torch.autograd.Function):
    """Moves what policy.py's `one_kernel` moves on a GPU: 2 tensors in and 1 out; in the backward 3 in and 2 out."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate + up

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addcmul(dy, *ctx.saved_tensors), torch.zeros_like(dy)


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Within it, fake tensors take the ways that tensors on a GPU take. Models must have been made before."""
    with (
        patch.object(FakeTensor, "is_cuda", True),  # attention and MLPs ask
        patch("torch.nn.functional.rms_norm", lambda x, *_, **__: RMSNormOnGPU.apply(x)),
        patch("policy.one_kernel", lambda: lambda act, gate, up: GatedOnGPU.apply(gate, up)),
    ):
        yield


def full_batch(config: Config) -> Packed:
    """The largest micro-batch: as many sequences of full length as its budget holds, and a shorter one; or one."""
    sharing = config.sequence_parallel_size
    count, rest = divmod(max(config.tokens_per_microbatch * sharing, config.max_model_len), config.max_model_len)
    lengths = [(config.max_prompt_length, config.max_completion_length)] * count
    if rest > 1:
        completion = min(rest - 1, config.max_completion_length)
        lengths.append((rest - completion, completion))
    prompts, completions = ([[1] * length for length in column] for column in zip(*lengths))
    return pack(prompts, completions, HERE, group=neighbours(sharing), adapters=[0] * len(prompts))


def measure(config: Config, shape: PretrainedConfig, prompt_head: PromptHead | None, on_gpu: bool = True) -> Trainer:
    """Runs the models among the ranks of the process group that there is, with tensors without memory."""
    share = held_by_vllm if shares_base(config, dist.get_world_size()) else None
    config = dataclasses.replace(config, offload="none")  # what lives on the host is told apart in `phases`
    policy_of = partial(models.meta_policy, prompt_head=prompt_head, share=share)
    policy = make(policy_of, config, shape)  # outside of the fake mode: a mesh holds ranks
    critic = make(models.meta_critic, config, shape) if config.algorithm == "ppo" else None
    width = getattr(torch, config.compute_dtype).itemsize
    whole = {name: math.prod(weight.shape) * width for name, weight in lora.base_weights(policy.model)}
    modules = fsdp_utils.to_send(policy.model, everything=config.sleep_level == 2)
    sent = [size for name, size in whole.items() if modules is None or name.rpartition(".")[0] in modules]
    if config.sends_adapter:
        layers = [layer.adapters[name] for name in config.adapters for _, layer in lora.lora_layers(policy.model, name)]
        sent = [parameter.nbytes for adapter in layers for parameter in adapter.parameters()]
    active = models.active_parameters(policy.model) * width
    gpu = kernels_of_a_gpu() if on_gpu else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), gpu:  # last: `to_empty` unties weights
        learners = [module and run_learner(config, module) for module in (policy, critic)]
    return Trainer(
        *learners,
        model=sum(whole.values()),
        active=active,
        engine=sum(size * engine_share(name, config, shape) for name, size in whole.items()),
        streamed=sum(sent),
        streamed_peak=max(sent),
    )


def held_by_vllm(model: PreTrainedModel) -> set[torch.nn.Parameter]:
    """What the trainer has in vLLM's memory (runtime/shared_base.py): all of the base but experts."""
    return {weight for path, weight in lora.base_weights(model) if not fsdp_utils.is_experts(path)}


def make(meta: Callable, config: Config, shape: PretrainedConfig) -> Policy | Critic:
    """The policy or the critic as it is trained, sharded, but without memory."""
    return meta(config, models.meta_model_of(shape, config.model, models.parameter_dtype(config)), HERE)


def run_learner(config: Config, module: Policy | Critic) -> Learner:
    """Its shards, and what it holds in a forward and in an update over the largest micro-batch."""
    module.model.to_empty(device=HERE)
    fsdp_utils.compute_buffers(module.model, HERE)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, module, 0.0)
    checkpoint.allocate_state(optimizer, trained)  # it is there in every step but the first
    batch = full_batch(config)
    with Tracker(module, optimizer) as forward, torch.no_grad():
        module(batch)
    fsdp_utils.reshard(module)
    backward(module(batch))  # of a first micro-batch, the gradients are there in the next
    with Tracker(module, optimizer) as update:
        backward(module(batch))
        optimizer.step()
        optimizer.zero_grad()
    parameters = fsdp_utils.own_bytes(module)
    adapters = sum(size for name, size in parameters.items() if ".adapters." in name)
    return Learner(
        base=sum(parameters.values()) - adapters,
        adapters=adapters,
        trained=sum(fsdp_utils.local(parameter).nbytes for parameter in trained),
        forward=forward.moments,
        update=update.moments,
    )


def backward(out: Tensor | PolicyOutput) -> None:
    """Backpropagates the sum of every output that has a gradient."""
    parts = out if isinstance(out, PolicyOutput) else [out]
    sum(part.sum() for part in parts if part is not None and part.requires_grad).backward()


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """Within it, this process is the first of so many that do not exist."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def plan_trainer(
    config: Config,
    shape: PretrainedConfig,
    gpus: int,
    prompt_head: PromptHead | None = None,
    on_gpu: bool = True,
) -> Trainer:
    """One of `gpus` ranks, or of so many processes on a CPU. Each period of blocks adds the same, so a few are run, and
    a deep model is extrapolated linearly.
    """
    layers, period = shape.num_hidden_layers, blocks_per_period(shape)
    few = -(-FEW // period) * period
    with fake_ranks(gpus):
        if layers <= few + period:
            return measure(config, shape, prompt_head, on_gpu)
        shapes = [with_layers(shape, count) for count in (few, few + period)]
        less, more = (measure(config, each, prompt_head, on_gpu) for each in shapes)
    return extrapolate(less, more, (layers - few - period) / period)


def blocks_per_period(shape: PretrainedConfig) -> int:
    """After how many blocks recurrent layers and others repeat."""
    kinds = recurrent_layers(shape)
    return next(period for period in range(1, len(kinds) + 1) if kinds[period:] == kinds[:-period])


def with_layers(shape: PretrainedConfig, count: int) -> PretrainedConfig:
    """The same model with fewer layers."""
    shape = copy.deepcopy(shape)
    shape.num_hidden_layers = count
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:count]
    return shape


def extrapolate(few, more, steps: float):
    """`more`, plus `steps` times its difference from `few`, for every number in them."""
    if more is None:
        return None
    if dataclasses.is_dataclass(more):
        return type(more)(**extrapolate(vars(few), vars(more), steps))
    if isinstance(more, dict):
        return {key: extrapolate(few[key], more[key], steps) for key in more if key in few}
    return more + steps * (more - few)


# ---- vLLM, and the phases -------------------------------------------------------------------------------------


def engine_share(name: str, config: Config, shape: PretrainedConfig) -> float:
    """The share of a weight that one GPU of an engine has: a head's keys and values are not cut further."""
    if name.endswith("norm.weight"):
        return 1.0
    ranks = config.tensor_parallel_size
    keys = re.search(r"\b[kv]_proj\.", name)
    return 1 / (min(ranks, shape.num_key_value_heads) if keys else ranks)


def working_memory(config: Config, shape: PretrainedConfig, gpus: int, gpu: float) -> float:
    """vLLM's activations of one block and its logits, which it sets aside when it starts. An estimate."""
    width, ranks = getattr(torch, config.compute_dtype).itemsize, config.tensor_parallel_size
    tokens = 16384 if gpu >= 70 * 2**30 else 8192  # that it pushes through the model at once
    block = tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size / ranks) * width
    logits = setup.sequences_at_once(config, gpus, gpu) * shape.vocab_size * (width + 3 * 4)  # and float32 for sampling
    return block + logits


def bytes_per_token(config: Config, shape: PretrainedConfig) -> float:
    """Of KV cache, on one GPU, in layers that have keys and values."""
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    heads = max(1, shape.num_key_value_heads // config.tensor_parallel_size)
    return 2 * recurrent_layers(shape).count(False) * heads * head * getattr(torch, config.compute_dtype).itemsize


def bytes_per_sequence(config: Config, shape: PretrainedConfig) -> float:
    """Of the longest one, on one GPU: keys and values, and the states of recurrent layers, which are float32."""
    layers, states = recurrent_layers(shape).count(True), 0.0
    if layers:
        heads = shape.linear_num_value_heads / config.tensor_parallel_size
        states = 4 * layers * heads * shape.linear_key_head_dim * shape.linear_value_head_dim
    return bytes_per_token(config, shape) * config.max_model_len + states


def phases(config: Config, shape: PretrainedConfig, trainer: Trainer, gpus: int, gpu: float) -> dict[str, Ledger]:
    """What one GPU of `gpu` bytes holds at the peak of each phase. gpus: how many generate."""
    working, graphs = working_memory(config, shape, gpus, gpu), CUDA_GRAPHS
    kv_cache = config.gpu_memory_utilization * gpu - (trainer.engine + working + graphs)
    engine = {"vLLM weights": trainer.engine, "KV cache": max(kv_cache, 0.0)}
    awake = {} if config.sleep_level else engine
    policy, critic = trainer.policy, trainer.critic
    shards = {} if config.offload == "all" else {"base shard": policy.base, "adapters": policy.adapters}
    state = {"optimizer": state_on_gpu(policy, config)}
    waiting = {"critic": weights_on_gpu(critic, config) + state_on_gpu(critic, config)} if critic else {}
    always = {"vLLM CUDA graphs": graphs, "reserved": RESERVED}

    def peak(kind: str) -> Ledger:
        """The fullest moment of the policy, or of the critic while the policy waits."""
        ledgers = [waiting | on_gpu(policy, config, *moment) for moment in getattr(policy, kind).items()]
        for moment in getattr(critic, kind).items() if critic else []:
            ledger = on_gpu(critic, config, *moment)
            held = {"critic": weights_on_gpu(critic, config) + ledger["optimizer"]}
            ledgers.append(ledger | held | state)
        return max(ledgers, key=lambda ledger: sum(ledger.values()))

    streamed = {"streamed weights": trainer.streamed_peak}
    if config.rollout_ranks:  # no GPU has both sides
        reserved = {"reserved": RESERVED}
        return {
            "rollout": engine | {"vLLM working memory": working} | always,
            "logprobs": shards | peak("forward") | reserved,
            "update": shards | peak("update") | reserved,
            "sync": shards | state | waiting | streamed | reserved,
        }
    return {
        "rollout": shards | state | waiting | engine | {"vLLM working memory": working} | always,
        "logprobs": shards | peak("forward") | awake | always,
        "update": shards | peak("update") | awake | always,
        "sync": shards | state | waiting | streamed | {"vLLM weights": trainer.engine} | awake | always,
    }


def weights_on_gpu(learner: Learner, config: Config) -> float:
    """Bytes of a model's shards there while it waits."""
    return 0.0 if config.offload == "all" else learner.base + learner.adapters


def state_on_gpu(learner: Learner, config: Config) -> float:
    """And of its optimizer."""
    return 0.0 if config.offload != "none" else 2 * learner.trained


def on_gpu(learner: Learner, config: Config, moment: str, ledger: Ledger) -> Ledger:
    """A moment's ledger without what lives on the host then."""
    ledger = dict(ledger)
    if config.offload == "all" or (config.offload == "optimizer" and not moment.startswith("optimizer")):
        ledger["optimizer"] = 0.0
    if config.offload == "all":
        ledger["gradients"] = max(0.0, ledger["gradients"] - learner.trained)
    return ledger


# ---- The report -----------------------------------------------------------------------------------------------


def report(
    config: Config,
    shape: PretrainedConfig,
    gpus: int,
    gpu_gb: float,
    bandwidth_gb: float,
    prompt_head: PromptHead | None = None,
) -> tuple[str, bool]:
    """The text, and whether it all fits."""
    if gpus < 1 or not gpu_gb > 0 or not bandwidth_gb > 0:
        raise ValueError(f"there must be GPUs, memory and bandwidth, not {gpus}, {gpu_gb:g} GB, {bandwidth_gb:g} GB/s")
    trains, generates = gpus - config.rollout_ranks, config.rollout_ranks or gpus  # GPUs
    if trains < 1:
        raise ValueError(f"rollout_ranks {config.rollout_ranks} of {gpus} GPUs leaves none to train; lower it")
    for name, count in (("tensor_parallel_size", generates), ("sequence_parallel_size", trains)):
        if count % getattr(config, name):
            raise ValueError(f"{name} {getattr(config, name)} does not divide the {count} GPUs")
    trainer = plan_trainer(config, shape, trains, prompt_head)
    ledgers = phases(config, shape, trainer, generates, gpu_gb * GB)
    width = getattr(torch, config.compute_dtype).itemsize
    total, active = trainer.model / width / GB, trainer.active / width / GB
    of_them = f", of which {active:.1f}B are active for a token" if active < total else ""
    totals = {phase: sum(ledger.values()) / GB for phase, ledger in ledgers.items()}
    lines = [
        f"{config.model}, {total:.1f}B parameters{of_them}, on {gpus} x {gpu_gb:g} GB; "
        f"at its peak, each GPU holds (GB{f'; rollout: each of the last {generates}' if generates < gpus else ''})",
        "",
        f"{'':<22}" + "".join(f"{phase:>10}" for phase in ledgers),
    ]
    for row in KNOBS:
        values = [ledger.get(row, 0.0) / GB for ledger in ledgers.values()]
        if any(values):
            lines.append(f"{row:<22}" + "".join(f"{value:>10.2f}" if value else f"{'-':>10}" for value in values))
    lines.append(f"{'together':<22}" + "".join(f"{total:>10.2f}" for total in totals.values()))

    sequences = ledgers["rollout"]["KV cache"] / bytes_per_sequence(config, shape)
    moved = trainer.streamed * (1 if config.rollout_ranks else 1 - 1 / (config.fsdp_size or gpus))
    host = host_memory(config, trainer, trains)
    at_once = setup.sequences_at_once(config, generates, gpu_gb * GB)
    lines += [
        "",
        f"KV cache  holds {sequences:,.0f} sequences of {config.max_model_len:,} tokens; {at_once:,} at once",
        f"sync      streams {trainer.streamed / GB:.2f} GB, of which {moved / GB:.2f} come from other GPUs: "
        f"{moved / GB / bandwidth_gb:.1f} s at {bandwidth_gb:g} GB/s",
        f"host      {host / GB:.0f} GB for what is offloaded, asleep, or copied to /dev/shm",
        "",
    ]
    worst = max(totals, key=totals.get)
    fits = totals[worst] <= gpu_gb and sequences >= 1
    if fits:
        lines.append(f"It fits: {worst}, the fullest phase, leaves {gpu_gb - totals[worst]:.1f} GB.")
    elif totals[worst] > gpu_gb:
        row = max(ledgers[worst], key=ledgers[worst].get)
        lines.append(f"It does not fit: {worst} lacks {totals[worst] - gpu_gb:.1f} GB. Most is {row}: {KNOBS[row]}.")
    else:
        lines.append(
            "It does not fit: no KV cache for one sequence; a larger gpu_memory_utilization or tensor_parallel_size."
        )
    return "\n".join(lines), fits


def host_memory(config: Config, trainer: Trainer, gpus: int) -> float:
    """Of all ranks together, on one host."""
    learners = [trainer.policy, *filter(None, [trainer.critic])]
    shards = sum(each.base + each.adapters + each.trained for each in learners) * (config.offload == "all")
    state = sum(2 * each.trained for each in learners) * (config.offload != "none")
    asleep = trainer.engine * (config.sleep_level == 1)
    return gpus * (shards + state + asleep) + trainer.model * use_shm() * (1 + (config.rollout_ranks > 0))


def find_shape(config: Config, given: dict[str, int | bool]) -> PretrainedConfig:
    """The model's configuration: from what was given, a folder, `SHAPES`, or the hub (its config.json alone)."""
    known = {} if Path(config.model).is_dir() else dict(zip(SIZES, SHAPES.get(config.model, ())))
    if known or len(given) == len(SIZES):
        return AutoConfig.for_model("qwen2", **known | given)
    shape = models.read_model_config(config.model_source)
    shape.update(given)
    return shape


def load_script(path: str, config: Config) -> ModuleType:
    """The training script whose settings and algorithm are planned; "": the one that has the configured algorithm."""
    name = Path(path).stem or ("train_ppo" if config.algorithm == "ppo" else "train_grpo")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f"there is no training script {path!r} in the root") from None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu_memory_gb", type=float, default=80.0)
    parser.add_argument("--bandwidth_gb", type=float, default=200.0)
    parser.add_argument("--script", default="")  # of a fork
    for name in SIZES:
        is_bool = name == "tie_word_embeddings"
        parser.add_argument(f"--{name}", type=(lambda text: text.lower() == "true") if is_bool else int)
    own, others = parser.parse_known_args()
    given = {name: getattr(own, name) for name in SIZES if getattr(own, name) is not None}
    try:
        script = load_script(own.script, parse_config(others, description=__doc__))
        config, algorithm = script.configure(others, description=__doc__)
        shape = find_shape(config, given)
        text, fits = report(config, shape, own.gpus, own.gpu_memory_gb, own.bandwidth_gb, algorithm.prompt_head)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    print(text)
    sys.exit(not fits)


if __name__ == "__main__":
    main()
