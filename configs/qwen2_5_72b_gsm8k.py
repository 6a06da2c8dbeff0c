"""Qwen2.5-72B-Instruct on GSM8K, on one host with 8 GPUs of 80 GB.

The sizes are those of verl's published run, whose log ends at 96.0% greedy on GSM8K's test set (docs/peers.md has the
source, and how its task and loss differ): the accuracy to expect. Not yet run here: no such GPU was at hand.
With USE_SHM=1, the trainer and vLLM read 145 GB from the disk once instead of twice.
"""

from configs.base import Config

config = Config(
    output_dir="runs/qwen2_5_72b_gsm8k",
    task="gsm8k",  # asks for \boxed{}, the form in which Qwen2.5 was trained to answer mathematics
    model="Qwen/Qwen2.5-72B-Instruct",
    steps=116,  # one epoch: 7,473 problems / 64
    group_size=5,
    tensor_parallel_size=8,  # vLLM's 145 GB of weights are spread over all GPUs, as the trainer's are
    sleep_level=1,
    offload="all",  # shards, gradients and the optimizer's state are in host memory
    tokens_per_microbatch=8192,
    eval_problems=1319,  # all of GSM8K's test set
)
