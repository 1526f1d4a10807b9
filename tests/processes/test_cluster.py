"""recipes/cluster: what a launcher reads is whole, and the Slurm script ends, saves and queues itself again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launched import masters_of, recipe_of
from toy_run import recipe_tree, write_models, write_rows

from grace_vlm.formats.weights import open_weights
from grace_vlm.train.launcher import asked_for

CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster"
TWO_STEPS = {"optim__num_steps": 2, "runtime__checkpoint_every_steps": 1, "data__accumulation": 2}
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


@pytest.mark.parametrize(
    ("file", "kind", "sharding"),
    [("one_machine", "MULTI_GPU", None), ("fsdp2", "FSDP", "parameters"), ("zero2", "DEEPSPEED", "gradients")],
)
def test_accelerate_reads_its_files_and_asks_for_what_they_say(
    monkeypatch: pytest.MonkeyPatch, file: str, kind: str, sharding: str | None
) -> None:
    """The environment that its launcher makes of a file, before it starts processes (DeepSpeed's wants DeepSpeed)."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = CLUSTER / f"{file}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.mixed_precision) == (kind, "no")
    words = ["--config_file", str(path), "--no_python", "grace", "train", "recipe.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.num_processes == 2
    if kind == "DEEPSPEED":
        args.deepspeed_fields_from_accelerate_config = ""
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    asked = asked_for(environment)
    assert (None if asked is None else asked.sharding) == sharding


def test_accelerate_launches_fsdp2(world: Path, tmp_path: Path) -> None:
    """Two processes, as the file says, on CPUs."""
    recipe = recipe_of(world, tmp_path, **TWO_STEPS)
    words = ["launch", "--config_file", CLUSTER / "fsdp2.yaml", "--main_process_port", "0"]
    grace = ["-m", "grace_vlm.cli.main", "train", recipe, "--out", tmp_path / "run"]
    program = "from accelerate.commands.accelerate_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, (*words, *grace))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = "the launcher asks for FSDP version 2: done by grace itself, as runtime.sharding=parameters"
    assert (done.stdout + done.stderr).count(said) == 1
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").read_text())
    assert (state["fingerprint"]["num_processes"], state["fingerprint"]["sharding"]) == (2, "parameters")
    start = open_weights(world / "student")
    for name, master in masters_of(tmp_path / "run", 1).items():  # every process had read its weights
        assert float((master - start[name].float()).abs().max()) < 1e-2, name


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
