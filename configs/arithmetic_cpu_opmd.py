"""Mirror descent (Kimi k1.5) on the default task: stays close to the sampling policy by a square, not a clip."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_opmd",
    steps=60,  # enough to see it learn
    algorithm="opmd",
    updates_per_rollout=4,  # the square acts from the second update on
)
