"""Eight virtual CPU devices for every test, and the data that the larger tests read."""

import os
import sys
from pathlib import Path

import pytest

NUM_DEVICES = 8
REPOSITORY = Path(__file__).resolve().parent.parent

assert "jax" not in sys.modules, "JAX reads these variables when it is imported, so they come first"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={NUM_DEVICES}",
        # This scheduler starts collectives in another order on each device: on few cores they wait
        # for each other for ever.
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        # Small models compile for longer than they run: half as long with these.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
)
# A compiled function is kept for the next session, for the other workers of this one, and for the
# commands that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPOSITORY / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets: GPTJAX_TEST_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("GPTJAX_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs data sets: {folder} is not there; GPTJAX_TEST_DATA may name the folder")
    return folder


@pytest.fixture(scope="session")
def tinyshakespeare(shared_data: Path) -> Path:
    """The text of Karpathy's tiny Shakespeare, 1,115,394 characters."""
    path = shared_data / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return path
