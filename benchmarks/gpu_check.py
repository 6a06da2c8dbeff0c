"""Is it right and is it fast on this machine: one command, one table, one JSON file, under nine minutes.

    python benchmarks/gpu_check.py [--size toy|3b|7b] [--sections layers head ...] [--budget_s 540] [--out FILE]

Builds Qwen2.5 architectures with random weights on the local disk and measures, each in a section of its own:
kernels, sampler, adapter (is it right?), layers, head, update, sync, step, trl (is it fast?), plan (was it foreseen?).
The size is `3b` where there is a GPU and `toy` elsewhere: there, times mean nothing, but everything runs.

Wrong results, and sections that break, are told as FAIL, and the exit code is 1; a target of speed that is missed is
only told. What no longer fits in the budget is skipped, and so is what this machine cannot do; both say so. Targets are
those of docs/gpu_results.md; roofs are measured in the same process as what is compared with them.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402, I001
from torch import Tensor  # noqa: E402

import quiet  # noqa: E402, F401  before torch
from benchmarks import vs_trl  # noqa: E402
from benchmarks.measuring import DEVICE, PeakBytes, median_seconds  # noqa: E402

ON_GPU = DEVICE.type == "cuda"
RANK = 32  # of all adapters; alpha is the same
GIB, MB = 2**30, 1e6


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    scale: str  # of vs_trl.SCALES: the model of update, sync and step
    layers: tuple[str, ...]  # of vs_trl.SCALES: the models whose linears are timed
    vocabulary: int  # of the head, over the scale's hidden size
    tokens: int  # of a layer's input, and of an update, whose sequences have `prompt` + `completion`
    prompt: int
    completion: int
    head_rows: int
    matmul: int  # width of the square matrices of the matmul roof
    copied: int  # bytes of the copy roof
    rounds: int
    patience: float  # the sections' usual seconds are multiplied by this


SIZES = {
    "toy": Size("toy", ("toy",), 3000, 256, 8, 24, 64, 256, 1 << 20, 3, 0.0),
    "3b": Size("3b", ("3b", "7b"), 151936, 16384, 512, 512, 8192, 8192, 1 << 30, 7, 1.0),
    "7b": Size("7b", ("3b", "7b"), 152064, 16384, 512, 512, 8192, 8192, 1 << 30, 5, 1.8),
}
CHECKED = {"toy": vs_trl.SCALES["toy"]}  # the model whose logprobs are checked; large weights, or all would be alike
CHECKED_ON_GPU = vs_trl.Scale(512, 1536, 4, 8, 2, words=8000)


# ---------------------------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    section: str
    what: str
    value: float | None = None  # None: not measured, and `note` says why
    unit: str = ""
    target: str = ""
    verdict: str = ""  # ok or FAIL; of a speed's target: met or missed
    note: str = ""


class Rows:
    """The rows of one section. They go to a file at once, so that they outlive the process."""

    def __init__(self, file: Path, section: str):
        self.file, self.section = file, section

    def add(self, what: str, value: float | None, unit: str = "", note: str = "", **more: str) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps(asdict(Row(self.section, what, value, unit, note=note, **more))) + "\n")

    def right(self, what: str, error: float, limit: float, unit: str = "relative", note: str = "") -> None:
        """An error that must not exceed a limit; NaN does."""
        self.add(what, error, unit, note, target=f"<= {limit:g}", verdict="ok" if error <= limit else "FAIL")

    def aim(self, what: str, value: float, unit: str, sign: str, target: float, note: str = "") -> None:
        """A speed or a size with a target, which a toy cannot meet or miss."""
        met = value <= target if sign == "<=" else value >= target
        verdict = ("met" if met else "missed") if ON_GPU else ""
        self.add(what, value, unit, note, target=f"{sign} {target:g}", verdict=verdict)

    def unable(self, what: str, why: str) -> None:
        """Something that could not be measured here."""
        self.add(what, None, note=why)

    def found(self, section: str, what: str) -> float | None:
        """What another section measured; None if it has not."""
        rows = [row for row in read_rows(self.file) if (row.section, row.what) == (section, what)]
        return rows[-1].value if rows else None


def read_rows(file: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def matmul_roof(size: Size) -> float:
    """FLOP/s of a large square bfloat16 product."""
    a, b = (torch.randn(size.matmul, size.matmul, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size.matmul**3 / median_seconds(lambda: a @ b, 10)


def copy_roof(size: Size) -> float:
    """Bytes/s that a copy within the device's memory moves: each is read once and written once."""
    source = torch.zeros(size.copied, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return size.copied / median_seconds(lambda: target.copy_(source), 10)


def model_folder(work: Path, scale: vs_trl.Scale, spread: float = 0.0) -> str:
    """The folder of a random model, made once."""
    folder = work / f"model_{scale.hidden}_{scale.layers}_{spread}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        vs_trl.make_model(partial, scale, spread)
        partial.rename(folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------
# Is it right?
# ---------------------------------------------------------------------------------------------------------------


def kernels(rows: Rows, size: Size, work: Path) -> None:
    """Layer, head, four bits and attention in bfloat16, each against plain formulas and autograd in float64."""
    from benchmarks import logprob_head

    torch.manual_seed(0)
    for merged in (False, True):
        error = layer_error(512, 256, 384, merged)
        rows.right(f"LoRA layer, {'merged' if merged else 'factored'}", error, 0.01, note="worst of y, dx, dA, dB")
    hidden = torch.randn(128, 256, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(5000, 256, device=DEVICE) / 16).bfloat16()
    targets = torch.randint(5000, (128,), device=DEVICE)
    logprobs = logprob_head.ours(hidden, weight, targets)
    logprobs.sum().backward()
    exact = (hidden.detach().double() @ weight.double().T / logprob_head.TEMPERATURE).log_softmax(-1)
    rows.right("frozen head, logprobs", relative(logprobs, exact.gather(1, targets[:, None])[:, 0]), 0.01)
    gradient = logprob_head.exact_gradient(hidden.detach(), weight, targets)
    rows.right("frozen head, gradient", relative(hidden.grad, gradient), 0.01)
    check_four_bits(rows)
    name = "varlen" if ON_GPU else "SDPA"
    for part, error in attention_errors([200, 200, 131, 64, 1]).items():
        rows.right(f"packed attention ({name}), {part}", error, 0.01)
    if not ON_GPU:
        rows.unable("packed attention (varlen)", "needs a GPU")


def layer_error(tokens: int, in_features: int, out_features: int, merged: bool) -> float:
    """The largest relative error of `LowRankLinear`'s output and gradients."""
    import lora

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()

    x, A, B = leaf(tokens, in_features, dtype=torch.bfloat16), leaf(8, in_features), leaf(out_features, 8)
    W = leaf(out_features, in_features, dtype=torch.bfloat16).detach()
    y = lora.LowRankLinear.apply(x, W, None, A, B, 0.5, merged)
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, A, B)]
    low = 0.5 * (wide[0] @ wide[1].T) @ wide[2].T
    exact = wide[0] @ W.double().T + low
    gradients = torch.autograd.grad(exact, wide, dy.double())
    if merged:  # the sampler's weight instead, in y and dx
        M = (W.double() + 0.5 * B.detach().double() @ A.detach().double()).to(torch.bfloat16).double()
        exact, gradients = wide[0] @ M.T, (dy.double() @ M, *gradients[1:])
    pairs = zip((y, x.grad, A.grad, B.grad), (exact, *gradients))
    return max(relative(found.detach(), expected.detach()) for found, expected in pairs)


def check_four_bits(rows: Rows) -> None:
    """NF4 of a normal weight, and a linear on it."""
    import nf4

    weight = torch.randn(384, 256, device=DEVICE).bfloat16()
    stored = nf4.quantize(weight)
    whole = nf4.dequantize(*stored, 256, torch.float64)
    on_cpu = nf4.dequantize(*nf4.quantize(weight.cpu()), 256, torch.float64)
    rows.right("NF4, against the CPU's", relative(whole.cpu(), on_cpu), 1e-3)
    rows.right("NF4, lost of a normal weight", relative(whole, weight), 0.097, note="bitsandbytes loses 0.092")
    layer = nf4.NF4Weight(weight)
    x = torch.randn(200, 256, device=DEVICE).bfloat16().requires_grad_()
    y = nf4.NF4Linear.apply(x, layer, None)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = x.detach().double() @ whole.T, dy.double() @ whole
    error = max(relative(y.detach(), exact[0]), relative(x.grad, exact[1]))
    rows.right("NF4 linear, forward and backward", error, 0.01)


def attention_errors(lengths: list[int], heads: int = 8, kv_heads: int = 2, width: int = 64) -> dict[str, float]:
    """Of `packed_attention` with grouped heads, against a masked softmax over all pairs of tokens in float64."""
    from policy import packed_attention

    tokens = sum(lengths)
    inputs = [
        torch.randn(1, count, tokens, width, device=DEVICE).bfloat16().requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    out, _ = packed_attention(None, *inputs, None, scaling=width**-0.5, lengths=lengths)
    dout = torch.randn_like(out)
    out.backward(dout)
    q, k, v = wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (k, v))
    owner = torch.arange(len(lengths), device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))
    seen = (owner[:, None] == owner) & torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()
    weights = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    exact = (weights @ v).transpose(1, 2)
    gradients = torch.autograd.grad(exact, wide, dout.double())
    backward = max(relative(tensor.grad, gradient) for tensor, gradient in zip(inputs, gradients))
    return {"forward": relative(out.detach(), exact.detach()), "backward": backward}


def check_config(size: Size, **settings):
    """Of a policy that is checked or timed without a task."""
    from configs.base import Config

    lengths = {"max_prompt_length": size.prompt, "max_completion_length": size.completion}
    common = {"lora_rank": RANK, "lora_alpha": float(RANK), "tokens_per_microbatch": size.tokens}
    return Config(**(common | lengths | settings))


def bare_run(config, folder: str, prompts: list[list[int]], sample: bool = True):
    """A run without a task, an optimizer and a log; and without an engine unless it is to `sample`."""
    import fsdp_utils
    import prepare
    from run import Prompt, Run

    world = fsdp_utils.init_world()
    policy = prepare.build_policy(config, folder, world)
    engine = prepare.build_engine(config, folder) if sample else None
    asked = [Prompt(None, token_ids) for token_ids in prompts]
    return Run(config, world, None, asked, asked, policy, None, engine, None)


def random_adapter(policy, seed: int, size: float) -> None:
    from benchmarks import weight_sync

    weight_sync.random_adapter(policy.model, seed, size)


def checked_run(size: Size, work: Path, **settings):
    """A run of the small model whose logprobs are checked, its folder, and prompts longer than vLLM's cache blocks."""
    scale = CHECKED_ON_GPU if ON_GPU else CHECKED["toy"]
    folder = model_folder(work, scale, spread=0.05)
    prompts = [[2 + (7 * i + 3 * j * j) % 900 for j in range(length)] for i, length in enumerate((300, 280, 260, 150))]
    common = {"max_prompt_length": 320, "max_completion_length": 16, "gpu_memory_utilization": 0.2}
    return bare_run(check_config(size, **common, **settings), folder, prompts), folder, prompts


@torch.no_grad()
def plain_logprobs(folder: str, policy, texts: list[list[int]], adapted: bool = True) -> list[Tensor]:
    """Of each text's tokens after the first: transformers' own float32 model, W + s·B A added up in its weights."""
    from transformers import AutoModelForCausalLM

    import fsdp_utils
    import lora

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(DEVICE)
    for path, layer in lora.lora_layers(policy.model) if adapted else ():
        adapter = layer.adapters[lora.POLICY]
        A, B = fsdp_utils.gather(adapter.lora_A), fsdp_utils.gather(adapter.lora_B)
        model.get_submodule(path).weight += adapter.scale * B @ A
    logprobs = []
    for text in texts:
        ids = torch.tensor([text], device=DEVICE)
        logprobs.append(model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu())
    return logprobs


def compare_logprobs(rows: Rows, when: str, run, folder: str, prompts: list[list[int]]) -> None:
    """vLLM reading and vLLM writing, and the trainer, against the plain model; in units of what the adapter changes.

    The prompts are those of the time before: with a prefix cache that outlived the old weights, what vLLM writes
    would be wrong.
    """
    import fsdp_utils
    import sync
    from policy import pack
    from rollout import Request

    written = run.engine.generate([Request(p, samples=4, temperature=1.0, seed=i) for i, p in enumerate(prompts)])
    texts = prompts + [prompts[completion.request] + completion.token_ids for completion in written]
    exact = plain_logprobs(folder, run.policy, texts)
    base = plain_logprobs(folder, run.policy, prompts, adapted=False)
    count = len(prompts)
    effect = mean_difference(exact[:count], base)
    packed = pack([text[:1] for text in prompts], [text[1:] for text in prompts], DEVICE)
    with torch.no_grad(), sync.rounded(run.policy.model):
        trainer = run.policy(packed).logprobs.cpu().split([len(text) - 1 for text in prompts])
    fsdp_utils.reshard(run.policy)
    ends = [text[-len(completion.logprobs) :] for text, completion in zip(exact[count:], written)]
    read = [torch.tensor(run.engine.logprobs(text)) for text in prompts]
    for what, found, expected in (
        ("vLLM reading", read, exact[:count]),
        ("vLLM writing", [torch.tensor(completion.logprobs) for completion in written], ends),
        ("trainer", trainer, exact[:count]),
    ):
        error = mean_difference(found, expected)
        note = f"{error:.4f} nats a token; the adapter is worth {effect:.3f}"
        rows.right(f"{what}, {when}", error / effect, 0.15, "of the update", note)


def mean_difference(found: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """Mean |difference|, over the tokens of all texts."""
    return (torch.cat(list(found)) - torch.cat(expected)).abs().mean().item()


def sampler(rows: Rows, size: Size, work: Path) -> None:
    """After each sync vLLM has the trainer's weights, whatever it did in between: sleep at level 0, 1, 2, and back."""
    run, folder, prompts = checked_run(size, work, sleep_level=2 if ON_GPU else 0)
    settings = run.engine.llm.llm_engine.vllm_config
    rows.add("prefix caching", float(settings.cache_config.enable_prefix_caching), "on")
    if ON_GPU:
        mode = settings.compilation_config.cudagraph_mode
        rows.add("CUDA graphs", float(bool(mode.value)), "on", note=f"{mode.name}, tensor_parallel_size 1")
    else:
        rows.unable("CUDA graphs", "need a GPU")
        rows.unable("sleep levels 1 and 2", "vLLM on a CPU does not sleep")
    verified = run.sync(verify=True)
    rows.add("verifier's noise", verified["sync/verified_diff"], "nats", "trainer and vLLM as it was loaded")
    for number, level in enumerate((0, 1, 2, 1, 0) if ON_GPU else (0, 0), start=1):
        random_adapter(run.policy, number, 0.05)
        run.engine.sleep_level = level
        free = torch.cuda.mem_get_info()[0] if ON_GPU else 0
        run.engine.sleep()
        if level:
            freed = torch.cuda.mem_get_info()[0] - free
            rows.add(f"sync {number}: sleep level {level} frees", freed / GIB, "GiB")
        run.sync()
        compare_logprobs(rows, f"sync {number}, sleep level {level}", run, folder, prompts)
    arrived = run.sync(verify=True)["sync/arrived"]
    rows.right("verifier: share of the update that is missing", abs(1 - arrived), 0.1)


def adapter(rows: Rows, size: Size, work: Path) -> None:
    """The same with vLLM's own LoRA, which gets the adapter alone."""
    level = 1 if ON_GPU else 0
    run, folder, prompts = checked_run(size, work, sync="adapter", sleep_level=level)
    for number in (1, 2):
        random_adapter(run.policy, number, 0.05)
        run.engine.sleep()
        run.sync()
        compare_logprobs(rows, f"sync {number}, sleep level {level}", run, folder, prompts)


# ---------------------------------------------------------------------------------------------------------------
# Is it fast?
# ---------------------------------------------------------------------------------------------------------------


def layers(rows: Rows, size: Size, work: Path) -> None:
    """The seven linears of a block with LoRA, forward and backward, against the same seven bare ones."""
    from benchmarks import lora_layer

    for name in size.layers:
        scale, seconds, saved = vs_trl.SCALES[name], {}, {}
        for shape, count in linears(scale).items():
            for variant, timing in lora_layer.measure(size.tokens, *shape, RANK, size.rounds).items():
                seconds[variant] = seconds.get(variant, 0.0) + count * (timing.forward + timing.backward)
                saved[variant] = saved.get(variant, 0) + count * timing.saved
        bare = seconds.pop("bare frozen linear")
        rows.add(f"{name}: bare frozen linears", bare * 1e3, "ms", f"{size.tokens:,} tokens")
        for variant, total in seconds.items():
            note = f"{total * 1e3:.2f} ms, saves {saved[variant] / MB:,.0f} MB"
            rows.add(f"{name}: {variant}", total / bare, "x bare", note)
    if not find_spec("peft"):
        rows.unable("peft", "is not installed")


def linears(scale: vs_trl.Scale) -> dict[tuple[int, int], int]:
    """(in, out) of a block's seven linears, and how many have it."""
    keys = scale.hidden // scale.heads * scale.kv_heads
    wide, narrow = (scale.hidden, scale.intermediate), (scale.intermediate, scale.hidden)
    return {(scale.hidden, scale.hidden): 2, (scale.hidden, keys): 2, wide: 2, narrow: 1}


def head(rows: Rows, size: Size, work: Path) -> None:
    """Logprobs and their gradient at the frozen head: time, and memory beyond inputs and weights."""
    from benchmarks import logprob_head

    hidden, roof = vs_trl.SCALES[size.scale].hidden, matmul_roof(size)
    timings = logprob_head.compare(size.head_rows, hidden, size.vocabulary, size.rounds)
    for name, timing in timings.items():
        note = f"{timing.extra / MB:,.0f} MB at the peak, gradient's error {timing.error:.4f}"
        rows.add(f"{name}", timing.total * 1e3, "ms", note)
    ours, full = timings["ours"], timings["full logits, float32"]
    products = 4 * size.head_rows * hidden * size.vocabulary  # two
    rows.right("ours, gradient", ours.error, 0.01)
    rows.add("ours, of the matmul roof", products / ours.total / roof, "", f"roof {roof / 1e12:.1f} TFLOP/s")
    if ON_GPU:
        rows.aim("ours, memory of that of full logits", ours.extra / full.extra, "", "<=", 0.1)
    else:
        rows.unable("ours, memory of that of full logits", "a process's memory is too coarse for a toy")
    if "Liger" in timings:
        rows.aim("ours, times as fast as Liger", timings["Liger"].total / ours.total, "x", ">=", 1.5)
    else:
        rows.unable("ours, times as fast as Liger", "Liger is not installed")


def update(rows: Rows, size: Size, work: Path) -> None:
    """The update phase as a run has it: forward, backward, clipping, AdamW; factored and merged; and without LoRA."""
    import fsdp_utils
    import lora
    import sync
    from train_grpo import ALGORITHMS, update_policy

    scale, roof = vs_trl.SCALES[size.scale], matmul_roof(size)
    run, batches = update_run(size, work)
    policy, tokens = run.policy, sum(sum(batch.packed.lengths) for batch in batches)

    def whole() -> None:
        update_policy(run, batches, ALGORITHMS["grpo"].loss)

    def backward() -> None:
        for batch in batches:
            policy(batch.packed).logprobs.sum().backward()

    modes = {"factored": lora.using(policy, lora.POLICY), "merged": sync.rounded(policy.model)}
    for name, mode in modes.items():
        with mode:
            seconds = median_seconds(whole, size.rounds)
            with PeakBytes() as extra:
                whole()
            if name == "factored":
                adapted = median_seconds(backward, size.rounds)
                run.optimizer.zero_grad()
        note = f"{seconds:.3f} s for {tokens:,} tokens, {tokens / len(batches):,.0f} at a time"
        rows.add(f"{name}: speed", tokens / seconds, "tokens/s", note)
        used = flops(scale, size, tokens, recompute=False) / seconds
        again = flops(scale, size, tokens, recompute=True) / seconds
        note = f"{used / 1e12:.1f} of {roof / 1e12:.1f} TFLOP/s; with what is recomputed {again / roof:.1%}"
        rows.aim(f"{name}: MFU", used / roof, "of the roof", ">=", 0.45, note)
        rows.add(f"{name}: peak beyond what is kept", extra.peak / MB, "MB")

    policy.model.enable_input_require_grads()  # or a model without adapters would have no backward
    with lora.disabled(policy):
        bare = median_seconds(backward, size.rounds)
    policy.model.disable_input_require_grads()
    rows.aim("LoRA's overhead", adapted / bare - 1, "of forward and backward", "<=", 0.05, f"without it {bare:.3f} s")
    fsdp_utils.reshard(policy)
    with PeakBytes() as extra, torch.no_grad():
        policy(batches[0].packed)
    rows.add("logprobs: peak beyond what is kept", extra.peak / MB, "MB")
    state = [t for values in run.optimizer.state.values() for t in values.values() if t.ndim]
    kept = sum(fsdp_utils.local(tensor).nbytes for tensor in [*policy.parameters(), *state])
    rows.add("kept: weights, adapters, optimizer", kept / MB, "MB")


def update_run(size: Size, work: Path):
    """A run with an optimizer and no engine, and the micro-batches of an update of random tokens."""
    from batching import make_updates
    from rollout import Completion
    from train_grpo import ALGORITHMS, settle

    scale = vs_trl.SCALES[size.scale]
    config = settle(check_config(size, gradient_checkpointing=True), ALGORITHMS["grpo"])
    count = size.tokens // config.max_model_len
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, scale.words, (count, config.max_model_len), generator=generator).tolist()
    prompts = [row[: size.prompt] for row in ids]
    completions = [Completion(i, row[size.prompt :], [-10.0] * size.completion, True) for i, row in enumerate(ids)]
    run = bare_run(config, model_folder(work, scale), prompts, sample=False)
    trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    run.learners = {}
    (batches,) = make_updates(
        prompts,
        completions,
        torch.randn(count, generator=generator).double(),
        weight=lambda lengths: ALGORITHMS["grpo"].weight(lengths, config),
        updates=1,
        budget=config.tokens_per_microbatch,
        drop_useless=False,
        world=run.world,
    )
    return run, batches


def flops(scale: vs_trl.Scale, size: Size, tokens: int, recompute: bool) -> float:
    """Of an update: 2 per weight and token forward, 2 for the gradient of x, none for that of a frozen W.

    And attention over the half of all pairs that is seen, adapters (6 per weight and token), and the head's two
    products. `recompute` counts the second forward of checkpointing, too.
    """
    passes = 3 if recompute else 2
    matrices = linears(scale)
    weights = scale.layers * sum(count * a * b for (a, b), count in matrices.items())
    low = scale.layers * RANK * sum(count * (a + b) for (a, b), count in matrices.items())
    sequence = size.prompt + size.completion
    pairs = 2 * tokens * sequence * scale.hidden * scale.layers  # a forward's: two products, half of the pairs
    predicted = tokens * size.completion / sequence
    vocabulary = len_vocabulary(scale)
    products = 4 * predicted * scale.hidden * vocabulary
    return 2 * passes * weights * tokens + (passes + 1) * pairs + 2 * (passes + 1) * low * tokens + products


def len_vocabulary(scale: vs_trl.Scale) -> int:
    return scale.words + 259


def sync_speed(rows: Rows, size: Size, work: Path) -> None:
    """A sync into real vLLM: bytes of merged weights per second, and what it needs beside them."""
    from stream import SyncStats

    scale, roof = vs_trl.SCALES[size.scale], copy_roof(size)
    config = check_config(size, gpu_memory_utilization=0.3, enforce_eager=True)
    run = bare_run(config, model_folder(work, scale), [list(range(3, 3 + size.prompt))])
    run.sync(verify=True)
    random_adapter(run.policy, 0, 0.02)
    verified = run.sync(verify=True)
    rows.right("share of the update that is missing in vLLM", abs(1 - verified["sync/arrived"]), 0.1)
    moved, peak = verified["sync/bytes"], 0
    seconds = median_seconds(run.sync, size.rounds)
    alone = median_seconds(lambda: [None for _ in run.weights(None, SyncStats())], size.rounds)
    whole = SyncStats()
    largest = max(tensor.nbytes for _, tensor in run.weights(None, whole))
    with PeakBytes() as extra:
        peak = run.sync()["sync/peak_bytes"]
    note = f"{moved / MB:,.0f} MB in {seconds:.4f} s; roof {roof / 1e9:,.1f} GB/s, of which merging takes two copies"
    rows.add("speed", moved / seconds / 1e9, "GB/s", note)
    rows.aim("speed, of the copy roof", moved / seconds / roof, "", ">=", 0.5)
    rows.add("merging alone", whole.bytes / alone / 1e9, "GB/s", "nobody takes the tensors")
    rows.aim("held by the stream", peak / largest, "x largest", "<=", 1.0, f"which has {largest / MB:,.1f} MB")
    rows.add("peak bytes", extra.peak / largest, "x largest", "float32 temporaries of a merge included")
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        rows.add("memory in use, with vLLM", (total - free) / MB, "MB", "all processes of this GPU")


def step(rows: Rows, size: Size, work: Path) -> None:
    """Whole GRPO steps by phase, vLLM and trainer in one process."""
    report_step(rows, vs_trl.run_lorl, size, work, steps=3)


def trl(rows: Rows, size: Size, work: Path) -> None:
    """The same steps by TRL, with peft and colocated vLLM."""
    missing = [package for package in ("trl", "peft", "datasets") if not find_spec(package)]
    if missing:
        rows.unable("step", f"{', '.join(missing)} not installed")
        return
    report_step(rows, vs_trl.run_trl, size, work, steps=2)
    ours, theirs = rows.found("step", "step"), rows.found("trl", "step")
    if ours:
        rows.aim("lorl, times as fast", theirs / ours, "x", ">=", 2.0)
    else:
        rows.unable("lorl, times as fast", "its step was not measured")


def report_step(rows: Rows, side: Callable[..., dict], size: Size, work: Path, steps: int) -> None:
    """Medians over all steps but the first, which warms up."""
    scale, folder = vs_trl.SCALES[size.scale], work / side.__name__
    folder.mkdir()
    found = side(Path(model_folder(work, scale)), steps, folder, scale)
    rest = found["steps"][1:]
    for phase in ("rollout", "reward", "logprobs", "update", "sync", "step"):
        rows.add(phase, statistics.median(record.get(phase, 0.0) for record in rest), "s", f"{len(rest)} steps")
    lengths = [sum(vs_trl.completion_lengths(number, scale)) for number in range(2, steps + 1)]
    speed = statistics.median(length / record["step"] for length, record in zip(lengths, rest))
    rows.add("speed", speed, "completion tokens/s")
    rows.add("peak memory", found["peak"], "GiB")
    if "mismatch" in rest[0]:
        rows.right("trainer and sampler: KL", max(record["mismatch"] for record in rest), 0.01, "nats a token")


def plan_peaks(rows: Rows, size: Size, work: Path) -> None:
    """What plan.py foresees of update and sync, beside what was measured there."""
    from transformers import AutoConfig

    import plan

    config = check_config(size, gradient_checkpointing=True, gpu_memory_utilization=0.3)
    shape = AutoConfig.from_pretrained(model_folder(work, vs_trl.SCALES[size.scale]))
    trainer = plan.plan_trainer(config, shape, gpus=1)

    def peak(moments: dict[str, plan.Ledger]) -> float:
        return max(sum(ledger.values()) - ledger["optimizer"] for ledger in moments.values())

    kept = trainer.base + trainer.adapters + 2 * trainer.trained
    for what, foreseen, measured in (
        ("kept", kept, rows.found("update", "kept: weights, adapters, optimizer")),
        ("update, beyond it", peak(trainer.update), rows.found("update", "factored: peak beyond what is kept")),
        ("logprobs, beyond it", peak(trainer.logprobs), rows.found("update", "logprobs: peak beyond what is kept")),
    ):
        report_plan(rows, what, foreseen, measured)
    if ON_GPU:
        total = torch.cuda.mem_get_info()[1]
        foreseen = sum(plan.phases(config, shape, trainer, total)["rollout"].values()) - 2 * trainer.trained
        report_plan(rows, "with vLLM", foreseen, rows.found("sync", "memory in use, with vLLM"))
    else:
        rows.unable("with vLLM", "its share of a GPU, and there is none")


def report_plan(rows: Rows, what: str, foreseen: float, measured: float | None) -> None:
    """Measured (MB) / foreseen (bytes)."""
    if measured is None:
        rows.unable(what, f"foreseen {foreseen / MB:,.1f} MB; what it was, was not measured")
    else:
        note = f"measured {measured:,.1f} MB, foreseen {foreseen / MB:,.1f}"
        rows.add(what, measured * MB / foreseen, "x foreseen", note, target="0.9 to 1.1")


# ---------------------------------------------------------------------------------------------------------------
# One after the other
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    run: Callable[[Rows, Size, Path], None]
    seconds: float  # that it usually takes at 3B on a GPU, with its process: a guess until one has run


SECTIONS = {
    "kernels": Section(kernels, 20),
    "sampler": Section(sampler, 60),
    "adapter": Section(adapter, 50),
    "layers": Section(layers, 20),
    "head": Section(head, 20),
    "update": Section(update, 50),
    "sync": Section(sync_speed, 50),
    "step": Section(step, 150),
    "plan": Section(plan_peaks, 20),
    "trl": Section(trl, 200),
}
# Sections of one process. vLLM takes a GPU's memory and gives it back when its process ends, so there each engine has
# one of its own; on a CPU that would only be slow. The planner makes a world of its own, of ranks that do not exist.
PROCESSES = (
    ["kernels layers head", "sampler", "adapter", "update", "sync", "step", "plan", "trl"]
    if ON_GPU
    else ["kernels layers head", "sampler adapter update sync step trl", "plan"]
)


def run_here(names: list[str], size: Size, work: Path) -> None:
    """In this process; what ends it, the parent sees."""
    for name in names:
        (work / f"{name}.begun").touch()
        SECTIONS[name].run(Rows(work / "rows.jsonl", name), size, work)
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
        (work / f"{name}.done").touch()


def run_process(names: list[str], arguments: argparse.Namespace, work: Path, deadline: float) -> None:
    """Runs sections in a fresh process; the first one that breaks gets a row that says why."""
    command = [sys.executable, __file__, "--size", arguments.size, "--work", str(work), "--sections", *names]
    log, left = work / "log.txt", max(1.0, deadline - time.monotonic())
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, env=environment)
        try:
            code = process.wait(timeout=left)
            cause = "" if code == 0 else last_line(log) or f"exit code {code}"
        except subprocess.TimeoutExpired:
            cause = f"did not end within the {left:.0f} s that were left"
        finally:  # with whatever it has started itself
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    broken = next((name for name in names if not (work / f"{name}.done").exists()), None)
    if broken:
        print(log.read_text()[-3000:], file=sys.stderr)
        (work / f"{broken}.done").touch()
        Rows(work / "rows.jsonl", broken).add("the whole section", None, note=cause, verdict="FAIL")


def last_line(log: Path) -> str:
    """Of an exception, what it says."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [""])[-1][:200]


def run_all(arguments: argparse.Namespace, work: Path) -> None:
    """Every section that is asked for and fits, in as few processes as that takes."""
    deadline, size = time.monotonic() + arguments.budget_s, SIZES[arguments.size]
    for process in PROCESSES:
        names = [name for name in process.split() if name in arguments.sections]
        while names := [name for name in names if not (work / f"{name}.done").exists()]:
            needed, left = SECTIONS[names[0]].seconds * size.patience, deadline - time.monotonic()
            if left < max(needed, 1.0):
                note = f"skipped: no time; {left:.0f} s are left, and it takes about {needed:.0f}"
                Rows(work / "rows.jsonl", names[0]).unable("the whole section", note)
                (work / f"{names[0]}.done").touch()
                continue
            print(f"{', '.join(names)} ({left:.0f} s left)", file=sys.stderr, flush=True)
            run_process(names, arguments, work, deadline)


def table(rows: list[Row]) -> Iterator[str]:
    """In Markdown."""
    header = ("section", "what", "measured", "target", "verdict", "note")
    cells = [
        (
            row.section,
            row.what,
            "-" if row.value is None else f"{row.value:,.4g} {row.unit}".strip(),
            *(row.target, row.verdict, " ".join(row.note.split()).replace("|", "/")),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    for line in (header, ["-" * width for width in widths], *cells):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="3b" if ON_GPU else "toy")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget_s", type=float, default=540.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check.json"))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # for the processes that it starts itself
    arguments = parser.parse_args()
    if arguments.work:
        run_here(arguments.sections, SIZES[arguments.size], arguments.work)
        return
    from tracking import environment

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        run_all(arguments, Path(work))
        rows = read_rows(Path(work, "rows.jsonl"))
    rows.sort(key=lambda row: list(SECTIONS).index(row.section))  # stable: within a section as they came
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    seconds = time.monotonic() - start
    print(f"{device}, {arguments.size}, {seconds:.0f} s")
    print("\n".join(table(rows)))
    record = {"device": device, "size": arguments.size, "date": time.strftime("%Y-%m-%d"), "seconds": seconds}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record |= {"environment": environment(), "rows": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    failed = [row for row in rows if row.verdict == "FAIL"]
    print(f"{len(rows)} rows, {len(failed)} failed; also in {arguments.out}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
