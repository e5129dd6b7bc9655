"""Which backend a call gets, and what is said where none can run it. GPUs are pretended: none is needed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compiled

import fusedreg
from fusedreg import Regularization, backends, collect_env
from fusedreg.backends import BACKENDS, OPERATORS, Availability, availability, cpu, cuda, explain, resolve, triton
from fusedreg.backends.common import DTYPES
from fusedreg.functional import LAYER_FUNCTIONS
from fusedreg.testing.budget import implementation

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
MISSING = Availability(False, "it is missing; build it")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that backends are available, or not."""

    def pretend(**states: Availability) -> None:
        for name, answer in states.items():
            monkeypatch.setattr(backends._MODULES[name], "load", lambda answer=answer: answer)
        monkeypatch.setattr(cuda, "_too_old", lambda index: "")
        monkeypatch.setattr(triton, "interpreted", lambda: False)
        monkeypatch.setattr(backends, "_warned", set())

    return pretend


def test_the_table() -> None:
    assert BACKENDS == ("auto", "reference", "cpu", "cuda", "triton")
    assert OPERATORS["cpu"] == OPERATORS["cuda"] != OPERATORS["triton"]
    assert set(LAYER_FUNCTIONS) == set(BACKENDS) - {"auto"}
    for name in OPERATORS:
        answer = availability(name)
        assert bool(answer) == (answer.reason == "")


@pytest.mark.parametrize(
    ("has_cuda", "has_triton", "expected"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "triton")],
)
def test_auto_on_a_gpu(state: Any, has_cuda: bool, has_triton: bool, expected: str) -> None:
    state(cuda=Availability(True) if has_cuda else MISSING, triton=Availability(True) if has_triton else MISSING)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve("auto", GPU, dtype) == expected


def test_auto_on_a_gpu_without_kernels_names_both_reasons(state: Any) -> None:
    state(cuda=Availability(False, "no file; build it"), triton=Availability(False, "no package; install it"))
    with pytest.raises(RuntimeError) as error:
        resolve("auto", GPU, torch.float32)
    for part in (
        "cuda:0",
        "'cuda' cannot: no file; build it.",
        "'triton' cannot: no package; install it.",
        "reference",
    ):
        assert part in str(error.value)


def test_what_has_no_kernel_goes_to_the_reference_with_one_warning(state: Any) -> None:
    for device in (CPU, GPU):
        state(cuda=Availability(True), triton=Availability(True))
        with pytest.warns(UserWarning, match="reference.*process_group"):
            assert resolve("auto", device, torch.float32, process_group=True) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve("auto", device, torch.float32, process_group=True) == "reference"


def test_other_devices_raise() -> None:
    with pytest.raises(RuntimeError, match=r"expected a device that there are kernels for \(cpu or cuda\), got mps"):
        resolve("auto", torch.device("mps"), torch.float32)
    assert resolve("auto", torch.device("meta"), torch.float32) == "reference"


@pytest.mark.parametrize("name", OPERATORS)
def test_a_backend_by_name_runs_or_raises(state: Any, name: str) -> None:
    state(**{name: MISSING})
    device = CPU if name == "cpu" else GPU
    with pytest.raises(RuntimeError, match=rf"'{name}' cannot run this call: it is missing; build it\..*reference"):
        resolve(name, device, torch.float32)
    state(**{name: Availability(True)})
    assert resolve(name, device, torch.float32) == name
    other = GPU if name == "cpu" else CPU
    with pytest.raises(RuntimeError, match=f"device: expected {device.type}, got {other}"):
        resolve(name, other, torch.float32)
    with pytest.raises(RuntimeError, match="process_group"):
        resolve(name, device, torch.float32, process_group=True)


def test_dtypes(state: Any) -> None:
    state(cuda=Availability(True), triton=Availability(True))
    assert all(resolve("cuda", GPU, dtype) == "cuda" for dtype in DTYPES)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16, got float64"):
        resolve("triton", GPU, torch.float64)


def test_old_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load", lambda: Availability(True))
    monkeypatch.setattr(cuda, "_ages", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index == 0 else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    reason = cuda.unsupported(GPU, torch.float32)
    assert reason is not None
    assert "expected 8.0 or higher, got 7.5 (Tesla T4); use backend='triton'" in reason
    assert cuda.unsupported(torch.device("cuda", 1), torch.float32) is None


def test_why_the_cuda_extension_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reason() -> str:
        answer = cuda._load(tmp_path / "_cuda.abi3.so")
        assert not answer
        return answer.reason

    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "built for ROCm" in reason() and "backend='triton'" in reason()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA; install a CUDA build of torch" in reason()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no CUDA device" in reason() and "nvidia-smi" in reason()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu, "load", lambda: MISSING)
    assert "it is missing; build it" in reason()
    monkeypatch.setattr(cpu, "load", lambda: Availability(True))
    if hasattr(torch.ops.fusedreg, "_cuda_version"):
        pytest.skip("not run further: the CUDA extension is loaded in this process")
    assert "does not exist" in reason() and "FUSEDREG_CUDA=1 make build" in reason()
    (tmp_path / "_cuda.abi3.so").write_bytes(b"not a library")
    assert "cannot be loaded" in reason() and "FUSEDREG_CUDA=1" in reason()
    monkeypatch.setattr(torch.ops.fusedreg, "_cuda_version", lambda: "0.0.0", raising=False)
    assert "is of version 0.0.0" in reason()
    monkeypatch.setattr(torch.ops.fusedreg, "_cuda_version", lambda: fusedreg.__version__)
    monkeypatch.setattr(torch.ops.fusedreg, "_cuda_versions", lambda: [12090, 13000], raising=False)
    assert "driver runs CUDA up to 12.9, and the compiled extension" in reason()
    assert "with CUDA 13.0; update the driver, or build with nvcc of CUDA 12: " in reason()
    monkeypatch.setattr(torch.ops.fusedreg, "_cuda_versions", lambda: [13000, 13020])  # minor versions do not matter
    assert cuda._load(tmp_path / "_cuda.abi3.so")


def test_why_triton_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert "is not installed" in triton._load().reason
    monkeypatch.undo()
    package = pytest.importorskip("triton", reason="not run: needs the package triton")
    monkeypatch.setattr(package, "__version__", "2.1.0")
    assert "or newer, got 2.1.0" in triton._load().reason
    monkeypatch.undo()
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in triton._load().reason


def test_explain(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state(cuda=MISSING, triton=Availability(True))
    monkeypatch.setattr(triton, "describe", lambda device: "Triton 3")
    text = explain("cuda", torch.bfloat16).splitlines()
    assert text[0] == "cuda, bfloat16"
    assert "  cuda       no: it is missing; build it" in text
    assert "  triton     yes, with Triton 3" in text
    assert text[-1] == "  auto takes triton"
    state(cuda=MISSING, triton=MISSING)
    assert explain("cuda").splitlines()[-1].startswith("  auto takes nothing: an error")
    assert explain("cpu", process_group=True).splitlines()[-1] == "  auto takes reference"


H200 = cuda.DeviceLimits(132, 232448, 9, 0)


@compiled
def test_the_plan_of_the_cuda_tiers() -> None:
    """Asked without a GPU: the tier of a size, a type and a norm, in words."""
    options: dict[str, Any] = {"steps": 100, "batch_size": 16, "input_size": 64, "hidden_size": 512}
    lines = cuda.plan(H200, torch.bfloat16, **options, regularization=Regularization()).splitlines()
    assert [line.split(":")[0] for line in lines] == ["forward", "backward"]
    assert all(line.split()[1] in ("cluster:", "grid:") for line in lines)
    for dtype, size in ((torch.float64, 512), (torch.bfloat16, 8192)):
        options["hidden_size"] = size
        text = cuda.plan(H200, dtype, **options, regularization=Regularization(zoneout_cell=0.2))
        assert "forward: step" in text and "backward: step" in text
    call = torch.ops.fusedreg._cuda_plan
    with pytest.raises(RuntimeError, match="sizes: expected numbers above 0, got 0"):
        call([1, 1, 1, 0, 1], 0, [0.0] * 9, [0] * 15, False, list(H200))
    with pytest.raises(RuntimeError, match="expected 5 sizes, a dtype from 0 to 3"):
        call([1, 1, 1, 1, 1], 7, [0.0] * 9, [0] * 15, False, list(H200))
    with pytest.raises(RuntimeError, match="expected 9 rates and 15 options, got 1 and 15"):
        call([1, 1, 1, 1, 1], 0, [0.0], [0] * 15, False, list(H200))


@compiled
def test_explain_names_the_tier(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state(cuda=Availability(True), triton=MISSING)
    monkeypatch.setattr(cuda, "describe", lambda device: "NVIDIA H200")
    monkeypatch.setattr(cuda, "device_limits", lambda device: H200)
    plan = cuda.plan
    monkeypatch.setattr(cuda, "plan", lambda *given, device, **options: plan(*given, **options))
    assert "backward:" not in explain("cuda", torch.bfloat16)
    text = explain("cuda", torch.bfloat16, hidden_size=512, batch_size=8)
    assert "  cuda       yes, with NVIDIA H200\n             forward: " in text
    assert "\n             backward: " in text
    assert text.endswith("auto takes cuda")


def test_the_import_is_light() -> None:
    """No GPU is touched and neither Triton nor the CUDA extension is loaded, whatever the machine has."""
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "torch.cuda.is_available = lambda: sys.exit('asked for a GPU')\n"
        "import fusedreg\n"
        "fusedreg.LSTM(3, 4)(torch.ones(2, 2, 3))\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert fusedreg.backends.cuda._state is None and fusedreg.backends.triton._state is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.compile
def test_a_backend_is_found_while_a_graph_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call may be in compiled code: loading happens beside the graph."""
    calls: list[str] = []

    def load() -> Availability:
        calls.append(torch.__version__.replace("no", str(len(calls))))  # nothing that could be traced
        return Availability(True)

    load._dynamo_marked_constant = cuda.load._dynamo_marked_constant  # type: ignore[attr-defined]
    monkeypatch.setattr(cpu, "load", load)
    torch._dynamo.reset()
    module = fusedreg.LSTM(3, 4, backend="cpu")
    whole = torch.compile(lambda x: module(x)[0], backend="eager", fullgraph=True)
    whole(torch.ones(2, 2, 3))
    assert len(calls) == 1


def test_implementations_by_name() -> None:
    assert implementation("reference") is LAYER_FUNCTIONS["reference"]
    with pytest.raises(ValueError, match="'reference', 'cpu', 'cuda', 'triton', got 'auto'"):
        implementation("auto")
    if not availability("cuda"):
        with pytest.raises(RuntimeError, match="'cuda' cannot be used here"):
            implementation("cuda")


def test_collect_env_lists_all() -> None:
    facts = collect_env.collect()
    for name in OPERATORS:
        assert facts[f"backend {name}"].startswith(("available", "not available: "))


def test_either_way_of_allowing_tf32_is_understood() -> None:
    """In a process of its own: once the newer setting is used, torch refuses to answer by the older one."""
    code = """
import torch
from fusedreg.backends.common import allows_tf32
assert not allows_tf32()
torch.set_float32_matmul_precision("high")
assert allows_tf32()
torch.set_float32_matmul_precision("highest")
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert allows_tf32()
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert not allows_tf32()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
