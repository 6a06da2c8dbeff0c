"""GSPO on the default task: one ratio per completion, clipped within 4e-4; TIS is per completion, too."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_gspo",
    steps=60,  # enough to see it learn
    algorithm="gspo",
    updates_per_rollout=4,  # as the paper: with one there would be nothing to clip
)
