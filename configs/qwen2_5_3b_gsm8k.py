"""The flagship: Qwen2.5-3B-Instruct on GSM8K, LoRA on every linear, on 1 to 8 GPUs of 80 GB.

Sizes are those of verl's published run of the same model and data (run_qwen2_5-3b_gsm8k_grpo_lora.sh), except where
a comment says otherwise. Not yet run here: no such GPU was at hand.
"""

from configs.base import Config

config = Config(
    run_name="qwen2_5_3b_gsm8k",
    task="gsm8k",
    model="Qwen/Qwen2.5-3B-Instruct",
    lora_rank=64,
    lora_alpha=64.0,  # alpha / rank = 1, and 1e-5 below instead of 3e-6: bf16 weights round smaller updates away
    learning_rate=1e-5,
    steps=105,  # 15 epochs: 7,473 problems / 1,024 a step
    prompts_per_step=1024,
    updates_per_rollout=4,  # of 256 problems each
    group_size=5,
    max_prompt_length=512,
    max_completion_length=1024,
    kl_coef=0.001,
    gpu_memory_utilization=0.6,
    tokens_per_microbatch=32768,  # with checkpointing, activations of one block at a time
    eval_problems=1319,  # all of GSM8K's test set
)
