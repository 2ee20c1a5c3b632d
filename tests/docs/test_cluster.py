"""The files of docs/scaling.md, each held to its own tool or schema."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from moescope.cli.main import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "docs" / "cluster"
SBATCH = CLUSTER / "train.sbatch"
CRDS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "schemas" / "trainer.kubeflow.org.json").read_text(encoding="utf-8")
)
"""Kubeflow Trainer 2.3.0's definitions without their descriptions (Apache-2.0, the Kubeflow
Authors): kind -> schema."""
DOCUMENTS = [
    pytest.param(document, id=f"{file.name}-{document['kind']}-{document['metadata']['name']}")
    for file in sorted(CLUSTER.glob("*.yaml"))
    for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))
]
SLURM = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
StateSaveLocation={folder}
SlurmdSpoolDir={folder}
SlurmctldPidFile={folder}/pid
SlurmctldLogFile={folder}/log
ProctrackType=proctrack/pgid
SelectType=select/cons_tres
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
NodeName=n[1-2] CPUs=64 Gres=gpu:8 State=CLOUD
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def check(document: dict[str, Any]) -> None:
    """Hold a document to its kind's schema, which knows every field."""
    if document["kind"] in CRDS:
        jsonschema.validate(document, closed(CRDS[document["kind"]]))
    else:
        kubernetes_validate = pytest.importorskip("kubernetes_validate")
        kubernetes_validate.validate(document, "1.33", strict=True)


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server warns of them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    fields = parts.get("properties")
    if isinstance(fields, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        parts.setdefault("additionalProperties", False)
    return parts


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_cluster_takes_the_file(document: dict[str, Any]) -> None:
    check(document)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_field_that_no_cluster_knows_is_found(document: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="misspelt"):
        check({**document, "spec": {**document["spec"], "misspelt": 1}})


def test_the_job_has_a_process_for_each_rank() -> None:
    job = next(d for d in yaml.safe_load_all(read("train.yaml")) if d["kind"] == "TrainJob")
    trainer = job["spec"]["trainer"]
    assert trainer["numNodes"] * trainer["numProcPerNode"] == ranks(" ".join(trainer["args"]))
    script = read("train.sbatch")
    nodes = int(found(r"--nodes=(\d+)", script))
    gpus = int(found(r"--gpus-per-node=(\d+)", script))
    assert gpus == int(found(r"--nproc-per-node (\d+)", script))
    assert nodes * gpus == ranks(script)


def test_both_engines_stand_behind_the_service() -> None:
    documents = list(yaml.safe_load_all(read("serve.yaml")))
    service = next(d["spec"] for d in documents if d["kind"] == "Service")
    pods = [d["spec"]["template"] for d in documents if d["kind"] == "Deployment"]
    assert len(pods) == 2
    for pod in pods:
        container = pod["spec"]["containers"][0]
        assert service["selector"].items() <= pod["metadata"]["labels"].items()
        assert container["ports"][0]["containerPort"] == service["ports"][0]["targetPort"]
        assert "--served-model-name=my-model" in container["args"]


def test_slurm_would_start_the_script(slurm: dict[str, str]) -> None:
    command = ["sbatch", "--test-only", str(SBATCH), "my.toml", "texts", "out"]
    said = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stderr
    assert re.search(r"Job 1 to start .* on nodes n\[1-2\]", said), said


def test_the_script_starts_one_torchrun_a_node(tmp_path: Path) -> None:
    for name, does in {"scontrol": 'printf "a\\nb\\n"', "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    command = ["bash", str(SBATCH), "my file.toml", "texts", "out"]
    said = subprocess.run(
        command, env={"PATH": path, **slurm}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[0] == "torchrun" and said[said.index("--rdzv-endpoint") + 1] == "a:29500"
    assert said[said.index("-m") :][:4] == ["-m", "moescope", "train", "my file.toml"]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each `moescope VERB ...` of the guide and its files: where it stands, and its words."""
    guide = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    places = {"scaling.md": "\n".join(re.findall(r"```sh\n(.*?)```", guide, re.S))}
    places["train.sbatch"] = read("train.sbatch")
    for place, text in places.items():
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if "moescope" in line else []
            verbs = [
                at for at, word in enumerate(words) if word == "moescope" and at + 1 < len(words)
            ]
            if verbs and (verbs[0] == 0 or words[verbs[0] - 1] == "-m"):
                yield place, words[verbs[0] + 1 :]
    job = next(d for d in yaml.safe_load_all(read("train.yaml")) if d["kind"] == "TrainJob")
    words = job["spec"]["trainer"]["args"]
    yield "train.yaml", words[words.index("moescope") + 1 :]


def test_the_commands_have_the_options_that_are_given() -> None:
    group: Any = typer.main.get_command(app)
    given = list(commands())
    assert len(given) >= 8 and {place for place, _ in given} == {
        *("scaling.md", "train.sbatch", "train.yaml")
    }
    for place, (verb, *words) in given:
        options = {name for parameter in group.commands[verb].params for name in parameter.opts}
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert asked <= options, (place, verb)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which a cluster of two nodes answers, which nobody starts."""
    server = shutil.which("slurmctld", path="/usr/sbin:/sbin:" + os.environ["PATH"])
    if server is None or shutil.which("sbatch") is None:
        pytest.skip("Slurm (slurmctld and slurm-client) is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    host = socket.gethostname().partition(".")[0]
    config = tmp_path / "slurm.conf"
    config.write_text(SLURM.format(host=host, port=port, user=user, folder=tmp_path))
    environment = {**os.environ, "SLURM_CONF": str(config)}
    running = subprocess.Popen(
        [server, "-D"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            if subprocess.run(["sinfo"], env=environment, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        else:
            pytest.skip("slurmctld does not answer on this machine")
        yield environment
    finally:
        running.terminate()
        running.wait()


def read(name: str) -> str:
    return (CLUSTER / name).read_text(encoding="utf-8")


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def ranks(command: str) -> int:
    return int(found(r"data=(\d+),expert=", command)) * int(found(r",expert=(\d+)", command))
