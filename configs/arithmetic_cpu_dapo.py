"""DAPO on the default task: its clip-higher, dynamic sampling and overlong shaping come with the algorithm."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_dapo",
    steps=60,  # enough to see it learn
    algorithm="dapo",
    group_size=4,  # small groups often agree, so there is something to leave out and sample again
    prompts_per_step=64,
    updates_per_rollout=2,  # the clipped ratio is there to be used
)
