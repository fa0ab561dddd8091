"""Hostile inputs: each would leave a canary if it were run; none may, and each is refused by name.

Peak memory is measured in every test: what is refused must not have been unpacked first.
"""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pyarrow import parquet

from launch.binding import bind
from launch.cli import main
from launch.exit_codes import BAD_CONFIG
from tests.conftest import Figure, tiny_spec
from tests.token_folders import write_folder
from trainer.adapters.pretrained import PretrainedAdapter
from trainer.checkpoint.commit import committed_steps
from trainer.data.chat_template import MAX_TEMPLATE, render
from trainer.data.examples import BadRowError
from trainer.data.images.decode import _eight_bits, decode
from trainer.data.images.files import ImageFiles
from trainer.data.images.references import ImageReference, RowPlace
from trainer.data.images.tar_rows import TarRows
from trainer.data.megatron import open_megatron
from trainer.data.named_sources import Source
from trainer.data.shards import HEADER, Shard
from trainer.data.sources import open_rows
from trainer.data.tokenizers import FileTokenizer
from trainer.data.tokens import INDEX, Part, TokenStore
from trainer.directory import choose_run
from trainer.errors import DataError, StorageError
from trainer.flax_file import read_npz
from trainer.hf_auto import HFAutoModel
from trainer.pretrained import MAX_LAYERS, read_hf_config, spec_from
from trainer.stored_config import read_stored
from trainer.weights import weight_entries

MAX_MEMORY = 1 << 30
CANARY = Path("canary")  # in the test's own folder


SEEN: set[str] = set()


@pytest.fixture(autouse=True)
def canary(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    figure: Figure,
) -> Iterator[Path]:
    """Nothing that is read may leave the file `canary`, or take more than a gigabyte."""
    monkeypatch.chdir(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    yield tmp_path / CANARY
    assert not (tmp_path / CANARY).exists()
    assert peak() - before < MAX_MEMORY
    SEEN.add(request.node.nodeid)
    figure("A30 hostile inputs", len(SEEN), "groups refused by name, 0 canaries")


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) << 10


class Payload:
    """Leaves the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def test_the_payload_itself_works(canary: Path) -> None:
    pickle.loads(pickle.dumps(Payload()))
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", ".metadata", "0.distcp"]
)
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"model.norm.weight": Payload()}))
    with pytest.raises(ValueError, match=rf"holds only {name}, which is a pickle; convert it"):
        weight_entries(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint; give the folder of a run"):
        choose_run("runs", "a", 10, str(tmp_path))


def safetensors(header: Any, size: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def tensor(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        safetensors({"a": tensor([4], [0, 16]), "b": tensor([4], [8, 24])}),
        safetensors({"a": tensor([4], [0, 1 << 50])}),
        safetensors({"a": tensor([1 << 40], [0, 1 << 42])}),
        safetensors({"a": tensor([-2, -2], [0, 16])}),
        safetensors({"a": tensor([4], [-16, 0])}),
        safetensors({"a": tensor([4.0], [0.0, 16.0])}),
        safetensors({"a": tensor(["4"], ["0", "16"])}),
        safetensors({"a": tensor([4], [0, 16], "O")}),
        safetensors({"a": "F32"}),
        safetensors(b"[" * 100_000),
        (1 << 60).to_bytes(8, "little") + bytes(64),
        safetensors(b"[" + b"[]," * (12 << 20) + b"[]]"),
        b"",
    ],
    ids=["overlap", "end", "huge", "negative", "before", "fraction", "text", "object", "flat",
         "deep", "length", "many", "empty"],
)  # fmt: skip
def test_weight_files_with_false_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        weight_entries(tmp_path)


@pytest.mark.parametrize("file", ["../w.safetensors", "/etc/passwd", 7, ["a"], "a/b"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, file: Any) -> None:
    index = {"weight_map": {"a": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match="index"):
        weight_entries(tmp_path)


TARGETS = [
    "os.system", "posix.system", "subprocess.run", "torch.load", "numpy.load", "builtins.eval",
    "logging.os.system", "launch.cli.os.system", "launch.cli.os", "trainer.weights.torch.load",
    "trainer.files.os.system", "trainer.export.reloaded.torch", "hydra.utils.instantiate",
    "tests.faults.test_hostile_inputs.Payload", "trainer.files.write_text", "trainer..files", "",
    "trainer.data.tokenizers.FileTokenizer", "trainer.resume.Path", "models.llama.torch.load",
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_one_of_our_specs_or_refused(target: str) -> None:
    tree = {"_target_": target, "_args_": [f"touch {CANARY}"], "command": f"touch {CANARY}"}
    with pytest.raises(ValueError, match="is not one of Tessera's specs"):
        bind(tree)
    with pytest.raises(ValueError, match=r"_target_='.*' is not one of Tessera's specs"):
        bind({"_target_": "trainer.optim.AdamW", "lr": {"_target_": target}})


def test_a_target_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=demo", "model._target_=os.system", f"+model.command=touch {CANARY}"]
    assert main(["train", *words, "dry_run=true"]) == BAD_CONFIG
    assert "is not one of Tessera's specs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"model: !!python/object/apply:os.system ['touch {CANARY}']", "python/object/apply"),
        (f"model: !!python/object/new:os.system ['touch {CANARY}']", "python/object/new"),
        ("a0: &a0 [x, x]\n" + "".join(
            f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
        ), "comes to more than 100000 values"),
        ("a: &a [*a]", "comes to more than 100000 values"),
        ("[1, 2]", "holds no keys"),
        ("a: [", "plain YAML"),
    ],
    ids=["apply", "new", "aliases", "loop", "list", "cut"],
)  # fmt: skip
def test_stored_configs_hold_plain_values(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_stored(tmp_path / "config.yaml")


def test_a_stored_config_instantiates_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "a"
    model = folder / "checkpoints" / "step_00000001" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    tree = {"model": {"_target_": "os.system", "command": f"touch {CANARY}"}, "tokenizer": "byte",
            "data": {"_target_": "numpy.load", "path": "x"}}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["evaluate", f"checkpoint={model.parent}"]) == BAD_CONFIG
    assert len(capsys.readouterr().err.splitlines()) == 1


CODE = "import os\nos.system('touch canary')\nclass Evil: pass\n"


def write_config(folder: Path, **keys: Any) -> Path:
    (folder / "evil.py").write_text(CODE)
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map} | keys))
    return folder


def test_a_model_with_its_own_code_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, model_type="evil", vocab_size=8)
    with pytest.raises(ValueError, match=r"no model of transformers \(its folder brings code"):
        _ = HFAutoModel(path=str(folder)).vocab_size
    with pytest.raises(ValueError, match=r"model_type='evil' is none of llama"):
        spec_from(folder)


def test_keys_that_name_code_are_taken_out_of_a_config(tmp_path: Path) -> None:
    evil = {"_attn_implementation_internal": "evil/kernel", "attn_implementation": "evil/kernel",
            "experts_implementation": "evil/kernel", "_commit_hash": "x"}  # fmt: skip
    folder = write_config(tmp_path, **tiny_spec().hf_config(), **evil, vision_config=evil)
    config = read_hf_config(folder)
    assert not [key for key in config if key.startswith("_") or "implementation" in key]
    assert "auto_map" not in config
    assert config["vision_config"] == {}
    model = HFAutoModel(path=str(folder)).build_causal_lm(chunk_tokens=8)
    assert model._model.config._attn_implementation == "sdpa"
    assert json.loads((folder / "config.json").read_text())["auto_map"]  # read, not changed


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "is no JSON"),
        ("[]", "holds no keys"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": 10**9}), f"than {MAX_LAYERS}"),
        (json.dumps({"model_type": ["llama"]}), "is none of llama"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nests deeper than"),
    ],
)  # fmt: skip
def test_a_config_that_is_no_model_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        spec_from(tmp_path)


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    "{{ lipsum.__globals__['os'].system('touch canary') }}",
    "{{ raise_exception.__globals__['json'].codecs.builtins.open('canary', 'w') }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (''|attr('__class__')).mro() }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(1).x() }}",
    "{{ '{0.__class__.__mro__[1].__subclasses__}'.format(1) }}",
    "{{ ['{0.__class__.__mro__[1].__subclasses__}']|map('format', 1)|first }}",
    "{{ messages.append(1) }}",
    "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "{% include '/etc/passwd' %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ (messages|length + 9) ** 10 ** 8 }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'a'|center(10 ** 10) }}",
    "{{ '%9999999999d'|format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a" * (MAX_TEMPLATE + 1),
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda text: text[:40])
def test_a_template_gets_out_of_its_sandbox_in_no_known_way(template: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises((BadRowError, ValueError), match="chat template"):
        render(template, [{"role": "user", "content": "hello"}], {})
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[]", "holds no keys"),
        ("{", "is no JSON"),
        ('{"bos_token": ["a"]}', "bos_token=.* is no text"),
        ('{"bos_token": {"content": 1}}', "bos_token=.* is no text"),
        ('{"chat_template": [1]}', "neither text nor a list"),
        ('{"chat_template": {"a": "b"}}', "neither text nor a list"),
        ('{"bos_token": "absent"}', "tokenizer.json has no such token"),
    ],
)
def test_a_tokenizer_config_is_checked(
    model_folder: Path, tmp_path: Path, config: str, reason: str
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=reason):
        FileTokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "Evil"}}', "\0"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="is no tokenizer"):
        FileTokenizer(tmp_path)


CHARSMAP = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
SPECIAL = [{"SpecialToken": {"id": "NONE", "type_id": 0}}]
TEMPLATE = {"post_processor": {"type": "TemplateProcessing", "single": SPECIAL, "pair": [],
                               "special_tokens": {}}}  # fmt: skip
SLOW = {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"},
                          "behavior": "Isolated", "invert": False}}  # fmt: skip


def test_a_panic_of_the_tokenizer_is_an_error_like_others(
    model_folder: Path, tmp_path: Path
) -> None:
    """A panic is no Exception: a rank would die without a word."""
    tree = json.loads((model_folder / "tokenizer.json").read_text())
    for change in (CHARSMAP, TEMPLATE):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree | change))
        with pytest.raises(ValueError, match="tokenizers gives up"):
            FileTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree | SLOW))
    tokenizer = FileTokenizer(tmp_path)
    for encode in (tokenizer.encode, tokenizer.encode_with_spans):
        with pytest.raises(DataError, match="tokenizers gives up: Onig: Regex search error"):
            encode("a" * 40 + " b")
    with pytest.raises(DataError, match="tokenizers gives up"):
        tokenizer.encode_documents(["a" * 40 + " b"])


@pytest.mark.parametrize("base", ["/nowhere", "../../nowhere", 7, ["a"], "", "hub/repository"])
def test_the_base_of_an_adapter_is_a_folder_here(tmp_path: Path, base: Any) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        safetensors({"base_model.model.q_proj.lora_A.weight": tensor([4, 1], [0, 16])}, 16)
    )
    with pytest.raises(ValueError, match="is no folder here"):
        _ = PretrainedAdapter(path=str(tmp_path)).base


def read_texts(path: Path) -> list[Any]:
    return list(open_rows(Source(path=str(path))).rows())


def test_pickles_and_arrays_are_no_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([Payload()], object), allow_pickle=True)
    for name in ("a.pkl", "a.pickle"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(ValueError, match=r"ends in '\.p.*'; give one of \.txt"):
            read_texts(tmp_path / name)
    with pytest.raises(ValueError, match=r"ends in '\.npy'; give one of"):
        read_texts(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="holds no file that can be read"):
        read_texts(tmp_path)


def test_arrays_of_objects_and_false_sizes_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([Payload()], object))
    with pytest.raises(StorageError, match="Object arrays cannot be loaded"):
        read_npz(path)
    np.savez_compressed(path, a=np.zeros(1 << 25, np.uint8))
    with pytest.raises(StorageError, match="unpacks"):
        read_npz(path)
    header = io.BytesIO()
    facts = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(header, facts)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    with pytest.raises(StorageError, match="bytes for"):
        read_npz(path)


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "zip": zipped,
    "zstd": lambda content: bytes(pa.Codec("zstd").compress(content)),
}


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("name", ["a.md", "a.txt", "a.jsonl", "a.csv", "a.rst"])
def test_a_packed_file_is_not_unpacked_whatever_its_name(
    tmp_path: Path, kind: str, name: str
) -> None:
    (tmp_path / name).write_bytes(PACKERS[kind](bytes(4 << 20)))
    with pytest.raises(DataError, match=rf"{name} is packed by {kind}, needed plain"):
        read_texts(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.zip", "a.tar.gz", "a.zst"])
def test_a_packed_file_by_its_name_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ValueError, match=r"give one of \.txt"):
        read_texts(tmp_path / name)


def test_texts_beside_images_are_read_without_decoding_any(tmp_path: Path) -> None:
    """An EPS would start Ghostscript, and a path may be any file or address."""
    features = {"text": {"dtype": "string", "_type": "Value"}, "image": {"_type": "Image"}}
    images = [
        {"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "path": ""},
        {"bytes": None, "path": "http://127.0.0.1:9/x.png"},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"text": ["a", "b"], "image": pa.array(images, kind)})
    facts = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(table.replace_schema_metadata(facts), tmp_path / "a.parquet")
    rows = read_texts(tmp_path)
    assert [row["text"] for row in rows] == ["a", "b"]
    assert rows[1]["image"] == images[1]


def png(size: tuple[int, int], **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG", **options)
    return file.getvalue()


def test_a_small_file_of_a_huge_image_is_refused_before_it_is_decoded() -> None:
    bomb = png((12_000, 12_000))
    assert len(bomb) < 100_000
    with pytest.raises(BadRowError, match="has 12000 x 12000 pixels"):
        decode(bomb)
    note = PngInfo()
    note.add_text("a", "0" * (4 << 20), zip=True)
    with pytest.raises(BadRowError, match="is broken: Decompressed data too large"):
        decode(png((8, 8), pnginfo=note))
    with pytest.raises(BadRowError, match="is no image; needed one of PNG"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_the_largest_image_of_sixteen_bits_takes_less_than_a_gigabyte() -> None:
    image = _eight_bits(np.full((7000, 7000), 65535, np.uint16))  # what a PNG is decoded to
    assert image.getpixel((6999, 6999)) == 255


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "http://a/x.png", "a/../../x.png"])
def test_a_row_names_images_below_its_folder(path: str) -> None:
    with pytest.raises(BadRowError, match=r"leads out of the folder|is an address"):
        RowPlace().reference(path)


def test_links_and_pipes_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "x.png").write_bytes(png((4, 4)))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "x.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    files = ImageFiles(tmp_path / "data")
    for name, reason in (("link.png", "leads out of"), ("pipe.png", "is no file")):
        with pytest.raises(BadRowError, match=reason):
            files.read(ImageReference(file=name))


def test_members_of_a_tar_file_are_read_in_memory_or_refused(tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.txt"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (name, kind) in enumerate(
            [("../outside.txt", tarfile.REGTYPE), (str(outside), tarfile.REGTYPE),
             ("0.txt", tarfile.SYMTYPE), ("1.txt", tarfile.LNKTYPE), ("2.txt", tarfile.CHRTYPE),
             ("3.txt", tarfile.BLKTYPE), ("4.txt", tarfile.FIFOTYPE)]
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = number if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    before = sorted(tmp_path.parent.iterdir())
    rows = list(TarRows(Source(path=str(tmp_path / "a.tar")), "data.path", None).rows())
    assert len(rows) == 7
    for row in rows:
        assert row.place.problem is not None
        assert "is no regular file below the tar's root" in row.place.problem
    assert sorted(tmp_path.parent.iterdir()) == before
    assert not outside.exists()
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DataError, match="is no whole tar file"):
        list(TarRows(Source(path=str(tmp_path / "a.tar")), "data.path", None).rows())


@pytest.mark.parametrize("counts", [(1 << 62, 2), (2, 1 << 62), (1 << 63, 1 << 63), (0, 0)])
def test_a_megatron_index_with_false_counts_is_refused(
    tmp_path: Path, counts: tuple[int, int]
) -> None:
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, *counts)
    (tmp_path / "a.idx").write_bytes(header)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.idx"):
        open_megatron(str(tmp_path / "a"))


def test_an_index_of_shards_names_files_of_its_folder_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [5, 6], shard_tokens=1 << 20, name="train")
    index = json.loads((tmp_path / "a" / INDEX).read_text())
    for file in ("../b.shard", "/etc/passwd", "b/../../c", 7):
        index["stores"]["train"][0]["file"] = file
        (tmp_path / "a" / INDEX).write_text(json.dumps(index))
        with pytest.raises(DataError, match=r"index\.json"):
            TokenStore(Part(tmp_path / "a", "train"))
    for text in ("[]", "{", '{"stores": {"train": [{"file": "a"}]}}', "[" * 100_000):
        (tmp_path / "a" / INDEX).write_text(text)
        with pytest.raises(DataError, match=r"index\.json is no index of shards"):
            TokenStore(Part(tmp_path / "a", "train"))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "|O"}, {"dtype": "O8"}, {"dtype": "<U9999999"}, {"count": 1 << 50},
        {"count": -1}, {"count": 1.5}, {"offset": -(1 << 20)}, {"offset": 1 << 50},
    ],
    ids=str,
)  # fmt: skip
def test_a_shard_with_false_sections_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write_folder(tmp_path, [5, 6], shard_tokens=1 << 20, name="train")
    (path,) = tmp_path.glob("*.shard")
    data = path.read_bytes()
    magic, version, offset, size, _ = HEADER.unpack(data[: HEADER.size])
    tree = json.loads(data[offset : offset + size])
    tree["sections"][0] |= change
    text = json.dumps(tree).encode()
    head = HEADER.pack(magic, version, offset, len(text), xxhash.xxh3_128_digest(text))
    path.write_bytes(head + data[HEADER.size : offset] + text)
    with pytest.raises(DataError, match="has no footer that can be used"):
        Shard(path)


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/b", "a\nb", "", ".hidden", "-rf", "a" * 101])
def test_names_of_runs_stay_below_their_folder(name: str) -> None:
    with pytest.raises(ValueError, match="is no folder name"):
        choose_run("runs", name, 10, "auto")


def test_runs_are_not_written_where_everybody_may_write(tmp_path: Path) -> None:
    for mode, is_fine in ((0o777, False), (0o1777, True), (0o775, True)):
        tmp_path.chmod(mode)
        if is_fine:
            assert choose_run(str(tmp_path), "a", 10, "auto") == tmp_path / "a"
        else:
            with pytest.raises(ValueError, match=r"may be written by everybody.*chmod o-w"):
                choose_run(str(tmp_path), "a", 10, "auto")


def test_a_step_that_is_a_link_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "MANIFEST.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001").symlink_to(tmp_path / "elsewhere")
    assert committed_steps(tmp_path / "checkpoints") == []
