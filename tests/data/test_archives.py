"""Published archives: unpacked where they belong, refused where they are damaged or lead out of their folder."""

import hashlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ditune.data import CUB, Caltech101, Flowers102, ImageNet
from ditune.data import archives as archives_module
from ditune.data.archives import Archive, install, unpack
from ditune.errors import UserError
from miniatures import MINIATURES, SYNSETS, cub, put
from small_datasets import pack, stamp


def known(archives: tuple[Archive, ...], root: Path) -> tuple[Archive, ...]:
    """The archives with the hashes of the files in `root`."""
    return tuple(Archive(**{**vars(a), "md5": hashlib.md5((root / a.file).read_bytes()).hexdigest()}) for a in archives)


def test_cub_is_unpacked_from_its_archive(tmp_path, monkeypatch):
    cub(tmp_path / "whole")
    root = tmp_path / "root"
    root.mkdir()
    pack(tmp_path / "whole", root / "CUB_200_2011.tgz")
    with pytest.raises(UserError, match="has the MD5"):
        CUB.fetch(root, download=False)
    monkeypatch.setattr(CUB, "archives", known(CUB.archives, root))
    CUB.fetch(root, download=False)
    assert len(CUB(root, 16)) == 12
    assert not list(root.glob(".unpacking*"))
    before = stamp(root)
    CUB.fetch(root, download=False)
    assert stamp(root) == before


def test_flowers_take_single_files(tmp_path, monkeypatch):
    MINIATURES["flowers102"](tmp_path / "whole")
    root, whole = tmp_path / "root", tmp_path / "whole" / "flowers-102"
    root.mkdir()
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.move(whole / name, root / name)
    pack(whole, root / "102flowers.tgz")
    monkeypatch.setattr(Flowers102, "archives", known(Flowers102.archives, root))
    Flowers102.fetch(root, download=False)
    assert len(Flowers102(root, 16, split=None)) == 10


def test_caltech_and_imagenet_have_archives_inside(tmp_path, monkeypatch):
    MINIATURES["caltech101"](tmp_path / "whole")
    root, outer = tmp_path / "root", tmp_path / "outer"
    root.mkdir()
    shutil.rmtree(tmp_path / "whole" / "caltech101" / "Annotations")
    (outer / "caltech-101").mkdir(parents=True)
    pack(tmp_path / "whole" / "caltech101", outer / "caltech-101" / "101_ObjectCategories.tar.gz")
    put(outer / "__MACOSX" / "caltech-101" / "._101_ObjectCategories.tar.gz", b"a fork")
    pack(outer, root / "caltech-101.zip")
    monkeypatch.setattr(Caltech101, "archives", known(Caltech101.archives, root))
    Caltech101.fetch(root, download=False)
    assert Caltech101(root, 16).class_names == ["Faces", "accordion", "yin_yang"]

    MINIATURES["imagenet"](tmp_path / "imagenet")
    root, outer = tmp_path / "root2", tmp_path / "outer2"
    root.mkdir()
    outer.mkdir()
    for synset in SYNSETS:
        pack(tmp_path / "imagenet" / "train" / synset, outer / f"{synset}.tar")
    pack(outer, root / "ILSVRC2012_img_train.tar")
    pack(tmp_path / "imagenet" / "val", root / "ILSVRC2012_img_val.tar")
    shutil.rmtree(tmp_path / "imagenet" / "val")
    shutil.rmtree(tmp_path / "imagenet" / "train")
    pack(tmp_path / "imagenet", root / "ILSVRC2012_devkit_t12.tar.gz")
    monkeypatch.setattr(ImageNet, "archives", known(ImageNet.archives, root))
    ImageNet.fetch(root, download=False)
    assert len(ImageNet(root, 16, split=None)) == 16


def evil_tar(path: Path, change: Callable[[tarfile.TarInfo], None]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("CUB_200_2011/x")
        info.size = 3
        change(info)
        archive.addfile(info, io.BytesIO(b"abc") if info.isreg() else None)
    return path


def linked(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.linkname, info.size = kind, "/etc/passwd", 0


EVIL: dict[str, Callable[[tarfile.TarInfo], None]] = {
    "above": lambda info: setattr(info, "name", "../../evil"),
    "absolute": lambda info: setattr(info, "name", "/tmp/evil"),
    "symlink": lambda info: linked(info, tarfile.SYMTYPE),
    "hard link": lambda info: linked(info, tarfile.LNKTYPE),
    "device": lambda info: linked(info, tarfile.CHRTYPE),
}


@pytest.mark.parametrize("kind", EVIL)
def test_entries_that_leave_the_folder_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives_module, "check_md5", lambda *_: None)
    evil_tar(tmp_path / "CUB_200_2011.tgz", EVIL[kind])
    with pytest.raises(UserError, match="Do not trust this file"):
        CUB.fetch(tmp_path, download=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CUB_200_2011.tgz"]


def test_zip_entries_that_leave_the_folder_are_refused(tmp_path):
    for name, mode in (("../evil", 0o100644), ("C:/evil", 0o100644), ("link", 0o120777)):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="Do not trust"):
            unpack(tmp_path / "x.zip", tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["x.tgz", "x.zip", "x.tar"])
@pytest.mark.parametrize("share_kept", [0, 0.5, 0.7])
def test_a_truncated_archive_leaves_nothing(tmp_path, name, share_kept):
    cub(tmp_path / "whole")
    root = tmp_path / "root"
    root.mkdir()
    content = pack(tmp_path / "whole", tmp_path / name).read_bytes()
    put(root / name, content[: int(len(content) * share_kept)])
    with pytest.raises(UserError, match="cannot be unpacked"):
        install(Archive(name, makes="CUB_200_2011"), root, download=False)
    assert {p.name for p in root.iterdir()} <= {name, f"{name}.json"}
