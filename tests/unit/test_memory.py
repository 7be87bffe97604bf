"""What worker processes do with memory that they have freed."""

import subprocess
import sys

import pytest

from lance_ray import memory

PROGRAM = """if True:
    import resource
    from concurrent.futures import ThreadPoolExecutor
    from lance_ray.memory import keep_freed_memory
    import ctypes
    kept = keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    def touch():
        pieces = [libc.malloc(4 << 20) for _ in range(16)]
        for piece in pieces:
            ctypes.memset(piece, 1, 4 << 20)
        for piece in pieces:
            libc.free(piece)
    touch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> tuple[bool, int]:
    monkeypatch.setenv("LANCE_RAY_KEEP_FREED_BYTES", str(kept_bytes))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_freed_by_one_task_is_used_again_by_the_next_without_page_faults(monkeypatch):
    kept, count = faults(monkeypatch, 256 * 1024**2)
    assert kept
    assert count < 1000  # 64 MB are 16,384 pages


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
@pytest.mark.slow
def test_zero_bytes_leave_the_allocator_alone(monkeypatch):
    kept, count = faults(monkeypatch, 0)
    assert not kept
    assert count > 10_000


def node(cpus: float, store: float | None, *, alive: bool = True) -> dict[str, object]:
    resources = {"CPU": cpus} | ({} if store is None else {"object_store_memory": store})
    return {"Alive": alive, "Resources": resources}


def test_a_task_may_fill_a_quarter_of_what_the_scarcest_node_has_for_each_cpu(monkeypatch: pytest.MonkeyPatch):
    nodes = [node(2, 1600), node(4, 1600), node(1, 10, alive=False), node(0, 10), node(8, None)]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: nodes)

    assert memory.object_store_share() == 100


def test_without_a_cluster_a_task_may_fill_anything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    assert memory.object_store_share() == sys.maxsize
