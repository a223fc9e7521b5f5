"""No small program costs more than its budget, by the real compiler; and what would cost more is seen and named."""

import copy
import json
import re
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.tpu import analysis, budgets
from pipeline.tpu.analysis import Compiler
from pipeline.worker import ROOT, Worker
from trainer_module.config import KeyBnMode

pytestmark = pytest.mark.long


@pytest.fixture
def budget():
    return json.loads(budgets.FILE.read_text())["programs"]


def test_no_program_costs_more_than_its_budget(tpu_environments, budget):
    with Compiler() as compiler:
        assert budgets.breaches(budget, budgets.measure(compiler)) == []


def test_the_command_fails_where_the_step_has_become_dearer_and_names_the_line(
    tpu_environments, budget, tmp_path, monkeypatch, capsys
):
    name = KeyBnMode.all_to_all.name
    one, file = {name: budgets.programs()[name]}, tmp_path / "budgets.json"
    file.write_text(json.dumps({"programs": {name: budget[name]}}))
    monkeypatch.setattr(budgets, "programs", lambda: one)
    monkeypatch.setattr(budgets, "FILE", file)
    monkeypatch.setattr(budgets, "Compiler", lambda: Compiler(tmp_path))
    monkeypatch.setattr(analysis, "Worker", worker_with("exchanged twice"))
    assert cli.main(["tpu-report", "--check-budgets"]) == cli.FAILED
    said = capsys.readouterr().out
    assert re.search(
        r"all_to_all: 1 became 2 \(\+100%\) times all-to-all of key_shuffle; look at .*shuffle\.py:\d+", said
    )
    assert "budgets.json are exceeded; if that was meant: ./moco tpu-report --write-budgets" in said


def worker_with(fault):
    """Worker, but what lowers has a fault."""

    def start(command):
        if command[-1] != "pipeline.tpu._lower":
            return Worker(command)
        python = command[0]
        program = Path(__file__).with_name("_lower_with_fault.py")
        return Worker([python, "-s", program, fault], {"PYTHONPATH": str(ROOT)})

    return start


def test_every_mode_has_a_budget(budget):
    assert {mode.name for mode in KeyBnMode} <= budget.keys() == budgets.programs().keys()


@pytest.mark.parametrize("what", ["bytes_accessed", "temporaries"])
def test_growth_by_more_than_two_percent_is_a_breach_and_names_the_part_that_grew(budget, what):
    figures = copy.deepcopy(budget)
    figures["host"][what] = round(budget["host"][what] * 1.03)
    figures["host"]["bytes_by_part"]["enqueue"] += 10**6
    (line,) = budgets.breaches(budget, figures)
    assert re.fullmatch(r"host: [\d,]+ became [\d,]+ \(\+3%\) .*most in enqueue .*trainer_module/moco\.py:\d+", line)


def test_a_collective_that_grows_is_named_with_the_line_that_asks_for_it(budget):
    figures = copy.deepcopy(budget)
    figures["cross_replica_sum"]["collectives"]["all-reduce of key_shuffle"]["bytes"] *= 2
    (line,) = budgets.breaches(budget, figures)
    assert "all-reduce of key_shuffle" in line
    assert re.search(r"trainer_module/shuffle\.py:\d+", line)


def test_a_new_collective_is_a_breach(budget):
    figures = copy.deepcopy(budget)
    figures["none"]["collectives"]["all-gather of loss"] = {"count": 1, "bytes": 8}
    assert len(budgets.breaches(budget, figures)) == 2  # its bytes, and that it is there


@pytest.mark.parametrize("share", [0.5, 0.99, 1.0, 1.02])
def test_what_shrinks_or_grows_by_two_percent_at_most_is_none(budget, share):
    figures = copy.deepcopy(budget)
    for program in figures.values():
        program["bytes_accessed"] = int(program["bytes_accessed"] * share)
        program["temporaries"] = int(program["temporaries"] * share)
    assert budgets.breaches(budget, figures) == []


def test_a_program_without_budget_is_a_breach(budget):
    figures = {**budget, "new": budget["none"]}
    assert budgets.breaches(budget, figures) == [
        "new: is in the budgets or in the programs, but not in both; --write-budgets"
    ]


def test_every_part_in_the_budgets_is_a_scope_of_the_sources(budget):
    parts = {part for program in budget.values() for part in program["bytes_by_part"]} - {"other"}
    assert parts >= {"key_shuffle", "key_return", "gradients", "statistics", "loss", "enqueue", "backward"}
    for part in parts:
        assert re.search(r"trainer_module/\w+\.py:\d+$", budgets.look_at(part)), part
