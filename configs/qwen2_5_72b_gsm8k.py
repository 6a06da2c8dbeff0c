"""Qwen2.5-72B-Instruct on GSM8K, on one host with 8 GPUs of 80 GB; the sizes of verl's published 72B LoRA run."""

from configs.base import Config

config = Config(
    run_name="qwen2_5_72b_gsm8k",
    task="gsm8k",
    model="Qwen/Qwen2.5-72B-Instruct",
    lora_rank=32,
    lora_alpha=32.0,
    learning_rate=3e-5,
    steps=116,
    prompts_per_step=64,
    group_size=5,
    max_prompt_length=512,
    max_completion_length=1024,  # with the prompt, sequences of 1,536
    tensor_parallel_size=8,  # vLLM's 145 GB of weights are spread over all GPUs, as the trainer's are
    max_num_seqs=64,
    gpu_memory_utilization=0.4,
    sleep_level=1,
    sync_prefetch=False,  # one whole linear at a time: up to 0.5 GB
    param_offload=True,
    optimizer_offload=True,
    use_shm=True,  # 145 GB that the trainer and vLLM both read: from the disk once
    tokens_per_microbatch=8192,
    eval_problems=1319,
)
