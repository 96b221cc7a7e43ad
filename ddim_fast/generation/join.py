"""A set of npz shards as the one file that evaluators of samples read."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from ..utils.atomic_files import atomic_file, fsync_directory, name_beside
from ..utils.checks import check_path
from ..utils.files import reading
from .directory import FINISHED, parts_of, read_manifest
from .formats import ZIP_EPOCH

_KIND = "a shard of a set (--check says which are damaged)"


def join_npz(out: str | os.PathLike[str], file: str | os.PathLike[str]) -> Path:
    """Write ``arr_0`` (and ``arr_1``) of all shards of a finished set, in order, to one ``.npz``,
    as guided-diffusion's evaluator reads it.

    Memory use is one buffer, whatever the size of the set. The file gets its name when it is
    complete.

    Raises:
        FileNotFoundError: there is no set in ``out``.
        ValueError: the set is not finished, or not of format "npz"; or ``file`` does not end in
            ``.npz``.
    """
    out, file = check_path("out", out), check_path("file", file)
    found = read_manifest(out)
    if file.suffix != ".npz":
        raise ValueError(f"the file of a joined set must end in .npz, got {file}")
    directory, slices = parts_of(out, found)
    format = found["settings"]["format"]
    if found["state"] != FINISHED or format != "npz":
        raise ValueError(
            f"only a finished set of format 'npz' can be joined, got one {found['state']} of format {format!r} in {out}"
        )
    shards = [directory.shard(part.index) for part in slices]
    with reading(shards[0], _KIND) as opened, zipfile.ZipFile(opened) as first:
        names = first.namelist()
    with atomic_file(file, name_beside(file)) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            _join(archive, name, shards, slices.count)
    fsync_directory(file.absolute().parent)
    return file


def _join(archive: zipfile.ZipFile, name: str, shards: list[Path], count: int) -> None:
    with archive.open(zipfile.ZipInfo(name, ZIP_EPOCH), "w", force_zip64=True) as target:
        for i, shard in enumerate(shards):
            with reading(shard, _KIND) as opened, zipfile.ZipFile(opened) as source, source.open(name) as member:
                np.lib.format.read_magic(member)
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
                if i == 0:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran_order}
                    np.lib.format.write_array_header_1_0(target, {**header, "shape": (count, *shape[1:])})
                shutil.copyfileobj(member, target)
