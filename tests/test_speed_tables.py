"""The numbers of speed in tests/benchmarks/README.md are those of the committed run."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch):
    folder = Path(__file__).parent / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


def test_the_readmes_tables_are_those_of_the_committed_run(benchmarks):
    from costs import samples_table, small_table
    from speed_sampling import tables

    committed = json.loads((benchmarks / "speed_on_two_cores.json").read_text())
    readme = " ".join((benchmarks / "README.md").read_text().split())
    found = tables(committed)
    quality = found.pop("QUALITY")
    costs = committed["costs"]
    for table in (*found.values(), small_table(costs["small"]), samples_table(costs["samples"])):
        assert " ".join(table.split()) in readme
    assert f"ten steps of ours take {quality} of the time of 250 published ones" in readme
