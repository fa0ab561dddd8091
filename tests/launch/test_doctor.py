"""`tessera doctor`, and the floors that it and pyproject.toml have in common."""

import json
import os
import pty
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main
from launch.examine import folder, machine
from launch.examine.finding import Finding, line, screen, verdict
from launch.examine.hosts import compare_versions, first_ranks
from launch.examine.ranks import default_processes
from launch.examine.speed import rounds, slow_devices, slow_links
from launch.exit_codes import BAD_CONFIG
from launch.floors import FLOORS, PYTHON, Floor, is_below
from launch.slurm_step import first_host, ranks_of_step
from tests.test_architecture import ROOT
from trainer import cgroup

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors_of(requirements: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found if match}


def test_pyproject_and_the_table_have_the_same_floors() -> None:
    ours = {name: floor.version for name, floor in FLOORS.items() if floor.is_ours}
    required = floors_of(PROJECT["dependencies"])
    extras = floors_of(
        [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    )
    assert len(required) == len(PROJECT["dependencies"])
    assert ours == required | {name: extras[name] for name in ours if name not in required}
    assert PROJECT["requires-python"] == ">=" + ".".join(map(str, PYTHON))
    assert all(floor.reason for floor in FLOORS.values())


@pytest.mark.parametrize(
    ("version", "floor", "is_old"),
    [
        ("2.13.0+cpu", "2.11", False), ("2.11", "2.11.0", False), ("2.11.0", "2.11", False),
        ("2.9.1", "2.11", True), ("1.3.7", "1.3.8", True), ("1.10", "1.9", False),
        ("5.3.0rc1", "5.3", False), ("13.0.0", "13.0", False), ("12.3.0", "13.0", True),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version: str, floor: str, is_old: bool) -> None:
    assert is_below(version, floor) is is_old


def test_a_version_below_its_floor_is_said_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    floor = Floor(version="99", reason="CVE-0000-1 (before 99)")
    monkeypatch.setattr(machine, "FLOORS", {"numpy": floor, "no-such-package": floor})
    (finding,) = machine.check_versions()
    assert not finding.is_fine
    assert line(finding).startswith("  BAD   numpy ")
    assert line(finding).endswith("needed >= 99; pip install 'numpy>=99': CVE-0000-1 (before 99)")


def test_the_machine_is_looked_at_without_torch_and_nothing_is_left_behind(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from launch.doctor import _look\n"
        "print([each.check for each in _look(Path(sys.argv[1]), False) if not isinstance(each, "
        "str)], 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "not" / "there")]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in ("python", "torch", "cores", "memory", "/dev/shm", "open files", "runs", "disk",
                 "writers", "clock of disk", "write speed"):  # fmt: skip
        assert f"'{name}'" in said
    assert said.strip().endswith("False")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_everybody_may_write_in_is_bad_unless_sticky(tmp_path: Path) -> None:
    for mode, is_fine in ((0o777, False), (0o1777, True), (0o755, True), (0o775, True)):
        tmp_path.chmod(mode)
        assert folder.check_writers(tmp_path).is_fine is is_fine


def test_what_is_too_small_or_too_slow_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder.check_disk(tmp_path).is_fine
    monkeypatch.setattr(folder, "MIN_DISK", 1 << 60)
    finding = folder.check_disk(tmp_path)
    assert not finding.is_fine
    assert finding.remedy == "delete old runs, or set runs=DIR on another disk"
    monkeypatch.setattr(folder, "MAX_SKEW_SECONDS", -1.0)
    assert not folder.check_clock(tmp_path).is_fine
    monkeypatch.setattr(folder, "MIN_SPEED", 1e9)
    assert not folder.check_speed(tmp_path).is_fine


def test_the_kind_of_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    share = tmp_path / "my share"
    (share / "runs").mkdir(parents=True)
    mounts = tmp_path / "mountinfo"
    escaped = str(share).replace(" ", "\\040")
    mounts.write_text(
        "20 1 8:1 / / rw - ext4 /dev/vda rw\n"
        f"21 20 0:5 / {tmp_path} rw shared:1 - xfs /dev/vdb rw\n"
        f"22 21 0:6 / {escaped} rw - nfs4 server:/share rw\n"
    )
    assert folder.mount_of(share / "runs", mounts) == ("nfs4", str(share))
    assert folder.mount_of(tmp_path, mounts) == ("xfs", str(tmp_path))
    assert folder.mount_of(Path("/usr"), mounts) == ("ext4", "/")
    assert folder.NETWORK.fullmatch("nfs4")
    assert not folder.NETWORK.fullmatch("ext4")


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


GROUP = "sys/fs/cgroup"


def test_limits_of_a_container_are_those_of_the_narrowest_level(tmp_path: Path) -> None:
    new = tree(tmp_path / "new", {
        "proc/self/cgroup": "0::/pod/one\n",
        f"{GROUP}/pod/one/memory.max": "max\n", f"{GROUP}/pod/one/memory.current": "7\n",
        f"{GROUP}/pod/memory.max": "1000\n", f"{GROUP}/pod/memory.current": "600\n",
        f"{GROUP}/pod/memory.stat":
            "anon 450\ninactive_file 50\nactive_file 90\nslab_reclaimable 10\nslab 30\n",
        f"{GROUP}/pod/one/cpu.max": "max 100000\n", f"{GROUP}/pod/cpu.max": "150000 100000\n",
    })  # fmt: skip
    assert cgroup.memory_left(new) == (550, 1000)
    assert cgroup.cores(new) == 1.5
    assert cgroup.free_memory(tree(new, {"proc/meminfo": "MemAvailable: 2 kB\n"})) == 550
    old = tree(tmp_path / "old", {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        f"{GROUP}/memory/memory.limit_in_bytes": "2000", f"{GROUP}/cpu/cpu.cfs_quota_us": "50000",
        f"{GROUP}/memory/memory.usage_in_bytes": "2500", f"{GROUP}/cpu/cpu.cfs_period_us": "100000",
        f"{GROUP}/memory/docker/abc/memory.limit_in_bytes": "900",
        f"{GROUP}/memory/docker/abc/memory.usage_in_bytes": "800",
        f"{GROUP}/memory/docker/abc/memory.stat":
            "active_file 1\ntotal_inactive_file 20\ntotal_active_file 300\n",
    })  # fmt: skip
    assert cgroup.memory_left(old) == (0, 2000)
    tree(old, {f"{GROUP}/memory/memory.usage_in_bytes": "1000"})
    assert cgroup.memory_left(old) == (420, 900)
    assert cgroup.cores(old) == 0.5


def test_without_limits_nothing_is_limited(tmp_path: Path) -> None:
    free = tree(tmp_path, {
        "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
        f"{GROUP}/memory/memory.limit_in_bytes": "9223372036854771712",
        f"{GROUP}/memory/memory.usage_in_bytes": "5", f"{GROUP}/cpu/cpu.cfs_quota_us": "-1",
        f"{GROUP}/cpu/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert cgroup.memory_left(free) is None
    assert cgroup.free_memory(free) > 1 << 50  # not known
    assert cgroup.free_memory(tree(free, {"proc/meminfo": "MemAvailable: 2 kB\n"})) == 2048
    assert cgroup.cores(free) is None
    assert cgroup.cores(tmp_path / "nowhere") is None


def test_few_open_files_are_bad_and_locked_memory_only_beside_network_cards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    files, processes, locked = machine.check_limits()
    assert not files.is_fine
    assert files.found == "256 (may be raised to 4096)"
    assert files.remedy == "ulimit -n 65536"
    assert not processes.is_fine
    assert locked.is_fine
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: unlimited)
    assert all(finding.is_fine for finding in machine.check_limits())


def test_a_limit_that_only_root_can_raise_is_said_with_where_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    files, *_ = machine.check_limits()
    assert files.remedy.startswith("as root: raise nofile in /etc/security/limits.conf ")
    assert files.remedy.endswith("--ulimit nofile=.., then ulimit -n 65536")


def test_sizes_below_a_gibibyte_are_said_in_mebibytes() -> None:
    few = Finding.of_size("disk", free=23 << 20, total=3 << 30, least=64 << 20, remedy="make room")
    assert (few.found, few.needed, few.is_fine) == (
        "23.0 MiB of 3.0 GiB free",
        ">= 64.0 MiB",
        False,
    )


@pytest.mark.slow  # 90 s: rank 0 waits that long for another to come
@pytest.mark.timeout(600)
def test_a_rank_that_fails_alone_is_named_beside_what_the_first_one_saw(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from launch.examine import ranks

    whole = ranks._environments

    def environments(processes: int) -> Iterator[dict[str, str]]:
        for number, each in enumerate(whole(processes)):
            yield each | ({"GLOO_SOCKET_IFNAME": "none0"} if number == 1 else {})

    monkeypatch.setattr(ranks, "_environments", environments)
    monkeypatch.setattr(ranks, "safe_paths", lambda _: {"PYTHONPATH": str(ROOT)})
    *_, first, second = ranks.examine_here(2, tmp_path, is_quick=True)
    assert isinstance(first, Finding)
    assert first.found.startswith("connecting, rank 0: ")
    assert isinstance(second, Finding)
    assert second.found.startswith("connecting, rank 1: ")
    assert second.found.endswith("Unable to find address for: none0")


def test_ranks_that_do_not_end_are_told_with_what_they_were_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from launch.examine import ranks

    monkeypatch.setattr(ranks, "LIMIT_SECONDS", 0.5)  # importing torch takes longer
    (finding,) = ranks.examine_here(1, tmp_path, is_quick=True)
    assert isinstance(finding, Finding)
    assert finding.found == "starting: not done after 0 s"


def test_a_device_much_slower_than_its_peers_is_named() -> None:
    assert slow_devices({"GPU 0 of a": 100.0, "GPU 1 of a": 90.0}) == []
    assert slow_devices({"CPU of a": 1.0}) == []
    speeds = {f"GPU {number} of b": 100.0 + number for number in range(4)}
    (finding,) = slow_devices(speeds | {"GPU 4 of b": 60.0})
    assert finding.found == "GPU 4 of b has 59 % of its peers' speed"


def test_every_pair_of_ranks_meets_once_and_nobody_twice_in_a_round() -> None:
    for count in (1, 2, 3, 6, 9):
        met = []
        for row in rounds(count):
            assert all(row[row[rank]] == rank != row[rank] for rank in row)
            met += [frozenset(pair) for pair in row.items()]
        pairs = {frozenset((a, b)) for a in range(count) for b in range(a)}
        assert set(met) == pairs
        assert len(met) == 2 * len(pairs)


def test_a_slow_pair_is_named_and_a_rank_that_is_slow_with_all_once() -> None:
    hosts = ["a", "b", "c", "d", "e"]
    links = {(a, b): 10.0 for a in range(5) for b in range(a)}
    assert slow_links(links, hosts) == []
    (pair,) = slow_links(links | {(3, 1): 2.0}, hosts)
    assert pair.found == "rank 1 (b) with rank 3 (d): 2 GB/s"
    (alone,) = slow_links(links | {pair: 2.0 for pair in links if 2 in pair}, hosts)
    assert alone.found == "rank 2 (c) with all others"


def test_hosts_that_differ_in_a_version_are_named() -> None:
    assert first_ranks(["a", "a", "b", "a", "c"]) == [0, 2, 4]
    old, new = (Finding(check="torch", found=version) for version in ("2.12", "2.13"))
    assert compare_versions([("a", [new]), ("b", [new])]) == []
    (finding,) = compare_versions([("a", [new]), ("b", [new]), ("c", [old])])
    assert finding.found == "torch 2.13 on a, 2.12 on c"


def test_as_many_processes_are_started_as_there_are_gpus(tmp_path: Path) -> None:
    few = min(2, len(os.sched_getaffinity(0)))
    assert default_processes({}, tmp_path) == few
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert default_processes({}, tmp_path) == 3
    assert default_processes({"CUDA_VISIBLE_DEVICES": "1,2"}, tmp_path) == 2
    assert default_processes({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == few


def test_a_process_of_srun_knows_its_rank_and_a_batch_script_has_none() -> None:
    assert first_host("n[01-03,7],m2") == "n01"
    assert [first_host(each) for each in ("a", "a,b", "r1n[3,5]-ib,x")] == ["a", "a", "r1n3-ib"]
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    assert ranks_of_step(batch) == {}
    step = batch | {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_ID": "1",
    }  # fmt: skip
    found = ranks_of_step(step)
    assert {key: found[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1",
    }  # fmt: skip
    assert 20_000 <= int(found["MASTER_PORT"]) < 32_000
    assert ranks_of_step(step | {"RANK": "0"}) == {}


BAD = Finding(
    check="disk", found="0.1 of 9 GiB free", needed=">= 1 GiB", is_fine=False,
    remedy="delete old runs, which lie there for a long time already, or set runs=DIR",
)  # fmt: skip


def test_a_screen_is_never_too_narrow_and_without_colors_where_they_are_not_wanted() -> None:
    for width in (50, 80, 140):
        plain = screen(BAD, width, has_colors=False)
        assert max(map(len, plain.splitlines())) <= width
        assert "\x1b" not in plain
        assert "remedy: delete" in plain
    assert "\x1b[1;31mBAD" in screen(BAD, 80, has_colors=True)


def test_the_verdict_counts_what_is_bad() -> None:
    assert verdict([Finding(check="a", found="")]).startswith("ready: 1 checks")
    assert verdict([BAD, BAD, Finding(check="b", found="", is_fine=False)]) == (
        "not ready: 2 problems: disk, b"
    )


@pytest.mark.parametrize(
    "word", ["json=maybe", "fix=true", "--json", "processes=0", "quick=1", "run=x"]
)
def test_unknown_options_are_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", word]) == BAD_CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 1


def read_terminal(words: list[str], **environ: str) -> tuple[int, str]:
    """Run a command on a terminal of its own; return its exit code and what it drew."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | environ, cwd=ROOT
    )
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(mine, 4096):
            drawn += part
    except OSError:  # Linux says so that the other side is closed
        pass
    os.close(mine)
    return process.wait(), drawn.decode()


@pytest.mark.slow  # compiles kernels: 12 s of a free core, minutes on a busy machine
@pytest.mark.timeout(600)
def test_two_processes_try_kernels_and_time_what_connects_them(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "launch", "doctor", f"runs={tmp_path}", "processes=2"]
    done = subprocess.run([*words, "json=true"], cwd=ROOT, capture_output=True, text=True)
    told = json.loads(done.stdout)
    names = [finding["check"] for finding in told["findings"]]
    bad = [finding for finding in told["findings"] if not finding["is_fine"]]
    assert done.returncode == (0 if told["is_ready"] else 1), done.stderr
    assert told["is_ready"] == (not bad), bad
    for name in ("torch build", "compile", "flex", "sdpa", "flash", "varlen", "matmul",
                 "all-reduce", "all-gather", "links in a host"):  # fmt: skip
        assert names.count(name) == 1
    assert "ranks" not in names


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_terminal_it_shows_what_it_does_and_no_color_where_none_is_wanted(
    tmp_path: Path,
) -> None:
    words = [sys.executable, "-m", "launch", "doctor", f"runs={tmp_path}", "processes=1",
             "quick=true"]  # fmt: skip
    _, drawn = read_terminal(words, NO_COLOR="1", COLUMNS="80", TERM="xterm")
    assert "  ...   importing torch" in drawn
    assert "\x1b[3" not in drawn
    shown = re.sub(r"[^\n]*\r\x1b\[K", "", drawn.replace("\r\n", "\n"))
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^(ready|not ready): ", shown, re.MULTILINE)


def test_a_rank_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from launch.examine import ranks

    broken = tmp_path / "torch"  # found before the real one
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcuda.so.1: no such file')")
    monkeypatch.setattr(ranks, "safe_paths", lambda _: {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    findings = list(ranks.examine_here(1, tmp_path, is_quick=True))
    assert isinstance(findings[-1], Finding)
    assert "rank 0 ended with code 1: OSError: libcuda.so.1: no such file" in findings[-1].found
    assert not findings[-1].is_fine
