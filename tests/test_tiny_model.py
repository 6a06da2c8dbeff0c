"""The tiny model that comes with the code is what its recipe makes, but for how a processor rounds."""

import json

from conftest import TINY
from safetensors.torch import load_file

from tools import tiny_model


def test_the_recipe_makes_this_tokenizer_and_this_architecture(tmp_path):
    tokenizer = tiny_model.make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_model.make_model(len(tokenizer)).bfloat16().save_pretrained(tmp_path)  # not warm-started: that takes minutes
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in TINY.iterdir()}
    for path in TINY.glob("*.json"):
        made, kept = json.loads((tmp_path / path.name).read_text()), json.loads(path.read_text())
        assert made | {"transformers_version": ""} == kept | {"transformers_version": ""}, path.name
    made, kept = (load_file(folder / "model.safetensors") for folder in (tmp_path, TINY))
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in kept.items()}
