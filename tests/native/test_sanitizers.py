"""The native half without Python, under AddressSanitizer and UBSan, and under ThreadSanitizer."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = ("_guard", "_map", "_shoot", "_fault", "_handler", "_commit", "_device", "_cache", "_cached", "_evict", "_absent")
SOURCES = [HERE / "driver.c", *(HERE.parents[1] / "daxemu" / f"{name}.c" for name in NAMES)]
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
COMPILER = os.environ.get("CC", "cc")
SEED = 20261
SIGNALS = "handle_segv=0:allow_user_segv_handler=1"  # SIGSEGV is the engine's

# gcc warns that ThreadSanitizer does not know atomic_thread_fence. What stands before and after the fence in `shoot` is
# sequentially consistent by itself, so nothing is missed. die_after_fork=0: forked children start a service thread.
# To it the parent's threads still live in a forked child, where a new one may get the address of one of them: KNOWN.
# ThreadSanitizer sees the threads of one process and not those of another: what processes do to each other is for
# tests/model_faults.
SANITIZERS = {
    "none": ([], {}),
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        {"ASAN_OPTIONS": f"{SIGNALS}:detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"},
    ),
    "thread": (["-fsanitize=thread", "-Wno-tsan"], {"TSAN_OPTIONS": f"{SIGNALS}:die_after_fork=0:halt_on_error=0"}),
}
KNOWN = "dup thread with used id"


@pytest.fixture(scope="module", params=SANITIZERS)
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The driver, compiled with one set of sanitizers, and what it wants in its environment."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C compiler ({COMPILER})")
    flags, environment = SANITIZERS[request.param]
    folder = tmp_path_factory.mktemp("native")
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    if flags:
        built = subprocess.run([COMPILER, *flags, probe, "-o", folder / "probe"], check=False, capture_output=True, text=True)
        if built.returncode or subprocess.run([folder / "probe"], check=False, env={**os.environ, **environment}).returncode:
            pytest.skip(f"this compiler has no {flags[0]}: {built.stderr[-200:]}")
    program = folder / "driver"
    command = [COMPILER, *WARNINGS, *flags, "-O1", "-g", "-pthread", *SOURCES, "-o", program]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not built.returncode, built.stderr
    return program, {**os.environ, **environment}


KINDS = {"stores": "", "deaths": "k", "forks": "f", "both": "k f", "slots-again": "k f r"}


def drive(driver: tuple[Path, dict[str, str]], *what: object, seconds: int = 0) -> str:
    """Run the driver; return what it says at the end."""
    program, environment = driver
    command = [str(program), *map(str, what)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            out, said = process.communicate(timeout=60 + seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"the driver hangs: {process.communicate()[1][-2000:]}")
    said = "".join(line for line in said.splitlines(keepends=True) if KNOWN not in line)
    assert "runtime error" not in said and "Sanitizer" not in said, said[:8000]
    assert process.returncode == 0, said[-4000:]
    return out


@pytest.mark.parametrize("kind", ["stores", "deaths", "slots-again"])
def test_driver(driver: tuple[Path, dict[str, str]], kind: str) -> None:
    """Processes store, clone, move, fork and die: no report, nothing lost, nothing left locked."""
    assert " clones" in drive(driver, 2, SEED, *KINDS[kind].split(), seconds=2)


@pytest.mark.parametrize("what", ["fork", "sweep", "sweep-heir"])
def test_a_rare_order(driver: tuple[Path, dict[str, str]], what: str) -> None:
    """A fork while a message is on its way; a sweep while a store, or who takes over from it, waits for who is slow."""
    drive(driver, "force", what)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED + 1, SEED + 2])
@pytest.mark.parametrize("kind", KINDS)
def test_driver_for_longer(driver: tuple[Path, dict[str, str]], kind: str, seed: int) -> None:
    """The same, for longer, of all kinds."""
    assert " clones" in drive(driver, 10, seed, *KINDS[kind].split(), seconds=10)
