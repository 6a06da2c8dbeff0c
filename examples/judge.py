"""A reward from a judge: a model behind any server with OpenAI's API, such as `vllm serve Qwen/Qwen2.5-7B-Instruct`.

JUDGE_URL=http://localhost:8000/v1 JUDGE_MODEL=Qwen/Qwen2.5-7B-Instruct torchrun train_grpo.py ... \
    --reward examples/judge.py:judge
"""

import os
import re

import aiohttp  # comes with vLLM

QUESTION = "Question: {}\n\nAnswer: {}\n\nHow good is this answer? Reply with a number from 0 to 10, and nothing else."


async def judge(prompt, completion):
    """A number from 0 to 1. `async`: many completions are judged at the same time."""
    message = {"role": "user", "content": QUESTION.format(prompt, completion)}
    request = {"model": os.environ["JUDGE_MODEL"], "messages": [message], "temperature": 0}
    async with aiohttp.ClientSession(raise_for_status=True) as session:
        async with session.post(os.environ["JUDGE_URL"] + "/chat/completions", json=request) as response:
            reply = (await response.json())["choices"][0]["message"]["content"]
    found = re.search(r"\d+", reply)
    return min(int(found[0]), 10) / 10 if found else 0.0
