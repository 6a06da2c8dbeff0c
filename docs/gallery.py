"""What mistakes look like in the metrics: docs/failures.png, and the numbers beside it. No GPU, no vLLM, a minute.

    python docs/gallery.py

The policy is a table of logits, 4 problems x 4 tokens x 8 possible tokens, and the right completion of each problem
is fixed; the reward is the share of right tokens. Advantages, weights, losses and metrics are those of train_grpo.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime.quiet  # noqa: E402, F401, I001  before torch
import torch  # noqa: E402

import low_rank  # noqa: E402
from runtime.batching import MicroBatch  # noqa: E402
from configs.base import Config  # noqa: E402
from configs.checks import resolve_config  # noqa: E402
from train_grpo import ALGORITHMS, policy_loss  # noqa: E402

PROBLEMS, LENGTH, VOCABULARY, GROUP = 4, 4, 8, 16
CONFIG = resolve_config(Config(), ALGORITHMS["grpo"])
OUT = Path(__file__).with_name("failures.png")


def train(steps: int = 120, stale: int = 0, shift: int = 0, reward_of=None, lr: float = 0.05) -> dict[str, list[float]]:
    """A run's metrics. stale: the sampler is never synced again after that step; shift: the mask is off by so much."""
    generator, algorithm = torch.Generator().manual_seed(0), ALGORITHMS["grpo"]
    table = torch.zeros(PROBLEMS, LENGTH, VOCABULARY, requires_grad=True)
    right = torch.randint(VOCABULARY, (PROBLEMS, LENGTH), generator=generator)
    optimizer = torch.optim.Adam([table], lr=lr)
    problems, places = torch.arange(PROBLEMS).repeat_interleave(GROUP), torch.arange(LENGTH)
    count = PROBLEMS * GROUP
    history: dict[str, list[float]] = {"reward/mean": [], "mismatch/kl": [], "grad_norm": [], "groups that differ": []}
    for step in range(steps):
        if not stale or step < stale:
            sampler = table.detach().log_softmax(-1)
        tokens = torch.multinomial(sampler[problems].exp().view(-1, VOCABULARY), 1, generator=generator)
        tokens = tokens.view(count, LENGTH)
        scores = (tokens == right[problems]).float().mean(1)
        rewards = (reward_of(scores) if reward_of else scores).view(PROBLEMS, GROUP)
        batch = MicroBatch(
            packed=None,
            completions=list(range(count)),
            sequences=torch.arange(count).repeat_interleave(LENGTH),
            advantages=algorithm.advantage(rewards).flatten().repeat_interleave(LENGTH),
            weights=algorithm.weight(torch.full((count,), float(LENGTH)), CONFIG).repeat_interleave(LENGTH),
            sampler_logprobs=sampler[problems[:, None], places, tokens].flatten(),
        )
        rows = table.log_softmax(-1)[problems[:, None], (places + shift) % LENGTH, tokens].flatten()
        loss, info = policy_loss(rows, torch.zeros_like(rows), batch, algorithm.loss, CONFIG)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history["reward/mean"].append(scores.mean().item())
        history["mismatch/kl"].append(info["mismatch/kl"].mean().item())
        history["grad_norm"].append(table.grad.norm().item())
        history["groups that differ"].append((rewards.std(1) > 0).float().mean().item())
    return history


def normaliser(splits: list[int]) -> tuple[list[float], list[float]]:
    """How far the gradient is from that of one batch, cut into so many: weights of the whole update, means of means."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (64,), generator=generator)
    of = torch.arange(64).repeat_interleave(lengths)
    advantages, features = torch.randn(64, generator=generator)[of], torch.randn(len(of), 32, generator=generator)
    whole = (features * advantages[:, None]).mean(0)  # of all tokens: the gradient of a linear loss
    errors: tuple[list[float], list[float]] = ([], [])
    for count in splits:
        parts = [(of >= first.min()) & (of <= first.max()) for first in torch.arange(64).chunk(count)]
        weighted = sum((features[p] * advantages[p, None]).sum(0) for p in parts) / len(of)
        means = sum((features[p] * advantages[p, None]).mean(0) for p in parts) / count
        for found, gradient in zip(errors, (weighted, means)):
            found.append(((gradient - whole).norm() / whole.norm()).item())
    return errors


def survival(sizes: list[float]) -> list[float]:
    """`sync/update_survival` of an update of each size, relative to a bfloat16 weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator).bfloat16()
    A, B = (torch.randn(shape, generator=generator) for shape in ((8, 512), (512, 8)))
    unit = weight.float().norm() / (B @ A).norm()
    found = []
    for size in sizes:
        realised = low_rank.merge(weight, A, B, (size * unit).item()).float() - weight.float()
        found.append(torch.nn.functional.cosine_similarity(realised.flatten(), (B @ A).flatten(), 0).item())
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    healthy = train()
    runs = {
        "healthy": healthy,
        "stale weights": train(stale=20),
        "shifted mask": train(shift=1),
        "all groups equal": train(reward_of=lambda scores: (scores == 1).float()),
    }
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axis, name in zip(axes.flat, ("reward/mean", "mismatch/kl", "grad_norm")):
        for colour, (run, history) in enumerate(runs.items()):
            axis.plot(history[name], color=f"C{colour}", label=run, alpha=0.9)
        axis.set_title(name)
        axis.set_xlabel("step")
    axes.flat[1].set_yscale("symlog", linthresh=1e-3)
    axes.flat[0].legend(fontsize=9)
    for colour, history in enumerate(runs.values()):
        axes.flat[3].plot(history["groups that differ"], color=f"C{colour}", alpha=0.9)
    axes.flat[3].set_title("groups whose rewards differ")
    axes.flat[3].set_xlabel("step")
    splits = [1, 2, 4, 8, 16, 32]
    for values, label in zip(normaliser(splits), ("weights of the whole update", "mean of micro-batch means")):
        axes.flat[4].plot(splits, values, "o-", label=label)
    axes.flat[4].set_xscale("log", base=2)
    axes.flat[4].set_title("error of the gradient")
    axes.flat[4].set_xlabel("micro-batches")
    axes.flat[4].legend(fontsize=9)
    sizes = [10 ** (-5 + i / 4) for i in range(15)]
    axes.flat[5].semilogx(sizes, survival(sizes), "o-")
    axes.flat[5].set_title("sync/update_survival")
    axes.flat[5].set_xlabel("size of the update / size of W")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(OUT, dpi=90)
    for run, history in runs.items():
        print(f"{run:<18}", ", ".join(f"{name} {sum(values[-20:]) / 20:.4f}" for name, values in history.items()))
    weighted, means = normaliser([8])
    print(f"gradient error at 8 micro-batches: {weighted[0]:.1e} weighted, {means[0]:.0%} mean of means")
    print("survival at 1e-4, 1e-3, 1e-2:", ", ".join(f"{value:.2f}" for value in survival([1e-4, 1e-3, 1e-2])))


if __name__ == "__main__":
    main()
