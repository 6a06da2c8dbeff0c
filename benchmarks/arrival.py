"""Is the check of arrival right? Right weights must never stop a run, and every planted fault must stop it.

    torchrun --nproc-per-node=2 benchmarks/arrival.py --model FOLDER --sync adapter --checks 100

Each check syncs another random policy with `verify`: in turn one that is as near to the base as after one small step,
and one that is far from it. Then each fault is planted once, and the result of the next check is printed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import quiet  # noqa: F401, E402, I001  before torch

import torch
from safetensors.torch import load_file, save_file

import fsdp_utils
import lora
from benchmarks.weight_sync import random_adapter
from runtime import files

NEAR, FAR = 1e-4, 0.02  # standard deviation of a random policy's A and B


def verdicts_on(run, faults, scale):
    """The result of a verified sync with each fault, and finally without any."""
    verdicts = {}
    for number, (name, (owner, attribute, broken)) in enumerate(faults.items()):
        random_adapter(run.policy.model, number, scale)
        intact = getattr(owner, attribute)
        setattr(owner, attribute, partial(broken, intact))
        try:
            verdicts[name] = run.weight_sync.update_weights(verify=True)
        except RuntimeError as error:
            verdicts[name] = str(error)
        setattr(owner, attribute, intact)
    verdicts["none"] = run.weight_sync.update_weights(verify=True)
    return verdicts


def merged_faults(run, layer):
    """Ways for merged weights to go wrong: before they are sent, and where vLLM takes them."""
    base = {name: fsdp_utils.gather(parameter).clone() for name, parameter in lora.base_weights(run.policy.model)}
    old = {name: tensor.clone() for name, tensor in run.weight_sync.weights()}
    swapped = {f"{layer}.mlp.gate_proj.weight": f"{layer}.mlp.up_proj.weight"}
    swapped |= {value: key for key, value in swapped.items()}

    def unmerged(part, weights, *arguments):
        return ((name, base[name] if part in name else tensor) for name, tensor in weights(*arguments))

    def doubled(weights, *arguments):
        return ((name, 2 * tensor - base[name]) for name, tensor in weights(*arguments))

    def nothing(load, stream):
        list(stream)

    def old_part(part, load, stream):
        load((name, old[name] if part in name else tensor) for name, tensor in stream)

    def late(load, stream):
        sent = [(name, tensor.clone()) for name, tensor in stream]
        load([(name, old[name]) for name, _ in sent])
        old.update(sent)

    def shuffled(load, stream):
        load((swapped.get(name, name), tensor) for name, tensor in stream)

    loading = run.engine, "load_weights"
    return {
        "adapters ignored": (run.weight_sync, "weights", partial(unmerged, "")),
        "a layer ignored": (run.weight_sync, "weights", partial(unmerged, f"{layer}.")),
        "wrong scale": (run.weight_sync, "weights", doubled),
        "not loaded": (*loading, nothing),
        "a step late": (*loading, late),
        "a part of qkv stale": (*loading, partial(old_part, f"{layer}.self_attn.k_proj")),
        "two exchanged": (*loading, shuffled),
    }


def adapter_faults(run, layer):
    """Ways for an adapter to go wrong: its requests do not name it, or another folder than the one sent is loaded."""
    old = {}

    def changed(change, load, folder, name):
        weights, settings = Path(folder, "adapter_model.safetensors"), Path(folder, "adapter_config.json")
        tensors, config = load_file(weights), json.loads(settings.read_text())
        change(tensors, config)
        torch.distributed.barrier()  # all have read it
        if run.world.rank == 0:
            save_file(tensors, weights)
            settings.write_text(json.dumps(config))
        torch.distributed.barrier()
        load(folder, name)

    def keep_old(part, tensors, config):
        previous = old.get("tensors", {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
        old["tensors"] = dict(tensors)
        tensors.update({name: tensor for name, tensor in previous.items() if part in name})

    def drop_layer(tensors, config):
        for name in [name for name in tensors if f"{layer}." in name]:
            del tensors[name]

    def double(tensors, config):
        config["lora_alpha"] *= 2

    loading = run.engine, "load_adapter"
    return {
        "adapters ignored": (run.engine, "adapter", lambda adapter, name: None),
        "a layer ignored": (*loading, partial(changed, drop_layer)),
        "wrong scale": (*loading, partial(changed, double)),
        "a step late": (*loading, partial(changed, partial(keep_old, ""))),
        "a part of qkv stale": (*loading, partial(changed, partial(keep_old, f"{layer}.self_attn.k_proj"))),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--sync", default="adapter", choices=["adapter", "merged", "straight_through"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--checks", type=int, default=100, help="of right weights")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    from benchmarks.gpu_shared import bare_run
    from configs.base import Config
    from runtime.prompts import load_prompts

    settings = {name: getattr(arguments, name) for name in ("model", "sync", "dtype")}
    config = Config(task="times_tables", lora_rank=16, max_prompt_length=100, max_completion_length=28, **settings)
    fsdp_utils.init_world()
    folder = files.find_model(arguments.model)
    _, prompts = load_prompts(config, AutoTokenizer.from_pretrained(folder))
    run = bare_run(config, folder, [prompt.token_ids for prompt in prompts])
    lora.init_adapters(run.policy.model, 0, fill=fsdp_utils.fill)
    errors, seconds = [], []
    for check in range(arguments.checks):
        random_adapter(run.policy.model, check, (NEAR, FAR)[check % 2])
        start = time.perf_counter()
        found = run.weight_sync.update_weights(verify=True)  # ends this process if it finds fault with right weights
        errors.append(found["sync/probe_error"])
        seconds.append(time.perf_counter() - start - found["sync/seconds"])
    layers = run.policy.model.config.num_hidden_layers
    faults = adapter_faults if config.sends_adapter else merged_faults
    verdicts = verdicts_on(run, faults(run, f"model.layers.{layers // 2}"), NEAR)
    if run.world.rank == 0:
        print(f"{' '.join(settings.values())}: {len(errors)} checks of right weights passed")
        print(f"  noise on the base {found['sync/noise']:.4f} nats, probe error {min(errors):.4f} to {max(errors):.4f}")
        print(f"  a probe takes {statistics.median(seconds):.2f} s")
        for name, verdict in verdicts.items():
            print(f"  {name:20} {verdict if isinstance(verdict, str) else 'passes'}", flush=True)
    torch.distributed.barrier()
    os._exit(0)  # vLLM's threads may outlive the interpreter


if __name__ == "__main__":
    main()
