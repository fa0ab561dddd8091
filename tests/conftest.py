"""Fixtures of all tests: one thread, no network, tiny specs."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from models.llama import LlamaSpec
from tests.ranks import cache_folder
from tests.sharing import run_share

Figure = Callable[..., None]
LONGEST = ("test_readme", "test_supervisor")
GPU_TESTS = Path(__file__).resolve().parent / "gpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The same examples each time, on a slow machine too: no change lands or fails by luck.
# Other ones each time: `pytest --hypothesis-profile=default`.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")
# A shell's background jobs ignore Ctrl-C, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two cores serve several ranks; and sums come out the same on every machine."""
    torch.set_num_threads(1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, unless tests of them alone are run: others fork ranks, where CUDA cannot start."""
    paths = [Path(text.partition("::")[0]).resolve() for text in config.args]
    if not all(path.is_relative_to(GPU_TESTS) for path in paths):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--triples",
        action="store_true",
        help="run the layout matrix over all triples of choices, not all pairs",
    )
    parser.addoption(
        "--share",
        type=Path,
        metavar="FOLDER",
        help="run the files of tests that no other process with the same folder has begun",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first: several processes end at about the same time.

    Tests of JAX come last: a process with its threads should not be forked into ranks.
    """
    items.sort(key=lambda item: (item.path.stem not in LONGEST, "jax" in item.path.stem))


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    folder = session.config.getoption("--share")
    if folder is None or session.testsfailed or session.config.option.collectonly:
        return None  # pytest's own loop
    return run_share(session, folder)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how large the layout matrix was, and how long it took."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "test_matrix.py::test_the_layout" in report.nodeid and report.when == "call"
    ]
    if reports:
        kind = "triples" if config.getoption("--triples") else "pairs"
        seconds = sum(report.duration for report in reports)
        terminalreporter.write_line(
            f"layout matrix: {len(reports)} cases hold all {kind} of choices, {seconds:.0f} s"
        )


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Record name, value and unit of what a test measured, where TESSERA_FIGURES names a file.

    There, and only there, it has to be below `goal`: other work on a machine costs seconds.
    """
    from tests.faults.figures import append

    def record(name: str, value: float | str, unit: str, *, goal: float | None = None) -> None:
        if file := os.environ.get("TESSERA_FIGURES"):
            append(Path(file), request.node.nodeid, name, value, unit)
            assert goal is None or float(value) < goal

    return record


@pytest.fixture
def spec() -> LlamaSpec:
    return tiny_spec()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a tiny random Llama with the byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tiny_spec())
    return folder


def write_model(folder: Path, spec: LlamaSpec, seed: int = 0) -> None:
    """Write a random model of `spec` and the byte tokenizer, in Hugging Face's layout."""
    from trainer.data.tokenizers import ByteTokenizer
    from trainer.parallel.materialise import materialise, random_values
    from trainer.pretrained import save_pretrained

    with torch.device("meta"):
        model = spec.build_causal_lm(chunk_tokens=64)
    materialise(model, torch.device("cpu"), random_values(model, 0.1, seed))
    save_pretrained(folder, model, spec.hf_config() | {"pad_token_id": 257})
    ByteTokenizer().save(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token cache that all tests of a session share."""
    return cache_folder(tmp_path_factory.getbasetemp())


def tiny_spec(**changes: object) -> LlamaSpec:
    """Two layers of width 16: real code paths, milliseconds."""
    settings: dict[str, object] = {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaSpec(**(settings | changes))  # type: ignore[arg-type]
