"""Is it fast, and was it foreseen? The sections of gpu_check.py that time, and that count bytes."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import vs_trl
from benchmarks.gpu_shared import (
    ON_GPU,
    RANK,
    Rows,
    Size,
    bare_run,
    check_config,
    copy_roof,
    matmul_roof,
    merged_forward,
    model_folder,
)
from benchmarks.measuring import PeakBytes, median_seconds

MB = 1e6
VLLM_SHARE = 0.3  # of the GPU's memory, while syncs are measured


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
    from train_grpo import ALGORITHMS, update_policy

    roof = matmul_roof(size)
    run, batches = update_run(size, work)
    policy = run.policy

    def whole(times: int = 1) -> None:
        update_policy(run, batches * times, ALGORITHMS["grpo"].loss)

    def backward() -> None:
        for batch in batches:
            policy(batch.packed).logprobs.sum().backward()

    report_update(rows, "factored", whole, size, roof)
    adapted = median_seconds(backward, size.rounds)
    run.optimizer.zero_grad()
    with merged_forward(policy.model):
        report_update(rows, "merged", whole, size, roof)
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


def report_update(rows: Rows, name: str, whole: Callable[..., None], size: Size, roof: float) -> None:
    """Speed, share of the matmul roof, and memory of one update."""
    seconds = median_seconds(whole, size.rounds)
    with PeakBytes() as extra:
        whole(times=2)  # in the second micro-batch, the gradients of the first are there
    rows.add(f"{name}: speed", size.tokens / seconds, "tokens/s", f"{seconds:.3f} s for {size.tokens:,} tokens")
    used = flops(size) / seconds
    note = f"{used / 1e12:.1f} of {roof / 1e12:.1f} TFLOP/s"
    rows.aim(f"{name}: MFU", used / roof, "of the roof", ">=", 0.5, note)
    rows.add(f"{name}: peak beyond what is kept", extra.peak / MB, "MB")


def update_run(size: Size, work: Path):
    """A run with an optimizer and no engine, and the micro-batches of an update of random tokens."""
    from configs.checks import resolve_config
    from runtime.batching import make_updates
    from runtime.conversation import Completion
    from train_grpo import ALGORITHMS

    scale = vs_trl.SCALES[size.scale]
    config = resolve_config(check_config(size, gradient_checkpointing="selective"), ALGORITHMS["grpo"])
    count = size.tokens // config.max_model_len  # exactly, or rates would be wrong
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, scale.words, (count, config.max_model_len), generator=generator).tolist()
    prompts = [row[: size.prompt] for row in ids]
    completions = [
        Completion(i, prompts[i], row[size.prompt :], [-10.0] * size.completion, True) for i, row in enumerate(ids)
    ]
    run = bare_run(config, model_folder(work, scale), prompts, sample=False)
    trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
    run.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate)
    run.learners = {}
    advantages = torch.randn(count, generator=generator).double()
    (batches,) = make_updates(completions, advantages, ALGORITHMS["grpo"].weight, config, run.world)
    return run, batches


def flops(size: Size) -> float:
    """The operations of an update: 2 per weight and token forward, 2 for the gradient of x, none for a frozen W.

    Added are attention over the visible half of all pairs, adapters (6 per weight and token), and the head's two
    products. Nothing of that is computed twice (`gradient_checkpointing` is selective).
    """
    scale, tokens = vs_trl.SCALES[size.scale], size.tokens
    matrices, sequence = linears(scale).items(), size.prompt + size.completion
    weights = scale.layers * sum(count * a * b for (a, b), count in matrices)
    low = scale.layers * RANK * sum(count * (a + b) for (a, b), count in matrices)
    attention = 2 * sequence * scale.hidden * scale.layers  # of a forward and a token: two products, half of the pairs
    head = 4 * scale.hidden * scale.vocabulary * size.completion / sequence  # of a token
    return tokens * (4 * weights + 3 * (attention + 2 * low) + head)


def sync(rows: Rows, size: Size, work: Path) -> None:
    """A sync into real vLLM: bytes of merged weights per second, and what it needs beside them."""
    from benchmarks.weight_sync import random_adapter
    from fsdp_utils import SyncStats, to_send

    scale, roof = vs_trl.SCALES[size.scale], copy_roof(size)
    config = check_config(size, gpu_memory_utilization=VLLM_SHARE, sync="merged")
    run = bare_run(config, model_folder(work, scale), [list(range(3, 3 + size.prompt))])
    run.weight_sync.update_weights(verify=True)
    random_adapter(run.policy.model, 0, 0.02)
    verified = run.weight_sync.update_weights(verify=True)
    rows.right("share of a test adapter's effect that is missing in vLLM", verified["sync/probe_error"], 0.1)
    sent = to_send(run.policy.model)
    largest = max(tensor.nbytes for _, tensor in run.weight_sync.weights(sent))
    moved, seconds = verified["sync/bytes"], median_seconds(run.weight_sync.update_weights, size.rounds)
    merging = median_seconds(lambda: [None for _ in run.weight_sync.weights(sent, SyncStats())], size.rounds)
    note = f"{moved / MB:,.0f} MB in {seconds:.4f} s; the roof is {roof / 1e9:,.1f}"
    rows.add("speed", moved / seconds / 1e9, "GB/s", note)
    rows.aim("of two copies", 2 * moved / seconds / roof, "", ">=", 0.7, "the rate: merging is one, loading the other")
    rows.add("speed without vLLM", moved / merging / 1e9, "GB/s", "merged, and nobody takes it")
    with PeakBytes() as extra:
        streamed = run.weight_sync.update_weights()["sync/peak_bytes"]
    rows.aim("streamed at a time", streamed / largest, "x largest", "<=", 1.0, f"which has {largest / MB:,.1f} MB")
    rows.add("peak of all tensors", extra.peak / largest, "x largest", "with what merging and vLLM need meanwhile")
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        rows.add("memory in use, with vLLM", (total - free) / MB, "MB", "by all processes")


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
    medians = vs_trl.medians([found], scale)
    for phase in (*vs_trl.PHASES, "step"):
        rows.add(phase, medians[phase], "s", f"{steps - 1} steps")
    rows.add("speed", medians["tokens/s"], "completion tokens/s")
    rows.add("peak memory", found["peak"], "GiB")
    mismatches = [record["mismatch"] for record in found["steps"][1:] if "mismatch" in record]
    if mismatches:
        rows.right("trainer and sampler: KL", max(mismatches), 0.01, "nats a token")


def plan(rows: Rows, size: Size, work: Path) -> None:
    """The plan of tools/plan.py for update and sync, beside the measurements."""
    from transformers import AutoConfig

    from tools import plan as planner

    config = check_config(size, gradient_checkpointing="selective", gpu_memory_utilization=VLLM_SHARE)
    shape = AutoConfig.from_pretrained(model_folder(work, vs_trl.SCALES[size.scale]))
    trainer = planner.plan_trainer(config, shape, gpus=1, on_gpu=ON_GPU)

    def peak(moments: dict[str, planner.Ledger]) -> float:
        return max(sum(ledger.values()) - ledger["optimizer"] for ledger in moments.values())

    policy = trainer.policy
    kept = policy.base + policy.adapters + 2 * policy.trained
    for what, foreseen, measured in (
        ("kept", kept, rows.found("update", "kept: weights, adapters, optimizer")),
        ("update, beyond it", peak(policy.update), rows.found("update", "factored: peak beyond what is kept")),
        ("logprobs, beyond it", peak(policy.forward), rows.found("update", "logprobs: peak beyond what is kept")),
    ):
        report_plan(rows, what, foreseen, measured)
    if ON_GPU:
        total = torch.cuda.mem_get_info()[1]
        foreseen = sum(planner.phases(config, shape, trainer, 1, total)["rollout"].values()) - 2 * policy.trained
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
