"""Each deliberate mistake in `mutants/` must be noticed by the state machine that it names."""

from pathlib import Path

import pytest
from arena_machine import arena_machine
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from mutants import Mutant
from page_machine import page_machine
from scheduler_machine import scheduler_machine

MUTANTS = [Mutant.read(path) for path in sorted((Path(__file__).parent / "mutants").glob("*.toml"))]
REQUIRED = {"missing_decref", "hash_without_version", "partial_page", "double_free", "fork_without_copy"}
MACHINES = {
    "arena": lambda modules: arena_machine(modules["arena"], modules["pages"]),
    "pages": lambda modules: page_machine(modules["pages"]),
    "scheduler": lambda modules: scheduler_machine(modules["scheduler"], lending=False),
}
UNTIL_FIRST_FAILURE = settings(
    max_examples=1000,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)


def play(machine: str, modules) -> None:
    run_state_machine_as_test(MACHINES[machine](modules), settings=UNTIL_FIRST_FAILURE)


def test_the_mutants_asked_for_are_there():
    assert {mutant.name for mutant in MUTANTS} >= REQUIRED


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant):
    with mutant.modules() as modules, pytest.raises((AssertionError, LookupError)):
        play(mutant.machine, modules)


@pytest.mark.parametrize("machine", MACHINES)
def test_an_unchanged_copy_is_not_caught(machine: str):
    """So that the failures above are the mistakes' and not the loader's."""
    unchanged = Mutant("unchanged", why="", module="", machine=machine, old="", new="")
    with unchanged.modules() as modules:
        run_state_machine_as_test(MACHINES[machine](modules), settings=settings(UNTIL_FIRST_FAILURE, max_examples=50))
