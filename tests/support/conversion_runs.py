"""Running conversions in processes that are killed or have little disk, and the damage that hostile input has."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time

import torch
from safetensors.torch import load_file, save_file

from minicpm4_hf.conversion.__main__ import main

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_two_shards(folder, tensors, config):
    """A folder with the tensors in two shards, the second half of the names in the second."""
    folder.mkdir()
    names = sorted(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    for shard, part in zip(SHARDS, parts):
        save_file({name: tensors[name].contiguous() for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_child(arguments, *, limit_bytes=None, kill_after=None):
    """Run a conversion in a forked process; (exit code or -signal, what it wrote to stderr)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.dup2(writer, 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # pytest's is a file: the limit below would hold
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.set_num_threads(1)  # the parent's thread pool is not here
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            code = main(arguments)
        finally:
            os._exit(code)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as file:
        shown = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown


def listing(folder):
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def content(path):
    """The bytes of a file, or of every file in a folder by name."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


def remove(path):
    """Remove a result: a folder, or a file with its card."""
    for old in (path, path.with_name(f"{path.name}.md")):
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


def check_killed_at_any_moment(arguments, tmp_path, num_moments, *, suffix=""):
    """Kill a conversion at random moments: OUT is absent or whole each time, and a second run finishes.

    Args:
        arguments: the command line for a given OUT.
        num_moments: how many runs are killed; those that ended before are not counted.
        suffix: of the name of OUT, where it must have one.

    Returns after how many of the kills OUT was there.
    """
    whole, out = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    before = listing(tmp_path)

    def complete(path):
        begin = time.monotonic()
        code, shown = in_child(arguments(path))
        assert code == 0, shown
        return time.monotonic() - begin, listing(tmp_path)

    _, files = complete(out)
    remove(out)
    duration, _ = complete(whole)
    reference, rng, num_killed, num_whole = content(whole), random.Random(0), 0, 0
    remove(whole)
    assert listing(tmp_path) == before
    for _ in range(5 * num_moments):
        moment = rng.uniform(0, duration)
        code, shown = in_child(arguments(out), kill_after=moment)
        if code == -signal.SIGKILL:
            num_killed += 1
            num_whole += out.exists()
            if out.exists():
                assert content(out) == reference
                remove(out)
            seconds, left = complete(out)
            assert left == files
            duration = min(duration, seconds)  # a busy machine made the first run long
        else:
            assert code == 0, shown
            duration = min(duration, moment)  # it ended by itself before
        assert content(out) == reference
        remove(out)
        if num_killed == num_moments:
            return num_whole
    raise AssertionError(f"only {num_killed} of {5 * num_moments} runs were killed before their end")


def _change(folder, function):
    tensors = load_file(folder / SHARDS[1])
    function(tensors)
    save_file(tensors, folder / SHARDS[1])


def truncate(folder, name):
    """A shard ends too early."""
    os.truncate(folder / SHARDS[1], (folder / SHARDS[1]).stat().st_size - 10)


def huge_header(folder, name):
    """A header says that it is 2**60 bytes long."""
    path = folder / SHARDS[1]
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def not_a_number(folder, name):
    """One weight is NaN."""

    def spoil(tensors):
        tensors[name][0, 1] = float("nan")

    _change(folder, spoil)


def wrong_shape(folder, name):
    """A tensor lacks a column."""
    _change(folder, lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()}))


def missing(folder, name):
    """A tensor is neither in its shard nor in the index."""
    _change(folder, lambda tensors: tensors.pop(name))
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("bomb_was_run",)


def pickled_shard(folder, name):
    """A shard is a pickle under a safetensors name."""
    (folder / SHARDS[1]).write_bytes(pickle.dumps(Bomb()))


def only_a_pickle(folder, name):
    """The weights are a pickle only."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def leave_the_folder(folder, name):
    """The index names a file outside of the folder, which is there."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = f"../{SHARDS[1]}"
    (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(folder / SHARDS[1], folder.parent)


# Damage -> what the sentence says of it.
DAMAGES = {
    truncate: "is damaged or cut off",
    huge_header: "is damaged or cut off",
    not_a_number: "{name} in {folder}/model-00002-of-00002.safetensors holds NaN or infinity, first at [0, 1]",
    wrong_shape: "{name} in {folder}/model-00002-of-00002.safetensors has shape",
    missing: "lack {name}",
    pickled_shard: "is damaged or cut off",
    only_a_pickle: "has its weights in pytorch_model.bin, a pickle, which can run code when opened",
    leave_the_folder: "lists '../model-00002-of-00002.safetensors', which is no file of this folder",
}
