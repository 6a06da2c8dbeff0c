"""REINFORCE++ on the default task: no groups at all, one completion per problem, against the whole step."""

import dataclasses

from configs.arithmetic_cpu import config as default

config = dataclasses.replace(
    default,
    run_name="arithmetic_reinforce_pp",
    steps=60,  # enough to see it learn
    algorithm="reinforce_pp",
    prompts_per_step=512,
    group_size=1,
    kl_coef=0.001,  # the paper keeps close to the reference by a k1 penalty in the reward
    kl_penalty="k1_reward",
)
