"""Several right answers: how many of them does an algorithm keep? GRPO against FlowRL on eight answers, four right.

    python benchmarks/flowrl.py --out runs/flowrl

The policy is a table of eight logits, the losses are those of train_grpo.py; no language model. The verifier misses
one right answer in ten, as real ones do, so that there is always something to prefer. Prints the share of each right
answer at the end, and writes OUT.png: their shares over time.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.base import Config
from configs.checks import resolve_config
from runtime.batching import MicroBatch
from train_grpo import ALGORITHMS, policy_loss

ANSWERS, RIGHT, GROUP = 8, 4, 16
MISSED = 0.1  # how often the verifier takes a right answer for a wrong one


def train(name: str, seed: int = 0, steps: int = 1000) -> torch.Tensor:
    """(steps, ANSWERS) probabilities of the answers, the right ones first; all are as likely at the start."""
    generator = torch.Generator().manual_seed(seed)
    algorithm = ALGORITHMS[name]
    config = resolve_config(Config(algorithm=name, tis_mode="off"), algorithm)
    table, log_z = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in (ANSWERS, 1))
    optimizer = torch.optim.Adam([table, log_z], lr=0.05)
    shares = []
    for _ in range(steps):
        answers = torch.multinomial(table.softmax(0).detach(), GROUP, replacement=True, generator=generator)
        seen = torch.rand(GROUP, generator=generator) >= MISSED
        rewards = ((answers < RIGHT) & seen).double()
        old = table.log_softmax(0)[answers].detach()
        batch = MicroBatch(
            packed=None,
            completions=list(range(GROUP)),
            sequences=torch.arange(GROUP),  # an answer is one token
            advantages=algorithm.advantage(rewards[None])[0],
            weights=algorithm.weight(torch.ones(GROUP, dtype=torch.float64), config),
            sampler_logprobs=old,
            old_logprobs=old,
            ref_logprobs=torch.full_like(old, -math.log(ANSWERS)),
            prompt_values=log_z.expand(GROUP),
        )
        optimizer.zero_grad()
        loss, _ = policy_loss(table.log_softmax(0)[answers], torch.zeros_like(old), batch, algorithm.loss, config)
        loss.backward()
        optimizer.step()
        shares.append(table.softmax(0).detach())
    return torch.stack(shares)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/flowrl")
    arguments = parser.parse_args()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, name in zip(axes, ("grpo", "flowrl")):
        shares = train(name)
        print(
            name, [round(share, 3) for share in shares[-1, :RIGHT].tolist()], f"right: {shares[-1, :RIGHT].sum():.3f}"
        )
        axis.stackplot(range(len(shares)), *shares[:, :RIGHT].T.tolist())
        axis.set(title=name, xlabel="update", xlim=(0, len(shares) - 1), ylim=(0, 1))
    axes[0].set_ylabel("share of each right answer")
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{arguments.out}.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
