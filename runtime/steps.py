"""The frame of any algorithm's steps: the first evaluation, the end of a step, checkpoints, the end of a run."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora
from fsdp_utils import on_first_rank
from runtime import checkpoint
from runtime.adapter_files import adapter_folder, save_adapter
from runtime.checkpoint import Progress
from runtime.evaluation import evaluate
from runtime.files import write_model
from runtime.run import Run, is_due
from runtime.tracking import format_held_out


def begin_training(run: Run) -> None:
    """Evaluates before the first step, unless the run is resumed."""
    if not run.saved:
        metrics = evaluate(run, step=0)
        run.stop.check()
        run.log.record({"step": 0, **metrics})
        run.log.print("before training: held-out " + format_held_out(metrics))
    run.complete_step(run.progress.step)
    run.engine.metrics()  # discards the waiting times before the first step
    if run.progress.step >= run.config.steps:
        run.log.print(f"all {run.config.steps} steps are done; to go on, add --steps to the command")


def finish_step(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Logs the step; saves a checkpoint if one is due. Raises RuntimeError if the run is unhealthy, or Stopped."""
    config, last = run.config, step == run.config.steps
    metrics |= run.engine.metrics()
    run.log.step(step, metrics)
    run.health.check(metrics, run.progress)
    reason = run.health.reason_to_stop(step, metrics, run.samples, run.progress)
    run.complete_step(step)
    run.log.phase("save")  # its time counts in the next step
    asked = run.stop.take_save()
    if last or reason or asked or is_due(config.save_every, step):
        save_checkpoint(run, metrics.get("eval/accuracy", metrics.get("eval/reward")))
    if reason:
        raise RuntimeError(f"{reason}; the last step that was saved is {run.saved_step}")
    if not last:
        run.stop.check()


def finish_training(run: Run) -> None:
    """Closes the log, and prints where everything is. Raises OSError if the last step could not be saved."""
    run.engine.close()
    run.log.close()
    folder, kind = run.log.folder, "adapter" if run.config.lora_rank else "model"
    saved = run.saved_step and folder / "checkpoints" / f"step_{run.saved_step:06d}" / kind
    if run.saved_step != run.progress.step:
        raise OSError(f"step {run.progress.step} could not be saved; the last one that was: {saved or 'none'}")
    run.log.print(f"\n{kind:<8} {saved}")
    run.log.print(f"metrics  {folder / 'metrics.jsonl'}")
    run.log.print(f"samples  {folder / 'samples.jsonl'}")
    run.log.print(f"next     python tools/evaluate.py --run_folder {folder}")


def finish_stopped(run: Run) -> None:
    """Saves a run that a signal has stopped, if its last step is not saved yet. Before step 1, nothing is saved."""
    begun = run.log_position is not None
    if begun and run.saved_step != run.progress.step:
        save_checkpoint(run)
    saved = "saved" if run.saved_step == run.progress.step else "could not save"
    where = f"after step {run.progress.step}, and {saved}" if begun else "before the first step"
    run.log.print(f"stopped {where}. To go on, add --resume to the command.")
    run.engine.close()
    run.log.close()


# ---- Checkpoints ----------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, accuracy: float | None = None) -> None:
    """Saves all finished steps. Collective. If the disk is full, a line says so, and the run goes on.

    accuracy: of this step's evaluation, to find the best step; the mean reward in a run without accuracies.
    """
    progress = run.progress
    if accuracy is not None and (progress.best_step < 0 or accuracy > progress.best_accuracy):
        progress = replace(progress, best_accuracy=accuracy, best_step=progress.step)
    tensors = checkpoint.gather_state(run.learners, keep=run.world.rank == 0)
    if on_first_rank(lambda: write_checkpoint(run, progress, tensors)):
        run.progress, run.saved_step = progress, progress.step


def write_checkpoint(run: Run, progress: Progress, tensors: dict[str, Tensor]) -> bool:
    """Writes the checkpoint; False if the disk had no room for it."""
    folder = run.log.folder
    state = {"progress": asdict(progress), "log": run.log_position, "config": asdict(run.config)}
    try:
        run.log.flush()
        checkpoint.write(folder, progress.step, state, tensors, export=lambda target: export(run, target, tensors))
        checkpoint.set_pointers(folder, progress.step, progress.best_step)
    except OSError as error:
        run.log.print(f"no checkpoint of step {progress.step}: {error}. The run goes on; older ones are whole.")
        return False
    try:
        checkpoint.prune(folder, progress.best_step)
    except OSError as error:
        run.log.print(f"older checkpoints are not deleted: {error}. The next save tries again.")
    return True


def export(run: Run, folder: Path, tensors: dict[str, Any]) -> None:
    """Writes the policy from its gathered tensors: as peft folders or, without adapters, as a model folder."""
    model = run.policy.model
    whole = {parameter: tensors.get(f"policy.model.{name}") for name, parameter in model.named_parameters()}
    if run.config.lora_rank:
        base = {"base_model": run.config.model_source, "base_dtype": run.config.dtype}
        for name in run.config.adapters:
            save_adapter(model, adapter_folder(folder / "adapter", name), name=name, **base, gather=whole.get)
    else:
        dtype = getattr(torch, run.config.compute_dtype)
        weights = ((name, whole[parameter].to(dtype)) for name, parameter in lora.base_weights(model))
        write_model(weights, folder / "model", like=Path(run.tokenizer.name_or_path))
