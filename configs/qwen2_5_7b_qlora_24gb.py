"""Qwen2.5-7B-Instruct on GSM8K with a four-bit base, on one GPU of 24 GB."""

from configs.base import Config

config = Config(
    output_dir="runs/qwen2_5_7b_qlora_24gb",
    task="gsm8k",  # asks for \boxed{}, the form in which Qwen2.5 was trained to answer mathematics
    model="Qwen/Qwen2.5-7B-Instruct",
    dtype="nf4",  # QLoRA: 15 GB of linears become 4; vLLM runs what the four bits stand for, in bf16
    sync="straight_through",  # an NF4 base needs merging, which rounds: train the very weights that vLLM gets
    lora_rank=16,
    lora_alpha=16.0,
    steps=500,
    prompts_per_step=16,
    max_prompt_length=384,
    max_completion_length=640,
    gpu_memory_utilization=0.8,
    sleep_level=1,  # vLLM's 15 GB move to the host while the update needs the GPU
    offload="all",  # the four-bit base is in host memory while vLLM generates
    tokens_per_microbatch=16384,  # each fetches and dequantises all weights: few, and large
)
