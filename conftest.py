"""Puts the project first on the import path, whichever way the tests are started.

Our coverage.py (the theory of coverage) shares its name with a tool that measures line coverage. If that
tool is already loaded, as under `pytest --cov`, its package is forgotten here; it goes on working.
"""

import sys
from pathlib import Path

root = Path(__file__).parent
first = [str(root), str(root / "tests"), str(root / "assignment")]
sys.path[:] = first + [path for path in sys.path if path not in first]
if hasattr(sys.modules.get("coverage"), "__path__"):
    del sys.modules["coverage"]


def pytest_configure(config):
    config.addinivalue_line("markers", "exercise(n): a test of exercise n of the assignment")
