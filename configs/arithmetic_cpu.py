"""The default of `make train`: two-digit sums on two CPU cores, in a few minutes."""

from configs.base import Config

config = Config(
    output_dir="runs/arithmetic",
    task="arithmetic",
    model="tiny",  # comes with the code: configs/tiny, made by tools/tiny_model.py
    steps=100,
    prompts_per_step=32,
    group_size=16,
    max_prompt_length=16,
    max_completion_length=24,  # a worked sum and its end are 13 tokens or fewer
    learning_rate=2e-3,  # large: the model is tiny
    lr_schedule="linear",  # the last steps, with little noise left, take accuracy over 90%
    lora_rank=16,
    lora_alpha=32.0,
    sync="merged",  # at this rate merging keeps over 0.9 of every update, and vLLM generates faster
    eval_samples=4,
    gradient_checkpointing="none",  # nothing here is large
)
