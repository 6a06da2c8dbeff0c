"""One adapter beside two on one base: a rollout in vLLM, and a forward and backward of the trainer.

    OMP_NUM_THREADS=1 torchrun benchmarks/several_adapters.py --config configs/smollm2_times_tables.py --model FOLDER

Both sides of each pair have the same sequences; with two adapters, every other prompt belongs to the second one. They
take turns in one process. Adapters that are new (B = 0) take as long as any others.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # noqa: E402, I001  before torch
import fsdp_utils  # noqa: E402
import lora  # noqa: E402
from benchmarks.cpu_rollout import requests  # noqa: E402
from configs.base import Config  # noqa: E402
from policy import Policy  # noqa: E402
from runtime import heap, models, setup  # noqa: E402
from runtime.adapter_files import save_adapter  # noqa: E402
from runtime.packing import pack  # noqa: E402
from runtime.prompts import find_stops, load_tokenizer  # noqa: E402
from train_grpo import configure  # noqa: E402

ROUNDS = 5
TASKS = {"one": "times_tables", "two": "times_tables,gsm8k"}


def make(config: Config, folder: str, world: fsdp_utils.World) -> tuple[Policy, rollout.Engine]:
    """Trainer and sampler, which has the trainer's adapters."""
    policy = models.build_policy(config, folder, world)
    stops = find_stops(config, load_tokenizer(folder), models.read_model_config(folder))
    engine = setup.build_engine(config, folder, stops, lora.target_names(policy.model, config.adapters[0]))
    for name in config.adapters:
        with tempfile.TemporaryDirectory() as adapter:
            save_adapter(policy.model, adapter, name=name, gather=fsdp_utils.gather)
            engine.load_adapter(adapter, name)
    return policy, engine


def main() -> None:
    config, _ = configure(sys.argv[1:], description=__doc__)
    world = fsdp_utils.init_world()
    folder = models.model_folder(config)
    heap.keep_freed_memory()
    configs = {name: replace(config, task=tasks) for name, tasks in TASKS.items()}
    made = {name: make(each, folder, world) for name, each in configs.items()}
    seconds: dict[str, dict[str, list[float]]] = {"rollout": {}, "forward and backward": {}}

    @contextmanager
    def timed(what: str, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[what].setdefault(name, []).append(time.process_time() - start)

    for step in range(ROUNDS + 1):
        for name, (policy, engine) in made.items():
            adapters = configs[name].adapters
            asked = requests(config, step)
            asked = [replace(request, adapter=adapters[i % len(adapters)]) for i, request in enumerate(asked)]
            engine.reset_prefix_cache()
            with timed("rollout", name):
                found = engine.generate(asked)
            found = sorted(found[:: config.group_size // 2], key=lambda each: -len(each.prompt_ids + each.token_ids))
            parts = [each.prompt_ids for each in found], [each.token_ids for each in found]
            places = [adapters.index(each.adapter) for each in found] if len(adapters) > 1 else None
            packed = pack(*parts, world.device, adapters=places)
            with timed("forward and backward", name):
                policy(packed, config.temperature).logprobs.sum().backward()
    for what, times in seconds.items():
        times = {name: values[1:] for name, values in times.items()}  # the first ones warm up
        ratio = statistics.median(two / one for one, two in zip(times["one"], times["two"]))
        shown = ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in times.items())
        print(f"{what}: {shown} of a core; ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
