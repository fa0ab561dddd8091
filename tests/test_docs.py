"""The README and docs: links lead somewhere, commands have real keys, experiments are shown."""

import re
import shlex
from pathlib import Path

import pytest

from launch.binding import bind, convert
from launch.compose import compose
from launch.known_keys import known_keys
from launch.protocol import Launch
from tests.assembled import write_clip, write_text_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs/experiment").glob("*.yaml"))
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Return where the links of a page lead, but for those to the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text()))
    return [link for link in found if not link.startswith("http")]


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            waiting += [
                page.parent / link.partition("#")[0] for link in links(page) if link[0] != "#"
            ]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    lost = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


def test_the_gallery_shows_every_experiment_and_no_other() -> None:
    text = (ROOT / "docs/gallery.md").read_text()
    assert sorted(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == EXPERIMENTS
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", text, re.MULTILINE)) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_entry_of_the_gallery_has_its_command_and_its_result(name: str) -> None:
    text = (ROOT / "docs/gallery.md").read_text()
    entry = re.split(r"^## ", text.partition(f"\n## {name}\n")[2], flags=re.MULTILINE)[0]
    assert f"\n    tessera train experiment={name}" in entry
    assert "\n**Measured**" in entry


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folders that commands name, each a tiny one."""
    folder = tmp_path_factory.mktemp("named")
    write_text_model(folder / "FOLDER")
    for name in ("MODEL", "SMOLLM2", "IDEFICS"):
        (folder / name).symlink_to(folder / "FOLDER")
    write_clip(folder / "CLIP")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_train_commands_of_a_page_have_only_keys_and_choices_that_exist(
    page: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders)
    wrong = {command: refusal(command) for command in train_commands(page)}
    assert not {command: why for command, why in wrong.items() if why}


def refusal(command: str) -> str | None:
    """Return why the words of a command are no config, in one line."""
    words = shlex.split(command.partition(" > ")[0], comments=True)[2:]
    try:
        tree = compose([word for word in words if not word.startswith("dry_run=")]).tree
        convert(tree.pop("launch"), Launch, "launch")
        bind(tree | {"name": "run"})
    except ValueError as error:
        return str(error)
    return None


def train_commands(page: Path) -> list[str]:
    """Return the commands that name an experiment, but for those that stand for any words."""
    joined = page.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in joined.splitlines()]
    commands = [line for line in lines if line.startswith("tessera train experiment=")]
    return [line for line in commands if "..." not in line]


def test_commands_are_found_at_all() -> None:
    assert sum(len(train_commands(page)) for page in PAGES) > 50


def test_the_keys_that_others_are_told_to_use_exist() -> None:
    known: set[str] = set()
    for words in (
        ["data=chat", "task=dpo", "adapter=lora", "schedule=wsd", "engine=deepspeed"],
        ["data=text", "task=sequence_classification", "model=pretrained", "launch=slurm"],
    ):
        known |= set(known_keys(compose(words, is_partial=True).tree))
    cells = re.findall(r"^\|.*\| (.*) \|$", (ROOT / "docs/migrating.md").read_text(), re.MULTILINE)
    spans = [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]
    words = [word.strip("'").partition("=") for span in spans for word in span.split()]
    keys = {key for key, is_set, _ in words if is_set or "." in key}
    assert len(keys) > 50
    wrong = {key for key in keys if re.fullmatch(r"[a-z_.]+", key)} - known - OPTIONS
    assert not wrong


# Of `tessera export`, `tessera plan` and `tessera train`.
OPTIONS = {"dtype", "processes", "device", "dry_run"}
