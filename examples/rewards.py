"""Rewards of your own, for the sums in sums.csv, whose answers are to end in `#### N`:

torchrun --nproc-per-node=2 train_grpo.py --config configs/arithmetic_cpu.py --task own --data examples/sums.csv \
    --prompt_field question --answer_field label --reward examples/rewards.py:score examples/rewards.py:short=0.1
"""

import re


def score(completion, answer):
    """Correctness and form, one completion at a time. The part named `correct` becomes eval/accuracy."""
    found = re.search(r"#### (-?\d+)$", completion.strip())
    return {"correct": float(found is not None and found[1] == answer), "form": 0.2 * (found is not None)}


def short(prompts, completions, **columns):
    """From 0 for an empty completion to -1 for 100 characters or more, many at a time, as in TRL."""
    return [-min(1.0, len(completion) / 100) for completion in completions]
