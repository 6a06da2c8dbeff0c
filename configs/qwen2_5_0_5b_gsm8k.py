"""Qwen2.5-0.5B-Instruct on GSM8K, LoRA on every linear, on one GPU of 24 GB.

The sizes are those of verl's published run, whose log ends at 54.3% greedy on GSM8K's test set (docs/peers.md has the
source, and how its task and loss differ): the accuracy to expect. Not yet run here: no such GPU was at hand.
"""

from configs.base import Config

config = Config(
    output_dir="runs/qwen2_5_0_5b_gsm8k",
    task="gsm8k",  # asks for \boxed{}, the form in which Qwen2.5 was trained to answer mathematics
    model="Qwen/Qwen2.5-0.5B-Instruct",
    steps=116,  # one epoch: 7,473 problems / 64
    group_size=5,
    eval_problems=1319,  # all of GSM8K's test set
)
