"""The packaged recipe for causal models starts: its flags parse, a tiny Llama is trained, cut and saved."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import hf_compress as hfc
from hf_compress.cli import run
from hf_compress.cli.recipes import packaged, read_recipe
from tests.sft import texts, tiny_causal_model, write_json_lines

pytest.importorskip("trl")

FAST = "--max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --per_device_eval_batch_size 8"
FAST += " --use_cpu --disable_tqdm true --eval_steps 1 --logging_steps 1"
OF_CAUSAL_MODELS = sorted(n for n, p in packaged().items() if p.parent.name == "supervised-finetuning")
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize("name", OF_CAUSAL_MODELS)
def test_recipe_starts_and_gives_a_family(name, tmp_path, capsys):
    recipe = read_recipe(name)
    llama = tiny_causal_model(tmp_path / "llama", chat_template=TEMPLATE)
    said = zip(texts(), reversed(texts()), strict=True)
    chats = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    data = write_json_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    out = tmp_path / "out"
    command = ["train", name, "--model_name_or_path", str(llama), "--dataset_name", str(data), "--output_dir", str(out)]
    assert run([*command, "--max_length", "24", *FAST.split()]) == 0, capsys.readouterr().err
    family = hfc.load_family(out / "_family")
    assert [v.pattern for v in family.variants] == recipe["variants"] == ["2:4", "4:8"]
    assert all(v.metrics["perplexity"] > 1 and v.sparsity > 0.2 for v in family.variants)
    for key in ("rho", "patterns", "eval_patterns"):
        assert family.recipe[key] == recipe[key], key
    assert family.recipe.get("learning_rate", 2e-5) == float(recipe["learning_rate"])
    weight = AutoModelForCausalLM.from_pretrained(family.path_to("2:4")).model.layers[1].mlp.down_proj.weight
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    keys = {key for row in state["log_history"] for key in row}
    assert {"compressed_loss", "mean_token_accuracy", "eval_perplexity", "eval_nm-2of4_perplexity"} <= keys
