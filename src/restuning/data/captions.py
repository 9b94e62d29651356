"""Captioned pictures by `kind:rest`, for text-to-image: folders and tars with captions, COCO's json, classes by a
template."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from restuning.data.captioned import Captioned, texts
from restuning.data.decode import SUFFIXES
from restuning.data.folder import Files, load_folder, load_images
from restuning.data.table import read_table, settings_of
from restuning.data.tar import Members, contents, load_tar, members_of
from restuning.data.task import Items, Subset
from restuning.errors import DataError
from restuning.utils.reading import read_json

METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "captions", "texts")
TEMPLATES = {
    "aircraft": "a photo of a {}, a type of aircraft.",
    "cars": "a photo of a {}.",
    "dogs": "a photo of a {}, a type of dog.",
    "flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "nabirds": "a photo of a {}, a type of bird.",
    "sun397": "a photo of a {}.",
}
"""CLIP's prompts (Radford et al. 2021) for the paper's data sets, by names that `template=` knows."""
PLAIN = "a photo of a {}"


def load_captions(spec: str) -> Captioned:
    """`captions:FOLDER`, `coco:JSON`, `captions-tar:TAR` or `classes:FOLDER_OR_TAR`; what each takes after a `?` is
    with its loader. Raises DataError for an unknown kind and for data that cannot be used."""
    kind, _, rest = spec.partition(":")
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise DataError(f"unknown captioned data {spec!r}{hint}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](rest)


def load_metadata(rest: str) -> Captioned:
    """`FOLDER[?text=COLUMN]`: pictures and metadata.jsonl (or .csv), as the datasets library's imagefolder has them.

    A row is a picture's `file_name` and its caption, or list of captions. Raises DataError for a row without picture,
    a picture without row, a picture with two.
    """
    path, settings = settings_of(rest, ("text",))
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"no such folder: {root.absolute()} (expected pictures and {METADATA[0]})")
    listed = next((root / name for name in METADATA if (root / name).is_file()), None)
    if listed is None:
        raise DataError(f"{root.absolute()} has no {' or '.join(METADATA)}: a row is a file_name and its text")
    table = read_table(listed)
    column = table.column("text", settings.get("text"), COLUMNS)
    table.column("file_name", "file_name", ())
    files, captions = [], []
    for row, name in zip(table.rows, table.names, strict=True):
        file = row.get("file_name")
        if not isinstance(file, str) or not (root / file).is_file():
            raise DataError(f"{name}: no such picture: {file!r}")
        files.append(root / file)
        captions.append(texts(row.get(column), f"{name}: {file}"))
    _once(files, str(listed))
    captioned = {file.resolve() for file in files}
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.resolve() not in captioned:
            raise DataError(f"{file} has no caption: it is not in {listed.name}")
    return Captioned(Files(files, [0] * len(files)), captions)


def load_coco(rest: str) -> Captioned:
    """`JSON[?images=FOLDER_OR_TAR]`: COCO's captions json; without `images`, the pictures are looked for beside it.

    In the usual layout, annotations/captions_train2017.json, they are in train2017/, beside annotations/. Raises
    DataError for what is no captions json, for a picture that is not there, without caption, or listed twice.
    """
    path, settings = settings_of(rest, ("images",))
    where = Path(path)
    try:
        held = read_json(where)
    except OSError as error:
        raise DataError(f"{where.absolute()} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{where} is no JSON ({error})") from error
    by_id: dict[Any, list[Any]] = {}
    try:
        files = {image["id"]: str(image["file_name"]) for image in held["images"]}
        _once([image["id"] for image in held["images"]], f"{where}, ids of images")
        for one in held["annotations"]:
            by_id.setdefault(one["image_id"], []).append(one["caption"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} is no captions json of COCO's: expected images and annotations ({error})") from error
    _once(files.values(), str(where))
    strange = next((key for key in by_id if key not in files), None)
    if strange is not None or not files:
        raise DataError(f"{where}: {'no image' if not files else f'a caption of image {strange}, which is not listed'}")
    captions = [texts(by_id.get(key, []), f"{where}: {file}") for key, file in files.items()]
    given = settings.get("images")
    return Captioned(_listed(where, list(files.values()), given), captions)


def _listed(where: Path, files: Sequence[str], given: str | None) -> Items:
    """COCO's pictures, in the folder or the tar that was given, or in a folder beside the json."""
    if given is not None and Path(given).is_file():
        within = {str(PurePosixPath(member[1])): member for member in members_of(given)}
        tops = {name.partition("/")[0] for name in within}
        if files[0] not in within and len(tops) == 1:  # one folder around it all
            within = {name.partition("/")[2]: member for name, member in within.items()}
        missing = next((file for file in files if file not in within), None)
        if missing is not None:
            raise DataError(f"{where}: {given} holds no {missing}")
        return Members([within[file] for file in files], [0] * len(files))
    beside = where.stem.rpartition("_")[2]
    likely = [where.parent / beside, where.parent.parent / beside, where.parent, where.parent.parent]
    roots = likely if given is None else [Path(given)]
    root = next((root for root in roots if (root / files[0]).is_file()), roots[0])
    for file in files:
        if not (root / file).is_file():
            raise DataError(f"{where}: no such picture: {root / file} (name their folder or tar: ?images=PATH)")
    return Files([root / file for file in files], [0] * len(files))


def load_captioned_tar(path: str) -> Captioned:
    """`TAR`: pictures, and beside each a .txt of the same stem, as webdataset has them; a line is a caption.

    Raises DataError for a picture without .txt, a .txt that is empty or not UTF-8, and two pictures of one stem.
    """
    found = sorted((PurePosixPath(member[1]), member) for member in members_of(path))
    pictures = [(name, m) for name, m in found if name.suffix.lower() in SUFFIXES and not name.name.startswith(".")]
    if not pictures:
        raise DataError(f"{Path(path).absolute()} holds no picture (expected {', '.join(sorted(SUFFIXES))})")
    _once([name.with_suffix("") for name, _ in pictures], path)
    files = {PurePosixPath(name).with_suffix(""): data for name, data in contents(path, ".txt").items()}
    captions = []
    for name, _ in pictures:
        where = f"{path}:{name}"
        if name.with_suffix("") not in files:
            raise DataError(f"{where} has no caption: expected {name.with_suffix('.txt')} beside it")
        try:
            text = files[name.with_suffix("")].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{name.with_suffix('.txt')} is not UTF-8") from error
        captions.append(texts([one for one in text.splitlines() if one.strip()] or "", where))
    return Captioned(Members([member for _, member in pictures], [0] * len(pictures)), captions)


def load_classes(rest: str) -> Captioned:
    """`FOLDER_OR_TAR[?template=TEXT][&only=CLASS][&prompt=TEXT]`: class/file, or train/class/file, of which the
    training pictures are read; a caption is the template with the class in place of {}.

    template: also a name of TEMPLATES. only: the pictures of one class. prompt: the caption of every picture, as
    DreamBooth has it; FOLDER may then hold the pictures themselves. Numbers that class folders begin with are left
    out, and folders that are numbers alone are named by classes.txt, as NABirds has it. Raises DataError.
    """
    path, settings = settings_of(rest, ("template", "only", "prompt"))
    template, prompt, only = (settings.get(name) for name in ("template", "prompt", "only"))
    if prompt is not None and template is not None:
        raise DataError(f"{rest}: a template and a prompt: expected one of them")
    if (
        prompt is not None
        and only is None
        and Path(path).is_dir()
        and not any(p.is_dir() for p in Path(path).iterdir())
    ):
        images = load_images(Path(path))
        return Captioned(images, [texts(prompt, f"{rest}: the prompt")] * len(images))
    template = TEMPLATES.get(template or "", template or PLAIN)
    if "{}" not in template:
        raise DataError(
            f"{rest}: the template {template!r} has no {{}} for the class: expected one, or {', '.join(TEMPLATES)}"
        )
    source = load_tar(path) if Path(path).is_file() else load_folder(path)
    chosen = list(range(len(source.train)))
    if only is not None:
        if only not in source.classes:
            near = difflib.get_close_matches(only, source.classes, 1)
            raise DataError(f"{path} has no class {only!r}{f' (did you mean {near[0]!r}?)' if near else ''}")
        chosen = [i for i in chosen if source.classes[source.train.labels[i]] == only]
    if prompt is not None:
        captions = [texts(prompt, f"{rest}: the prompt")] * len(chosen)
    else:
        known = _class_names(Path(path))
        words = [template.replace("{}", _words(name, known)) for name in source.classes]
        captions = [(words[source.train.labels[i]],) for i in chosen]
    return Captioned(Subset(source.train, chosen), captions)


def _words(name: str, known: Mapping[int, str]) -> str:
    """`n02085620-Chihuahua`, `001.Black_footed_Albatross` and NABirds' `0817` as a person would say them."""
    if name.isdecimal():
        return known.get(int(name), name)
    return re.sub(r"^(n?\d+[-._ ])(?=\D)", "", name).replace("_", " ")


def _class_names(path: Path) -> dict[int, str]:
    """NABirds' classes.txt, `number name` a line, in the folder or beside it; nothing where there is none."""
    for folder in (path, path.parent):
        listed = folder / "classes.txt"
        if listed.is_file():
            rows = [one.split(maxsplit=1) for one in listed.read_text("utf-8-sig", "replace").splitlines()]
            return {int(row[0]): row[1] for row in rows if len(row) == 2 and row[0].isdecimal()}
    return {}


def _once(names: Iterable[object], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{where}: {twice[0]} is there twice")


KINDS: dict[str, Callable[[str], Captioned]] = {
    "captions": load_metadata,
    "coco": load_coco,
    "captions-tar": load_captioned_tar,
    "classes": load_classes,
}
