"""The costs on an accelerator: the script runs to its end on small nets, whatever the device."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = ROOT / "recipes" / "benchmarks" / "accelerator_cost.py"


def test_every_part_is_measured(tmp_path):
    output = tmp_path / "cost.json"
    command = [sys.executable, SCRIPT, "--small", "--device", "cpu", "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(output.read_text())
    assert result["copy"] > 0
    for numbers in result["selection"].values():
        assert set(numbers) == {
            "copy",
            *(f"unstructured:{s}" for s in ("0.5", "0.9", "0.95", "0.9:layer")),
            "2:4",
            "4:8",
        }
        assert all(own["gigabytes_a_second"] > 0 for own in numbers.values())
    assert len(result["steps"]) == 2
    for forms in result["steps"].values():
        assert {"plain", "two passes", "CrAM+ 2:4", "SFW k_sparse, global", "SFW spectral", "TPP", "LilNetX"} <= set(
            forms
        )
        assert all(own["ratio_of_minima"] > 0 for own in forms.values())
    assert all("cannot" in own for own in result["two_four"].values())  # on a CPU, and it says why
    assert result["removed"]["promised"] > 1.5
    assert all(result["removed"][way]["speed_up"] > 0 for way in ("eager", "compiled"))
