"""Which limit counts, what is used of it, and what follows; on files as kernels make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_orchestrator.engine.memory import HIGH, LOW, Memory, Pressure, Reading

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


def tree(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


OWN = {
    "proc/self/statm": f"9999 {100 * MIB // PAGE} 1 1 0 1 0\n",
    "proc/meminfo": "MemTotal: 4096 kB\n",
}


def v2(path: str, limit: str, use: int, cache: int) -> dict[str, str]:
    base = f"sys/fs/cgroup{path}"
    stat = f"anon 1\ninactive_file {cache}\nactive_file 7\n"
    return {
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.current": f"{use}\n",
        f"{base}/memory.stat": stat,
    }


def v1(path: str, limit: int, use: int, cache: int) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory{path}"
    return {
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{use}\n",
        f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }


def test_a_parents_limit_counts_and_the_page_cache_does_not(tmp_path: Path) -> None:
    files = {
        **OWN,
        "proc/self/cgroup": "0::/app.slice/llmo.service\n",
        **v2("/app.slice/llmo.service", "max", 50 * MIB, 0),
        **v2("/app.slice", str(200 * MIB), 150 * MIB, 40 * MIB),
        **v2("", "max", 900 * MIB, 0),
    }
    memory = Memory(root=tree(tmp_path, files))
    assert memory.read() == Reading(110 * MIB, 200 * MIB, "control group /app.slice")


def test_the_tightest_of_several_limits_counts(tmp_path: Path) -> None:
    files = {
        **OWN,
        "proc/self/cgroup": "0::/a/b\n",
        **v2("/a/b", str(400 * MIB), 100 * MIB, 0),
        **v2("/a", str(500 * MIB), 490 * MIB, 0),
    }
    assert Memory(root=tree(tmp_path, files)).read().source == "control group /a"
    assert Memory(101 * MIB, root=tmp_path).read().source == "memory_limit_mb"


def test_version_one_is_read_and_its_unlimited_is_none(tmp_path: Path) -> None:
    files = {
        **OWN,
        "proc/self/cgroup": "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n1:name=systemd:/x\n",
        **v1("/docker/abc", 0x7FFFFFFFFFFFF000, 60 * MIB, 0),
        **v1("", 300 * MIB, 80 * MIB, 30 * MIB),
    }
    memory = Memory(root=tree(tmp_path, files))
    assert [bound.limit for bound in memory.bounds] == [300 * MIB]
    assert memory.read().use == 50 * MIB


def test_in_a_container_whose_path_is_the_hosts_the_root_is_ours(tmp_path: Path) -> None:
    files = {
        **OWN,
        "proc/self/cgroup": "0::/../../kubepods/pod1\n",
        **v2("", str(128 * MIB), 64 * MIB, 0),
    }
    assert Memory(root=tree(tmp_path, files)).read() == Reading(
        64 * MIB, 128 * MIB, "control group /"
    )


def test_without_any_limit_the_machine_counts_and_without_proc_nothing(tmp_path: Path) -> None:
    files = {
        **OWN,
        "proc/self/cgroup": "0::/\n",
        "proc/meminfo": "MemFree: 1 kB\nMemTotal: 204800 kB\n",
    }
    memory = Memory(root=tree(tmp_path / "linux", files))
    assert memory.read() == Reading(100 * MIB, 200 * MIB, "the machine's memory")
    assert Memory(root=tmp_path / "nothing").read().share == 0.0


def test_this_process_reads_its_own_use() -> None:
    before = Memory(1 << 40).bounds[-1].use()
    held = bytearray(b"x") * (64 * MIB)
    grown = Memory(1 << 40).bounds[-1].use() - before
    assert grown >= 60 * MIB
    del held


def at(share: float) -> Reading:
    return Reading(int(share * 1_000), 1_000, "a test")


def test_it_sheds_from_high_until_low_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    pressure = Pressure(runs_max=100)
    states = []
    for share in (0.5, HIGH - 0.01, HIGH, 0.95, 0.75, LOW, LOW - 0.01, 0.75):
        pressure.take(at(share), driven=40)
        states.append(pressure.is_shedding)
    assert states == [False, False, True, True, True, True, False, False]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "runs are let go" in said[0]
    assert "claimed again" in said[1]


def test_an_empty_process_claims_again_although_it_does_not_shrink() -> None:
    pressure = Pressure(runs_max=100)
    states = []
    for share, driven in ((0.9, 10), (0.75, 1), (0.75, 0), (0.9, 0)):
        pressure.take(at(share), driven=driven)
        states.append(pressure.is_shedding)
    assert states == [True, True, False, True], "at last nothing fits, however empty it is"


def test_the_ceiling_falls_to_half_and_grows_only_where_it_is_reached() -> None:
    pressure = Pressure(runs_max=100)
    pressure.take(at(0.85), driven=40)
    assert pressure.ceiling == 20
    pressure.take(at(0.90), driven=30)
    assert pressure.ceiling == 20, "one shedding halves it once"
    pressure.take(at(0.50), driven=5)
    pressure.take(at(0.50), driven=5)
    assert pressure.ceiling == 20
    pressure.take(at(0.50), driven=20)
    assert pressure.ceiling == 23
    pressure.take(at(0.75), driven=23)
    assert pressure.ceiling == 24
    for _ in range(100):
        pressure.take(at(0.1), driven=100)
    assert pressure.ceiling == 100
    pressure.resize(10)
    assert pressure.ceiling == 10
    pressure.resize(50)
    assert pressure.ceiling == 50
