"""Bytes are said in a unit that shows them: disks in powers of ten, memory of two."""

from trainer.sizes import in_memory, on_disk


def test_what_lies_on_a_disk_counts_in_powers_of_ten() -> None:
    found = [on_disk(number) for number in (0, 40e3, 99e6, 140e9)]
    assert found == ["0.0 kB", "40.0 kB", "99.0 MB", "140.0 GB"]


def test_memory_counts_in_powers_of_two() -> None:
    assert [in_memory(number) for number in (100, 64 << 10, 23 << 20)] == [
        "0.1 KiB", "64.0 KiB", "23.0 MiB",
    ]  # fmt: skip
    assert in_memory(3 << 29, digits=2) == "1.50 GiB"
