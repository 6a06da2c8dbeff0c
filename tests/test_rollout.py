"""The engine generates the same tokens for the same requests, whatever else is in the batch."""

from conftest import on_ranks

import fsdp_utils
from rollout import Engine, Request


def generations(folder, requests):
    """All completions at once, and then each request's alone."""
    fsdp_utils.init_world()
    engine = Engine(str(folder), dtype="float32", max_model_len=256, max_completion_length=4)
    return engine.generate(requests), [engine.generate([request]) for request in requests]


def test_requests_that_exceed_one_pass_are_answered_as_if_alone(model_folder, tmp_path):
    """40 prompts of 250 tokens are more than vLLM reads at once (4,096): it must not cut one in two, because a
    seeded request's generator can only be set back half-way on a GPU. In float32: how a processor rounds may depend
    on how many are computed at once, and in bfloat16 that may decide about a token.
    """
    requests = [
        Request(prompt_ids=[2 + (7 * i + j) % 150 for j in range(250)], samples=2, temperature=1.0, seed=10 * i)
        for i in range(40)
    ]
    ((together, alone),) = on_ranks(1, generations, model_folder("qwen2", hidden_size=128), requests, folder=tmp_path)
    assert [completion.request for completion in together] == [i for i in range(40) for _ in range(2)]
    assert [c.token_ids for c in together] == [c.token_ids for answers in alone for c in answers]
