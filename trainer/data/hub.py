"""Rows of a data set on the Hugging Face Hub: a stream of one commit, of which no code is run."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import xxhash

from trainer.data.named_sources import Source
from trainer.data.streams import (
    OPTIONS,
    class_names,
    in_one_line,
    quiet_datasets,
    with_encoded_media,
)
from trainer.errors import DataError
from trainer.near_names import did_you_mean

log = logging.getLogger(__name__)
PREFIX = "hf://"
# As in Hugging Face's own URLs; what would follow is a path in the repository.
_URL = re.compile(
    r"hf://datasets/(?P<repository>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?/?"
)


def is_on_hub(path: str) -> bool:
    return path.startswith(PREFIX)


class HubRows:
    """A split of a data set. Making one asks nobody; all that is read is of one commit."""

    def __init__(self, source: Source, key: str, limit: int | None) -> None:
        url = _URL.fullmatch(source.path)
        if url is None:
            raise ValueError(
                f"{key}={source.path} is no data set of the Hub; needed hf://datasets/OWNER/NAME "
                "or hf://datasets/OWNER/NAME@REVISION; its files are chosen by subset and split"
            )
        self.name, self.path, self.limit = key, source.path, limit
        self.repository, self.revision = url["repository"], url["revision"]
        self.subset, self.split = source.subset, source.split or "train"

    @cached_property
    def commit(self) -> str:
        """The commit that is read: the same one for as long as this process lives."""
        with self._explained():
            return _commit(self.repository, self.revision)

    @property
    def place(self) -> str:
        return f"hf://datasets/{self.repository}@{self.commit}"

    def key(self) -> str:
        log.info("%s is %s", self.name, self.in_words())
        what = f"{self.place}/{self.subset}/{self.split}/{self.limit}"
        return xxhash.xxh3_128_hexdigest(what.encode())

    def num_bytes(self) -> None:
        return None

    def in_words(self) -> str:
        return f"split {self.split} of {self.place}"

    def rows(self) -> Iterator[dict[str, Any]]:
        with suppress(StopIteration):  # datasets' way to say that a JSON file is empty
            stream = self._stream
            with self._explained():
                yield from islice(stream, self.limit)

    def class_names(self, column: str) -> list[str] | None:
        return class_names(self._stream, column)

    @cached_property
    def _stream(self) -> Any:
        builder = self._builder()
        splits = list(map(str, builder.config.data_files))
        if self.split not in splits:
            raise self._is_unknown("split", self.split, splits)
        for option, value in OPTIONS[builder.name].items():
            setattr(builder.config, option, value)
        with self._explained():
            return with_encoded_media(builder.as_streaming_dataset(split=self.split))

    def _builder(self) -> Any:
        """Return what reads the commit; ValueError: not with a reader of rows, or not it alone."""
        builder, subsets = self._load()
        if builder is None:
            raise self._is_unknown("subset", self.subset, subsets)
        if builder.name not in OPTIONS:
            raise ValueError(
                f"{self.name}={self.path} holds {builder.name} files, needed one of "
                f"{', '.join(OPTIONS)}; convert them, and set {self.name}=FOLDER"
            )
        # A data set's card may point anywhere; only the files of the commit stay what they are.
        files = [file for files in builder.config.data_files.values() for file in files]
        foreign = [file for file in files if not file.startswith(f"{self.place}/")]
        if foreign:
            raise ValueError(
                f"{self.name}={self.path} reads {foreign[0]}, which is no file of its commit; "
                f"bring its files, and set {self.name}=FOLDER"
            )
        return builder

    def _load(self) -> tuple[Any, list[str]]:
        """Return the builder; or None, and which subsets there are where one must be chosen."""
        datasets = quiet_datasets()
        logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # cards are optional
        # The name alone could mean a folder here, or one of the readers of datasets.
        path = f"hf://datasets/{self.repository}"
        commit = self.commit
        with self._explained():
            try:
                return datasets.load_dataset_builder(path, name=self.subset, revision=commit), []
            except ValueError:
                subsets = datasets.get_dataset_config_names(path, revision=commit)
                if self.subset in subsets or (self.subset is None and len(subsets) < 2):
                    raise
                return None, subsets

    def _is_unknown(self, name: str, value: str | None, known: list[str]) -> ValueError:
        """Return the refusal of a subset or split, with the config key beside that of the path."""
        hint = did_you_mean(value or "", known)
        found = f"has no {name} {value!r}" if value else f"has several {name}s"
        return ValueError(
            f"{self.name}={self.path} {found}; {hint}set "
            f"{self.name.removesuffix('path')}{name} to one of {', '.join(known)}"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the Hub and its packages raise into what to do, in one line."""
        datasets = quiet_datasets()
        from huggingface_hub import errors

        where, instead = f"{self.name}={self.path}", f"bring its files, and set {self.name}=FOLDER"
        try:
            yield
        except errors.OfflineModeIsEnabled:
            raise DataError(
                f"{where} is on the Hub, and HF_HUB_OFFLINE is set; {instead}, or unset it"
            ) from None
        except errors.RepositoryNotFoundError as error:  # gated ones too
            raise ValueError(
                f"{where} is not on the Hub, or not for everybody; correct the name, or log in: "
                "hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise ValueError(
                f"{where}: revision {self.revision!r} does not exist; give a branch, a tag or a "
                "commit behind the @, or none"
            ) from error
        # RuntimeError: the data set is a script, which datasets refuses to run.
        except (
            ValueError, RuntimeError, FileNotFoundError, datasets.exceptions.DatasetsError,
        ) as error:  # fmt: skip
            raise DataError(
                f"{where} cannot be read: {in_one_line(error)}; take another subset, split or "
                f"revision, or {instead}"
            ) from error
        except (errors.HTTPError, OSError) as error:
            raise DataError(
                f"{where} cannot be read from the Hub: {in_one_line(error)}; start the same "
                f"command again, or {instead}"
            ) from error


@lru_cache
def _commit(repository: str, revision: str | None) -> str:
    """Ask the Hub for the commit that a revision stands for now; once in a process."""
    from huggingface_hub import HfApi

    commit: str | None = HfApi().dataset_info(repository, revision=revision).sha
    assert commit is not None
    return commit
