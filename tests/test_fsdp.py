"""Loading into shards, from disks and from memory that ranks share."""

import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from conftest import on_ranks, sharded_policy
from transformers import AutoModelForCausalLM

import fsdp_utils
from runtime import shared_memory
from runtime.files import read_model

SHAPES = dict(intermediate_size=90, vocab_size=161)  # rows that 4 ranks cannot share evenly


# ---- Loading --------------------------------------------------------------------------------------------------


class CountingSlice:
    """A tensor on disk that notes how much of it is read."""

    read: list[tuple[str, int]] = []

    def __init__(self, source, name):
        self.source, self.name = source, name

    def get_shape(self):
        return self.source.get_shape()

    def get_dtype(self):
        return self.source.get_dtype()

    def __getitem__(self, rows):
        tensor = self.source[rows]
        self.read.append((self.name, tensor.numel()))
        return tensor


def read_counted(source, parameter, name, real=fsdp_utils.read_rows):
    real(CountingSlice(source, name), parameter, name)


def load_all(folders):
    """For each folder: elements that this rank read by name; asserts that the model is that of from_pretrained."""
    world, fsdp_utils.read_rows, counts = fsdp_utils.init_world(), read_counted, []
    for folder in folders:
        CountingSlice.read = []
        model = sharded_policy(folder, world).model
        counts.append(CountingSlice.read)
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for name, parameter in expected.named_parameters(remove_duplicate=False):
            assert torch.equal(fsdp_utils.gather(model.get_parameter(name)), parameter), name
        for name, buffer in expected.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        stored = dict(read_model(Path(folder)))
        for name, tensor in fsdp_utils.summon_layers(model, world.device):
            if ".experts." in name:  # of which the checkpoint has each by itself
                assert torch.equal(tensor, stored.pop(name)), name
        assert not [name for name in stored if ".experts." in name]
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied == expected.config.tie_word_embeddings
    return counts


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_loading_into_shards_equals_from_pretrained(ranks, model_folder, tmp_path):
    folders = [
        model_folder("qwen2", **SHAPES),
        model_folder("llama", **SHAPES),
        model_folder("qwen3", num_key_value_heads=1, head_dim=2, **SHAPES),  # 2 rows: fewer than ranks
        in_several_files(model_folder("llama", **SHAPES), tmp_path / "sharded"),
        model_folder("qwen3_moe", num_experts=6, moe_intermediate_size=24),  # whole experts: one rank has none
    ]
    results = on_ranks(ranks, load_all, folders, folder=tmp_path)
    for index, folder in enumerate(folders):
        whole = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        whole = {name: parameter for name, parameter in whole.items() if parameter.ndim < 3}  # experts are read apart
        read = dict.fromkeys(whole, 0)
        for counts in results:
            for name, elements in counts[index]:
                assert elements <= -(-len(whole[name]) // ranks) * whole[name][0].numel()  # a share of the rows
                read[name] += elements
        assert read == {
            name: p.numel() for name, p in whole.items()
        }  # every element by exactly one rank, and no tensor twice


def in_several_files(folder, target):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(target, max_shard_size="50KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def peak_of_loading(folder):
    """Bytes: the most that loading took of this process's own memory, this rank's shards, and the largest tensor."""

    def own_bytes():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    def watch():
        while not done.wait(0.001):
            seen.append(own_bytes())

    world = fsdp_utils.init_world()
    model = sharded_policy(folder, world, load=False).model
    done, seen, before = threading.Event(), [], own_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    fsdp_utils.load_weights(model, str(folder), world.device)
    done.set()
    watcher.join()
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return max(seen) - before, sum(fsdp_utils.local(p).nbytes for p in model.parameters()), max(sizes)


def test_loading_takes_the_shards_and_little_more(model_folder, tmp_path):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=16384)
    for peak, shards, largest in on_ranks(2, peak_of_loading, model_folder("qwen2", **sizes), folder=tmp_path):
        assert 0.9 * shards < peak < shards + 1.5 * largest, (peak, shards, largest)


def load_errors(folders_by_rank):
    """For each list of folders, one per rank: the error that this rank gets."""
    world, errors = fsdp_utils.init_world(), []
    for folders in folders_by_rank:
        try:
            sharded_policy(folders[world.rank], world)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_broken_checkpoints_are_an_error_on_every_rank(model_folder, tmp_path):
    good = in_several_files(model_folder("llama", **SHAPES), tmp_path / "good")
    broken = {}
    for fault in ("truncated", "missing", "shape"):
        broken[fault] = tmp_path / fault
        shutil.copytree(good, broken[fault])
    first = sorted(broken["truncated"].glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    sorted(broken["missing"].glob("*.safetensors"))[0].unlink()
    config = broken["shape"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 91}))

    expected = {
        "truncated": first.name,
        "missing": "is no file of its folder",
        "shape": "(64, 90) in the file, and (64, 91) in the model",
    }
    cases = [[broken[fault]] * 2 for fault in expected] + [[good, broken["truncated"]]]  # the last: on one host only
    for errors in on_ranks(2, load_errors, cases, folder=tmp_path):
        for error, part in zip(errors, [*expected.values(), first.name], strict=True):
            assert part in error


def use_shared_memory(folder):
    """The files that this rank sees, whether any are left when the block has ended, and what is done without room."""
    fsdp_utils.init_world()
    os.environ["USE_SHM"] = "1"
    with shared_memory.fast_folder(folder) as copy:
        files = {path.name: path.stat().st_size for path in Path(copy).iterdir()}
    torch.distributed.barrier()
    left = [Path(copy).exists()]
    try:
        with shared_memory.fast_folder(folder) as copy:
            raise KeyError
    except KeyError:
        torch.distributed.barrier()
        left.append(Path(copy).exists())
    free = dict(zip(shared_memory.PLACES, (1000, 3000)))
    room = lambda path: next(free[place] for place in (path, path.parent) if place in free)  # noqa: E731
    shared_memory.shutil.disk_usage = lambda path, real=shutil.disk_usage: real(path)._replace(free=room(path))
    with shared_memory.shared_folder(2000) as elsewhere:
        assert elsewhere.is_dir()
    errors = []
    for context in (shared_memory.fast_folder(folder), shared_memory.shared_folder(4000)):
        try:
            with context:
                errors.append("no error")
        except ValueError as error:
            errors.append(str(error))
    return files, copy, left, elsewhere, errors


def test_shared_memory_is_used_once_per_host_and_cleaned_up(model_folder, tmp_path):
    folder = model_folder("qwen2", **SHAPES)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    results = on_ranks(2, use_shared_memory, str(folder), folder=tmp_path)
    for files, copy, left, elsewhere, errors in results:
        assert files == sizes and copy == results[0][1] and copy.startswith("/dev/shm/")
        assert left == [False, False]
        assert elsewhere == results[0][3] and elsewhere.parent == Path(tempfile.gettempdir()), "a small /dev/shm"
        assert "MiB of weights: /dev/shm has 0 MiB free; make room, or leave USE_SHM out" in errors[0]
        assert "no room for 0 MiB of weights: /dev/shm has 0 MiB and " in errors[1]
