"""The notebooks run in a real kernel, in an empty folder; what they show is stored clean of where it was made.

    OMP_NUM_THREADS=1 python -m tests.integration.test_notebooks

runs all of them and stores their outputs anew.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What must hold in the kernel when the last cell has run.
CLAIMS = {
    "train_once_cut_anywhere": [
        "points['CrAM']['unstructured:0.9'] > points['SGD']['unstructured:0.9'] + 20",
        "points['CrAM']['unstructured:0'] > 97 and points['SGD']['unstructured:0'] > 97",
        "max(sizes) < 75 and family['unstructured:0.9'].loads_with == 'transformers'",
        "int((weights != 0).sum()) < 0.2 * len(weights) and accuracy(model) > 90",
    ],
    "smaller_layers": [
        "promised['50 % zeros'] == 1 and promised['50 % removed'] > 2",
        "0.67 < measured['50 % zeros'] < 1.5 < measured['50 % removed'] < measured['75 % removed']",
        "after['TPP'] > after['L1'] + 30 and min(points['TPP'][-1], points['L1'][-1]) > 90",
        "model.num_parameters() < 0.2 * digits.num_parameters() and difference < 1e-3",
    ],
    "smaller_files_and_the_hub": [
        "family['unstructured:0.9+int8'].bytes < 0.1 * family.dense.bytes",
        "max(kilobytes.values()) < 0.0002 * family.dense.bytes and min(points.values()) > 90",
        "all(v.metrics['accuracy'] > 0.9 for v in family.checkpoints)",
        "slider[0.9] > 90 and pruned.num_parameters() == loaded.num_parameters()",
    ],
}


def execute(notebook, folder):
    """Run all cells as Jupyter does, in a folder that they may fill."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "HF_TOKEN")}
    environment |= {"IPYTHONDIR": str(folder / ".ipython"), "PYTHONPATH": str(ROOT)}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm misses ipywidgets, which draw nothing here
    place = folder / "empty"
    place.mkdir()
    options = {"timeout": 300, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": str(place)}}, **options).execute(env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_an_empty_folder_and_shows_what_it_says(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    claims = f"{{claim: bool(eval(claim)) for claim in {CLAIMS[path.stem]}}}"
    ask = f"import json, time\nprint(json.dumps([time.process_time(), {claims}]))"
    notebook.cells.append(nbformat.v4.new_code_cell(ask))
    execute(notebook, tmp_path)
    seconds, holds = json.loads(notebook.cells.pop().outputs[0].text)
    assert [claim for claim, value in holds.items() if not value] == []
    assert seconds < 90
    assert kinds(notebook) == kinds(nbformat.read(path, as_version=4))


def kinds(notebook):
    """What every cell shows, warnings and errors included."""
    return [[each.get("name", each.output_type) for each in c.get("outputs", ())] for c in notebook.cells]


def test_every_notebook_has_its_claims():
    assert {path.stem for path in NOTEBOOKS} == set(CLAIMS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_and_say_nothing_of_the_machine(path):
    text, notebook = path.read_text(), nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 400_000
    assert notebook.metadata == METADATA
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    assert {kind for kinds_of_cell in kinds(notebook) for kind in kinds_of_cell} == {"stdout", "display_data"}
    outputs = [output for cell in code for output in cell.outputs]
    assert 1 <= sum("image/png" in output.get("data", ()) for output in outputs) <= 3
    shown = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert not re.search(r"/(root|tmp|work|home)\b|\r|\x1b|it/s|[Ww]arning", shown)


def store(path):
    """Run a notebook and write it back with what it shows."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    notebook.metadata = nbformat.from_dict(METADATA)
    path.write_text(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    for each in NOTEBOOKS:
        store(each)
