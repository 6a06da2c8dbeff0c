"""Several machines: each agent of torchrun has a network, a /dev/shm and a working folder of its own."""

import os
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
from conftest import ROOT, torchrun
from test_resume import await_step, rows

ADDRESSES = ("10.231.7.1", "10.231.7.2")
OPTIONS = f"--config {ROOT}/configs/arithmetic_cpu.py --prompts_per_step 8 --group_size 4 --eval_problems 8"
OPTIONS += " --eval_every 1 --save_every 1 --lr_schedule constant --output_dir runs/r"


class Machine:
    """A network namespace with one end of a cable, and a folder that no other machine sees."""

    def __init__(self, name: str, address: str, folder):
        self.name, self.address, self.folder = name, address, folder

    def start(self, rank: int, *arguments: str, processes: int = 1, machines: int = 2) -> subprocess.Popen:
        """torchrun's agent of this machine, the first of which all others meet."""
        agent = f"{sys.executable} -m torch.distributed.run --nnodes={machines} --node-rank={rank}"
        agent += f" --nproc-per-node={processes} --master-addr={ADDRESSES[0]} --master-port=29517"
        inside = f"mount -t tmpfs tmpfs /dev/shm && exec {agent} " + " ".join(arguments)
        environment = {"GLOO_SOCKET_IFNAME": "cable", "VLLM_HOST_IP": self.address, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", inside],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def die(self) -> None:
        """Kills every process of this machine."""
        for pid in ip(f"netns pids {self.name}").split():
            os.kill(int(pid), signal.SIGKILL)


def ip(command: str) -> str:
    return subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def machines(tmp_path):
    """Two machines with a cable between them; skipped where the kernel or the user may not make them."""
    tag = uuid.uuid4().hex[:6]
    names, made = [f"lorl-{tag}-{end}" for end in (0, 1)], []
    try:
        for name in names:
            ip(f"netns add {name}")
            made.append(name)
        ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        for name, address in zip(names, ADDRESSES):
            ip(f"-n {name} addr add {address}/24 dev cable")
            for device in ("lo", "cable"):
                ip(f"-n {name} link set {device} up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            ip(f"netns delete {name}")
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    made = [Machine(*each) for each in zip(names, ADDRESSES, folders)]
    yield made
    for machine in made:
        machine.die()
        ip(f"netns delete {machine.name}")


def finish(agents: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """What each agent printed; all must end well."""
    outputs = [agent.communicate(timeout=timeout)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(agents), "\n".join(outputs)[-4000:]
    return outputs


@pytest.mark.slow
def test_two_machines_are_one_world(machines, tmp_path):
    """The same run as on one machine, also when it resumes, for which both need the checkpoint."""
    script = [str(ROOT / "train_grpo.py"), *OPTIONS.split(), "--resume"]
    start = lambda steps: [machine.start(rank, *script, "--steps", steps) for rank, machine in enumerate(machines)]  # noqa: E731
    finish(start("2"))
    assert not (machines[1].folder / "runs").exists()

    agents = start("3")
    outputs = [agent.communicate(timeout=60)[0] for agent in agents]
    assert all(agent.returncode for agent in agents)
    assert "every machine needs it; put output_dir on storage that they share" in outputs[0] + outputs[1]

    shutil.copytree(machines[0].folder / "runs", machines[1].folder / "runs")
    finish(start("3"))
    alone = torchrun(2, *script, "--steps", "3", "--output_dir", str(tmp_path / "alone/r"))
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert rows(machines[0].folder / "runs") == rows(tmp_path / "alone")

    # From two machines to one.
    done = torchrun(2, *script, "--steps", "4", "--output_dir", str(machines[0].folder / "runs/r"))
    assert done.returncode == 0 and "step 4/4" in " ".join(done.stdout.split()), done.stderr[-3000:]


@pytest.mark.slow
def test_replicas_across_machines(machines, tmp_path):
    """Two ranks on each share a copy of the weights, and the copies stay equal: the loss is that of one machine."""
    script = [str(ROOT / "train_grpo.py"), *OPTIONS.split(), "--steps", "1", "--fsdp_size", "2"]
    finish([machine.start(rank, *script, processes=2) for rank, machine in enumerate(machines)])
    alone = torchrun(4, *script, "--output_dir", str(tmp_path / "alone/r"))
    assert alone.returncode == 0, alone.stderr[-3000:]
    assert rows(machines[0].folder / "runs") == rows(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim, options, lost",
    [
        (1, "", ""),
        (0, "--rollout_ranks 1 --max_staleness 1", "trainers"),
        (1, "--rollout_ranks 1 --max_staleness 1", "generators"),
    ],
)
def test_a_machine_that_dies_ends_the_others(machines, victim, options, lost):
    script = [str(ROOT / "train_grpo.py"), *OPTIONS.split(), "--steps", "1000", "--eval_every", "0", *options.split()]
    agents = [machine.start(rank, *script) for rank, machine in enumerate(machines)]
    await_step(agents[0], machines[0].folder / "runs", 2)
    machines[victim].die()
    survivor = agents[1 - victim]
    output, _ = survivor.communicate(timeout=60)
    assert survivor.returncode not in (0, None)
    assert f"error: lost the {lost}: " in output if lost else "error" in output.lower()
