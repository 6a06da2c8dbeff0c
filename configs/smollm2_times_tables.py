"""`make real`: a real pretrained model, SmolLM2-135M-Instruct, learns its times tables on two CPU cores."""

from configs.base import Config

config = Config(
    output_dir="runs/smollm2_times_tables",
    task="times_tables",
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    steps=60,
    prompts_per_step=16,
    group_size=8,
    max_prompt_length=64,
    max_completion_length=24,  # an answer takes 3 tokens; it is free to think aloud, and learns not to
    learning_rate=2e-4,
    lora_rank=16,
    lora_alpha=32.0,
    eval_samples=4,
    tokens_per_microbatch=2048,  # activations of so many tokens are kept, see the next line
    gradient_checkpointing="none",
    save_every=10,
)
