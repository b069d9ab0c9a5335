"""What general compressors need for a text: against the command-line programs and by their own round trips."""

import bz2
import json
import lzma
import shutil
import subprocess
import sys

import pytest

from minicpm4_hf.eval import compressors
from minicpm4_hf.shipped import shipped_excerpt

TEXT = shipped_excerpt().read_bytes()


@pytest.mark.parametrize(("name", "command"), [("bzip2", ["bzip2", "-9c"]), ("xz", ["xz", "-9ec"])])
def test_the_standard_ones_are_the_programs(name, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    size = len(subprocess.run(command, input=TEXT, capture_output=True, check=True).stdout)
    assert compressors.bits_per_byte(TEXT, name) == 8 * size / len(TEXT)


def test_what_is_compressed_can_be_read_again():
    assert bz2.decompress(compressors.COMPRESSORS["bzip2"][1](TEXT)) == TEXT
    assert lzma.decompress(compressors.COMPRESSORS["xz"][1](TEXT)) == TEXT
    pyppmd = pytest.importorskip("pyppmd")
    packed = compressors.compress_ppmd(TEXT)
    assert pyppmd.Ppmd7Decoder(16, 256 << 20).decode(packed, len(TEXT)) == TEXT
    assert len(packed) < len(compressors.COMPRESSORS["bzip2"][1](TEXT))  # prose suits it


def test_command(tmp_path, capsys):
    pytest.importorskip("pyppmd")
    (tmp_path / "one.txt").write_bytes(TEXT[:5000])
    (tmp_path / "two.txt").write_bytes(b"a" * 80_000)
    output = tmp_path / "record.json"
    assert compressors.main([str(tmp_path / "one.txt"), str(tmp_path / "two.txt"), "--output", str(output)]) == 0
    record = json.loads(output.read_text(encoding="utf-8"))
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert record["texts"]["two"]["bytes"] == 80_000
    table = capsys.readouterr().out
    for entry in record["compressors"].values():
        assert 0 < entry["bits_per_byte"]["two"] < 0.1 < entry["bits_per_byte"]["one"] < 8
        assert f"| {entry['settings']} | {entry['bits_per_byte']['one']:.3f} |" in table


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "other" / "a.txt"):
        path.write_bytes(b"words")
    monkeypatch.setattr(compressors, "compress_ppmd", lambda text: text)
    assert compressors.main([str(tmp_path / "a.txt"), str(tmp_path / "other" / "a.txt")]) == 2
    assert capsys.readouterr().err == "error: Each text must have a name of its own, got a.txt a.txt.\n"
    assert compressors.main([str(tmp_path / "none.txt")]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_without_pyppmd_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyppmd", None)
    (tmp_path / "a.txt").write_bytes(b"words")
    assert compressors.main([str(tmp_path / "a.txt")]) == 2
    error = "error: PPMd needs pyppmd: `pip install minicpm4-hf[eval]`, or `pip install pyppmd`.\n"
    assert capsys.readouterr().err == error
