"""How fast devices multiply and ranks talk, and which of them is slower than its peers."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist

from launch.examine.finding import Finding
from launch.examine.gathering import gather
from trainer.distributed import Ranks

SLOW_DEVICE, SLOW_LINK = 0.85, 0.5
"""Of the median of the others. Links vary more: other jobs use the same switches."""
WINDOWS, WINDOW_SECONDS = 7, 0.1
TIMES = 3


def compare_devices(ranks: Ranks) -> list[Finding]:
    """Multiply matrices on all devices at once. Collective."""
    ranks.barrier()
    device = ranks.device
    name = f"GPU {device.index} of " if device.type == "cuda" else "CPU of "
    told = gather(ranks, [name, matmul_speed(device)])
    speeds: dict[str, float] = {}
    for host, (each, speed) in told:  # ranks of one host share its CPU
        speeds[each + host] = max(speed, speeds.get(each + host, 0.0))
    dtype, unit = ("bf16", "TFLOP/s") if device.type == "cuda" else ("fp32", "TFLOP/s per rank")
    low, high = min(speeds.values()), max(speeds.values())
    span = f"{low:.3g}" if len(speeds) == 1 else f"{low:.3g} to {high:.3g}"
    found = f"{span} {unit} ({dtype}) on {len(speeds)} device{'s' if len(speeds) > 1 else ''}"
    return [Finding(check="matmul", found=found), *slow_devices(speeds)]


def slow_devices(speeds: dict[str, float]) -> list[Finding]:
    """Name each device that is much slower than the others."""
    found = []
    for name, speed in speeds.items():
        peers = [other for each, other in speeds.items() if each != name]
        if peers and speed < SLOW_DEVICE * median(peers):
            share = 100 * speed / median(peers)
            found.append(Finding(
                check="slow device", found=f"{name} has {share:.0f} % of its peers' speed",
                needed=f">= {100 * SLOW_DEVICE:.0f} %", is_fine=False,
                remedy="look at its clocks, heat and other programs (nvidia-smi -q), or leave "
                "this node out",
            ))  # fmt: skip
    return found


def matmul_speed(device: torch.device) -> float:
    """Return TFLOP/s; the best of some windows, since what disturbs a device only slows it."""
    is_cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if is_cuda else (1024, torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    matrix @ matrix
    best = 0.0
    for _ in range(WINDOWS):
        _finish(device)
        begin, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - begin < WINDOW_SECONDS:
            for _ in range(20 if is_cuda else 1):
                matrix @ matrix
            _finish(device)
            count += 20 if is_cuda else 1
        best = max(best, count * 2 * size**3 / (time.perf_counter() - begin) / 1e12)
    return best


def time_collectives(ranks: Ranks) -> list[Finding]:
    """Return the bandwidths of the two collectives that training lives on. Collective."""
    count, device = ranks.placement.world_size, ranks.device
    num_bytes = (256 << 20) if device.type == "cuda" else (16 << 20)
    whole = torch.ones(num_bytes // 4 // count * count, device=device)
    piece = torch.ones(len(whole) // count, device=device)
    parts = list(torch.empty_like(whole).chunk(count))
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "all-reduce": (lambda: dist.all_reduce(whole), 2.0),
        "all-gather": (lambda: dist.all_gather(parts, piece), 1.0),
    }
    found = []
    for name, (call, passes) in calls.items():
        seconds = ranks.maximum([int(1e9 * _median_seconds(ranks, call))])[0] / 1e9
        speed = passes * (count - 1) / count * len(whole) * 4 / seconds / 1e9
        backend = dist.get_backend()
        text = f"{speed:.3g} GB/s over {count} ranks ({backend}, {num_bytes >> 20} MiB, bus)"
        found.append(Finding(check=name, found=text))
    return found


def compare_links(ranks: Ranks) -> list[Finding]:
    """Time every pair of ranks, many pairs at once, and name the slow ones. Collective."""
    count, rank = ranks.placement.world_size, ranks.placement.rank
    mine = [0.0] * count
    for row in rounds(count):
        peer = row.get(rank)
        ranks.barrier()
        if peer is not None:
            mine[peer] = _pair_speed(ranks, peer)
    told = gather(ranks, mine)
    hosts = [host for host, _ in told]
    links = {(a, b): min(told[a][1][b], told[b][1][a]) for a in range(count) for b in range(a)}
    found = []
    for is_between, name in ((False, "links in a host"), (True, "between hosts")):
        kind = {p: s for p, s in links.items() if (hosts[p[0]] != hosts[p[1]]) is is_between}
        if kind:
            middle = median(kind.values())
            text = f"{middle:.3g} GB/s each way ({len(kind)} pairs, {min(kind.values()):.3g} least)"
            found += [Finding(check=name, found=text), *slow_links(kind, hosts)]
    return found


def slow_links(links: dict[tuple[int, int], float], hosts: Sequence[str]) -> list[Finding]:
    """Name each pair that is much slower than most; a rank that is slow with all, once."""
    if len(links) < 3:
        return []  # nothing to compare with
    least = SLOW_LINK * median(links.values())
    slow = {pair for pair, speed in links.items() if speed < least}
    of = {rank: {p for p in links if rank in p} for pair in slow for rank in pair}
    alone = [rank for rank, pairs in of.items() if len(pairs) > 1 and pairs <= slow]
    covered = {pair for rank in alone for pair in of[rank]}
    names = [f"rank {rank} ({hosts[rank]}) with all others" for rank in sorted(alone)]
    names += [
        f"rank {b} ({hosts[b]}) with rank {a} ({hosts[a]}): {links[a, b]:.3g} GB/s"
        for a, b in sorted(slow - covered)
    ]
    return [
        Finding(
            check="slow link", found=name, needed=f">= {least:.3g} GB/s, half of the median",
            is_fine=False, remedy="look at that node's cable, card and switch, or leave it out",
        )
        for name in names
    ]  # fmt: skip


def rounds(count: int) -> list[dict[int, int]]:
    """Return rounds in which each rank has one partner at most; in all, each pair once."""
    seats = [*range(count), *([-1] * (count % 2))]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append({a: b for p in pairs if -1 not in p for a, b in (p, p[::-1])})
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def _pair_speed(ranks: Ranks, peer: int) -> float:
    """Return GB/s of sending and receiving at the same time."""
    num_bytes = (64 << 20) if ranks.device.type == "cuda" else (4 << 20)
    out = torch.ones(num_bytes // 4, device=ranks.device)
    into = torch.empty_like(out)

    def swap() -> None:
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
        )
        for work in works:
            work.wait()

    swap()
    _finish(ranks.device)
    seconds = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        swap()
        _finish(ranks.device)
        seconds.append(time.perf_counter() - begin)
    return num_bytes / min(seconds) / 1e9


def _median_seconds(ranks: Ranks, call: Callable[[], object]) -> float:
    call()  # connections are made
    seconds = []
    for _ in range(TIMES):
        _finish(ranks.device)
        ranks.barrier()
        begin = time.perf_counter()
        call()
        _finish(ranks.device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # sync: what is timed must be over
