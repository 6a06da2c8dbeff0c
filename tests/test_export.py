"""`python tools/adapter.py export` and `inspect`, against peft's merge and plain algebra."""

import json
import re
import shutil
import sys

import peft
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_lora import IDS, load, saved_adapter
from torch.nn import functional
from transformers import AutoTokenizer

import lora
from runtime import adapter_files, files
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


def test_only_the_models_own_files_are_read_and_exported(model_folder, tmp_path, capsys):
    """People keep an adapter, or the makers' own format, beside a model's weights."""
    base, out, file = tmp_path / "base", tmp_path / "out", "model.safetensors"
    shutil.copytree(model_folder("mistral"), base)
    saved_adapter(base, tmp_path / "adapter", rank=4)
    shutil.copytree(tmp_path / "adapter", base, dirs_exist_ok=True)
    (base / "training_args.bin").touch()
    original = load_file(base / file)
    save_file(original, base / "consolidated.safetensors")
    assert {name for name, _ in files.read_model(base)} == original.keys()
    export.export(str(base), str(tmp_path / "adapter"), str(out))
    assert "is read without adapter_model.safetensors, consolidated.safetensors" in capsys.readouterr().out
    merged = {name: tensor for name, tensor in files.read_model(out)}
    changed = {name for name in original if not torch.equal(merged[name], original[name])}
    with open_adapter(tmp_path / "adapter") as adapter:
        assert changed == {f"{path}.weight" for path in adapter.paths}
    copied = {"config.json", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == copied | {"model-00001.safetensors", files.INDEX}
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode & 0o777 for path in (*out.iterdir(), *(tmp_path / "adapter").iterdir())}
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}, "as the umask lets others read"

    (base / files.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(original, file)}))
    assert {name for name, _ in files.read_model(base)} == original.keys()
    (base / files.INDEX).unlink()
    (base / file).rename(base / "copy.safetensors")
    with pytest.raises(ValueError, match="is in an earlier file, too"):
        export.export(str(base), str(tmp_path / "adapter"), str(tmp_path / "twice"))
    assert not list(tmp_path.glob("twice*"))


@torch.no_grad()
def test_an_adapter_of_an_nf4_base_is_exported_onto_it(tmp_path, capsys):
    """Against the layers that are trained. Onto the 16-bit base, what is printed is what the two models' own losses on
    the texts say.
    """
    model = saved_adapter(TINY, tmp_path, rank=4, alpha=8, std=0.02)
    adapter_files.save_adapter(model, tmp_path, base_model=str(TINY), base_dtype="nf4")
    trained = load(TINY, torch.bfloat16)
    lora.quantize_base(trained)
    lora.inject(trained, ["all-linear"], 4, 8, merged=True)
    adapter_files.load_adapter(trained, tmp_path)
    for into in ("trained", "files"):
        export.export(str(TINY), str(tmp_path), str(tmp_path / into), into)
    exact, other = load(tmp_path / "trained", torch.bfloat16), load(tmp_path / "files", torch.bfloat16)
    assert torch.equal(exact(IDS).logits, trained(IDS).logits)

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    texts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in export.TEXTS]

    def losses(model: torch.nn.Module) -> torch.Tensor:
        return torch.cat(
            [functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none") for ids in texts]
        )

    expected = (losses(other) - losses(exact)).abs().mean().item()
    printed = re.search(r"differ by ([0-9.]+) nats", capsys.readouterr().out)
    assert float(printed[1]) == pytest.approx(expected, abs=0.001) and expected > 0.01
    export.inspect(str(tmp_path), "")
    assert f"base     {TINY}, trained on it in nf4" in capsys.readouterr().out


def test_a_head_that_is_tied_is_not_exported_apart(model_folder, tmp_path):
    """qwen2 here ties its head: an adapter of the head would change the embedding, or be lost."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(model_folder("qwen2"), base)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(base), config).save_pretrained(adapter, save_embedding_layers=False)
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors")
    with pytest.raises(ValueError, match="changes lm_head, which .* ties to its embedding"):
        export.export(str(base), str(adapter), str(tmp_path / "out"))
    files.check_tied_head(base)  # the same once more, as many models of the hub have it
    save_file(tensors | {"lm_head.weight": head.flip(0).contiguous()}, base / "model.safetensors")
    with pytest.raises(ValueError, match="hold another lm_head.weight; set tie_word_embeddings to false"):
        files.check_tied_head(base)


def test_inspect_prints_what_each_module_gets_and_keeps(model_folder, tmp_path, monkeypatch, capsys):
    model = saved_adapter(model_folder("qwen2"), tmp_path, rank=4, alpha=8, std=0.002)
    monkeypatch.setattr(sys, "argv", ["adapter.py", "inspect", str(tmp_path)])
    export.main()
    printed = capsys.readouterr().out
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
        f"error: {full!r} exists and is not empty": ["export", "--base", base, "--adapter", adapter, "--out", full],
        "error: '.' exists and is not empty": ["export", "--base", base, "--adapter", adapter, "--out", "."],
        f"error: cannot write to '{full}/something/model': '{full}/something' is not a writable directory": [
            "export", "--base", base, "--adapter", adapter, "--out", f"{full}/something/model"
        ],
    }.items():  # fmt: skip
        monkeypatch.chdir(full)
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
