"""Settings that must be in place before torch is imported, and fixtures that every test folder shares."""

import os

# libgomp's workers spin while they wait: on a busy machine that makes small models several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# Where each core has a test process, these must not share theirs out a second time.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach for a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.command_line import (  # noqa: F401
    checkpoint,
    command,
    model,
    processor,
    stock_checkpoint,
)
