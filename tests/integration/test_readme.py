"""The README is executed: its commands as printed, its Python blocks, its diff applied to stock scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_compress.cli.recipes import read_recipe
from tests.conftest import ROOT
from tests.hub.server import HubServer
from tests.text import tiny_text_model

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.strip().splitlines()]


def run(command, cwd, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        shell=isinstance(command, str),
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the first command of the README has run, without its installation."""
    folder = tmp_path_factory.mktemp("readme")
    install, train = COMMANDS[0].split(" && ")
    assert install == "pip install ."
    output = run(train, folder)
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def hub(workplace, tmp_path_factory):
    """The environment of a Hub to which the README's family has been pushed, by its command."""
    (push,) = [c for c in COMMANDS if c.startswith("hf-compress push")]
    with HubServer() as server:
        environment = server.environment(tmp_path_factory.mktemp("hub"))
        assert server.url in run(push, workplace, **environment)
        assert list(server.repos) == [push.split()[-1]]
        make_language(workplace, environment)
        yield environment


UPLOAD = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[2])
HfApi().upload_folder(folder_path=sys.argv[1], repo_id=sys.argv[2])
"""


def make_language(workplace, environment):
    """A small encoder stands on the Hub as MiniLM, files of SQuAD in the folder, and the command has run."""
    encoder = tiny_text_model(workplace / "encoder", "question-answering")
    name = read_recipe("minilm_squad_cram")["model_name_or_path"]
    run([sys.executable, "-c", UPLOAD, str(encoder), name], workplace, **environment)
    answers = [{"text": "Ada", "answer_start": 15}]
    asked = [{"id": f"{i}", "question": "Who was it?", "answers": answers} for i in range(6)]
    articles = [{"title": "A", "paragraphs": [{"context": "It was written Ada.", "qas": asked}]}]
    for file in ("train-v1.1.json", "dev-v1.1.json"):
        (workplace / file).write_text(json.dumps({"version": "1.1", "data": articles}))
    (command,) = [c for c in COMMANDS if "minilm_squad_cram" in c]
    assert "2:4" in run(command, workplace, OMP_NUM_THREADS="1", **environment)


@pytest.mark.slow
def test_the_first_command_trains_and_leaves_what_it_prints(workplace):
    output = (workplace / "output.txt").read_text()
    rows = re.findall(r"^(dense|unstructured:\S+|2:4) +[\d.]+ % +([\d.]+)", output, re.M)
    assert [name for name, _ in rows] == ["dense", *(f"unstructured:{s}" for s in (0.5, 0.7, 0.8, 0.9, 0.95)), "2:4"]
    accuracies = {name: float(value) for name, value in rows}
    assert accuracies["dense"] > 0.97
    assert accuracies["unstructured:0.95"] > 0.9
    for line in re.findall(r"^(?:family|manifest|plot) +(\S+)$", output, re.M):
        assert (workplace / line).exists()


# Runs where hf_compress cannot be imported, and prints the logits of a fixed input.
STRANGER = """
import importlib.abc, json, sys

class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compress":
            raise ImportError(name)

sys.meta_path.insert(0, Wall())
try:
    import hf_compress
except ImportError:
    pass
else:
    raise SystemExit("hf_compress is there")
import torch
from transformers import AutoModelForImageClassification
torch.manual_seed(0)
x = torch.randn(2, 3, 32, 32)
out = {}
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        out[folder] = model(x).logits.tolist()
print("LOGITS" + json.dumps(out))
"""


@pytest.mark.slow
def test_every_variant_loads_where_hf_compress_cannot_be_imported(workplace):
    import torch
    from transformers import AutoModelForImageClassification

    import hf_compress as hfc

    family = hfc.load_family(workplace / "out" / "digits_cram" / "_family")
    folders = [str(family.folder / v.path) for v in (family.dense, *family.variants)]
    output = run([sys.executable, "-c", STRANGER, *folders], workplace)
    logits = json.loads(output.split("LOGITS")[1])
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    dense = AutoModelForImageClassification.from_pretrained(folders[0]).eval()
    for folder in folders:
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            assert model(x).logits.tolist() == logits[folder]
        config = json.loads((Path(folder) / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["model_type"] == "resnet"
        assert model.state_dict().keys() == dense.state_dict().keys()
    assert logits[folders[0]] != logits[folders[1]]


# Imports once, then runs every block that it is sent in a process of its own, as `python -c` would.
FORKING = """
import json, os, sys, tempfile, traceback
import hf_compress, torch
from transformers import AutoModelForImageClassification, AutoTokenizer, Trainer

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            code = 0
            try:
                exec(compile(json.loads(line), "README.md", "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        output.seek(0)
        print(json.dumps([status, output.read()]), flush=True)
"""


@pytest.fixture(scope="module")
def interpreter(workplace, hub):
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        cwd=workplace,
        env={**os.environ, **hub},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.stdin.close()


@pytest.mark.slow
@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_python_blocks_run(interpreter, block):
    print(json.dumps(block), file=interpreter.stdin, flush=True)
    status, output = json.loads(interpreter.stdout.readline())
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("hf-compress", "ACCELERATE_USE_CPU"))])
def test_commands_run_as_printed(workplace, hub, command):
    output = run(command, workplace, OMP_NUM_THREADS="1", **hub)
    if "accelerate launch" in command:
        assert "cram on 2 processes" in output
    if command.endswith("digits_tpp"):
        removed, accuracy = re.search(r"^filters:0.5 +([\d.]+) % +[\d.]+ % +([\d.]+)", output, re.M).groups()
        assert float(removed) > 40
        assert float(accuracy) > 0.96


def test_the_test_command_is_the_one_that_ci_runs():
    (command,) = [c for c in COMMANDS if "[test]" in c]
    assert command.endswith("&& pytest -n 2")
    pattern = re.search(r'sed -n "/(.*)/p" README.md', (ROOT / ".ci" / "run").read_text())[1]
    assert re.search(pattern.replace("\\[", "\\["), command)


STOCK = """
import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from tests.conftest import image_samples

model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=24, num_labels=3))
train = test = image_samples()
metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
args = TrainingArguments("out", max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1)
trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=metrics)
trainer.train()
trainer.save_model("out/final")
print("EVAL", trainer.evaluate())
"""

OWN_TRAINER = '''
import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from tests.conftest import image_samples


class MyTrainer(Trainer):
    """Weighs the classes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        weight = torch.tensor([1.0, 2.0, 1.0])
        loss = torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], weight)
        return (loss, outputs) if return_outputs else loss


model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=24, num_labels=3))
train = test = image_samples()
metrics = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
args = TrainingArguments("out", max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1)
trainer = MyTrainer(model=model, args=args, train_dataset=train, eval_dataset=test, compute_metrics=metrics)
trainer.train()
trainer.save_model("out/final")
print("EVAL", trainer.evaluate())
'''

CUT = '\nprint("FAMILY", [v.pattern for v in trainer.build_family(["unstructured:0.5", "2:4"]).variants])\n'


def readme_diff():
    """Words that the README's diff replaces."""
    (diff,) = [text for kind, text in BLOCKS if kind == "diff"]
    removed, added = (" ".join(re.findall(rf"^\{sign}(.*)", diff, re.M)) for sign in "-+")
    assert "Trainer(" in removed
    assert "CrAMTrainer(" in added
    assert "TrainingArguments(" in removed
    assert "CrAMConfig(" in added
    return {"Trainer(model": "CrAMTrainer(model", "TrainingArguments(": "CrAMConfig("}


def test_the_diff_on_a_stock_script(tmp_path):
    script = STOCK
    assert "EVAL" in run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(ROOT))
    for old, new in readme_diff().items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    script = script.replace(
        "from transformers import", "from hf_compress import CrAMConfig, CrAMTrainer\nfrom transformers import", 1
    )
    output = run([sys.executable, "-c", script + CUT], tmp_path, PYTHONPATH=str(ROOT))
    assert "compressed_loss" in output
    assert "EVAL {'eval_loss'" in output
    assert "FAMILY ['unstructured:0.5', '2:4']" in output


def test_the_diff_on_a_script_with_its_own_trainer(tmp_path):
    script = OWN_TRAINER.replace("TrainingArguments(", "CrAMConfig(").replace("MyTrainer(model", "MyCrAMTrainer(model")
    mixin = "class MyCrAMTrainer(CrAMMixin, MyTrainer):\n    pass\n"
    assert mixin in README
    script = script.replace("\nmodel = ", f"\n{mixin}\n\nmodel = ", 1)
    script = script.replace(
        "from transformers import", "from hf_compress import CrAMConfig, CrAMMixin\nfrom transformers import", 1
    )
    output = run([sys.executable, "-c", script + CUT], tmp_path, PYTHONPATH=str(ROOT))
    assert "compressed_loss" in output
    assert "FAMILY ['unstructured:0.5', '2:4']" in output
