"""Puts check.py on the path and registers the marker: `pytest assignment/tests -m "exercise(n=3)"`."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "exercise(n): a test of exercise n of the assignment")
