"""The public datasets are read in their official layouts, with the labels that other readers give them."""

import shutil
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig
from torchvision import datasets

from ditune.config.instantiate import instantiate
from ditune.data import Benchmark, StanfordCars
from ditune.errors import UserError
from helpers import compose
from miniatures import CARS, MINIATURES, SYNSETS, put, stanford_cars_whole

COUNTS = {  # of each miniature
    "artbench10": {"train": 9, "test": 3},
    "caltech101": {"train": 22, "test": 2},
    "celebahq": {"train": 4, "val": 2, "test": 2},
    "cub": {"train": 12, "test": 3},
    "df20m_mini": {"train": 9, "test": 3},
    "flowers102": {"train": 4, "val": 2, "test": 4},
    "food101": {"train": 9, "test": 3},
    "imagenet": {"train": 12, "val": 4},
    "stanford_cars": {"train": 7, "test": 3},
    "sun397": {"train": 22, "test": 2},
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in MINIATURES}
    for name, function in MINIATURES.items():
        function(found[name])
    return found


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DictConfig]:
    folder = tmp_path_factory.mktemp("run")
    return {name: compose(folder, f"data={name}", "data.resolution=16").data for name in MINIATURES}


@pytest.fixture
def read(roots: dict[str, Path], configs: dict[str, DictConfig]):
    def build(name: str, root: Path | None = None, split: str | None = None) -> Benchmark:
        return instantiate(configs[name].pictures, "data", split=split, root=str(root or roots[name]), manifest=None)

    return build


@pytest.mark.parametrize("name", MINIATURES)
def test_counts_and_images(read, name):
    for split, count in COUNTS[name].items():
        pictures = read(name, split=split)
        assert len(pictures) == count
        batch, labels = pictures.__getitems__(list(range(count)))
        assert batch.shape == (count, 3, 16, 16)
        assert set(labels.tolist()) <= set(range(pictures.num_classes))
    everything = read(name)
    assert len(everything) == sum(COUNTS[name].values())
    assert everything.names == sorted(everything.names)
    assert everything.incomplete  # a miniature is none of what was published
    assert all(everything.title in sentence for sentence in everything.incomplete)


@pytest.mark.parametrize("name", MINIATURES)
def test_root_may_be_the_top_folder_itself(read, roots, name):
    top = read(name).top
    assert read(name, root=top).names == read(name).names


def pairs(files: list[object], labels: list[int], root: Path) -> set[tuple[str, int]]:
    return {(Path(file).relative_to(root).as_posix(), label) for file, label in zip(files, labels, strict=True)}


@pytest.mark.parametrize("name", ["food101", "flowers102", "stanford_cars", "sun397", "caltech101"])
def test_labels_are_those_of_torchvision(read, roots, monkeypatch, name):
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda _: True)  # it knows the published files only
    ours = read(name)
    theirs: set[tuple[str, int]] = set()
    for split in COUNTS[name] if name in ("food101", "flowers102", "stanford_cars") else (None,):
        if name == "stanford_cars":
            samples = datasets.StanfordCars(roots[name], split)._samples
            theirs |= pairs(*zip(*samples, strict=True), ours.top)
        elif name == "caltech101":
            other = datasets.Caltech101(roots[name])
            files = [
                f"101_ObjectCategories/{other.categories[label]}/image_{i:04d}.jpg"
                for i, label in zip(other.index, other.y, strict=True)
            ]
            theirs |= set(zip(files, other.y, strict=True))
            assert other.categories == ours.class_names
        else:
            cls = {"food101": datasets.Food101, "flowers102": datasets.Flowers102, "sun397": datasets.SUN397}[name]
            other = cls(roots[name]) if split is None else cls(roots[name], split)
            theirs |= pairs(other._image_files, other._labels, ours.top)
            assert other.classes == ours.class_names
    assert set(zip(ours.names, ours.labels.tolist(), strict=True)) == theirs


def test_class_names(read):
    assert read("cub").class_names == ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"]
    assert read("df20m_mini").class_names == ["Amanita muscaria", "Boletus edulis", "Cortinarius sp."]
    assert read("artbench10").class_names == ["art nouveau", "baroque", "ukiyo e"]
    assert read("flowers102").class_names[76] == "passion flower"
    assert read("imagenet").class_names == SYNSETS
    assert read("celebahq").class_names == ["face"]
    assert read("stanford_cars").class_names == CARS


def test_cub_takes_its_split_and_labels_from_its_lists(read):
    train, test = read("cub", split="train"), read("cub", split="test")
    assert [name.split("/")[1][:3] for name in test.names] == ["001", "002", "003"]
    assert all("_0005_" in name for name in test.names)
    assert train.labels.tolist() == [int(name.split("/")[1][:3]) - 1 for name in train.names]


def test_imagenet_validation_follows_the_development_kit(read, roots, tmp_path):
    pictures = read("imagenet", split="val")
    assert [pictures.class_names[label] for label in pictures.labels] == [SYNSETS[i] for i in (0, 2, 1, 0)]
    root = tmp_path / "sorted"
    shutil.copytree(roots["imagenet"], root)
    for file in sorted((root / "val").iterdir()):
        put(root / "val" / SYNSETS[1] / file.name, file.read_bytes())
        file.unlink()
    assert read("imagenet", root, "val").labels.tolist() == [1, 1, 1, 1]


def test_celebahq_has_the_split_of_celeba(read):
    numbers = {split: [Path(n).stem for n in read("celebahq", split=split).names] for split in ("train", "val", "test")}
    assert numbers == {"train": ["0", "1", "3", "7"], "val": ["4", "5"], "test": ["2", "6"]}


def test_cars_in_its_other_layout(tmp_path):
    stanford_cars_whole(tmp_path)
    train, test = (StanfordCars(tmp_path, 16, split) for split in ("train", "test"))
    assert train.names == [f"car_ims/{i:06d}.jpg" for i in (1, 3, 5)]
    assert train.labels.tolist() == [0, 2, 1]
    assert test.labels.tolist() == [1, 0, 2]
    assert train.class_names == CARS


@pytest.mark.parametrize("name", MINIATURES)
def test_what_is_missing_is_said(read, tmp_path, name):
    with pytest.raises(UserError, match=r"src/prepare\.py") as error:
        read(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    cls = type(read(name))
    for archive in cls.archives:
        assert archive.file in str(error.value) or not archive.needed
    assert cls.licence.endswith(".")


@pytest.mark.parametrize("name", MINIATURES)
def test_messages_name_the_config_of_the_dataset(configs, tmp_path, name):
    """The class says which config is its own, and that config names the class."""
    cls = get_class(configs[name].pictures._target_)
    assert cls.config == name
    assert f"data={name}`" in cls.missing(tmp_path)


# Bad annotations: (dataset, file, its new content or None for none, what is said)
BAD = [
    ("cub", "CUB_200_2011/classes.txt", None, "classes.txt is missing"),
    ("cub", "CUB_200_2011/image_class_labels.txt", "1 1\n", "differ at image"),
    ("cub", "CUB_200_2011/images.txt", "1\n", "has 1 fields, not 2"),
    ("cub", "CUB_200_2011/images.txt", b"\xff\xfe\xff", "damaged"),
    ("food101", "food-101/meta/test.json", '{"waffles": ["waffles/1"]}', "which classes.txt has not"),
    ("food101", "food-101/meta/test.json", '{"apple_pie": ', "damaged"),
    ("sun397", "SUN397/ClassName.txt", "/a/abbey\n", "not named in ClassName.txt"),
    ("df20m_mini", "DF20M-public_test_metadata_PROD.csv", "a,b\n1,2\n", "no column 'image_path'"),
    (
        *("df20m_mini", "DF20M-public_test_metadata_PROD.csv"),
        *("image_path,class_id,scientificName\nx.JPG,0,Boletus edulis\n", "calls class 0 both"),
    ),
    ("df20m_mini", "DF20M-public_test_metadata_PROD.csv", None, "is missing"),
    ("flowers102", "flowers-102/imagelabels.mat", b"MATLAB 5.0 MAT-file, cut", "damaged"),
    ("flowers102", "flowers-102/setid.mat", None, "setid.mat is missing"),
    ("stanford_cars", "stanford_cars/cars_test_annos_withlabels.mat", None, "is missing"),
    ("imagenet", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "1\n", "the development kit 1"),
    ("celebahq", "CelebAMask-HQ/CelebA-HQ-to-CelebA-mapping.txt", "head a b\n0 1 x.jpg\n", "a number is expected"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD)
def test_bad_annotations_are_refused(read, tmp_path, name, file, content, message):
    MINIATURES[name](tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        put(tmp_path / file, content)
    with pytest.raises(UserError, match=message):
        read(name, tmp_path)


def test_a_species_with_another_author_is_a_warning(read, tmp_path, caplog):
    MINIATURES["df20m_mini"](tmp_path)
    path = tmp_path / "DF20M-public_test_metadata_PROD.csv"
    path.write_text(path.read_text().replace('"Boletus edulis",1', '"Boletus edulis Bull.",1'))
    assert read("df20m_mini", tmp_path).class_names == ["Amanita muscaria", "Boletus edulis", "Cortinarius sp."]
    assert "1 rows in" in caplog.text
    assert "('Boletus edulis Bull.', 'Boletus edulis'). The first name is used." in caplog.text


@pytest.mark.parametrize("label", [0, 4, -1])
def test_labels_outside_of_the_classes_are_refused(read, tmp_path, label):
    MINIATURES["cub"](tmp_path)
    path = tmp_path / "CUB_200_2011" / "image_class_labels.txt"
    path.write_text(path.read_text().replace("\n3 1\n", f"\n3 {label}\n"))
    with pytest.raises(UserError, match="not one of 0 to 2"):
        read("cub", tmp_path)


def test_annotations_cannot_name_files_outside(read, tmp_path):
    MINIATURES["cub"](tmp_path)
    path = tmp_path / "CUB_200_2011" / "images.txt"
    path.write_text(path.read_text().replace("1 001", "1 ../../001", 1))
    with pytest.raises(UserError, match="outside of it"):
        read("cub", tmp_path)
