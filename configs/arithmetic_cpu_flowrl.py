"""FlowRL on the default task: as likely as it is good, rather than only the best. See benchmarks/flowrl.py."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_flowrl",
    steps=60,  # enough to see it learn
    algorithm="flowrl",
    updates_per_rollout=2,  # its importance weights are for what has moved since the rollout
)
