"""What a plain `pip install .` carries."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "opd_bench/embedded/models"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="building a wheel offline needs hatchling: install the extra 'dev'")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(out.glob("opd_bench-*.whl"))


@pytest.fixture(scope="module")
def carried(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_wheel_carries_every_part_the_program_reads(carried):
    files = [path for folder in ("baselines", "tasks") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    expected = {f"opd_bench/{path.relative_to(ROOT).as_posix()}" for path in files}
    package = [path for path in (ROOT / "opd_bench").rglob("*") if path.suffix in (".py", ".yaml", ".json")]
    expected |= {path.relative_to(ROOT).as_posix() for path in package}
    assert {"opd_bench/baselines/opd.py", "opd_bench/tasks/opd_bench_stem.yaml", "opd_bench/tiers/embedded.yaml"} <= expected
    assert {"opd_bench/sizes/quick.yaml", "opd_bench/designs/factorial.yaml"} <= expected
    assert "opd_bench/leaderboard.schema.json" in expected
    assert expected <= carried
    assert any(name.endswith("licenses/LICENSE") for name in carried)


@pytest.mark.slow
@pytest.mark.skipif(not MODELS.is_dir(), reason="the embedded models are not built in this checkout")
def test_wheel_carries_the_embedded_models(carried):
    for role in ("teacher", "student-0", "student-1", "student-2"):
        for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
            assert f"opd_bench/embedded/models/{role}/{name}" in carried


@pytest.mark.slow
def test_wheel_is_small_and_holds_no_leftovers(wheel, carried):
    assert wheel.stat().st_size < 10_000_000
    assert not [name for name in carried if "__pycache__" in name or name.startswith(("tests/", "results/"))]
