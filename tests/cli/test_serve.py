"""``dynamic-llava serve``: what it refuses, how it starts vLLM, and a whole run of the server beside it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="starlette is not installed; the extra serve has it")

from tests.command_line import Command, refused

from dynamic_llava.cli.serve import vllm_command, vllm_environment


def test_what_cannot_be_served_is_refused(command: Command) -> None:
    engine = ("--engine", "transformers")
    assert "nowhere" in refused(command, "serve", *engine, "--model", "./nowhere")
    assert "no further options" in refused(command, "serve", *engine, "--", "--max-model-len", 100)


def test_vllm_gets_what_it_needs(checkpoint: Path) -> None:
    line = vllm_command(str(checkpoint), "127.0.0.1", 8000, (), None, ["--max-model-len", "100"])
    text = " ".join(line)
    assert "dynamic_llava.page.beside_vllm.Beside" in text
    assert "--served-model-name tiny" in text
    assert "--allowed-media-domains none.invalid" in text  # nothing is fetched
    assert "--shutdown-timeout 120" in text
    assert line[-2:] == ["--max-model-len", "100"]


def test_vllm_gets_bounds_and_the_key_by_its_environment() -> None:
    found = vllm_environment({"HOME": "x", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1"}, "secret")
    assert (found["HOME"], found["VLLM_API_KEY"]) == ("x", "secret")
    assert found["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert found["VLLM_MAX_IMAGE_PIXELS"] == "16000000"
    assert vllm_environment({"VLLM_MAX_IMAGE_PIXELS": "9"}, "")["VLLM_MAX_IMAGE_PIXELS"] == "9"
    assert "VLLM_API_KEY" not in vllm_environment({}, "")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM is not sent there")
def test_it_serves_and_ends_after_what_is_under_way(checkpoint: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "dynamic_llava",
        "serve",
        "--engine=transformers",
        "--port=0",
        "--device=cpu",
    ]
    around = os.environ | {"DYNAMIC_LLAVA_API_KEY": "k"}
    process = subprocess.Popen(
        [*line, f"--model={checkpoint}"], env=around, stderr=subprocess.PIPE, text=True
    )
    try:
        said = []
        for written in process.stderr or ():
            said.append(written)
            if found := re.search(r"running on (http://\S+)", written):
                break
        else:
            pytest.fail("".join(said))
        address = found[1]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/v1/models", timeout=60)
        data = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", data, {"Authorization": "Bearer k"}
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            stream.readline()
            process.send_signal(signal.SIGTERM)
            assert stream.read().endswith(b"data: [DONE]\n\n")
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
