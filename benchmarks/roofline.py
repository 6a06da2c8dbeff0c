"""Every phase of a step beside its own floor, on a GPU that need not be there: counted, not timed.

    python benchmarks/roofline.py --config configs/qwen2_5_3b_gsm8k.py --card h100

Any field of the configuration can be given, too, such as `--tokens_per_microbatch 16384`; shapes come from where
tools/plan.py has them. The real code runs a micro-batch of sequences of full length, with tensors that have shapes and
no memory (benchmarks/counting.py; counting_check.py has the counter beside a clock). A phase's floor is what it would
take as one kernel: it reads what it needs once, writes what it leaves once, and multiplies at the card's peak rate.

One GPU, which may be smaller than the model; nothing is sent to others. Real kernels reach no peak rate, large products
70 to 80% of theirs, so what counts is a row beside its floor and beside other rows.
"""

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with patch("torch.cuda.is_available", return_value=True):  # they choose sizes when they are imported: a GPU's
    import fsdp_utils
    import lora
    from policy import FrozenHead, Head, Policy, recompute, use_rms_norm

from benchmarks.counting import CARDS, Card, Counter  # noqa: E402
from configs.base import Config  # noqa: E402
from runtime import models  # noqa: E402
from runtime.batching import MicroBatch, make_updates  # noqa: E402
from runtime.checkpoint import allocate_state  # noqa: E402
from runtime.conversation import Completion  # noqa: E402
from runtime.optimize import MAX_GRAD_NORM, make_optimizer  # noqa: E402
from tools import plan  # noqa: E402
from train_grpo import ALGORITHMS, configure, policy_loss  # noqa: E402

HERE = torch.device("cpu")
PRODUCTS = re.compile(r"mm|attn|attention")  # operators that are none of the small ones between products


def full_batch(config: Config) -> MicroBatch:
    """The completions of full length that one micro-batch holds."""
    count = max(1, config.tokens_per_microbatch // config.max_model_len)
    prompt, completion = [1] * config.max_prompt_length, [1] * config.max_completion_length
    completions = [Completion(0, prompt, completion, [-1.0] * len(completion), True) for _ in range(count)]
    world, weight = fsdp_utils.World(rank=0, size=1, device=HERE), ALGORITHMS[config.algorithm].weight
    one_update = replace(config, updates_per_rollout=1)
    ((batch,),) = make_updates(completions, torch.ones(count, dtype=torch.float64), weight, one_update, world)
    return batch


def counted(card: Card, work: Callable[[], object]) -> Counter:
    """The cost of a call; what it returns is there at the end, as results are."""
    with Counter(card) as count:
        kept = work()
    del kept
    return count


def backward_from(y: Tensor) -> Tensor:
    """y, after a backward from a gradient of its shape."""
    y.backward(torch.empty_like(y))
    return y


def copy(tensor: Tensor) -> Tensor:
    """What vLLM makes of a weight that arrives."""
    return torch.empty_like(tensor).copy_(tensor)


def parts(config: Config, shape: PretrainedConfig, batch: MicroBatch, card: Card) -> dict[str, Counter]:
    """One linear, one block and the head, alone and not sharded; the block as often as an update computes it."""
    model = AutoModelForCausalLM.from_config(plan.with_layers(shape, 1), dtype=torch.bfloat16)
    use_rms_norm(model)
    models.add_adapters(model, config)
    policy, packed, found = Policy(model), batch.packed, {}
    recompute(model, config.gradient_checkpointing)
    block, head = model.base_model.layers[0], Head.of(model)
    x = torch.empty(1, sum(packed.lengths), shape.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = model.base_model.rotary_emb(x, packed.position_ids[None])
    states = x[0, packed.rows].detach().requires_grad_()

    def add(name: str, work: Callable[..., Tensor], x: Tensor) -> None:
        found[name] = counted(card, lambda: backward_from(work(x)))
        for tensor in (x, *policy.parameters()):
            tensor.grad = None

    run_block = partial(block, position_embeddings=rotary, packed=packed)

    def score(states: Tensor) -> Tensor:
        return FrozenHead.apply(states, head, packed.targets, config.temperature, False)[0]

    linear = block.mlp.gate_proj
    with lora.disabled(model):
        add("gate_proj without LoRA", linear, x)
        add("block without LoRA", run_block, x)
    add("gate_proj", linear, x)
    add("block", run_block, x)
    linear.adapters[lora.POLICY].merged = True
    add("gate_proj, merged", linear, x)
    add("head", score, states)
    return found


def whole(config: Config, policy: Policy, plain: Policy, batch: MicroBatch, card: Card) -> dict[str, Counter]:
    """The update of the sharded policy, and its syncs, as a run on one GPU has them; `plain` recomputes nothing."""
    for each in (policy, plain):
        each.model.to_empty(device=HERE)
        fsdp_utils.compute_buffers(each.model, HERE)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config, policy, config.learning_rate)
    optimizer.param_groups[0]["foreach"] = True  # the default on a GPU
    allocate_state(optimizer, trained)
    loss_of, found = ALGORITHMS[config.algorithm].loss, {}

    def micro_batch(policy: Policy = policy) -> None:
        out = policy(batch.packed, config.temperature, entropy_gradient=config.entropy_coef > 0)
        policy_loss(out.logprobs, out.entropy, batch, loss_of, config)[0].backward()

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()

    def sync(load: Callable[[Tensor], object]) -> list:
        sent = fsdp_utils.to_send(policy.model)
        return [load(tensor) for _, tensor in fsdp_utils.summon_layers(policy.model, HERE, modules=sent, release=True)]

    micro_batch()  # the first one has no gradients to add to
    found["micro-batch"] = counted(card, micro_batch)
    found["clipping and AdamW"] = counted(card, step)
    policy.model.enable_input_require_grads()  # or a model without adapters would have no backward
    with lora.disabled(policy):
        found["micro-batch without LoRA"] = counted(card, micro_batch)
    micro_batch(plain)
    found["micro-batch, nothing recomputed"] = counted(card, lambda: micro_batch(plain))
    fsdp_utils.reshard(policy)
    found["weights, copied"] = counted(card, lambda: [copy(layer.weight) for _, layer in lora.lora_layers(policy)])
    found["weights, merged"] = counted(card, lambda: sync(lambda tensor: None))
    found["weights, merged and copied"] = counted(card, lambda: sync(copy))
    return found


def predict(config: Config, shape: PretrainedConfig, card: Card) -> dict[str, Counter]:
    """The cost of every phase, by name."""
    with plan.fake_ranks(1):
        plain = replace(config, gradient_checkpointing="none")
        policies, batch = [plan.make(models.meta_policy, each, shape) for each in (config, plain)], full_batch(config)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, plan.kernels_of_a_gpu():
            starts = fake.from_tensor(batch.packed.starts)  # then each sequence counts with the longest one's length
            batch = replace(batch, packed=replace(batch.packed, starts=starts))
            return parts(config, shape, batch, card) | whole(config, *policies, batch, card)


def one_kernel_each(config: Config, shape: PretrainedConfig, tokens: int, found: dict[str, Counter]) -> float:
    """Seconds of a micro-batch, were each RMSNorm, rotary embedding, SwiGLU and sum in a block one kernel.

    Tensors read and written in a forward + backward: norm 2 + 3, rotary 2 + 2, SwiGLU 3 + 5, sum of residuals 3 + 2.
    """
    card, recomputed = found["block"].card, {"full": 3, "selective": 1, "none": 0}[config.gradient_checkpointing]
    heads = shape.num_attention_heads + shape.num_key_value_heads
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    sizes = [(shape.intermediate_size, 3, 5), (shape.hidden_size, 2 * (2 + 3), 2 * (3 + 2)), (heads * head, 2, 2)]
    moved = sum(size * (there + back) for size, there, back in sizes)
    moved = 2 * tokens * (moved + sum(size * there for size, there, _ in sizes[:recomputed]))
    block = found["block without LoRA"]
    eager = sum(seconds for name, seconds in block.operators.items() if not PRODUCTS.search(name))
    return found["micro-batch"].seconds - shape.num_hidden_layers * (eager - moved / card.bandwidth)


def report(config: Config, shape: PretrainedConfig, name: str) -> str:
    """The table and what follows from it."""
    card = CARDS[name]
    found = predict(config, shape, card)
    tokens = sum(full_batch(config).packed.lengths)
    lines = [
        f"{config.model} on one {name.upper()}, counted: {tokens:,} tokens, LoRA of rank {config.lora_rank}; "
        f"{card.bandwidth / 1e12:g} TB/s, {card.rates[torch.bfloat16] / 1e12:g} TFLOP/s in bfloat16, "
        f"{card.start * 1e6:g} µs a kernel",
        "",
        "| phase | floor, ms | counted, ms | ratio | GB | TFLOP | kernels | waits for memory, products, starts |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for phase, count in found.items():
        waits = ", ".join(f"{seconds / count.seconds:.0%}" for seconds in count.limits.values())
        lines.append(
            f"| {phase} | {count.floor * 1e3:,.2f} | {count.seconds * 1e3:,.2f} | {count.seconds / count.floor:.2f}x | "
            f"{count.bytes / 1e9:,.1f} | {sum(count.flops.values()) / 1e12:,.2f} | {count.starts:,} | {waits} |"
        )
    ours, bare, plain = (found[f"micro-batch{kind}"] for kind in ("", " without LoRA", ", nothing recomputed"))
    useful = card.product_seconds(plain.flops)
    fused = one_kernel_each(config, shape, tokens, found)
    sync = found["weights, copied"].seconds
    lines += [
        "",
        f"MFU, recomputed products not counted: {useful / ours.seconds:.1%}; with RMSNorm, rotary, SwiGLU and sums as "
        f"one kernel each {useful / fused:.1%}; with nothing recomputed {useful / plain.seconds:.1%}",
        f"LoRA's overhead: {ours.seconds / bare.seconds - 1:.1%}",
        f"A sync of merged weights, of the rate of a copy: merging {sync / found['weights, merged'].seconds:.0%}; with "
        f"the copy that vLLM makes, of two copies: {2 * sync / found['weights, merged and copied'].seconds:.0%}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--card", default="h100", choices=CARDS)
    own, others = parser.parse_known_args()
    try:
        config, _ = configure(others, description=__doc__)
        if not config.lora_rank:
            raise ValueError("lora_rank is 0, and what is counted here is LoRA")
        print(report(config, plan.find_shape(config, {}), own.card))
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
