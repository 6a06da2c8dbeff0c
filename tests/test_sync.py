"""The policy arrives in real vLLM: merged or as an adapter, whatever the ranks; and what does not arrive is noticed."""

from pathlib import Path

import pytest
import torch
from conftest import on_ranks
from transformers import AutoModelForCausalLM

import lora
from benchmarks.arrival import adapter_faults, merged_faults, random_adapter, verdicts_on

TEXTS = [[7 * i % 150 + 5 for i in range(n)] for n in (40, 31, 31)]
RANK, ALPHA = 4, 8.0
SCALE = 0.1  # of the random adapters
LAYER = "model.layers.1"  # where faults are planted


def plain_logprobs(folder, seed, targets=("all-linear",)):
    """The reference: W + s·B A formed by hand in an ordinary float32 model, softmax over all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if seed is not None:
        lora.inject(model, list(targets), RANK, ALPHA)
        random_adapter(model, seed, SCALE)
        for _, layer in lora.lora_layers(model):
            adapter = layer.adapters[lora.POLICY]
            layer.weight.data += ALPHA / RANK * adapter.lora_B.data @ adapter.lora_A.data
            layer.active = ()
    return [
        model(torch.tensor([text])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        for text in TEXTS
    ]


def furthest(found, expected):
    return max((torch.tensor(a) - b).abs().max().item() for a, b in zip(found, expected))


def a_run(folder, tensor_parallel_size, **overrides):
    """A run without a task."""
    from benchmarks.gpu_shared import bare_run
    from configs.base import Config

    config = Config(
        lora_rank=RANK,
        lora_alpha=ALPHA,
        max_prompt_length=60,
        max_completion_length=4,
        tensor_parallel_size=tensor_parallel_size,
        **({"dtype": "float32", "sync": "merged"} | overrides),
    )
    return bare_run(config, str(folder), TEXTS)


# Where a fault is noticed: by reading vLLM's weights back, or only by what the probe does.
RUNS, HOLDS = "does not run the trained weights", "does not hold the weights that were sent"


def merged_syncs(folder, tensor_parallel_size, faults, overrides):
    a = a_run(folder, tensor_parallel_size, **overrides)
    before, found = [p.to_local().clone() for _, p in sorted(a.policy.named_parameters()) if not p.requires_grad], []
    a.weight_sync.update_weights(verify=True)
    found.append([a.engine.logprobs(text) for text in TEXTS])
    for seed in (1, 2):
        random_adapter(a.policy.model, seed, SCALE)
        metrics = a.weight_sync.update_weights(verify=True)
        found.append([a.engine.logprobs(text) for text in TEXTS])
    verdicts = verdicts_on(a, merged_faults(a, LAYER), SCALE) if faults else {}
    after = [p.to_local() for _, p in sorted(a.policy.named_parameters()) if not p.requires_grad]
    return found, metrics, verdicts, all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize(
    "ranks, tp, faults, overrides",
    [
        (2, 1, True, dict(dtype="bfloat16")),
        (2, 2, False, dict(sleep_level=2)),
        pytest.param(4, 2, False, dict(target_modules=["q_proj", "down_proj"], fsdp_size=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_stream_arrives_in_vllm(ranks, tp, faults, overrides, model_folder, tmp_path):
    folder = model_folder("qwen2", dtype=torch.float32, hidden_size=128)
    references = [
        plain_logprobs(folder, seed, overrides.get("target_modules", ["all-linear"])) for seed in (None, 1, 2)
    ]
    assert furthest([r.tolist() for r in references[0]], references[1]) > 0.1  # the adapters do matter
    for found, _, verdicts, unchanged in on_ranks(ranks, merged_syncs, folder, tp, faults, overrides, folder=tmp_path):
        for got, reference in zip(found, references):
            assert furthest(got, reference) < (0.3 if overrides.get("dtype") else 1e-3)
        assert unchanged
        if faults:
            assert verdicts.pop("none")["sync/read_back_frac"] == 1
            seen_by_probe = ("adapters ignored", "a layer ignored", "wrong scale")
            for fault, verdict in verdicts.items():
                assert (RUNS if fault in seen_by_probe else HOLDS) in verdict, (fault, verdict)


def adapter_syncs(folder, tensor_parallel_size):
    """vLLM's own LoRA: three versions of the policy's adapter, one after the other, and then faulty ones."""
    from runtime.conversation import Request

    a = a_run(folder, tensor_parallel_size, sync="adapter", sleep_level=1)
    found, before = [], set(Path("/dev/shm").glob("lorl-*"))
    a.weight_sync.update_weights(verify=True)
    found.append([a.engine.logprobs(text) for text in TEXTS])
    for seed in (1, 2):
        random_adapter(a.policy.model, seed, SCALE)
        metrics = a.weight_sync.update_weights(verify=True)
        found.append([a.engine.logprobs(text) for text in TEXTS])
    tokens = [completion.token_ids for completion in a.engine.generate([Request(TEXTS[0], 2, 1.0, seed=5)])]
    try:
        a.engine.generate([Request(TEXTS[0], 1, 1.0, seed=5, adapter="critic")])
    except ValueError as error:
        unknown = str(error)
    verdicts = verdicts_on(a, adapter_faults(a, LAYER), SCALE)
    torch.distributed.barrier()  # the rank that cleans up has done so
    return found, metrics, verdicts, tokens, unknown, set(Path("/dev/shm").glob("lorl-*")) - before


def test_adapters_arrive_in_vllm(model_folder, tmp_path):
    folder = model_folder("qwen2", dtype=torch.float32, hidden_size=128)
    references = [plain_logprobs(folder, seed) for seed in (None, 1, 2)]
    results = on_ranks(2, adapter_syncs, folder, 2, folder=tmp_path)
    for found, metrics, verdicts, tokens, unknown, left in results:
        for got, reference in zip(found, references):
            assert furthest(got, reference) < 1e-3
        assert metrics["sync/probe_error"] < 0.01 and verdicts.pop("none")["sync/read_back_frac"] == 1
        for fault, verdict in verdicts.items():
            assert (RUNS if fault == "adapters ignored" else HOLDS) in verdict, (fault, verdict)
        assert tokens == results[0][3]
        assert unknown == "vLLM has no adapter 'critic'; there are: policy"
        assert not left
