"""Which files are images, by the endings of their names, and which belong to the system and are ignored."""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from os.path import splitext

from PIL import Image, features

# Pillow's names of plain raster formats. Other formats are no images here: pages (PDF, EPS), drawings, science data.
RASTER = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP"}
)
ODD_ENDINGS = frozenset({".pfm", ".icb", ".vda", ".vst"})  # of these formats, but floats or rarely images
# Never decoded, whatever a file is called: Pillow would start another program for them.
UNSAFE = frozenset({"EPS", "WMF"})
PLUGINS = ("pillow_heif.HeifImagePlugin", "pillow_jxl")  # packages that teach Pillow a format when they are imported
REMEDIES = {
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".hif": "pillow-heif",
    ".avif": "'pillow>=11.3'",
    ".jxl": "pillow-jxl-plugin",
}
METADATA = ("metadata.csv", "metadata.jsonl")
SYSTEM = frozenset(
    {
        *("__macosx", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin"),
        *("system volume information", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)


@cache
def _learn_formats() -> None:
    """Let Pillow know all its formats, and those of the plugins that are installed."""
    Image.init()
    for plugin in PLUGINS:
        try:
            import_module(plugin)
        except ImportError:
            continue  # left_out() names the remedy where it is needed


@cache
def decoders() -> tuple[str, ...]:
    """Pillow's names of the formats that may be decoded, whatever a file's name ends in."""
    _learn_formats()
    return tuple(name for name in Image.ID if name not in UNSAFE)


@cache
def endings() -> frozenset[str]:
    """Ends of the names of image files that can be read here, such as '.png'."""
    _learn_formats()
    readable = {name for name in RASTER if name in Image.OPEN or name == "MPO"}  # the JPEG reader reads MPO
    if not features.check("jpg_2000"):
        readable.discard("JPEG2000")
    return frozenset(end for end, name in Image.registered_extensions().items() if name in readable) - ODD_ENDINGS


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return splitext(name)[1].lower() in endings()


def is_metadata(name: str) -> bool:
    """Whether this is a metadata file as Hugging Face's imagefolder has them, in any case, in any folder."""
    return name.rpartition("/")[2].lower() in METADATA


def is_hidden(name: str) -> bool:
    """True for dot files, system files such as Thumbs.db, and all in dot folders or folders of systems (@eaDir)."""
    return any(part.startswith(".") or part.lower() in SYSTEM for part in name.split("/"))


def count_kinds(names: Iterable[str]) -> dict[str, int]:
    """Numbers of files by the end of their names, most frequent first."""
    kinds = Counter(splitext(name)[1].lower() or "without ending" for name in names)
    return dict(sorted(kinds.items(), key=lambda entry: (-entry[1], entry[0])))


def describe_kinds(kinds: dict[str, int]) -> str:
    """Such as '.txt 3, .csv 1'."""
    return ", ".join(f"{kind} {count:,}" for kind, count in kinds.items())


def left_out(place: object, kinds: dict[str, int]) -> list[str]:
    """A sentence about files that are no images, with a remedy if there is one; none for no files.

    Args:
        place: where they lie, for the message.
        kinds: numbers of files by the end of their names.
    """
    if not kinds:
        return []
    total = sum(kinds.values())
    what = "file is no image" if total == 1 else "files are no images"
    sentence = f"{total:,} {what}: {describe_kinds(kinds)} (left out of {place})."
    return [" ".join([sentence, *remedies(kinds)])]


def remedies(kinds: Iterable[str]) -> list[str]:
    """What to install so that these kinds of images can be read."""
    ways: dict[str, list[str]] = {}
    for kind in kinds:
        if kind in REMEDIES:
            ways.setdefault(REMEDIES[kind], []).append(kind)
    return [f"To read {' and '.join(kinds)}, run `pip install {package}`." for package, kinds in ways.items()]
