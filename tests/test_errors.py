import pytest
import torch

from ftexp import errors


@pytest.mark.parametrize(
    ("error", "code", "standard"),
    [
        (errors.ConfigError, 2, ValueError),
        (errors.DataError, 3, ValueError),
        (errors.MachineError, 4, RuntimeError),
        (errors.Diverged, 5, ArithmeticError),
        (errors.TrialsFailed, 5, RuntimeError),
    ],
)
def test_error_has_exit_code_and_standard_base(error, code, standard):
    assert error.exit_code == code
    assert issubclass(error, errors.FtexpError)
    assert issubclass(error, standard)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory of the past"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_other_errors(error, told):
    assert errors.out_of_memory(error) is told


def test_memory_of_the_host_that_pytorch_cannot_get_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)  # a thousand million GiB
    assert errors.out_of_memory(caught.value), caught.value
