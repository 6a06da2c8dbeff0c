"""A rollout on a CPU, with vLLM's own settings and with ours, of merged weights and of the adapter.

    OMP_NUM_THREADS=1 torchrun benchmarks/cpu_rollout.py --config configs/smollm2_times_tables.py --model FOLDER

Four engines in one process take turns with the same requests, a whole rollout of the configuration. Ours differs in two
settings: prompts are shared in blocks of 32 tokens instead of 128 (runtime/vllm_on_cpu.py), and memory of large arrays
is used again (runtime/heap.py). An adapter that is new (B = 0) takes as long as any other.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # noqa: E402, I001  before torch
import fsdp_utils  # noqa: E402
import lora  # noqa: E402
from configs.base import Config  # noqa: E402
from runtime import heap, models, setup, vllm_on_cpu  # noqa: E402
from runtime.adapter_files import save_adapter  # noqa: E402
from runtime.conversation import Request  # noqa: E402
from runtime.prompts import find_stops, load_prompts, load_tokenizer  # noqa: E402
from runtime.run import request_of  # noqa: E402
from train_grpo import configure  # noqa: E402

SETTINGS = {"vLLM's": (128, 32 << 20), "ours": (32, heap.KEPT)}  # tokens of a block, bytes that malloc keeps


def engines(config: Config) -> Iterator[tuple[tuple[str, str], rollout.Engine]]:
    """The four engines, with their setting and their way of syncing."""
    folder = models.model_folder(config)
    tokenizer = load_tokenizer(folder)
    stops = find_stops(config, tokenizer, models.read_model_config(folder))
    for setting, (block, _) in SETTINGS.items():
        for sync in ("merged", "adapter"):
            changed = Config(**vars(config) | {"sync": sync})
            model = models.meta_model(folder, models.parameter_dtype(changed))
            models.add_adapters(model, changed)
            with patch.object(vllm_on_cpu, "BLOCK", block):
                engine = setup.build_engine(changed, folder, stops, lora.target_names(model))
            if sync == "adapter":
                model.to_empty(device="cpu")
                lora.init_adapters(model, config.seed)
                with tempfile.TemporaryDirectory() as adapter:
                    save_adapter(model, adapter)
                    engine.load_adapter(adapter)
            yield (setting, sync), engine


def requests(config: Config, step: int) -> list[Request]:
    """The requests of one rollout."""
    prompts, _ = load_prompts(config, load_tokenizer(models.model_folder(config)))
    size = config.prompts_per_step
    numbers = [step * size + i for i in range(size)]
    return [request_of(prompts[i % len(prompts)], config.group_size, config.temperature, 10 * i) for i in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    own, others = parser.parse_known_args()
    config, _ = configure(others, description=__doc__)
    fsdp_utils.init_world()
    made, seconds = dict(engines(config)), {}
    for step in range(own.rounds + 1):
        asked = requests(config, step)
        for (setting, sync), engine in made.items():
            heap.keep_freed_memory(SETTINGS[setting][1])
            engine.reset_prefix_cache()
            start = time.process_time()
            engine.generate(asked)
            if step:  # the first one warms up
                seconds.setdefault((setting, sync), []).append(time.process_time() - start)
    print("| setting | sync | seconds of a core | of vLLM's setting |\n|---|---|---:|---:|")
    for (setting, sync), own_seconds in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(own_seconds, seconds["vLLM's", sync]))
        print(f"| {setting} | {sync} | {statistics.median(own_seconds):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
