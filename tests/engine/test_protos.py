from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path("protos/trirank/v1")


def test_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    grpc_tools = pytest.importorskip("grpc_tools", reason="needs grpcio-tools (the dev extra)")
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for protoc-gen-mypy
    subprocess.run(
        [
            *(sys.executable, "-m", f"{grpc_tools.__name__}.protoc", "-I", str(ROOT)),
            *(f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
            str(FOLDER / "recommender.proto"),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PATH": search_path},
        stderr=subprocess.DEVNULL,
    )
    generated = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert len(generated) == 4
    for name in generated:
        fresh, stored = (tmp_path / FOLDER / name).read_text(), (ROOT / FOLDER / name).read_text()
        assert fresh == stored, f"{FOLDER / name} is out of date: run `make protos`"
