"""What test_processes.py starts by torchrun: each command that it names, one after the other, into OUT/NAME.

With DIE_AT=N the second process kills itself in step N.
"""

import copy
import functools
import os
import signal
import sys
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import data
import dpo
import eval
import hypo
import rlhf
import run

data.TINY_SAMPLES = 512
SHORT = ["--steps", "20", "--eval-every", "20", "--eval-samples", "16", "--batch-size", "12", "--pairs", "24",
         "--max-new-tokens", "10", "--lr", "5e-4", "--device", "cpu"]
COMMANDS = {"hypo": (hypo, ["--eval-every", "10"]), "dpo": (dpo, []),
            "online": (dpo, ["--loss", "ipo", "--sampling", "online"]),
            "ppo": (rlhf, ["--reward-epochs", "2"]), "rloo": (rlhf, ["--rloo", "--judge", "golden"])}


@functools.cache
def start_of(seed: int) -> tuple[data.Start, dict]:
    """What all runs start from, and the policy's weights at first."""
    start = data.start(run.parse(run.parser("")[0], [*SHORT, "--seed", str(seed)], lambda args: "any"))
    return start._replace(held_out=start.held_out[:24]), copy.deepcopy(start.policy.state_dict())


def begin(args) -> data.Start:
    """As data.start, which would sample the same pairs again for each."""
    start, weights = start_of(args.seed)
    start.policy.load_state_dict(weights)
    return start


def clip(model, max_norm, clip=run.clip):
    """run.clip, in which one of two dies."""
    if run.RANK == 1 and run.at == f"step {os.environ.get('DIE_AT')}: ":
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(model, max_norm)


def train(out: Path, name: str, *more: str) -> None:
    command, flags = COMMANDS[name]
    with mock.patch.object(eval, "plot_curve"):  # a picture takes as long as the training
        command.main([*SHORT, *flags, "--out", str(out / name), *more], begin)


if __name__ == "__main__":
    run.clip = clip
    run.start(lambda: [train(Path(sys.argv[1]), name) for name in sys.argv[2:]])
