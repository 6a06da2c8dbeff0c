"""`python tools/adapter.py export` and `inspect`, against peft's merge and plain algebra."""

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_lora import IDS, load, saved_adapter

import lora
from runtime import files
from runtime.adapter_files import open_adapter
from tools import adapter as export


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_exported_model_is_pefts_merge_rounded_once(architecture, model_folder, tmp_path, monkeypatch):
    base = model_folder(architecture)
    saved_adapter(base, tmp_path / "adapter", rank=4, alpha=8)
    monkeypatch.setattr(files, "FILE_BYTES", 60_000)  # several files
    monkeypatch.setattr(
        sys,
        "argv",
        ["adapter.py", *f"export --base {base} --adapter {tmp_path / 'adapter'} --out {tmp_path / 'o'}".split()],
    )
    export.main()
    written = sorted((tmp_path / "o").glob("*.safetensors"))
    assert len(written) > 2 and all(file.stat().st_size < 80_000 for file in written)
    merged = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload()
    expected = {name: tensor.bfloat16() for name, tensor in merged.state_dict().items()}
    found = load(tmp_path / "o", torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    for name in expected:  # another order of additions may round to the neighbour, rarely
        assert (found[name] != expected[name]).float().mean() < 0.01
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-6)
    assert (
        found["model.layers.0.mlp.up_proj.weight"] != load(base, torch.bfloat16).model.layers[0].mlp.up_proj.weight
    ).any()
    merged.load_state_dict(found)  # rounded
    torch.testing.assert_close(load(tmp_path / "o")(IDS).logits, merged(IDS).logits)


def test_only_files_of_the_index_are_exported(model_folder, tmp_path):
    """Some models of the hub also hold their weights once more, under names of their makers' own."""
    shutil.copytree(model_folder("mistral"), tmp_path / "base")
    weights = dict.fromkeys(load_file(tmp_path / "base" / "model.safetensors"), "model.safetensors")
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    save_file({"layers.0.attention.wq.weight": torch.ones(2)}, tmp_path / "base" / "consolidated.safetensors")
    assert {name for name, _ in files.read_model(tmp_path / "base")} == weights.keys()


def test_inspect_prints_what_each_module_gets_and_keeps(model_folder, tmp_path):
    model = saved_adapter(model_folder("qwen2"), tmp_path, rank=4, alpha=8, std=0.002)
    command = [sys.executable, "tools/adapter.py", "inspect", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "rank     4, alpha 8: the update is scaled by alpha / rank = 2" in printed
    assert "targets  down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: 14 modules" in printed
    rows = {line.split()[0]: [float(n) for n in line.split()[1:]] for line in printed.splitlines() if "layers." in line}
    assert rows.keys() == {path for path, _ in lora.lora_layers(model)}
    for path, layer in lora.lora_layers(model):
        adapter = layer.adapters[lora.POLICY]
        update = (2 * adapter.lora_B @ adapter.lora_A).detach()
        kept = (layer.weight + update).bfloat16().float() - layer.weight
        size, share, survival = rows[path]
        assert size == pytest.approx(update.norm().item(), rel=0.01)
        assert share == pytest.approx((update.norm() / layer.weight.norm()).item(), rel=0.01)
        assert survival == pytest.approx(((kept * update).sum() / kept.norm() / update.norm()).item(), abs=0.002)
    assert min(row[2] for row in rows.values()) < 0.99  # so small that some of it is lost


def test_mistakes_are_one_line_and_exit_code_2(model_folder, tmp_path, monkeypatch, capsys):
    base, adapter, full = str(model_folder("llama")), str(tmp_path / "adapter"), str(tmp_path / "full")
    saved_adapter(base, adapter)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    for message, arguments in {
        "has no adapter_config.json": ["inspect", base],
        "exists and is not empty": ["export", "--base", base, "--adapter", adapter, "--out", full],
    }.items():
        monkeypatch.setattr(sys, "argv", ["adapter.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            export.main()
        printed = capsys.readouterr().err
        assert exit.value.code == 2 and message in printed and printed.count("\n") == 1
    quantized = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(128, 128, dtype=torch.int8)}
    with open_adapter(adapter) as file, pytest.raises(ValueError, match="q_proj is of type torch.int8 in the base"):
        dict(export.merge_all(quantized.items(), file))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("layers.1.", "layers.7."): tensor for key, tensor in tensors.items()}, file)
    with pytest.raises(ValueError, match="the base has no 'model.layers.7"):
        export.export(base, adapter, str(tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="the base has no 'model.layers.7"):
        export.inspect(adapter, base)
