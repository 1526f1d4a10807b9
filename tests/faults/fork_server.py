"""Forks training runs on request, so that a kill costs no import.

Started by the tests as a process of its own that never computes: a fork of a process whose OpenMP pool has run would
hang. Lines on standard input are JSON {"folder", "out", "resume"}; each gets the child's pid, and its exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch

torch.set_num_threads(1)

import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: E402,F401
from toy_run import recipe_tree  # noqa: E402

from grace_vlm.train.config import recipe_from  # noqa: E402
from grace_vlm.train.loop import train  # noqa: E402


def child(job: dict[str, str]) -> int:
    try:
        train(recipe_from(recipe_tree(Path(job["folder"])), "test"), Path(job["out"]), resume=bool(job["resume"]))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = child(job)
            os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
