"""What is left of the host's memory, from files as Linux has them."""

import pytest

from indexcache_jax import host_memory

MIB = 2**20


@pytest.fixture
def host(tmp_path):
    """Writes files below a folder that stands for /."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    write({"proc/meminfo": "MemTotal: 4096000 kB\nMemFree: 1000 kB\nMemAvailable:    2048000 kB\n"})
    return write


def group(limit, used, file_cache, version=2):
    names = (
        ("memory.max", "memory.current", "") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    stat = f"anon 5\n{names[2]}inactive_file {file_cache - 1}\n{names[2]}active_file 1\ninactive_file_other 7\n"
    return {names[0]: f"{limit}\n", names[1]: f"{used}\n", "memory.stat": stat}


def below(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


def test_without_control_groups_it_is_what_the_machine_has_left(host):
    assert host_memory.available(host({})) == 2000 * MIB
    assert 0 < host_memory.available() < 2**50


def test_a_container_sees_its_own_group_on_top(host):
    root = host({"proc/self/cgroup": "0::/\n"} | below("sys/fs/cgroup", group(900 * MIB, 500 * MIB, 100 * MIB)))
    assert host_memory.available(root) == 500 * MIB  # caches of files are given up


def test_the_tightest_of_all_groups_above_decides(host):
    files = {"proc/self/cgroup": "0::/batch/job\n"}
    files |= below("sys/fs/cgroup/batch/job", group("max", 10, 1))
    files |= below("sys/fs/cgroup/batch", group(300 * MIB, 100 * MIB, 1 * MIB))
    assert host_memory.available(host(files)) == 201 * MIB
    files |= below("sys/fs/cgroup/batch", group(300 * MIB, 400 * MIB, 1 * MIB))
    assert host_memory.available(host(files)) == 0


def test_groups_of_the_first_version(host):
    files = {"proc/self/cgroup": "11:memory:/elsewhere\n10:cpu,cpuacct:/elsewhere\n"}
    root = host(files | below("sys/fs/cgroup/memory", group(50 * MIB, 20 * MIB, 5 * MIB, version=1)))
    assert host_memory.available(root) == 35 * MIB


def test_a_host_without_such_files_has_its_physical_memory(tmp_path):
    assert host_memory.available(tmp_path) > 2**28
