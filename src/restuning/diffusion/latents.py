"""Latents of pictures and embeddings of captions, computed once and kept in shards on disk."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning.data.captioned import Captioned, Square
from restuning.diffusion.base import check_prompts, check_size, latents_of, texts_of
from restuning.errors import CheckpointError, RestuningError
from restuning.model.files import fingerprint_of
from restuning.utils.files import as_json, atomic_write, locked

MANIFEST, FORMAT, SHARD = "latents.json", "restuning.latents/1", 256


class Latents:
    """What training reads of pictures and captions: mean (n, v, c, h, w), and deviation if the VAE has one, of each
    picture's v views (as it is; flipped); `texts` by name, (m, …), of which row 0 is the empty caption; `captions[i]`,
    the rows of picture i."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        self.captions: list[list[int]] = manifest["captions"]
        self.names: list[str] = manifest["names"]
        self.size: int = manifest["settings"]["size"]
        self._pictures = _Shards(folder, "pictures", len(self.captions))
        self._texts = _Shards(folder, "texts", manifest["texts"])

    def __len__(self) -> int:
        return len(self.captions)

    def picture(self, i: int) -> dict[str, Tensor]:
        """`mean`, and `std` if there is one, (v, c, h, w)."""
        return self._pictures.row(i)

    def text(self, i: int) -> dict[str, Tensor]:
        """A caption's embeddings."""
        return self._texts.row(i)


class _Shards:
    """Rows of tensors by name, some hundred in a file, mapped into memory."""

    def __init__(self, folder: Path, kind: str, count: int) -> None:
        self.folder, self.kind, self.count = folder, kind, count
        self.open: dict[int, Any] = {}

    def row(self, i: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        shard, at = divmod(i, SHARD)
        if shard not in self.open:
            path = shard_of(self.folder, self.kind, shard)
            try:
                self.open[shard] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is damaged: delete it, and it is built again ({error})") from error
        file = self.open[shard]
        return {name: file.get_slice(name)[at] for name in file.keys()}  # noqa: SIM118


def shard_of(folder: Path, kind: str, shard: int) -> Path:
    return folder / f"{kind}-{shard:05}.safetensors"


def keep_latents(
    pipe: Any,
    data: Captioned,
    out: Path,
    *,
    size: int,
    flip: bool = False,
    truncate: bool = False,
    batch_size: int = 8,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Latents:
    """Build what is missing in `out`, or take what is there if it is of the same pictures (told by their names, and by
    their files' bytes in number), captions, base and settings.

    Raises RestuningError if it is of others, or if there is no room for it; DataError for a picture that cannot be
    read, and (without `truncate`) for a caption beyond the encoder's length.
    """
    check_size(pipe, size)
    captions = sorted({caption for i in range(len(data)) for caption in data.captions(i)})
    if not truncate:
        check_prompts(pipe, captions, ", or truncate")
    rows = {caption: i for i, caption in enumerate(["", *captions])}
    texts = ["", *captions]
    manifest = {
        "format": FORMAT,
        "settings": {"size": size, "flip": flip, "truncate": truncate},
        "vae": fingerprint_of(pipe.vae),
        "text encoders": [
            fingerprint_of(part) for name, part in pipe.components.items() if name.startswith("text_encoder") and part
        ],
        "names": [Path(name).name for name in data.names],
        "files": [data.images.size(i) for i in range(len(data))],
        "words": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "texts": len(texts),
        "captions": [[rows[caption] for caption in data.captions(i)] for i in range(len(data))],
    }
    with locked(out), _nothing_or_shards(out):
        _same(out, manifest)
        square = Square(size)

        def pictures(at: Sequence[int]) -> dict[str, Tensor]:
            views = [torch.stack([square(data.image(i), f) for i in at]) for f in (False, True)[: 1 + flip]]
            found = [latents_of(pipe, view) for view in views]
            kept = {"mean": torch.stack([mean for mean, _ in found], 1)}
            stds = [std for _, std in found if std is not None]
            return {**kept, "std": torch.stack(stds, 1)} if stds else kept

        def embeddings(at: Sequence[int]) -> dict[str, Tensor]:
            return texts_of(pipe, [texts[i] for i in at])

        total = len(data) + len(texts)
        _fill(out, "pictures", len(data), pictures, batch_size, show, 0, total)
        _fill(out, "texts", len(texts), embeddings, batch_size, show, len(data), total)
    return Latents(out)


@contextlib.contextmanager
def _nothing_or_shards(out: Path) -> Iterator[None]:
    """What fails before anything is kept leaves no folder behind."""
    try:
        yield
    except RestuningError:
        if not any(out.glob("*.safetensors")):
            for name in (MANIFEST, ".lock"):
                (out / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def _same(out: Path, manifest: dict[str, Any]) -> None:
    """Raises RestuningError if the folder holds something else."""
    file = out / MANIFEST
    held = [p for p in out.iterdir() if p.name != ".lock"]
    if held and not file.exists():
        raise RestuningError(f"{out} is not empty and holds no latents: choose another folder")
    if file.exists():
        try:
            before = json.loads(file.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        now = json.loads(as_json(manifest))
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            raise RestuningError(
                f"{out} holds latents of other {', '.join(other)}: delete it, or choose another folder"
            )
    else:
        atomic_write(file, as_json(manifest))


def _fill(
    out: Path,
    kind: str,
    count: int,
    made: Callable[[Sequence[int]], dict[str, Tensor]],
    batch_size: int,
    show: Callable[[int, str], None],
    before: int,
    total: int,
) -> None:
    """Every shard that is not there yet, whole."""
    from safetensors.torch import save

    for shard in range(-(-count // SHARD)):
        path = shard_of(out, kind, shard)
        if path.exists():
            continue
        rows = range(shard * SHARD, min(count, (shard + 1) * SHARD))
        parts = [made(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
        data = save({name: torch.cat([part[name] for part in parts]).cpu().contiguous() for name in parts[0]})
        left = -(-(count - shard * SHARD) // SHARD)
        if len(data) * left > shutil.disk_usage(out).free:
            raise RestuningError(
                f"{out}: no room for {kind}, about {len(data) * left / 2**30:.1f} GiB more; choose another folder"
            )
        try:
            atomic_write(path, data)
        except OSError as error:
            raise RestuningError(f"cannot write {path}: {error.strerror or error}") from error
        show(before + rows.stop, f"{kind} {rows.stop}/{count} of {total}")
