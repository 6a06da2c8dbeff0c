"""A tool: the tiny model cannot multiply, and learns to ask a calculator.

    torchrun --nproc-per-node=2 train_grpo.py --config examples/calculator_tool.py

`47*85/10=` asks for the last whole digit of that number, 9. A turn of the model that ends without `####` calls the
calculator, which replies with the digit. The model's answer is what it writes after `####`.
"""

import reward
from configs.base import Config


def problems(split: str) -> list[reward.Problem]:
    return [reward.Problem(f"{a}*{b}/10=", digit(a, b)) for a, b in reward.arithmetic_pairs(split)]


def digit(a: int, b: int) -> str:
    return str(a * b // 10 % 10)


def calculator(problem: reward.Problem, messages: list[reward.Message]) -> str | None:
    """The digit, for the first turn if it is a call; None ends the conversation. messages: the prompt and the turn."""
    is_call = len(messages) == 2 and "####" not in messages[-1]["content"]
    return digit(*map(int, problem.prompt.removesuffix("/10=").split("*"))) if is_call else None


reward.TASKS["calculator"] = reward.Task(problems, reward.exact_match, reply=calculator)

config = Config(
    output_dir="runs/calculator",
    task="calculator",
    model="tiny",
    steps=60,
    prompts_per_step=32,
    group_size=16,
    max_prompt_length=16,
    max_completion_length=40,  # of all turns and replies together
    learning_rate=1e-3,
    dtype="float32",  # the tiny model has never seen a product, and is so unsure that bfloat16's rounding would show
    lora_rank=16,
    sync="merged",
    eval_samples=4,
    gradient_checkpointing="none",
)
