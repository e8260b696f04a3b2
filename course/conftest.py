"""pytest's options for the exercises' tests.

    python -m pytest -q test_exercises.py --exercise 4            # one exercise's tests, or several: --exercise 4 --exercise 5
    python -m pytest -q test_exercises.py -m exercise             # all of them

In the repository, where the numbers are not frozen, also with others:

    AMFT_TEST_SEED=7 python -m pytest -q test_exercises.py
    python -m pytest -q test_exercises.py --seeds 0-199           # each test with each of these seeds
"""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads that share a busy core wait for each other

def pytest_addoption(parser):
    parser.addoption("--exercise", type=int, action="append", help="run this exercise's tests alone")
    parser.addoption("--seeds", help="run each test with the seeds of this range, FIRST-LAST")


def pytest_configure(config):
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "short"  # what a test says matters more than its source
    config.addinivalue_line("markers", "exercise(n): a test that grades exercise n")


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        first, _, last = (metafunc.config.getoption("--seeds", None) or os.environ.get("AMFT_TEST_SEED", "0")).partition("-")
        metafunc.parametrize("seed", range(int(first), int(last or first) + 1))


def pytest_collection_modifyitems(config, items):
    if wanted := config.getoption("--exercise", None):  # absent where pytest began in another folder
        number = [marker.args[0] if (marker := item.get_closest_marker("exercise")) else None for item in items]
        config.hook.pytest_deselected(items=[item for item, n in zip(items, number) if n not in wanted])
        items[:] = [item for item, n in zip(items, number) if n in wanted]
