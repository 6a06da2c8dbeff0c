"""The flagship: Qwen2.5-3B-Instruct on GSM8K, LoRA on every linear, on 1 to 8 GPUs of 80 GB.

Sizes are those of verl's script for the same model and data, run_qwen2_5-3b_gsm8k_grpo_lora.sh, as added in May 2025
(verl 16f6c1ee), except where a comment says otherwise. verl removed it in April 2026 (3467d90a) in favour of
examples/tuning/lora/run_qwen3_8b_fsdp.sh; docs/peers.md has what verl has published for this model. Not yet run here:
no such GPU was at hand.
"""

from configs.base import Config

config = Config(
    run_name="qwen2_5_3b_gsm8k",
    task="gsm8k",  # asks for \boxed{}, the form in which Qwen2.5 was trained to answer mathematics
    model="Qwen/Qwen2.5-3B-Instruct",
    lora_rank=64,
    lora_alpha=64.0,  # alpha / rank = 1, and a learning rate of 1e-5 for 3e-6: LoRA takes some ten times the full rate
    steps=105,  # of 1,024 problems each, 14 times all; verl's 15 epochs leave out the rest of each
    prompts_per_step=1024,
    updates_per_rollout=4,  # of 256 problems each
    group_size=5,
    kl_coef=0.001,
    gpu_memory_utilization=0.6,
    tokens_per_microbatch=32768,  # with checkpointing, activations of one block at a time
    eval_problems=1319,  # all of GSM8K's test set
)
