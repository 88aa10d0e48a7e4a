import pytest

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
