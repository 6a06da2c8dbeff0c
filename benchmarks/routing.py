"""Do sampler and trainer choose the same experts, and what does it cost where they do not?

    python benchmarks/routing.py

A random mixture of experts scores texts in vLLM and in the trainer, with the same weights. Printed per dtype: the share
of a token's choices in a layer whose sets of experts differ, and the logprob mismatch, with the trainer's own routing
and with vLLM's replayed (R3, arXiv 2510.11370). vLLM's routers tell what they chose; only on a CPU is each called for
every token, so only there does this run.
"""

import argparse
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import quiet  # noqa: F401, E402, I001  before torch

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu_shared import bare_run
from configs.base import Config
from runtime.packing import pack

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny"
SIZES = dict(vocab_size=160, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
SIZES |= dict(num_hidden_layers=8, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=64)


def make_model(folder, dtype):
    """A random Qwen3-MoE of `SIZES`, whose router's probabilities differ as much as a trained one's."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES, tie_word_embeddings=False, norm_topk_prob=True, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1 if name.endswith("mlp.gate.weight") else 0.05)
    model.to(dtype).save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)


def sampler_scores(engine, texts):
    """(T,) logprobs of the texts' tokens by vLLM, and the experts that it chose: (T + texts, layers, k)."""
    from vllm.model_executor.layers.fused_moe import MoERunner

    (model,) = engine.llm.apply_model(lambda model: model)
    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    chosen, logprobs = [[] for _ in runners], []
    for runner, calls in zip(runners, chosen):
        runner.router.set_capture_fn(lambda ids, calls=calls: calls.append(ids.long().clone()))
    for text in texts:
        engine.reset_prefix_cache()
        count = len(chosen[0])
        logprobs += engine.logprobs(text)
        for calls in chosen:
            calls[count:] = [torch.cat(calls[count:])[: len(text)]]  # without the token that it then samples
    for runner in runners:
        runner.router.set_capture_fn(None)
    return torch.tensor(logprobs), torch.stack([torch.cat(calls) for calls in chosen], dim=1)


@contextmanager
def routers(policy, replayed=None):
    """Records the trainer's choices, (T, k) of each layer; with `replayed` (T, layers, k), replaces them first."""
    recorded, hooks = [], []

    def hook(layer, router, _, output):
        logits, weights, chosen = output
        if replayed is not None:
            chosen = replayed[:, layer]
            weights = logits.softmax(-1, dtype=torch.float32).gather(1, chosen)
            weights = (weights / weights.sum(-1, keepdim=True)).to(logits.dtype)
        recorded.append(chosen)
        return logits, weights, chosen

    for layer, block in enumerate(policy.model.model.layers):
        hooks.append(block.mlp.gate.register_forward_hook(lambda *call, layer=layer: hook(layer, *call)))
    yield recorded
    for handle in hooks:
        handle.remove()


@torch.no_grad()
def measure(dtype, folder, length, count):
    """Per dtype: the share of choices that differ, and (mean |Δ logprob|, KL) by own and by replayed routing."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(3, 160, (count, length), generator=generator).tolist()
    config = Config(dtype=dtype, lora_rank=4, sync="merged", max_prompt_length=length, max_completion_length=8)
    run = bare_run(config, str(folder), texts)
    sampled, theirs = sampler_scores(run.engine, texts)
    packed, found = pack([text[:1] for text in texts], [text[1:] for text in texts], run.world.device), []
    for replayed in (None, theirs):
        with routers(run.policy, replayed) as recorded:
            difference = (run.policy(packed).logprobs - sampled).double()  # log trainer / sampler
        ours = torch.stack(recorded, dim=1)
        differ = (ours.sort(-1).values != theirs.sort(-1).values).any(-1).double().mean().item()
        found.append((differ, difference.abs().mean().item(), (difference.exp() - 1 - difference).mean().item()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--texts", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, getattr(torch, given.dtype))
        for routing, row in zip(("own", "replayed"), measure(given.dtype, folder, given.length, given.texts)):
            print(f"{given.dtype} {routing:9}choices differ {row[0]:.2%}  |Δ logprob| {row[1]:.5f}  KL {row[2]:.2e}")
