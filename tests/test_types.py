"""Types as a user's checker sees them, through the editable install that developers make."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def user_environment(tmp_path):
    """An environment with the package installed as by ``pip install --editable``."""
    checkout = tmp_path / "checkout"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        checkout.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(
        ROOT / "cut_cross_entropy",
        checkout / "cut_cross_entropy",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    code = "import sys, setuptools.build_meta as b; print(b.build_editable(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.split()[-1]

    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    paths = {"base": str(environment), "platbase": str(environment)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    zipfile.ZipFile(wheel).extractall(site)
    # The other packages are those of the environment that runs the tests.
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_strict_check_of_a_users_file(user_environment, tmp_path):
    shutil.copy(ROOT / "tests" / "typing_user.py", tmp_path / "user.py")
    command = [
        *(sys.executable, "-m", "mypy", "--strict", "--config-file="),
        *("--cache-dir", str(ROOT / ".mypy_cache" / "user")),
        *("--python-executable", str(user_environment), "user.py"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "Success: no issues found in 1 source file\n"
