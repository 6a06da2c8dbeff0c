"""The engine generates the same tokens for the same requests, whatever else is in the batch and was there before."""

from pathlib import Path

from conftest import on_ranks

import fsdp_utils
from rollout import Engine, Request


def generations(folder, requests):
    """All completions at once, and then each request's alone."""
    world = fsdp_utils.init_world()
    sizes = {"tensor_parallel_size": world.size, "max_model_len": 256, "max_completion_length": 4}
    engine = Engine(str(folder), dtype="bfloat16", **sizes)
    return engine.generate(requests), [engine.generate([request]) for request in requests]


def test_requests_that_exceed_one_pass_are_answered_as_if_alone(model_folder, tmp_path):
    """40 prompts of 250 tokens are more than vLLM reads at once (4,096): it must not cut one in two, because a
    seeded request's generator can only be set back half-way on a GPU."""
    requests = [
        Request(prompt_ids=[2 + (7 * i + j) % 150 for j in range(250)], samples=2, temperature=1.0, seed=10 * i)
        for i in range(40)
    ]
    ((together, alone),) = on_ranks(1, generations, model_folder("qwen2", hidden_size=128), requests, folder=tmp_path)
    assert [completion.request for completion in together] == [i for i in range(40) for _ in range(2)]
    assert [c.token_ids for c in together] == [c.token_ids for answers in alone for c in answers]


def test_an_engine_that_was_killed_is_not_in_the_way(model_folder, tmp_path):
    """Its ranks' shared memory stays behind, under the name that vLLM gives every such engine."""
    for rank in range(2):
        Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}").write_bytes(bytes(64))
    requests = [Request([5, 6, 7], samples=2, temperature=1.0, seed=1)]
    results = on_ranks(2, generations, model_folder("qwen2", hidden_size=128), requests, folder=tmp_path)
    assert all(together == alone[0] == results[0][0] for together, alone in results)
    assert not list(Path("/dev/shm").glob("*cpushm*"))
