"""The examples of deployment: files that can be read, and that say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("yaml", reason="PyYAML is not installed; the extra train has it")

import yaml

from dynamic_llava.vllm.rates import settings

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def read(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def test_kubernetes_serves_what_ray_serves() -> None:
    assert yaml.safe_load(read("ray/kubernetes.yaml")["spec"]["serveConfigV2"]) == read("ray/serve.yaml")


@pytest.mark.parametrize("name", ["ray/serve.yaml", "ray/cpu.yaml"])
def test_two_replicas_are_served(name: str) -> None:
    (application,) = read(name)["applications"]
    (model,) = application["args"]["llm_configs"]
    assert model["deployment_config"]["num_replicas"] == 2
    settings(model["engine_kwargs"].get("additional_config", {}))


def test_compose_starts_the_server_again_always() -> None:
    (service,) = read("serving/compose.yaml")["services"].values()
    assert service["restart"] == "always"
    assert (EXAMPLES.parent / service["build"]["dockerfile"]).is_file()
