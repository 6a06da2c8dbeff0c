"""The policy arrives in real vLLM: merged or as an adapter, whatever the ranks; and what does not arrive is noticed."""

import pytest
import torch
from conftest import on_ranks
from transformers import AutoModelForCausalLM

import fsdp_utils
import lora

TEXTS = [[7 * i % 150 + 5 for i in range(n)] for n in (40, 31, 31)]
RANK, ALPHA = 4, 8.0


def random_adapter(model, seed, fill, scale=0.1, name=lora.POLICY):
    """The same values for the same seed, wherever the model's tensors live."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in lora.lora_layers(model):
            adapter = layer.adapters[name]
            for parameter in (adapter.lora_A, adapter.lora_B):
                fill(parameter, torch.randn(parameter.shape, generator=generator) * scale)


def plain_logprobs(folder, seed, targets=("all-linear",)):
    """The reference: W + s·B A formed by hand in an ordinary float32 model, softmax over all logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if seed is not None:
        lora.inject(model, list(targets), RANK, ALPHA)
        random_adapter(model, seed, torch.Tensor.copy_)
        for _, layer in lora.lora_layers(model):
            adapter = layer.adapters[lora.POLICY]
            layer.weight.data += ALPHA / RANK * adapter.lora_B.data @ adapter.lora_A.data
            layer.active = None
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
        **({"dtype": "float32"} | overrides),
    )
    return bare_run(config, str(folder), TEXTS)


def planted_faults(a):
    """What verification says, if anything, to each way of the stream going wrong."""
    import rollout

    def skip(self, stream):
        list(stream)

    def one_stale(self, stream):  # the first layer's queries, keys and values are those of the sync before
        real(self, ((name, stale.get(name, tensor)) for name, tensor in stream))

    def shuffle(self, stream):  # two tensors of one shape under each other's names
        other = {"model.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.up_proj.weight"}
        other |= {value: key for key, value in other.items()}
        real(self, ((other.get(name, name), tensor) for name, tensor in stream))

    from stream import summon_layers

    real, verdicts = rollout.Engine.load_weights, {}
    stale = {n: t for n, t in summon_layers(a.policy.model, a.world.device) if "layers.0.self_attn" in n}
    random_adapter(a.policy.model, 3, fsdp_utils.fill)
    for fault in (skip, one_stale, shuffle):
        rollout.Engine.load_weights = fault
        try:
            verdicts[fault.__name__] = a.sync(verify=True)
        except RuntimeError as error:
            verdicts[fault.__name__] = str(error)
        finally:
            rollout.Engine.load_weights = real
    verdicts["none"] = a.sync(verify=True)
    return verdicts


def merged_syncs(folder, tensor_parallel_size, faults, overrides):
    a = a_run(folder, tensor_parallel_size, **overrides)
    before, found = [p.to_local().clone() for _, p in sorted(a.policy.named_parameters()) if not p.requires_grad], []
    a.sync(verify=True)
    found.append([a.engine.logprobs(text) for text in TEXTS])
    for seed in (1, 2):
        random_adapter(a.policy.model, seed, fsdp_utils.fill)
        metrics = a.sync(verify=True)
        found.append([a.engine.logprobs(text) for text in TEXTS])
    verdicts = planted_faults(a) if faults else {}
    after = [p.to_local() for _, p in sorted(a.policy.named_parameters()) if not p.requires_grad]
    return found, metrics, verdicts, all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize(
    "ranks, tp, faults, overrides",
    [
        (2, 1, True, dict(dtype="bfloat16")),
        (2, 2, False, dict(sleep_level=2, sync_prefetch=False, reshard_after_forward=False)),
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
            assert isinstance(verdicts.pop("none"), dict)
            assert all("does not run the trained weights" in verdict for verdict in verdicts.values())


def adapter_syncs(folder, tensor_parallel_size):
    """vLLM's own LoRA: three versions of the policy's adapter, one after the other, and then one that does not come."""
    from pathlib import Path

    import sync
    from rollout import Request

    a = a_run(folder, tensor_parallel_size, sync="adapter", sleep_level=1)
    found, before = [], set(Path("/dev/shm").glob("lorl-*"))
    a.sync(verify=True)
    found.append([a.engine.logprobs(text) for text in TEXTS])
    for seed in (1, 2):
        random_adapter(a.policy.model, seed, fsdp_utils.fill)
        metrics = a.sync(verify=True)
        found.append([a.engine.logprobs(text) for text in TEXTS])
    tokens = [completion.token_ids for completion in a.engine.generate([Request(TEXTS[0], 2, 1.0, seed=5)])]
    try:
        a.engine.generate([Request(TEXTS[0], 1, 1.0, seed=5, adapter="critic")])
    except ValueError as error:
        unknown = str(error)
    a.engine.load_adapter = lambda folder: None
    random_adapter(a.policy.model, 3, fsdp_utils.fill)
    with pytest.raises(RuntimeError, match="does not run the trained weights"):
        a.sync(verify=True)
    assert sync.send_adapter(a.policy, a.engine)["sync/bytes"] == metrics["sync/bytes"]
    torch.distributed.barrier()  # the rank that cleans up has done so
    return found, metrics, tokens, unknown, set(Path("/dev/shm").glob("lorl-*")) - before


def test_adapters_arrive_in_vllm(model_folder, tmp_path):
    folder = model_folder("qwen2", dtype=torch.float32, hidden_size=128)
    references = [plain_logprobs(folder, seed) for seed in (None, 1, 2)]
    results = on_ranks(2, adapter_syncs, folder, 2, folder=tmp_path)
    for found, metrics, tokens, unknown, left in results:
        for got, reference in zip(found, references):
            assert furthest(got, reference) < 1e-3
        assert metrics["sync/arrived"] == pytest.approx(1, abs=1e-3)
        assert tokens == results[0][2]
        assert unknown == "vLLM has no adapter 'critic'; there are: policy"
        assert not left
