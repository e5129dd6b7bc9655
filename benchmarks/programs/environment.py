"""An environment for the programs: the torch of the interpreter that makes it, and what the catalogue pins."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

from benchmarks.programs.catalogue import ALSO, PROGRAMS, Program


def make(folder: Path) -> Path:
    """Make it, or complete it, and unpack the packages' sources beside it; returns its interpreter.

    It sees the packages of the interpreter that runs this, so that no second torch is installed.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        here = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        Path(here, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [program.requirement for program in PROGRAMS] + list(ALSO)
    plan = _pip(python, "install", "--dry-run", *wanted)
    would = re.findall(r"^Would install (.*)$", plan, re.MULTILINE)
    if any(re.search(r"(^| )torch-\d", line) for line in would):
        raise RuntimeError(f"{folder}: pip would install another torch: {would}; change the pins in the catalogue")
    if would:
        _pip(python, "install", "--quiet", *wanted)
    for program in PROGRAMS:
        if program.tests and not source_of(folder, program).exists():
            _unpack(python, folder, program)
    _word_vectors(python, home_of_stanza(folder) / "in")
    return python


def source_of(folder: Path, program: Program) -> Path:
    """Where a program's source distribution is unpacked."""
    return folder / "sources" / program.requirement


def home_of_stanza(folder: Path) -> Path:
    """What stanza's tests are told as STANZA_TEST_HOME."""
    return folder / "stanza"


def _pip(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _unpack(python: Path, folder: Path, program: Program) -> None:
    archives = folder / "archives" / program.requirement
    _pip(
        python,
        *("download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
        *("--dest", str(archives), program.requirement),
    )
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(archives, filter="data")
    (unpacked,) = (path for path in archives.iterdir() if path.is_dir())
    source_of(folder, program).parent.mkdir(exist_ok=True)
    unpacked.rename(source_of(folder, program))


def _word_vectors(python: Path, folder: Path) -> None:
    """The vectors that stanza's tests ask for: three words, four numbers each."""
    if (folder / "tiny_emb.pt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder.parent / "out").mkdir(exist_ok=True)
    text = folder / "tiny_emb.txt"
    text.write_text("3 4\nunban 1 2 3 4\nmox 5 6 7 8\nopal 9 10 11 12\n")
    code = "import sys; from stanza.models.common.pretrain import Pretrain; Pretrain(*sys.argv[1:]).load()"
    subprocess.run([str(python), "-c", code, str(folder / "tiny_emb.pt"), str(text)], check=True)


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
