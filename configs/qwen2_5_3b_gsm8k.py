"""The flagship: Qwen2.5-3B-Instruct on GSM8K, LoRA on every linear, on 1 to 8 GPUs of 80 GB.

The sizes are those of verl's published run, whose log ends at 86.1% greedy on GSM8K's test set (docs/peers.md has the
source, and how its task and loss differ): the accuracy to expect. Not yet run here: no such GPU was at hand.
"""

from configs.base import Config

config = Config(
    output_dir="runs/qwen2_5_3b_gsm8k",
    task="gsm8k",  # asks for \boxed{}, the form in which Qwen2.5 was trained to answer mathematics
    model="Qwen/Qwen2.5-3B-Instruct",
    steps=116,  # one epoch: 7,473 problems / 64
    group_size=5,
    gpu_memory_utilization=0.6,
    tokens_per_microbatch=32768,  # with checkpointing, activations of one block at a time
    eval_problems=1319,  # all of GSM8K's test set
)
