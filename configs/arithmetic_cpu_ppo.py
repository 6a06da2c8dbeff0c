"""PPO on the default task: a critic instead of groups."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    output_dir="runs/arithmetic_ppo",
    steps=60,  # enough to see it learn
    algorithm="ppo",
    prompts_per_step=512,  # as many completions per step, each of another problem
    group_size=1,
    critic_learning_rate=1e-3,
    warmup_steps=2,  # the critic learns first
    updates_per_rollout=2,  # the clipped ratio is there to be used
)
