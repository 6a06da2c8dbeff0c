"""The engine generates the same tokens for the same requests, whatever else is in the batch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import on_ranks
from transformers import PretrainedConfig

import fsdp_utils
import rollout
from rollout import Engine
from runtime.conversation import Request
from runtime.vllm_on_cpu import add_lora_linear
from sync import HeldLinear


def generations(folder, requests):
    """All completions at once, and then each request's alone; and how many tokens of a prompt its two samples share."""
    fsdp_utils.init_world()
    engine, shared = Engine(str(folder), dtype="float32", max_model_len=256, max_completion_length=4), []
    step = engine.llm.llm_engine.step

    def noting_step():
        outputs = step()
        shared.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    engine.llm.llm_engine.step = noting_step
    return engine.generate(requests), [engine.generate([request]) for request in requests], shared[: 2 * len(requests)]


def test_requests_that_exceed_one_pass_are_answered_as_if_alone(model_folder, tmp_path):
    """40 prompts of 250 tokens are more than vLLM reads at once (4,096): it must not cut one in two, because a
    seeded request's generator can only be set back half-way on a GPU. In float32: how a processor rounds may depend
    on how many are computed at once, and in bfloat16 that may decide about a token.
    """
    requests = [
        Request(prompt_ids=[2 + (7 * i + j) % 150 for j in range(250)], samples=2, temperature=1.0, seed=10 * i)
        for i in range(40)
    ]
    ((together, alone, shared),) = on_ranks(
        1, generations, model_folder("qwen2", hidden_size=128), requests, folder=tmp_path
    )
    assert [completion.request for completion in together] == [i for i in range(40) for _ in range(2)]
    assert [c.token_ids for c in together] == [c.token_ids for answers in alone for c in answers]
    assert sorted(shared) == [0] * 40 + [250 // 32 * 32] * 40, (
        "the second sample reads again what the first one has read"
    )


def test_vllm_gets_the_weights_that_the_trainer_reads_and_its_refusals_are_one_line(tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_text(name)
    seen = []

    def refusing(folder: str, error: Exception) -> None:
        seen.append({path.name: path.read_text() for path in Path(folder).iterdir()})
        raise error

    monkeypatch.setattr(rollout.vllm, "LLM", refusing)
    long = (
        "Model architectures ['MineForCausalLM'] are not supported for now. " + "Supported architectures: ...\n" * 1000
    )
    with pytest.raises(AttributeError) as missing:
        print(PretrainedConfig().block_dim)
    refusals = {"MineForCausalLM": ValueError(long), "config.json lacks 'block_dim'": missing.value}
    for words, error in refusals.items():
        with pytest.raises(ValueError) as raised:
            rollout.start_vllm(str(tmp_path), error=error)
        line = str(raised.value)
        assert words in line and str(tmp_path) in line and len(line) < 250 and "\n" not in line
    assert seen == [{name: name for name in ("config.json", "model.safetensors")}] * 2


def test_adapters_on_a_cpu_are_what_a_loop_over_tokens_makes_of_them():
    """Two adapters and none in one batch, for a linear of two fused ones; against float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 6, generator=generator), torch.randn(7, 9, generator=generator)
    stacks = [
        [torch.randn(3, 1, *shape, generator=generator) for shape in shapes]
        for shapes in (((2, 6), (2, 6)), ((4, 2), (5, 2)))
    ]
    for slots in ([2, 0, -1, 2, 2, 0, -1], [1] * 7, [-1] * 7):
        expected = y.double()
        for token, slot in enumerate(slots):
            parts = [B[slot, 0].double() @ (A[slot, 0].double() @ x[token].double()) for A, B in zip(*stacks)]
            expected[token] += 0.5 * torch.cat(parts) * (slot >= 0)
        found = y.clone()
        add_lora_linear(SimpleNamespace(token_lora_indices=torch.tensor(slots)), found, x, *stacks, 0.5, (4, 5))
        assert torch.allclose(found.double(), expected, rtol=0, atol=100 * torch.finfo(torch.float32).eps)


def vllm_linear(weight, rows, sizes, columns, rank, **more):
    """A rank's share of a linear as vLLM keeps it: of fused linears, some rows of each; or some columns."""
    linear = torch.nn.Module()
    linear.weight = torch.nn.Parameter(weight[rows][:, columns])
    linear.output_partition_sizes, linear.output_size = sizes, more.pop("output_size", len(weight))
    linear.input_size, linear.input_size_per_partition = weight.shape[1], len(columns)
    linear.tp_rank = rank
    linear.quant_method = SimpleNamespace(apply=lambda layer, x, bias: x @ layer.weight.T)
    vars(linear).update(more)
    return linear


def test_a_ranks_share_of_a_weight_is_read_in_its_place():
    """Of 4 ranks: queries by heads, keys by heads that two ranks share, both as one matrix of a checkpoint that fuses
    them, and a linear that is split by columns.
    """
    q, k, everything = torch.randn(8, 6), torch.randn(4, 6), range(6)
    for rank in range(4):
        rows = [*range(2 * rank, 2 * rank + 2), *range(8 + rank // 2 * 2, 10 + rank // 2 * 2)]
        more = {"output_size": 16, "num_kv_head_replicas": 2, "tp_size": 4}
        fused = vllm_linear(torch.cat([q, k]), rows, [2, 2], everything, rank, **more)
        for parts, whole in ((range(1), q), (range(1, 2), k), (range(2), torch.cat([q, k]))):
            held = HeldLinear(fused, parts).weight([5, 0, 3])
            assert held.places == [0, 1, 2] and torch.equal(held.values, whole[held.rows][:, [5, 0, 3]])
    for rank in range(3):
        split = vllm_linear(q, range(8), [8], range(2 * rank, 2 * rank + 2), rank)
        held = HeldLinear(split, range(1)).weight([3, 5, 2])
        assert held.places == [[], [0, 2], [1]][rank]
        assert torch.equal(held.values, q[:, [[3, 5, 2][place] for place in held.places]])
