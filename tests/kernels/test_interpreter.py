"""Triton without a GPU: the shared kernel cases, the decode plan and the CUDA backend's layers, in Triton's interpreter.

Triton must be imported to interpret, so they run in a process of their own, one for all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from momentkv_vllm.policies import names

HERE = Path(__file__).parent
FILES = [
    "test_attention_kernels.py",
    "test_consolidation_kernels.py",
    "test_packed_kernels.py",
    "test_head_budgets.py",
    "test_softcap.py",
    "test_score_kernels.py",
    "test_decode_plan.py",
    "test_cuda_backend.py",
    "test_layer_state.py",
    "test_layers_together.py",
    "test_observed_on_the_way.py",
]
SECOND_PROOFS = [
    # Of the batches: every data type, record and order of the correction is in one of the others, and odd groups are.
    *("first-g1", "first-g4", "first-g7", "first-g8"),
    # Of scores made outside of the kernel: one of its four data types.
    *("80-float32-h2o", "32-bfloat16-h2o", "64-int8-h2o"),
    # The cap is one of logits, whatever the store's type and the correction: int4 and the first batch stay.
    *("capped_too and int8", "capped_attend and batch1", "on_the_way and int4-0.0"),
    # Every store and either score in one launch: of the six pairs, two have both; that of fed back keys is of int4.
    *("together and model-momentkv", "together and int4-", "together and fed_back-keydiff"),
    # Of heads with budgets of their own: usual events of an int4 store, large first ones of all layers at once, a backend's.
    *("of_it_alone and (int8 or 0-2.0 or momentkv-5)", "heads_of_their_own and 112-False"),
]
"""Cases that `make test` leaves to `make test-all`."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cases", ["most", pytest.param("all", marks=pytest.mark.slow)])
def test_triton_kernels_and_what_stands_on_them(cases):
    # Other policies' scores are made outside of the kernel: h2o stands for all of them. Attention without the correction is
    # the first test's matter. Threads change nothing in an interpreter.
    left_out = ["threads", "triton-False", *sorted(set(names()) - {"momentkv", "h2o"})]
    chosen = f"(triton and (same_bytes or not ({' or '.join(left_out)}))) or test_decode_plan or answers or reuse or together or on_the_way"
    if cases == "most":
        chosen = f"({chosen}) and not ({' or '.join(f'({case})' for case in SECOND_PROOFS)})"
    passed = passed_of(chosen, [HERE / f for f in FILES])
    # A filter that matches nothing would pass too.
    for word, least in (
        ("attend", 14),
        ("consolidation", 8),
        ("write", 3),
        ("observe", 1),
        ("same_bytes", 3),
        ("of_it_alone", 1),
        ("several", 2),
        ("interpreted_kernels_keep", 2),
        ("plans", 8),
        ("answers", 3),
        ("together", 3),
        ("on_the_way", 2),
        ("capped", 4),
    ):
        assert sum(word in line for line in passed) >= least, (word, passed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_engine_whose_keys_are_measured():
    assert len(passed_of("triton_and_of", [HERE.parent / "engine/test_key_rounding.py"])) == 1


def passed_of(chosen: str, files: list[Path]) -> list[str]:
    """What the interpreter's process says of tests that passed. Raises AssertionError where one fails or is skipped."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-k", chosen]
    env = os.environ | {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *files], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "SKIPPED" not in done.stdout
    return [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
