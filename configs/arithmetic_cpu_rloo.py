"""RLOO on the default task: each completion against the mean of the others; long completions count more."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_rloo",
    steps=60,  # enough to see it learn
    algorithm="rloo",
    group_size=4,  # the paper has 2 and 4
    prompts_per_step=128,
)
