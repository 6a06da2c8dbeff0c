"""Is it right? The sections of gpu_check.py that compare with float64 and with transformers' own model."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import vs_trl
from benchmarks.gpu_shared import (
    DEVICE,
    ON_GPU,
    Rows,
    Size,
    bare_run,
    check_config,
    merged_forward,
    model_folder,
    relative,
)

CHECKED = vs_trl.Scale(512, 1536, 4, 8, 2, words=8000) if ON_GPU else vs_trl.SCALES["toy"]
LENGTHS = (300, 280, 260, 150)  # of the prompts: longer than the blocks of vLLM's cache, 32 tokens on a CPU


def kernels(rows: Rows, size: Size, work: Path) -> None:
    """Layer, head, norm, four bits and attention in bfloat16, each against plain formulas and autograd in float64."""
    from benchmarks import logprob_head

    torch.manual_seed(0)
    for merged in (False, True):
        error = layer_error(512, 256, 384, merged)
        rows.right(f"LoRA layer, {'merged' if merged else 'factored'}", error, 0.01, note="worst of y, dx, dA, dB")
    rows.right("RMSNorm, forward and backward", norm_error(200, 256), 0.01)
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
    """The largest relative error of `low_rank_linear`'s output and gradients."""
    import low_rank

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()

    x, A, B = leaf(tokens, in_features, dtype=torch.bfloat16), leaf(8, in_features), leaf(out_features, 8)
    W = leaf(out_features, in_features, dtype=torch.bfloat16).detach()
    y = low_rank.low_rank_linear(x, W, None, A, B, 0.5, merged)
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


def norm_error(tokens: int, width: int) -> float:
    """The larger relative error of `rms_norm`'s output and of its gradient."""
    from policy import rms_norm

    weight, x = torch.randn(width, device=DEVICE).bfloat16(), torch.randn(tokens, width, device=DEVICE).bfloat16()
    y = rms_norm(SimpleNamespace(weight=weight, variance_epsilon=1e-6), x.requires_grad_())
    dy = torch.randn_like(y)
    y.backward(dy)
    wide = x.detach().double().requires_grad_()
    exact = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    (dx,) = torch.autograd.grad(exact, wide, dy.double())
    return max(relative(y.detach(), exact.detach()), relative(x.grad, dx))


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
    """Errors of `packed_attention` with grouped heads, against a masked softmax over all pairs in float64."""
    from runtime.packing import pack, packed_attention

    tokens = sum(lengths)
    packed = pack([[0] * length for length in lengths], [[] for _ in lengths], DEVICE)
    inputs = [
        torch.randn(1, count, tokens, width, device=DEVICE).bfloat16().requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    out, _ = packed_attention(None, *inputs, None, scaling=width**-0.5, packed=packed)
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


def checked_run(size: Size, work: Path, **settings):
    """A run of the small model whose logprobs are checked, its folder, and its prompts."""
    folder = model_folder(work, CHECKED, spread=0.05)  # large weights, or all logprobs would be alike
    prompts = [[2 + (7 * i + 3 * j * j) % 900 for j in range(length)] for i, length in enumerate(LENGTHS)]
    common = {"max_prompt_length": 320, "max_completion_length": 16, "gpu_memory_utilization": 0.2}
    return bare_run(check_config(size, **common, **settings), folder, prompts), folder, prompts


@torch.no_grad()
def plain_logprobs(folder: str, policy, texts: list[list[int]], adapted: bool = True) -> list[Tensor]:
    """Logprobs of each text's tokens after the first, by transformers' own float32 model with the adapter merged."""
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
    from runtime.conversation import Request
    from runtime.packing import pack

    written = run.engine.generate([Request(p, samples=4, temperature=1.0, seed=i) for i, p in enumerate(prompts)])
    texts = prompts + [prompts[completion.request] + completion.token_ids for completion in written]
    exact = plain_logprobs(folder, run.policy, texts)
    base = plain_logprobs(folder, run.policy, prompts, adapted=False)
    count = len(prompts)
    effect = mean_difference(exact[:count], base)
    packed = pack([text[:1] for text in prompts], [text[1:] for text in prompts], DEVICE)
    with torch.no_grad(), merged_forward(run.policy.model):
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
        rows.right(f"{what}, {when}", error / effect, 0.1, "of the update", note)


def mean_difference(found: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor]) -> float:
    """Mean |difference|, over the tokens of all texts."""
    return (torch.cat(list(found)) - torch.cat(expected)).abs().mean().item()


def sampler(rows: Rows, size: Size, work: Path) -> None:
    """After each sync vLLM has the trainer's weights, also after sleep at level 0, 1 or 2."""
    from benchmarks.weight_sync import random_adapter

    run, folder, prompts = checked_run(size, work, sync="merged", sleep_level=2 if ON_GPU else 0)
    if ON_GPU:
        mode = run.engine.llm.llm_engine.vllm_config.compilation_config.cudagraph_mode
        rows.holds("CUDA graphs", float(mode.name != "NONE"), "on", f"{mode.name}; tensor_parallel_size 1")
    else:
        rows.unable("CUDA graphs", "need a GPU")
        rows.unable("sleep levels 1 and 2", "vLLM on a CPU does not sleep")
    verified = run.weight_sync.update_weights(verify=True)
    rows.add("noise", verified["sync/noise"], "nats", "trainer and vLLM, both on the base")
    for number, level in enumerate((0, 1, 2, 1, 0) if ON_GPU else (0, 0), start=1):
        random_adapter(run.policy.model, number, 0.05)
        run.engine.sleep_level = level
        if level:
            torch.cuda.empty_cache()  # which is not vLLM's merit
            free = torch.cuda.mem_get_info()[0]
        run.engine.sleep()
        if level:
            freed = torch.cuda.mem_get_info()[0] - free
            rows.holds(f"freed, sync {number}, sleep level {level}", freed / 2**30, "GiB")
        run.weight_sync.update_weights()
        compare_logprobs(rows, f"sync {number}, sleep level {level}", run, folder, prompts)
    reused = run.engine.llm.generate([{"prompt_token_ids": prompts[0]}], use_tqdm=False)[0].num_cached_tokens
    rows.holds("prefix caching", reused, "tokens", f"of {len(prompts[0])} come from the cache")
    run.engine.sleep()
    rows.right(
        "probe: share of its effect that is missing",
        run.weight_sync.update_weights(verify=True)["sync/probe_error"],
        0.1,
    )


def adapter(rows: Rows, size: Size, work: Path) -> None:
    """The same with vLLM's own LoRA, which gets the adapter alone."""
    from benchmarks.weight_sync import random_adapter

    level = 1 if ON_GPU else 0
    run, folder, prompts = checked_run(size, work, sync="adapter", sleep_level=level)
    for number in (1, 2):
        random_adapter(run.policy.model, number, 0.05)
        run.engine.sleep()
        run.weight_sync.update_weights()
        compare_logprobs(rows, f"sync {number}, sleep level {level}", run, folder, prompts)
