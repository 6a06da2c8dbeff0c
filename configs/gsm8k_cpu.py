"""A smoke run of the real data path on a CPU: GSM8K's problems, through a model far too small to solve them."""

from configs.base import Config

config = Config(
    output_dir="runs/gsm8k_cpu",
    task="gsm8k",
    model="tiny",
    steps=3,
    prompts_per_step=8,
    group_size=4,
    max_prompt_length=768,  # bytes here: the tiny model's tokens are bytes, and most questions fit
    max_completion_length=64,
    eval_problems=16,
    gradient_checkpointing="none",
)
