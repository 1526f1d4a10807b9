"""recipes/cluster: what a launcher reads is whole, and the Slurm script ends, saves and queues itself again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from toy_run import recipe_tree, write_models, write_rows

CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster"
COMMANDS = {
    # This machine as a cluster of one node with two GPUs: what is left of srun is to run what it is given.
    "srun": 'shift; exec "$@"',
    "nvidia-smi": "echo GPU 0; echo GPU 1",
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$CALLS"; fi',
    "grace": f'exec {sys.executable} -m grace_vlm.cli.main "$@"',
}


def test_the_slurm_script_saves_and_queues_itself_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "world", 48)
    write_models(tmp_path / "world")
    recipe = tmp_path / "recipe.yaml"
    tree = recipe_tree(tmp_path / "world", optim__num_steps=100_000, runtime__checkpoint_every_steps=0)
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
    paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    out = tmp_path / "run"
    job = subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sbatch"), str(recipe), str(out)],
        env={**os.environ, **slurm, **paths, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics, until = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text()):
        assert job.poll() is None, job.stderr.read() if job.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.1)
    # Slurm tells the step, not the script: here the step's shell is the script's child.
    (step,) = map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(step, signal.SIGUSR1)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 128 + signal.SIGUSR1, said
    assert said.count("error: stopped by SIGUSR1") == 2
    assert (tmp_path / "calls").read_text() == "requeue 7\n"
    (saved,) = (out / "checkpoints").iterdir()
    assert (saved / "masters-00002-of-00002.safetensors").is_file()


def test_accelerate_reads_its_file() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CLUSTER / "one_machine.yaml"))
    assert (config.distributed_type, config.mixed_precision) == ("MULTI_GPU", "no")


def test_the_kubernetes_job_names_what_it_uses() -> None:
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert f"--nnodes={job['spec']['completions']}" in container["args"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["args"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    recipe = next(word for word in container["args"] if word.endswith(".yaml"))
    assert (CLUSTER.parent / Path(recipe).name).is_file()
