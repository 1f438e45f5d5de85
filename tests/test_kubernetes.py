"""The profile of Kubernetes: what its plug-in sends to a recorded API. It was not run on a cluster."""

import json
import shutil
import sys

import pytest
import yaml
from conftest import ROOT

from scsa_book.training import sweep as sweeps

pytest.importorskip("snakemake_executor_plugin_kubernetes", reason="not needed for the book itself")
pytest.importorskip("snakemake_storage_plugin_fs", reason="not needed for the book itself")

# Snakemake's process imports this when it starts: jobs are written down, and run for ever.
RECORDED = """
import json
from pathlib import Path
from types import SimpleNamespace
from kubernetes import client, config

def create(self, namespace, body):
    text = json.dumps(client.ApiClient().sanitize_for_serialization(body))
    Path({folder!r}, body.metadata.name + ".json").write_text(text)

config.load_kube_config = lambda: None
client.BatchV1Api.create_namespaced_job = create
client.BatchV1Api.read_namespaced_job_status = lambda *given: SimpleNamespace(
    status=SimpleNamespace(failed=0, succeeded=0)
)
client.CoreV1Api.list_namespaced_pod = lambda *given, **named: SimpleNamespace(items=[])
for name in ("create_namespaced_secret", "delete_namespaced_secret"):
    setattr(client.CoreV1Api, name, lambda *given, **named: None)
client.BatchV1Api.delete_namespaced_job = lambda *given, **named: None
"""

EXPERIMENTS = """
large:
  title: on two GPUs
  preset: sample
  resources: {gpus: 2, cores: 8, memory: 32000}
  runs: [{attention: se}]
usual:
  title: what the profile says
  preset: sample
  runs: [{attention: eca}]
"""


def test_requests_and_limits_of_a_pod_are_equal(tmp_path, monkeypatch, capsys):
    (tmp_path / "nbs" / "runs").mkdir(parents=True)
    (tmp_path / "_quarto.yml").touch()
    (tmp_path / "nbs" / "runs" / "experiments.yml").write_text(EXPERIMENTS)
    shutil.copy(ROOT / "nbs" / "runs" / "Snakefile", tmp_path / "nbs" / "runs")
    profile = yaml.safe_load((ROOT / "profiles" / "kubernetes" / "config.yaml").read_text())
    profile["default-storage-prefix"] = str(tmp_path / "storage")
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "config.yaml").write_text(yaml.safe_dump(profile))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORDED.format(folder=str(tmp_path)))
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path / "site"), *sys.path]))
    monkeypatch.chdir(tmp_path)
    sweeps.sweep("large", "usual", profile=str(tmp_path / "profile"), time_limit=0.5)
    assert "2 runs are left" in capsys.readouterr().out
    pods = [
        json.loads(path.read_text())["spec"]["template"]["spec"] for path in tmp_path.glob("snakejob*.json")
    ]
    assert len(pods) == 2
    found = []
    for pod in pods:
        (container,) = pod["containers"]
        wanted, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert wanted["nvidia.com/gpu"] == limits["nvidia.com/gpu"], "the API refuses anything else"
        assert wanted["memory"] == limits["memory"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/workdir", "/book"}
        found.append((limits["nvidia.com/gpu"], limits["cpu"], limits["memory"]))
    assert sorted(found) == [("1", "4000m", "16000M"), ("2", "8000m", "32000M")]
