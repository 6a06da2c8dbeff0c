"""Which number belongs to which token: one completion of a real step, as the table of docs/learn.md.

python docs/alignment.py [--config configs/arithmetic_cpu.py ...]
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runtime.quiet  # noqa: E402, F401, I001  before torch
import torch  # noqa: E402

from runtime.batching import make_updates  # noqa: E402
from runtime.evaluation import compute_rewards, total_rewards  # noqa: E402
from runtime.run import Run, rollout_requests  # noqa: E402
from train_grpo import ALGORITHMS, setup_grpo  # noqa: E402

COLUMNS = ("position", "token", "id", "predicts", "target id", "row", "sampler", "trainer", "advantage", "weight")


@torch.no_grad()
def align(run: Run) -> tuple[list[int], list[dict[str, Any]]]:
    """Takes a step's data to its update, without the update; the tokens of one completion's prompt, and the table."""
    config, algorithm = run.config, ALGORITHMS[run.config.algorithm]
    prompts = run.next_prompts(config.prompts_per_step)
    completions = run.engine.generate(rollout_requests(prompts, config, step=1))
    rewards = total_rewards(compute_rewards(prompts, completions, run.scorer, run.tokenizer, run.world))
    advantages = algorithm.advantage(rewards.view(-1, config.group_size)).flatten()
    (batches,) = make_updates(completions, advantages, algorithm.weight, config, run.world, drop_useless=True)
    batch = max(batches, key=lambda batch: batch.weights.sum())
    logprobs = run.policy(batch.packed, config.temperature).logprobs
    which = int(advantages[batch.completions].argmax())  # of the batch; one that is to become likelier
    prompt = completions[batch.completions[which]].prompt_ids
    start, ids = sum(batch.packed.lengths[:which]), batch.packed.input_ids.tolist()
    table = []
    for position in range(start, start + batch.packed.lengths[which]):
        cells: dict[str, Any] = {"position": position - start, "id": ids[position]}
        cells["token"] = run.tokenizer.convert_ids_to_tokens(ids[position])
        for row in (batch.packed.rows == position).nonzero().flatten().tolist():  # none, or the one that predicts next
            target = batch.packed.targets[row].item()
            cells |= {
                "predicts": run.tokenizer.convert_ids_to_tokens(target),
                "target id": target,
                "row": row,
                "sampler": batch.sampler_logprobs[row].item(),
                "trainer": logprobs[row].item(),
                "advantage": batch.advantages[row].item(),
                "weight": batch.weights[row].item(),
            }
        table.append(cells)
    return prompt, table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, empty where a token predicts nothing that was sampled."""

    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else f"`{value}`" if isinstance(value, str) else str(value)

    rows = [[show(cells[name]) if name in cells else "" for name in COLUMNS] for cells in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.argv += ["--config", "configs/arithmetic_cpu.py", "--output_dir", "runs/alignment"]
    print(markdown(align(setup_grpo())[1]))
