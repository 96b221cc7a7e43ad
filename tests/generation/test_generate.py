"""Sets of samples: the same bytes by any number of processes and after any interruption. All files are compared by their bytes."""

import contextlib
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import generate_worker as worker
import numpy as np
import pyarrow
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from damaged_files import DEEP, damaged, other_json, reads_or_names_the_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load_file
from torch import nn

from ddim_fast import DDIMSampler, EDMSchedule, FlowSchedule, sample_seeds
from ddim_fast.cli import main
from ddim_fast.generation import EveryClass, GenerationError, OneClass, Table, check_set, generate, join_npz
from ddim_fast.generation.directory import AGAIN, MOST_SHARDS, SetDirectory, Slice, Slices
from ddim_fast.generation.formats import FORMATS, PER_SHARD, Shard
from ddim_fast.generation.processes import Processes, WorkQueue
from ddim_fast.generation.settings import plan_settings
from ddim_fast.generation.writer import Writer
from ddim_fast.kernels import reference
from ddim_fast.utils.pictures import to_uint8

CROWD, SHARDS = worker.Crowd().eval(), -(-worker.COUNT // worker.SHARD)


def files(directory):
    """Every file below a directory, hidden ones too, with the SHA-256 of its bytes."""
    paths = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The set that most tests compare with: 200 samples in 7 shards, by this process alone."""
    out = tmp_path_factory.mktemp("sets") / "whole"
    worker.crowd(out)
    return out


def check_whole(out, whole):
    assert files(out) == files(whole)
    assert check_set(out) == []


def stored(directory):
    """All samples and labels of a set of safetensors."""
    shards = [load_file(path) for path in sorted(Path(directory).glob("samples-*"))]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


# --- What a sample is -------------------------------------------------------------------------------------------------


def test_sample_i_is_the_samplers_own_in_the_fixed_batch_of_i(whole):
    found = stored(whole)
    assert found["labels"].tolist() == [i % worker.CLASSES for i in range(worker.COUNT)]
    batches = [
        worker.sampler().sample(
            CROWD,
            (16, *worker.SHAPE),
            seeds=torch.from_numpy(sample_seeds(0, 16, first)),
            conditioning={"class_labels": torch.arange(first, first + 16) % worker.CLASSES},
        )
        for first in range(0, worker.COUNT, 16)
    ]
    np.testing.assert_array_equal(found["samples"], torch.cat(batches)[: worker.COUNT].numpy())


def said(value: object) -> str:
    """A test's id, the same in every process: without addresses."""
    return re.sub(r"<[\w.]*\.(\w+) object at 0x\w+>", r"\1", str(value))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"seed": 3}, {"seed": 3}),
        ({"guidance_scale": 2.0}, {"guidance_scale": 2.0}),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, {"guidance_scale": [1.0, 2.0, 3.0]}),
        ({"guidance_scale": 2.0, "guidance_rescale": 0.5}, {"guidance_scale": 2.0, "guidance_rescale": 0.5}),
        ({"conditioning": OneClass(2)}, {"class": 2}),
        ({"dtype": torch.float64, "backend": "reference"}, {"dtype": torch.float64, "backend": "reference"}),
        ({"model_dtype": torch.bfloat16}, {"model_dtype": torch.bfloat16}),
        ({"compute_batch_size": 32}, {}),
    ],
    ids=said,
)
def test_every_argument_of_the_sampler_is_passed_on(tmp_path, options, wanted):
    size = options.get("compute_batch_size", 16)
    worker.crowd(tmp_path / "set", 32, **options)
    labels, seed = wanted.pop("class", None), wanted.pop("seed", 0)
    batches = [
        worker.sampler().sample(
            CROWD,
            (size, *worker.SHAPE),
            seeds=torch.from_numpy(sample_seeds(seed, size, first)),
            conditioning={
                "class_labels": torch.arange(first, first + size) % worker.CLASSES
                if labels is None
                else torch.full((size,), labels)
            },
            **wanted,
        )
        for first in range(0, 32, size)
    ]
    assert torch.equal(torch.from_numpy(stored(tmp_path / "set")["samples"]), torch.cat(batches))


def test_backend_is_passed_on(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(reference, "run", lambda inputs, run=reference.run: used.append(1) or run(inputs))
    worker.crowd(tmp_path / "a", 16)
    assert not used
    worker.crowd(tmp_path / "b", 16, backend="reference")
    assert len(used) == 3


@pytest.mark.parametrize("batch_size", [16, 48, 1600])
def test_batch_size_changes_nothing(tmp_path, whole, batch_size):
    worker.crowd(tmp_path / "set", batch_size=batch_size)
    check_whole(tmp_path / "set", whole)


def test_count_changes_no_sample(tmp_path, whole):
    worker.crowd(tmp_path / "set", 75)
    np.testing.assert_array_equal(stored(tmp_path / "set")["samples"], stored(whole)["samples"][:75])


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_processes_the_same_files(tmp_path, whole, world_size):
    worker.run("crowd", tmp_path / "set", world_size=world_size)
    check_whole(tmp_path / "set", whole)


def test_model_is_called_with_the_fixed_batch_alone(tmp_path):
    seen = set()

    class Model(worker.Crowd):
        def forward(self, x, t, class_labels=None):
            seen.add((len(x), len(t), len(class_labels), x.data_ptr() % 64))
            return super().forward(x, t, class_labels)

    generate(Model().eval(), worker.sampler(), 40, tmp_path / "set", conditioning=EveryClass(3), shard_size=32)
    assert {sizes[:3] for sizes in seen} == {(16, 16, 16)}
    assert {sizes[3] for sizes in seen} == {0}


# --- Files ------------------------------------------------------------------------------------------------------------


def a_shard(channels, labels=True, keys=None):
    samples = torch.linspace(-1.3, 1.3, 3 * channels * 4 * 5).reshape(3, channels, 4, 5)
    return Shard(7, samples, torch.tensor([2, 0, 1]) if labels else None, keys)


def grown(pixels):
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [True, False])
def test_npz_is_what_evaluators_read(channels, labels):
    shard = a_shard(channels, labels)
    content = FORMATS["npz"].encode(shard)
    with np.load(io.BytesIO(content), allow_pickle=False) as found:
        assert sorted(found) == ["arr_0", "arr_1"][: 1 + labels]
        assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (3, 4, 5, 3))
        np.testing.assert_array_equal(found["arr_0"], grown(to_uint8(shard.samples)))
        assert not labels or found["arr_1"].tolist() == [2, 0, 1]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for member in archive.infolist():
            assert (member.date_time, member.compress_type) == ((1980, 1, 1, 0, 0, 0), zipfile.ZIP_STORED)
            assert (
                archive.read(member)[:8] == b"\x93NUMPY\x01\x00"
            )  # the only version that guided-diffusion's evaluator streams


def test_shards_of_npz_are_joined_to_the_one_file_that_evaluators_read(tmp_path):
    out, file = tmp_path / "set", tmp_path / "all.npz"
    worker.crowd(out, 75, format="npz")
    output = invoke("--check", out, "--join", file)
    assert f"joined into {file}" in output
    shards = []
    for path in sorted(out.glob("samples-*")):
        with np.load(path) as shard:
            shards.append(dict(shard))
    with np.load(file, allow_pickle=False) as found:
        assert sorted(found) == ["arr_0", "arr_1"]
        for name in found:
            np.testing.assert_array_equal(found[name], np.concatenate([shard[name] for shard in shards]))
        assert len(found["arr_0"]) == 75
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npz", "set"]
    truncate_name = out / "samples-000001.npz"
    truncate_name.write_bytes(truncate_name.read_bytes()[:-1])
    assert "must have" in invoke("--check", out, "--join", tmp_path / "broken.npz", code=1)
    assert not (tmp_path / "broken.npz").exists()
    worker.crowd(tmp_path / "numbers", 16)
    assert "of format 'npz' can be joined" in invoke("--check", tmp_path / "numbers", "--join", file, code=1)
    assert "--join needs --check DIR" in invoke("-n", 4, "--join", file, code=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("keys", [None, ["a", "b/c", "d"]])
def test_webdataset_is_a_tar_of_png(channels, keys):
    shard = a_shard(channels, keys=keys)
    with tarfile.open(fileobj=io.BytesIO(FORMATS["webdataset"].encode(shard))) as archive:
        members = archive.getmembers()
        names = keys or ["000000007", "000000008", "000000009"]
        assert [member.name for member in members] == [f"{name}.{kind}" for name in names for kind in ("png", "cls")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        for i, name in enumerate(names):
            with Image.open(archive.extractfile(f"{name}.png")) as picture:
                pixels = np.asarray(picture).reshape(4, 5, channels)
            np.testing.assert_array_equal(pixels, to_uint8(shard.samples)[i])
            assert archive.extractfile(f"{name}.cls").read() == str([2, 0, 1][i]).encode()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 40, 50)], ids=str)
def test_no_shard_is_larger_than_was_reckoned(name, shape):
    torch.manual_seed(0)
    noise = torch.rand(20, *shape) * 2 - 1  # nothing that deflate could make smaller
    size = len(FORMATS[name].encode(Shard(0, noise, torch.zeros(20, dtype=torch.int64))))
    assert size <= 20 * FORMATS[name].largest(shape, torch.float32) + PER_SHARD
    assert size > 10 * FORMATS[name].largest(shape, torch.float32) / 2


@pytest.mark.parametrize("format", list(FORMATS))
def test_the_same_bytes_in_every_format(tmp_path, format, monkeypatch):
    worker.crowd(tmp_path / "a", 40, format=format)
    monkeypatch.setattr(time, "time", lambda: 2e9)  # as if it were another day
    worker.crowd(tmp_path / "b", 40, format=format, batch_size=16)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 3


def test_what_is_no_number_is_counted_and_said(tmp_path):
    class Broken(worker.Crowd):
        def forward(self, x, t, class_labels=None):
            return torch.where(class_labels.view(-1, 1, 1, 1) == 1, torch.nan, x)

    done = generate(Broken().eval(), worker.sampler(), 40, tmp_path / "s", conditioning=EveryClass(3), format="npz")
    assert done.non_finite == 13
    assert json.loads((tmp_path / "s/manifest.json").read_text())["shards"][0]["non_finite"] == 13


# --- Going on ---------------------------------------------------------------------------------------------------------


def truncate(out):
    path = out / "samples-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(out):
    path = out / "samples-000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-77] ^= 4
    path.write_bytes(content)


def remove(out):
    (out / "samples-000000.safetensors").unlink()


def leave_a_file_half_written(out):
    (out / ".unfinished").mkdir(exist_ok=True)
    (out / ".unfinished/samples-000001.safetensors.123.tmp").write_bytes(b"half")


def damage_a_record(out):
    (out / ".unfinished").mkdir(exist_ok=True)
    (out / ".unfinished/samples-000003.json").write_text('{"name": "samples-00')


def lose_the_record_of(digit):
    def damage(out):
        (out / ".unfinished").mkdir(exist_ok=True)
        record = json.loads((out / "manifest.json").read_text())["shards"][1]
        record["sha256"] = digit + record["sha256"][1:]
        (out / ".unfinished/samples-000001.json").write_text(json.dumps(record))

    return damage


DAMAGE = [truncate, flip_a_bit, remove, leave_a_file_half_written, damage_a_record, lose_the_record_of("x")]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__qualname__.split(".")[0])
def test_a_finished_set_is_mended(tmp_path, whole, damage):
    worker.crowd(tmp_path / "set")
    damage(tmp_path / "set")
    done = worker.crowd(tmp_path / "set", resume=True)
    check_whole(tmp_path / "set", whole)
    changes_a_shard = damage in (truncate, flip_a_bit, remove) or "lose" in damage.__qualname__
    assert done.made == (worker.SHARD if changes_a_shard else 0)
    assert done.made + done.found == worker.COUNT


def test_check_says_what_is_wrong(tmp_path):
    out = tmp_path / "set"
    worker.crowd(out)
    for damage in (truncate, flip_a_bit, remove):
        damage(out)
    (out / "samples-000007.safetensors").write_bytes(b"one too many")
    said = "\n".join(check_set(out))
    for words in (
        "samples-000002.safetensors must have",
        "samples-000004.safetensors has the right size, and other bytes",
        "samples-000000.safetensors is missing",
        "samples-000007.safetensors is not part of the set",
    ):
        assert words in said
    assert len(said.splitlines()) == 4
    result = CliRunner().invoke(main, ["generate", "--check", str(out)])
    assert result.exit_code == 1
    assert "is missing" in result.output


def test_a_manifest_that_names_other_files_is_not_followed(tmp_path):
    out, secret = tmp_path / "set", tmp_path / "secret"
    worker.crowd(out)
    secret.write_bytes(b"secret")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][1] |= {"name": "../secret", "bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert check_set(out) == ["samples-000001.safetensors has no valid record in the manifest"]
    worker.crowd(out, resume=True)
    assert secret.read_bytes() == b"secret"
    assert check_set(out) == []


CHANGES = {
    "count": {"count": 199},
    "seed": {"seed": 1},
    "shard_size": {"shard_size": 48},
    "compute_batch_size": {"compute_batch_size": 32},
    "format": {"format": "npz"},
    "dtype": {"dtype": torch.bfloat16},
    "model_dtype": {"model_dtype": torch.bfloat16},
    "guidance_scale": {"guidance_scale": 2.0},
    "conditioning.label": {"conditioning": OneClass(1)},
    "environment.step_backend": {"backend": "reference"},
    "environment.threads": {"threads": 2},
    "model": {"model_id": "another"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_set_of_other_settings_is_refused_with_the_difference(whole, name):
    before = files(whole)
    with pytest.raises(ValueError, match=rf"other settings(.|\n)*\n  {re.escape(name)}: .* there, .* here"):
        worker.crowd(whole, resume=True, **CHANGES[name])
    assert files(whole) == before


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("plan.timesteps", worker.sampler(4)),
        ("plan.eta", worker.sampler(eta=0.5)),
        ("plan.prediction_type", worker.sampler(prediction_type="sample")),
        ("plan.clip_sample_range", worker.sampler(clip_sample=True)),
        ("plan.thresholding", worker.sampler(thresholding=True)),
        ("plan.set_alpha_to_one", worker.sampler(set_alpha_to_one=False)),
        ("plan.order", worker.sampler(eta=0.0, order=2)),
    ],
    ids=said,
)
def test_a_set_of_another_plan_or_other_weights_is_refused(whole, name, sampler):
    with pytest.raises(ValueError, match=rf"\n  {name}"):
        generate(CROWD, sampler, 200, whole, conditioning=EveryClass(3), shard_size=32, resume=True)
    other = worker.Crowd().eval()
    other.weight.data[0, 0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"\n  model: "):
        generate(other, worker.sampler(), 200, whole, conditioning=EveryClass(3), shard_size=32, resume=True)


@pytest.mark.parametrize(
    ("path", "prediction_type"), [(FlowSchedule(shift=3.0), "flow"), (EDMSchedule(), "edm")], ids=["flow", "edm"]
)
def test_a_set_on_a_path_in_continuous_time(tmp_path, path, prediction_type):
    sampler = DDIMSampler(path, 3, prediction_type=prediction_type, eta=0.5)
    options = {"conditioning": EveryClass(3), "shard_size": 16}
    generate(CROWD, sampler, 32, tmp_path / "set", **options)
    batches = [
        sampler.sample(
            CROWD,
            (16, *worker.SHAPE),
            seeds=torch.from_numpy(sample_seeds(0, 16, first)),
            conditioning={"class_labels": torch.arange(first, first + 16) % worker.CLASSES},
        )
        for first in (0, 16)
    ]
    assert torch.equal(torch.from_numpy(stored(tmp_path / "set")["samples"]), torch.cat(batches))
    before = files(tmp_path / "set")
    next((tmp_path / "set").glob("samples-*")).unlink()
    generate(CROWD, sampler, 32, tmp_path / "set", resume=True, **options)
    assert files(tmp_path / "set") == before
    other = DDIMSampler(FlowSchedule(shift=2.0), 3, prediction_type=prediction_type, eta=0.5)
    with pytest.raises(ValueError, match=r"\n  plan.schedule(.|\n)* there, .* here"):
        generate(CROWD, other, 32, tmp_path / "set", resume=True, **options)


def test_order_1_is_not_among_the_settings():
    """So that sets from before there was another can be resumed."""
    assert "order" not in plan_settings(worker.sampler(), CROWD)
    assert plan_settings(worker.sampler(eta=0.0, order=2), CROWD)["order"] == 2


def test_a_model_that_computes_otherwise_under_the_same_name_is_found_out(tmp_path):
    worker.crowd(tmp_path / "set", model_id="mine")
    remove(tmp_path / "set")
    other = worker.Crowd().eval()
    other.weight.data += 1
    options = {"conditioning": EveryClass(3), "shard_size": 32, "model_id": "mine", "resume": True}
    with pytest.raises(GenerationError, match=r"samples-000000.safetensors must have the SHA-256 that was recorded"):
        generate(other, worker.sampler(), 200, tmp_path / "set", **options)


def test_what_is_in_the_way_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match=r"holds a set already \(finished\): pass --resume"):
        worker.crowd(whole)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex: name another"):
        worker.crowd(tmp_path / "mine", resume=True)
    with pytest.raises(ValueError, match="is a file: name another"):
        worker.crowd(tmp_path / "mine/thesis.tex")
    (tmp_path / "mine/manifest.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON, and is not"):
        worker.crowd(tmp_path / "mine", resume=True)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_of_any_bytes_is_checked_or_named(whole, tmp_path, data):
    content = (whole / "manifest.json").read_bytes()
    other = st.one_of(other_json(json.loads(content)), damaged(content), st.sampled_from(DEEP))
    reads_or_names_the_file(lambda path: check_set(path.parent), tmp_path / "manifest.json", data.draw(other))


def test_a_record_of_any_bytes_is_no_record(tmp_path):
    directory = SetDirectory(tmp_path, ".npz")
    directory.scratch.mkdir()
    for content in (*DEEP, b"", b"[]", b"\xff", b'{"name": "samples-000000.npz"}'):
        directory.record_path(0).write_bytes(content)
        assert directory.record(Slice(0, 0, 8)) is None


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "link", [".unfinished", ".unfinished/lock", ".unfinished/samples-000000.json", "manifest.json"]
)
def test_no_link_in_a_prepared_directory_leads_out_of_it(tmp_path, link, resume):
    """Whatever the links point to keeps its bytes, and its files."""
    out, other = tmp_path / "set", tmp_path / "other"
    if resume:
        worker.crowd(out)
        (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"finished"', '"unfinished"'))
    (out / ".unfinished").mkdir(parents=True, exist_ok=True)
    other.mkdir()
    (other / "precious").write_text("precious")
    (other / "precious.tmp").write_text("precious")
    before = files(other)
    if link == "manifest.json":
        if resume:
            (out / link).rename(other / "precious")
            before = files(other)
        (out / link).symlink_to(other / "precious")
    elif link == ".unfinished":
        (out / link).rmdir()
        (out / link).symlink_to(other)
    else:
        (out / link).symlink_to(other / "precious")
    if link in (".unfinished", ".unfinished/lock"):
        with pytest.raises(ValueError, match="of its own, got a link"):
            worker.crowd(out, resume=resume)
    elif link == "manifest.json" and not resume:
        with pytest.raises(ValueError, match="must be JSON"):
            worker.crowd(out)
    else:
        worker.crowd(out, resume=resume)
        assert check_set(out) == []
        assert not (out / link).is_symlink()
    assert files(other) == before


def test_a_pipe_in_a_shards_place_is_replaced(tmp_path):
    worker.crowd(tmp_path / "set")
    for name in ("samples-000000.safetensors", ".unfinished/samples-000001.json"):
        path = tmp_path / "set" / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    worker.crowd(tmp_path / "set", resume=True)
    assert check_set(tmp_path / "set") == []


def test_where_rank_0_refuses_all_do(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.tex").touch()
    with worker.Processes("crowd", tmp_path / "set", world_size=2) as processes:
        assert processes.wait() == [1, 1]
        assert "ValueError: out must be a directory that is new" in processes.errors(0)
        assert "rank 0 refused: out must be a directory that is new" in processes.errors(1)


def test_a_rank_with_other_settings_is_refused(tmp_path):
    with worker.Processes("seeded_by_rank", tmp_path / "set", world_size=2, patience=0.2) as processes:
        assert processes.wait() == [0, 1]
        assert "seed: 0 there, 1 here" in processes.errors(1)


def test_two_runs_at_once_are_refused(tmp_path, whole):
    with worker.Processes("crowd", tmp_path / "set", seconds=0.02) as first:
        first.wait_for_shards(1)
        with pytest.raises(OSError, match="another run is at work"):
            worker.crowd(tmp_path / "set", resume=True)
        assert first.wait() == [0]
    check_whole(tmp_path / "set", whole)


# --- Interruptions ----------------------------------------------------------------------------------------------------


def kill_and_go_on(tmp_path, whole, number):
    """Two processes, one of them killed at some moment; then three finish."""
    chance = random.Random(number)
    out = tmp_path / "set"
    with worker.Processes("crowd", out, seconds=0.01, patience=0.2, world_size=2) as processes:
        if chance.random() < 0.8:
            processes.wait_for_shards(chance.randrange(1, SHARDS))
        time.sleep(chance.uniform(0, 0.3))
        victim = chance.randrange(2)
        processes.ranks[victim].kill()
        codes = processes.wait()
        if victim == 1:
            assert codes[0] == 0, processes.errors(0)  # it took over what the dead one had in hand
            check_whole(out, whole)
        elif codes[1]:  # rank 0 kept the store
            assert "the store of the process group is lost" in processes.errors(1)
    worker.run("crowd", out, world_size=3, resume=True)
    check_whole(out, whole)


@pytest.mark.parametrize("number", range(3))
def test_kill_9_of_any_rank_loses_and_doubles_nothing(tmp_path, whole, number):
    kill_and_go_on(tmp_path, whole, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3, 33))
def test_kill_9_at_thirty_moments(tmp_path, whole, number):
    kill_and_go_on(tmp_path, whole, number)


def test_what_has_its_name_is_whole_wherever_a_process_dies(tmp_path, whole):
    """At each fsync of the manifest (1, 2), of two shards (3, 4; 7, 8), and of their records: of the file, then of its directory."""
    for number in range(1, 11):
        out = tmp_path / str(number)
        with worker.Processes("dies_at_fsync", out, number) as processes:
            assert processes.wait() == [-signal.SIGKILL]
        there = {name: sha for name, sha in files(out).items() if name.startswith("samples-")}
        assert there.items() <= files(whole).items()
        assert len(there) == number // 4
        worker.crowd(out, resume=True)
        check_whole(out, whole)


def test_a_file_is_on_the_disk_before_its_name_and_the_record_after_both(tmp_path, monkeypatch):
    done = []

    def fsync(descriptor):
        done.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split(".")[0]))

    def replace(source, target, real=os.replace):
        done.append(("name", Path(target).name))
        real(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    worker.crowd(tmp_path / "set", 16)
    assert done == [
        ("fsync", "manifest"), ("name", "manifest.json"), ("fsync", "set"),
        ("fsync", "samples-000000"), ("name", "samples-000000.safetensors"), ("fsync", "set"),
        ("fsync", "samples-000000"), ("name", "samples-000000.json"), ("fsync", ""),
        ("fsync", "manifest"), ("name", "manifest.json"), ("fsync", "set"),
    ]  # fmt: skip


def test_a_stopped_rank_holds_nobody_up_and_may_go_on(tmp_path, whole):
    out = tmp_path / "set"
    with worker.Processes("crowd", out, seconds=0.02, patience=0.3, world_size=3) as processes:
        processes.wait_for_shards(2)
        os.kill(processes.ranks[2].pid, signal.SIGSTOP)
        while (out / ".unfinished").exists():
            assert processes.ranks[0].exitcode in (None, 0), processes.errors()
            time.sleep(0.05)
        check_whole(out, whole)
        os.kill(processes.ranks[2].pid, signal.SIGCONT)
        assert processes.wait() == [0, 0, 0]
    check_whole(out, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A directory on a disk of 32 kB, and how small it has to be made to be by ``disk_of`` where a disk cannot be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", path], capture_output=True).returncode == 0
    )
    yield path, None if mounted else 32_000, mounted
    if mounted:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("how", ["mounted where allowed", "every write"])
def test_a_full_disk_ends_the_run_and_keeps_what_is_written(tmp_path, whole, small_disk, how):
    disk, size, mounted = small_disk
    if how == "every write":
        disk, size, mounted = tmp_path / "other", 20_000, False
        disk.mkdir()
    with worker.Processes("full_disk", disk / "set", worker.COUNT, size, check_space=False) as processes:
        assert processes.wait() == [1]
        said = processes.errors()
    assert re.search(r"samples-00000\d.safetensors could not be written \(No space left on device\)", said)
    assert "run the same command with --resume" in said
    kept = {name: sha for name, sha in files(disk / "set").items() if name.startswith("samples-")}
    assert 1 < len(kept) < SHARDS
    assert kept.items() <= files(whole).items()
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
    done = worker.crowd(disk / "set", resume=True)
    assert done.found == worker.SHARD * len(kept)
    check_whole(disk / "set", whole)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and type("", (), {"free": 20_000}))
    with pytest.raises(OSError, match=r"0\.00 GB are free: make room") as caught:
        worker.crowd(tmp_path / "set")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "set").exists()
    worker.crowd(tmp_path / "set", check_space=False)


def few_looks(monkeypatch):
    """Fail where each of many shards is looked at, or each of many slices made."""
    made = []

    def counted(self, index):
        made.append(index)
        assert len(made) < 1000, "the work grows with the count"
        return Slice(index, index * self.size, min(self.size, self.count - index * self.size))

    monkeypatch.setattr("ddim_fast.generation.directory.Slices.__getitem__", counted)


@pytest.mark.parametrize("check_space", [True, False])
@pytest.mark.parametrize("count", [10**9, 10**11, 10**12, 10**18, 2**63, 10**30, 10**400])
@pytest.mark.parametrize("shard_size", [512, 10**6 * 16, 10**12, 10**30 * 16])
def test_counts_that_no_disk_can_hold_are_refused_at_once(tmp_path, monkeypatch, count, shard_size, check_space):
    few_looks(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 10**9}))
    monkeypatch.setattr("ddim_fast.utils.checks._memory", lambda: 10**9)
    model = worker.Crowd().eval()
    for _ in range(2):  # the same command again says the same
        with pytest.raises((ValueError, OSError), match=r"must make at most 1,000,000 files|into memory|GB are free"):
            generate(model, worker.sampler(), count, tmp_path / "set", shard_size=shard_size, check_space=check_space)
    assert list(tmp_path.iterdir()) == []


def test_the_most_files(tmp_path):
    assert len(Slices(MOST_SHARDS * 16, 16)) == MOST_SHARDS
    with pytest.raises(
        ValueError, match=r"at most 1,000,000 files of 16 samples each, got 16000001: take shard_size=32 "
    ):
        Slices(MOST_SHARDS * 16 + 1, 16)


def test_the_space_for_what_is_missing_alone_is_asked_for(tmp_path, whole, monkeypatch):
    out = Path(shutil.copytree(whole, tmp_path / "set"))
    remove(out)
    asked = []
    monkeypatch.setattr(SetDirectory, "_check_space", lambda self, needed: asked.append(needed))
    (out / "samples-000001.safetensors.part").touch()
    (out / "samples-999999.safetensors").touch()
    worker.crowd(out, resume=True)
    assert asked == [worker.SHARD * FORMATS["safetensors"].largest(worker.SHAPE, torch.float32) + PER_SHARD]


def test_the_command_leaves_nothing_behind(tmp_path):
    for count in ("1e9", str(10**9), str(10**12), str(10**30)):
        output = invoke("-n", count, "--steps", 2, "--out", tmp_path / "set", code=2 if "e" in count else 1)
        assert "Resume with" not in output
        assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("count", [10**7, 10**12, 10**400, -1, 0, "12", 2.5])
def test_a_manifest_of_a_huge_set_is_damaged(whole, tmp_path, monkeypatch, count):
    few_looks(monkeypatch)
    manifest = json.loads((whole / "manifest.json").read_text())
    manifest["settings"] |= {"count": count, "shard_size": 1, "format": "npz"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for use in (check_set, lambda path: join_npz(path, path / "all.npz")):
        with pytest.raises(
            ValueError, match=r"manifest\.json must hold the settings of a run: it is damaged \(.*count"
        ):
            use(tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_says_how_to_go_on(tmp_path, name):
    out = tmp_path / "set"
    arguments = ["-n", "96", "--steps", "2", "--shard-size", "16", "--class", "Bag"]
    with worker.Processes("command", out, *arguments) as processes:
        processes.wait_for_shards(1)
        os.kill(processes.ranks[0].pid, getattr(signal, name))
        assert processes.wait() == [130]
        said = processes.errors()
    assert "stopped: all shards written so far are complete" in said
    assert f"Resume with: ddim-fast generate -n 96 --steps 2 --shard-size 16 --class Bag --out {out} --resume" in said
    there = files(out)
    assert check_set(out) == [f"the set is not finished. {AGAIN}"]
    result = CliRunner().invoke(main, ["generate", *arguments, "--out", str(out), "--resume"])
    assert result.exit_code == 0, result.output
    assert "already there" in result.output
    assert check_set(out) == []
    shards = {name: sha for name, sha in there.items() if name.startswith("samples-")}
    assert 1 <= len(shards) < 6
    assert shards.items() <= files(out).items()


def test_torchrun_and_a_killed_worker(tmp_path, whole):
    """As people start it: torchrun ends the other process when one is killed, and begins again; its store remembers the first try."""
    out, script = tmp_path / "set", tmp_path / "script.py"
    script.write_text(
        "import os, sys, generate_worker as worker\n"
        "again = os.environ['TORCHELASTIC_RESTART_COUNT'] != '0'\n"
        "worker.crowd(sys.argv[1], seconds=0 if again else 0.1, resume=again)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", script, out]
    with subprocess.Popen(
        [sys.executable, *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True
    ) as torchrun:
        try:
            while len(list(out.glob("samples-*"))) < 2:
                assert torchrun.poll() is None, torchrun.communicate()[1]
                time.sleep(0.02)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            assert len(list(out.glob("samples-*"))) < SHARDS
            _, said = torchrun.communicate(timeout=240)
        finally:
            torchrun.kill()
    assert torchrun.returncode == 0, said
    assert "exitcode: -9" in said
    check_whole(out, whole)


# --- The queue and the writer -----------------------------------------------------------------------------------------


def together(count, work):
    """``work(rank, store)`` in threads that share a store."""
    store = dist.HashStore()
    threads = [threading.Thread(target=work, args=(rank, store), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_every_slice_is_taken_once_by_whoever_is_free():
    taken = []

    def work(rank, store):
        queue = WorkQueue(Processes(rank, 3, store), 40)
        for index in queue.turns(lambda: None):
            time.sleep(0.001 + 0.02 * (rank == 2))
            taken.append((rank, index))
            queue.finish(index, {"count": 2}, made=True)

    together(3, work)
    assert sorted(index for _, index in taken) == list(range(40))
    assert sum(rank == 2 for rank, _ in taken) < 8


def test_slices_of_dead_processes_are_made_by_others_once_each():
    taken, lost = [], {3, 4, 5}

    def work(rank, store):
        queue = WorkQueue(Processes(rank, 5, store), 12, patience=3.0)
        for index in queue.turns(lambda: None):
            if index in lost:
                lost.discard(index)
                return  # as a process that dies does
            time.sleep(0.01)
            taken.append(index)
            queue.finish(index, {"count": 1, "index": index}, made=True)
        assert queue.missing() == []
        assert queue.samples == (12, 0)
        assert [record["index"] for record in queue.records()] == list(range(12))

    together(5, work)
    assert sorted(taken) == list(range(12))


def test_nothing_is_made_twice_while_others_get_on():
    store = dist.HashStore()
    other, idle = (WorkQueue(Processes(rank, 2, store), 5, patience=1.0) for rank in range(2))
    store.add("next", 5)  # the other has taken all

    def work():
        for index in range(5):
            time.sleep(0.4)
            other.finish(index, {"count": 1}, made=True)

    thread = threading.Thread(target=work)
    thread.start()
    assert list(idle.turns(lambda: None)) == []
    thread.join()


def test_missing_slices_are_found_wherever_they_are():
    store = dist.HashStore()
    queue = WorkQueue(Processes(0, 1, store), 33)
    for index in set(range(33)) - {0, 17, 31, 32}:
        queue.finish(index, {"count": 1}, made=False)
        queue.finish(index, {"count": 1}, made=True)  # again, by another process: counts once
    assert queue.missing() == [0, 17, 31, 32]
    assert queue.samples == (0, 29)


def test_the_set_is_closed_by_another_where_one_does_not_get_to_it():
    closed = []

    def work(rank, store):
        queue = WorkQueue(Processes(rank, 2, store), 0, patience=0.2)

        def finish():
            if not closed:
                closed.append(None)
                raise InterruptedError  # as a process that dies does
            closed.append(rank)

        with contextlib.suppress(InterruptedError):
            queue.close(finish)

    together(3, work)
    assert len(closed) == 2


def test_the_writer_works_beside_and_its_errors_come_out():
    going, go = threading.Event(), threading.Event()
    written = []

    def write(item):
        going.set()
        assert go.wait(10)
        if item == 3:
            raise OSError(errno.ENOSPC, "full")
        written.append(item)

    with pytest.raises(OSError, match="full"), Writer(write) as writer:  # noqa: PT012 (the error comes at one of several calls)
        writer.put(1)
        assert going.wait(10)
        writer.put(2)  # does not wait for the first
        go.set()
        writer.flush()
        assert written == [1, 2]
        writer.put(3)
        for item in range(4, 100):
            writer.put(item)  # never waits for a writer that is dead
        writer.flush()
    assert written == [1, 2]


# --- Conditioning -----------------------------------------------------------------------------------------------------


def write_table(path, rows):
    if path.suffix == ".csv":
        lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_sample_i_has_row_i_of_a_file(tmp_path, suffix):
    labels = [2, 0, 1, 1, 0] * 8
    rows = [{"key": f"k{i}/a", "class_labels": label} for i, label in enumerate(labels)]
    table = Table(write_table(tmp_path / f"rows{suffix}", rows))
    worker.crowd(tmp_path / "set", 40, conditioning=table, format="webdataset")
    with tarfile.open(tmp_path / "set/samples-000001.tar") as archive:
        found = [archive.extractfile(f"k{i}/a.cls").read() for i in range(32, 40)]
        assert found == [b"%d" % label for label in labels[32:]]
    plain = Table(write_table(tmp_path / f"plain{suffix}", [{"class_labels": label} for label in labels]))
    worker.crowd(tmp_path / "numbers", 40, conditioning=plain)
    np.testing.assert_array_equal(stored(tmp_path / "numbers")["labels"], labels)
    twos = 40 * [2]
    constant = Table(write_table(tmp_path / f"twos{suffix}", [{"class_labels": label} for label in twos]))
    worker.crowd(tmp_path / "twos", 40, conditioning=constant)
    worker.crowd(tmp_path / "rule", 40, conditioning=OneClass(2))
    np.testing.assert_array_equal(stored(tmp_path / "twos")["samples"], stored(tmp_path / "rule")["samples"])


def test_columns_of_numbers_and_lists(tmp_path):
    rows = [{"a": i, "b": i / 2, "c": [i, -i]} for i in range(3)]
    found = Table(write_table(tmp_path / "rows.jsonl", rows)).rows(2, 2)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in found.items()} == {
        "a": (torch.int64, [2, 0]),
        "b": (torch.float32, [1.0, 0.0]),
        "c": (torch.int64, [[2, -2], [0, 0]]),
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"key": "../out"}], r"stays within its directory, got '\.\./out' in row 1"),
        ([{"key": "/etc/passwd"}], "stays within"),
        ([{"key": "a.b"}], "stays within"),
        ([{"key": "a\nb"}], "stays within"),
        ([{"key": "a" * 97}], "at most 96"),
        ([{"key": 3}], "got 3 in row 1"),
        ([{"key": "a"}, {"key": "a"}], "got 'a' a second time in row 2"),
        ([{"a": 1}, {"b": 1}], "row 2 of .* must have the columns of the first, a, got b"),
        ([{"a": 1}, {"a": "x"}], "got 'x' in row 2"),
        ([{"a": True}], "got True in row 1"),
        ([{"a": 1.0}, {"a": float("nan")}], "got nan in row 2"),
        ([{"a": [1]}, {"a": [1, 2]}], "lists of them, of one length"),
        ([], "got none"),
    ],
    ids=said,
)
def test_rows_that_cannot_be_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        Table(write_table(tmp_path / "rows.jsonl", rows))


def test_files_of_rows_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ImportError, match="pip install pyarrow, or write JSON lines"):
        Table(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.csv, \.parquet, got .*rows\.txt"):
        Table(tmp_path / "rows.txt")
    with pytest.raises(FileNotFoundError, match="got none at"):
        Table(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(ValueError, match=r"line 2 of .* must be JSON"):
        Table(tmp_path / "rows.jsonl")


ROWS = {
    ".csv": b"key,class_labels,weight\na,1,0.5\nb/c,2,1e3\n",
    ".jsonl": b'{"key": "a", "class_labels": 1, "list": [0.5, 1]}\n{"key": "b", "class_labels": 2, "list": [3, 4]}\n',
}


@pytest.mark.parametrize("suffix", ROWS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_table_of_any_bytes_is_finite_or_named(tmp_path_factory, suffix, data):
    def read(path):
        for column in Table(path).columns.values():
            assert column.dtype in (np.int64, np.float32)
            assert np.isfinite(column).all()

    rows = [json.loads(line) for line in ROWS[".jsonl"].splitlines()]
    other = other_json(rows[0]).map(lambda row: row + b"\n" + json.dumps(rows[1]).encode())
    content = data.draw(st.one_of(damaged(ROWS[suffix]), other, st.sampled_from(DEEP)))
    reads_or_names_the_file(read, tmp_path_factory.getbasetemp() / f"table{suffix}", content)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_parquet_table_of_any_bytes_is_finite_or_named(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "table.parquet"
    parquet.write_table(
        pyarrow.table({"key": ["a", "b/c"], "class_labels": [1, 2], "list": [[0.5, 1.0], [3, 4]]}), path
    )

    def read(path):
        for column in Table(path).columns.values():
            assert column.dtype in (np.int64, np.float32)
            assert np.isfinite(column).all()

    read(path)
    reads_or_names_the_file(read, path, data.draw(damaged(path.read_bytes())))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a\n1e39\n", r"int64 if they are whole, else float32, got 1e\+39 in row 1"),
        ("x.jsonl", '{"a": 1}\n{"a": -1e39}', r"got -1e\+39 in row 2"),
        ("x.csv", "a\n9223372036854775808\n", "got 9223372036854775808 in row 1"),
        ("x.jsonl", '{"a": [1, 1' + 400 * "0" + "]}", r"got \[1, 10000.* in row 1"),
        ("x.csv", "a,a\n1,2\n", "got 'a' twice"),
        ("x.csv", "a,\n1,2\n", "must have a name, got one without: 'a', ''"),
        ("x.csv", 'a\n"1', "must be CSV in UTF-8, and is none, or damaged"),
        ("x.csv", "a\n1_000\n", "got '1_000' in row 1"),
        ("x.jsonl", '{"a": 1}\n{"a": true}', "got True in row 2"),
        ("x.jsonl", '{"a": ' + "[" * 20 + "1" + "]" * 20 + "}", "lists of them"),
    ],
)
def test_numbers_that_would_change_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / name)


def test_the_largest_numbers_and_a_byte_order_mark(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n9223372036854775807,3.4028234663852886e38\n", encoding="utf-8-sig")
    columns = Table(tmp_path / "x.csv").columns
    assert columns["a"].tolist() == [2**63 - 1]
    assert columns["b"].tolist() == [float(np.finfo(np.float32).max)]


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count must be an integer, at least 1, got 0"),
        ({"count": 2.0}, TypeError, "count must be an integer, at least 1, got 2.0"),
        ({"batch_size": 24}, ValueError, "batch_size must be a multiple of compute_batch_size, 16, got 24: take 32"),
        ({"shard_size": 40}, ValueError, "shard_size must be a multiple of compute_batch_size, 16, got 40: take 48"),
        ({"threads": 0}, ValueError, "threads must be an integer, at least 1"),
        ({"patience": 0.0}, ValueError, "patience must be a finite number, above 0, got 0.0"),
        ({"format": "png"}, ValueError, "format must be one of safetensors, npz, webdataset, got 'png'"),
        ({"format": "npz", "shape": (2, 6, 6)}, ValueError, r"for pictures, \(1 or 3, H, W\), got samples \(2, 6, 6\)"),
        ({"shape": (1, 0)}, ValueError, r"shape\[1\] must be an integer, at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer in"),
        ({"guidance_scale": [1.0]}, ValueError, "guidance_scale"),
        ({"guidance_rescale": 2.0, "guidance_scale": 2.0}, ValueError, "guidance_rescale"),
        ({"conditioning": OneClass(4)}, ValueError, r"class_labels must be from 0 to 2 \(3: no class\), got 4 to 4"),
        ({"conditioning": EveryClass(5)}, ValueError, "class_labels must be from 0 to 2"),
        ({"device": "nowhere"}, ValueError, "device must be a torch device"),
        ({"backend": "nothing"}, ValueError, "backend must be one of"),
        ({"capture": "never"}, ValueError, "capture must be one of"),
        ({"capture": "step"}, ValueError, "needs a CUDA device"),
        ({"dtype": "float32"}, TypeError, "dtype must be a floating-point torch.dtype"),
        ({"model_dtype": torch.int64}, TypeError, "model_dtype must be a floating-point"),
        ({"dtype": torch.float64, "backend": "cpu"}, ValueError, "no backend can run this step"),
    ],
    ids=said,
)
def test_errors_come_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        worker.crowd(tmp_path / "set", **{"count": 40, **options})
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be in eval mode"):
        generate(worker.Crowd(), worker.sampler(), 4, tmp_path / "set")
    with pytest.raises(TypeError, match="pass model_id"):
        generate(lambda x, t: x, worker.sampler(), 4, tmp_path / "set", shape=(1, 4))
    with pytest.raises(ValueError, match="shape must be given"):
        generate(nn.Identity().eval(), worker.sampler(), 4, tmp_path / "set")
    with pytest.raises(TypeError, match="sampler must be a DDIMSampler"):
        generate(CROWD, None, 4, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    generate(lambda x, t: x, worker.sampler(), 4, tmp_path / "set", shape=(1, 4), model_id="identity")


# --- The command ------------------------------------------------------------------------------------------------------


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, ["generate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_is_the_function(tmp_path):
    import ddim_fast

    output = invoke(
        "-n", 20, "--steps", 2, "--eta", 1, "--seed", 5, "--guidance", 2, "--out", tmp_path / "a", "--format", "npz"
    )
    assert "20 samples in 1 file: 20 drawn in" in output
    assert "20/20" in output
    generate(
        ddim_fast.load_model("fashion"),
        worker.sampler(2),
        20,
        tmp_path / "b",
        seed=5,
        conditioning=EveryClass(10),
        guidance_scale=2.0,
        format="npz",
    )
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert "is complete: 20 samples in 1 file" in invoke("--check", tmp_path / "a")
    assert invoke("--check", tmp_path / "a", "--quiet").strip() == ""


def test_the_command_refuses_what_could_run_code_and_what_is_unclear(tmp_path):
    archive = tmp_path / "model.pt"
    torch.export.save(torch.export.export(nn.Identity(), (torch.zeros(2, 1),)), archive)
    for path in (archive,):
        assert "(--trust-pickle)" in invoke("-n", 4, "--model", path, "--out", tmp_path / "set", code=1)
    assert "shape of a model's samples" in invoke(
        "-n", 4, "--model", archive, "--trust-pickle", "--out", tmp_path / "set", code=1
    )
    assert "-n, the number of samples, must be given" in invoke("--out", tmp_path / "set", code=1)
    table = write_table(tmp_path / "rows.csv", [{"class_labels": 1}])
    assert "must not be combined" in invoke(
        "--conditioning", table, "--class", "Bag", "--out", tmp_path / "set", code=1
    )
    assert "got none in" in invoke("--check", tmp_path, code=1)
    assert not (tmp_path / "set").exists()


def test_help_shows_torchrun_and_no_options_that_do_nothing():
    output = invoke("--help")
    for word in ("torchrun", "--resume", "--check", "--compute-batch-size", "--trust-pickle"):
        assert word in output
    assert "--save" not in output
    assert "grid" not in output


# --- Many samples -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "shard_size"), [("shipped", 1000, 64), ("small", 100_000, 2048)])
def test_many_samples_by_one_two_and_four_and_after_a_kill(tmp_path, name, count, shard_size):
    options = {"shard_size": shard_size}
    for world_size in (1, 2, 4):
        worker.run(name, tmp_path / str(world_size), count, world_size=world_size, **options)
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert files(tmp_path / "4") == files(tmp_path / "1")
    with worker.Processes(name, tmp_path / "killed", count, world_size=2, **options) as processes:
        processes.wait_for_shards(5)
        for rank in processes.ranks:
            rank.kill()
        processes.wait()
    assert 5 <= len(list((tmp_path / "killed").glob("samples-*"))) < -(-count // shard_size)
    worker.run(name, tmp_path / "killed", count, world_size=3, resume=True, **options)
    check_whole(tmp_path / "killed", tmp_path / "1")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_count(tmp_path):
    used = {}
    for count in (1000, 100_000):
        worker.run("memory", tmp_path / str(count), count, batch_size=256, shard_size=256)
        used[count] = int((tmp_path / f"{count}.memory").read_text())
    assert used[100_000] - used[1000] < 8_000  # kB
