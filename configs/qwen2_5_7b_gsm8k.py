"""Qwen2.5-7B-Instruct on GSM8K, on 8 GPUs of 80 GB.

The sizes are those of verl's published run, whose log ends at 93.4% greedy on GSM8K's test set (docs/peers.md has the
source, and how its task and loss differ): the accuracy to expect. Not yet run here: no such GPU was at hand.
"""

from configs.base import Config

config = Config(
    output_dir="runs/qwen2_5_7b_gsm8k",
    task="gsm8k",  # asks for \boxed{}, the form in which Qwen2.5 was trained to answer mathematics
    model="Qwen/Qwen2.5-7B-Instruct",
    steps=116,  # one epoch: 7,473 problems / 64
    group_size=5,
    tensor_parallel_size=1,  # 15 GB of weights fit beside the training: eight engines, nothing to wait for
    gpu_memory_utilization=0.6,
    sleep_level=1,  # the update gets the KV cache's memory
    eval_problems=1319,  # all of GSM8K's test set
)
