"""CISPO on the default task: the ratio is a weight, capped at 5, and no token loses its gradient."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_cispo",
    steps=60,  # enough to see it learn
    algorithm="cispo",
    updates_per_rollout=4,  # the cap is for what has moved far from the sampler
    epochs_per_rollout=2,
)
